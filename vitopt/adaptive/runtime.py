"""One function prepares what can be called, adaptive or not."""

import torch

from vitopt.adaptive.calibrated import FIRST_FOLDER, load_calibrated, require_same
from vitopt.adaptive.passes import prepare_passes
from vitopt.adaptive.router import Router
from vitopt.engines import runtime
from vitopt.engines.runtime import Prepared
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.recipe import HeldSpec, RunSpec

AnyPrepared = Prepared | Router


def prepare(
    checkpoint: Checkpoint,
    *,
    name: str,
    device: torch.device,
    run: RunSpec | None = None,
    asked: HeldSpec | None = None,
    strict: bool = False,
) -> AnyPrepared:
    """Make a checkpoint ready to be called, see `vitopt.engines.runtime.prepare`; both of its passes if it is adaptive.

    Raises:
        CheckpointError: its threshold was chosen for another checkpoint.
        UnsupportedError: as there.
    """
    calibrated = load_calibrated(checkpoint)
    if calibrated is None:
        return runtime.prepare(checkpoint, name=name, device=device, run=run, asked=asked, strict=strict)
    require_same(checkpoint, calibrated.second_fingerprint, "second")
    first = checkpoint
    if calibrated.own_first:
        first = open_checkpoint(f"{checkpoint.folder}/{FIRST_FOLDER}")
        require_same(first, calibrated.first_fingerprint, "first")
    run = run or RunSpec()
    of_first, watched = calibrated.run_of_first(run), calibrated.rule.proxy == "class_token"
    passes = prepare_passes(
        first,
        checkpoint,
        name=name,
        device=device,
        run_first=of_first,
        run=run,
        watched=watched,
        asked=asked,
        strict=strict,
    )
    return Router(name, passes, calibrated)
