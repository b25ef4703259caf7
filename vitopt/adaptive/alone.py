"""A process that does nothing but load one adaptive checkpoint and call both passes, see `vitopt.optimize.alone`."""

import sys

import torch

from vitopt.adaptive.router import Router
from vitopt.adaptive.runtime import prepare
from vitopt.environment import libraries
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize.alone import print_peak
from vitopt.recipe import RunSpec


def main(source: str, run: str, batch_size: str) -> None:
    """Load, let all images through both passes once, print `{"peak_bytes": …}`."""
    libraries.quiet_libraries()
    checkpoint, device = open_checkpoint(source), torch.device("cpu")
    runnable = prepare(checkpoint, name=source, device=device, run=RunSpec.model_validate_json(run))
    assert isinstance(runnable, Router)
    print_peak(runnable.both_passes, int(batch_size), runnable.input_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
