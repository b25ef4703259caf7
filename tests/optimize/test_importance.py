"""The importance of tokens against the Fisher information, computed whole."""

from pathlib import Path

import torch

from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.models.names import linear_layers
from vitopt.optimize.importance import token_importance


def test_its_mean_over_projections_is_the_trace_of_the_fisher_information(tiny_checkpoint: Path) -> None:
    model = load_model(open_checkpoint(str(tiny_checkpoint)))
    layers = [layer for layer in linear_layers(model, "vit") if layer.logical in ("block.2.value", "block.2.fc2")]
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    copies = 400  # each copy is projected anew
    found = token_importance(model, layers, [image.expand(copies, -1, -1, -1)])
    for layer in layers:
        outputs: list[torch.Tensor] = []
        handle = model.get_submodule(layer.module).register_forward_hook(
            lambda *called, outputs=outputs: outputs.append(called[2])
        )
        given = image.clone().requires_grad_()
        log_shares = model(pixel_values=given).logits[0].log_softmax(-1)
        handle.remove()
        expected = torch.zeros(outputs[0].shape[1])
        for log_share in log_shares:
            (gradient,) = torch.autograd.grad(log_share, outputs[0], retain_graph=True)
            expected += log_share.exp().detach() * gradient[0].square().sum(-1)
        (numbers,) = found[layer.logical]
        mean = numbers.view(copies, -1).mean(0)
        torch.testing.assert_close(mean, expected, rtol=0.25, atol=1e-6 + 0.02 * float(expected.max()))
    # After the last block only the class token is read.
    last = found["block.2.fc2"][0].view(copies, -1)
    assert (last[:, 0] > 0).all() and not last[:, 1:].any()
