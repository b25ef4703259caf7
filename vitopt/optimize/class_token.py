"""How far a model's class token moves from block to block: a cheap sign of how hard an image is.

One more output after the logits, so that it is compiled and captured with the model and costs no second call.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_TOKENS = ("cls_token", "class_embedding")


def has(model: nn.Module) -> bool:
    """Whether the first token of every block is one of the class."""
    return any(name.rpartition(".")[2] in _TOKENS for name, _ in model.named_parameters())


def watch(model: nn.Module, blocks: Sequence[str]) -> None:
    """Let `model` return, behind its logits, the mean relative step of the class token: (batch, classes + 1), float32.

    The step of a block is |after - before| / |before|, of every block but the first, which comes from the same token
    for all images.
    """
    watched = [model.get_submodule(name) for name in blocks]
    for block in watched:
        block.register_forward_hook(_keep)

    def append(_: nn.Module, __: Any, outputs: Any) -> Any:
        tokens = [block.__dict__.pop("class_token") for block in watched]
        outputs.logits = torch.cat([outputs.logits.float(), relative_steps(tokens)[:, None]], dim=1)
        return outputs

    model.register_forward_hook(append)


def _keep(block: nn.Module, _: Any, outputs: Any) -> None:
    # The same code for all blocks, as one that is compiled serves all of them. An unfinished sum is a pair.
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    block.__dict__["class_token"] = sum(part[:, 0] for part in parts)


def relative_steps(tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """`tokens`: of each block (batch, width). Returns (batch,), float32."""
    steps = [
        (after.float() - before.float()).norm(dim=1) / before.float().norm(dim=1)
        for before, after in itertools.pairwise(tokens)
    ]
    return torch.stack(steps).mean(dim=0)
