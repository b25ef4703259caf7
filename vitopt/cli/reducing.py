"""A schedule of token merging for a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from vitopt import storage
from vitopt.cli.common import CheckpointArgument, DeviceOption, JsonOption, start
from vitopt.cli.options import Fields, from_fields
from vitopt.cli.printing import out, print_json, say
from vitopt.errors import StorageError
from vitopt.recipe import DataSpec


@from_fields()
def tokens(
    *,
    checkpoint: CheckpointArgument,
    data: Annotated[
        DataSpec,
        Fields(
            ("source", "root", "labels", "limit", "group_column"),
            named={"source": "data", "root": "data_root"},
            help={"source": "calibration images: the train split, or DATA:SPLIT; never your test images"},
        ),
    ],
    target_flops: Annotated[
        float, typer.Option(min=0.05, max=0.99, help="Share of the FLOPs that may be left, as in 0.6.")
    ],
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Most blocks that merge; fewer, larger steps take less time.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New JSON file for the result.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 32,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find which blocks should merge how many tokens: the lowest KL for a share of the FLOPs."""
    if output is not None and output.exists():
        raise StorageError(f"{output} exists already: choose another --output")
    start(as_json)
    from vitopt.data.images import open_images
    from vitopt.models.checkpoint import open_checkpoint
    from vitopt.search.fewer_tokens import find_schedule

    result = find_schedule(
        open_checkpoint(checkpoint),
        open_images(data, "train"),
        target_flops,
        steps=max_steps,
        device=device,
        batch_size=batch_size,
    )
    if output is not None:
        storage.write_json(output, result.to_json())
    if as_json:
        print_json(result.to_json())
        return
    for one in result.confirmed:
        low, high = one.kl_ci95 or (None, None)
        interval = "" if low is None else f" ({low:.4f} to {high:.4f})"
        say(
            f"{one.kind}: {one.flops_share:.3f} of the FLOPs, KL {one.kl:.4f}{interval} and agreement "
            f"{one.agreement_percent:.1f} % on {result.confirming_images:,} other images: {one.schedule}"
        )
    out.print(f"--merge-tokens {result.chosen}", soft_wrap=True)
