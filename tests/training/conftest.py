"""A training that is stopped and goes on, whatever it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vitopt.data.images import ImageSet
from vitopt.models.checkpoint import Checkpoint
from vitopt.recipe import FinetuneSpec
from vitopt.training import finetune as training


@pytest.fixture
def resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Checkpoint, FinetuneSpec, ImageSet], None]:
    """Interrupts a training of two epochs of two steps in its third step, and compares what it resumes to."""

    def check(checkpoint: Checkpoint, spec: FinetuneSpec, images: ImageSet) -> None:
        training.finetune(checkpoint, spec, tmp_path / "whole", "cpu", images=images)
        advance = training.Advance.on_step_end

        def interrupting(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
            advance(self, args, state, control, **rest)
            if state.global_step == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(training.Advance, "on_step_end", interrupting)
            with pytest.raises(KeyboardInterrupt):
                training.finetune(checkpoint, spec, tmp_path / "out", "cpu", images=images)
        resumed = training.finetune(checkpoint, spec, tmp_path / "out", "cpu", images=images)
        assert resumed.resumed_from_step == 2
        whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
        for name, tensor in whole.items():
            torch.testing.assert_close(again[name], tensor)

    return check
