"""How much the logits depend on what each layer gives for each token.

The squared gradient of a random projection of the logits has the Fisher information as its mean: to second order, the
KL divergence that a change of an output causes. Rounding weighted by it: GuidedQuant, arXiv 2505.07004.
"""

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import nn

from vitopt import progress
from vitopt.models.forward import logits
from vitopt.models.names import Layer

_AT_ONCE = 4  # images whose activations in all blocks are in memory
_SEED = 0


def token_importance(
    model: nn.Module, layers: Iterable[Layer], pixels: Iterable[torch.Tensor], total: int | None = None
) -> dict[str, list[torch.Tensor]]:
    """Logical name of each layer -> for each batch of `pixels` a number for each token: (tokens of all images,).

    `pixels`: (images, 3, height, width) each. No labels are used; weights get no gradients.
    """
    generator = torch.Generator().manual_seed(_SEED)
    found: dict[str, list[torch.Tensor]] = {layer.logical: [] for layer in layers}
    parts: dict[str, list[torch.Tensor]] = {}
    model.requires_grad_(False)
    with ExitStack() as hooks, torch.enable_grad():
        for layer in layers:

            def look(module: nn.Module, into: object, out: tuple[torch.Tensor], name: str = layer.logical) -> None:
                parts[name].append(out[0].float().square().sum(-1).flatten())

            hooks.callback(model.get_submodule(layer.module).register_full_backward_hook(look).remove)
        for batch in progress.track(pixels, "weighing tokens", total):
            parts.update({name: [] for name in found})
            for images in batch.split(_AT_ONCE):
                given = logits(model, images.clone().requires_grad_())
                shares = given.detach().float().softmax(-1)
                noise = torch.randn(shares.shape, generator=generator).to(shares.device) * shares.sqrt()
                (given * (noise - shares * noise.sum(-1, keepdim=True))).sum().backward()
            for name, part in parts.items():
                found[name].append(torch.cat(part))
    return found
