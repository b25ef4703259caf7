"""How far the class token moves, against the hidden states that transformers gives."""

from pathlib import Path

import pytest
import torch

from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.models.names import block_names
from vitopt.optimize import class_token
from vitopt.optimize.runtime import prepare
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")
REWRITTEN = RunSpec(class_token_last=True, carry_residual=True, fuse_qkv=True)


def expected(checkpoint: Path, pixels: torch.Tensor) -> torch.Tensor:
    """(batch, classes + 1)."""
    model = load_model(open_checkpoint(str(checkpoint)))
    with torch.inference_mode():
        outputs = model(pixel_values=pixels, output_hidden_states=True)
    before, after = (state[:, 0].double() for state in outputs.hidden_states[-2:])
    step = (after - before).norm(dim=1) / after.norm(dim=1)
    return torch.cat([outputs.logits, step[:, None].float()], dim=1)


@pytest.mark.parametrize("run", [RunSpec(), REWRITTEN, RunSpec(compile=True)], ids=["plain", "rewritten", "compiled"])
def test_steps_follow_the_logits(tiny_checkpoint: Path, run: RunSpec) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0))
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    runnable = prepare(checkpoint, name="tiny", device=CPU, run=run, watch_class_token=True)
    assert torch.allclose(runnable(pixels), expected(tiny_checkpoint, pixels), atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(runnable(2 * pixels), expected(tiny_checkpoint, 2 * pixels), atol=1e-4)
    assert runnable.reasons == {}


def test_blocks_that_hand_on_more_than_tokens_are_watched_too(tiny_checkpoint: Path) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0))
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    run = RunSpec(merge_tokens="2", carry_residual=True)
    watched, plain = (
        prepare(checkpoint, name="tiny", device=CPU, run=run, watch_class_token=wanted)(pixels)
        for wanted in (True, False)
    )
    assert torch.equal(watched[:, :-1], plain) and bool((watched[:, -1] > 0).all())


def test_families_with_a_class_token_are_known(make_family) -> None:
    models = {name: load_model(make_family(name)) for name in ("vit", "clip", "swin")}
    found = {name: class_token.moves(model, block_names(model, name)) for name, model in models.items()}
    assert found == {"vit": True, "clip": True, "swin": False}
    assert not class_token.moves(models["vit"], block_names(models["vit"], "vit")[:1])
