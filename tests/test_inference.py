"""Which checkpoints are made to be measured together."""

from pathlib import Path

import pytest

from vitopt import inference
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe import VariantSpec


def test_variants_share_a_checkpoint_unless_an_engine_compiles_their_options_in(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        inference, "make", lambda checkpoint, variant, output, *_, **__: asked.append(variant.name) or output.mkdir()
    )
    variants = [
        VariantSpec(name="torch", format="fp32"),
        VariantSpec(name="fused", format="fp32", fuse_qkv=True),
        VariantSpec(name="file", format="fp32", engine="aoti"),
        VariantSpec(name="file-fused", format="fp32", engine="aoti", fuse_qkv=True),
        VariantSpec(name="file-again", format="fp32", engine="aoti"),
    ]
    made = list(inference.made(open_checkpoint(str(tiny_checkpoint)), variants, tmp_path, "cpu"))
    assert asked == ["torch", "file", "file-fused"]
    assert made[0].source == made[1].source and made[2].source == made[4].source != made[3].source
