"""A schedule of token merging for a checkpoint."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitopt import storage
from vitopt.cli.common import CheckpointArgument, DeviceOption, JsonOption, start
from vitopt.cli.options import Fields, from_fields
from vitopt.cli.printing import out, print_json, say
from vitopt.recipe import DataSpec

if TYPE_CHECKING:
    from vitopt.search.fewer_tokens import Confirmed, TokenSearch


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
    start(as_json)
    from vitopt.data.images import open_images
    from vitopt.models.checkpoint import open_checkpoint
    from vitopt.search.fewer_tokens import find_schedule

    with storage.new_file(output) if output else nullcontext():
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
        say(
            f"{one.kind}: {one.flops_share:.3f} of the FLOPs, KL {one.kl:.4f}{_limits(one.kl_ci95)} and agreement "
            f"{one.agreement_percent:.1f} % on {result.confirming_images:,} other images: {one.schedule}"
        )
    for one in result.confirmed[1:]:
        say(_against_searched(one, result))
    out.print(f"--merge-tokens {result.chosen}", soft_wrap=True)


def _limits(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({_nats(interval[0])} to {_nats(interval[1])})"


def _nats(value: float) -> str:
    return f"{round(value, 4) + 0.0:.4f}"  # never -0.0000


def _against_searched(one: "Confirmed", result: "TokenSearch") -> str:
    """Whether the searched schedule is better than a simple one, in words."""
    if one.schedule == result.chosen:
        return f"the searched schedule is the {one.kind} one"
    interval, verdict = one.kl_above_searched_ci95, "neither is shown to be better"
    if interval is None:
        verdict = "too few images to tell which is better"
    elif interval[0] > 0 or interval[1] < 0:
        verdict = f"{'searched' if interval[0] > 0 else one.kind} is better"
    difference = f"{_nats(one.kl_above_searched or 0.0)}{_limits(interval)}"
    return f"KL of {one.kind} minus KL of searched, image by image: {difference}: {verdict}"
