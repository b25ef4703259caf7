"""Fine-tuning of one checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from vitopt.cli.common import CheckpointArgument, DeviceOption, JsonOption, LogToOption, add_card, start
from vitopt.cli.options import Fields, from_fields, refuse
from vitopt.cli.printing import print_json, say
from vitopt.recipe import DataSpec, FinetuneSpec


def _refuse_without_effect(context: typer.Context) -> None:
    if (method := context.params["method"]) != "lora":
        because = f"--method {method} trains every weight and has no LoRA updates"
        refuse(context, "rank", "alpha", "dropout", *(["target"] if method == "full" else []), because=because)


@from_fields(_refuse_without_effect)
def finetune(
    *,
    checkpoint: CheckpointArgument,
    data: Annotated[
        DataSpec, Fields(("source", "root", "labels", "group_column"), named={"source": "data", "root": "data_root"})
    ],
    output: Annotated[Path, typer.Option(help="Folder for the merged checkpoint.")],
    finetune: Annotated[FinetuneSpec, Fields(named={"targets": "target", "teacher": "distill_from"})],
    seed: Annotated[int, typer.Option(help="Seed of the order of images, of augmentation and of LoRA's start.")] = 0,
    log_to: LogToOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a checkpoint on labelled images and merge the result."""
    start(as_json)
    from vitopt.data.images import open_images
    from vitopt.data.sources import parse_source
    from vitopt.errors import DataError
    from vitopt.models.checkpoint import open_checkpoint
    from vitopt.tracking import Tracking
    from vitopt.training.finetune import finetune as train

    place = output.resolve()
    tracking = Tracking(tuple(log_to or ()), place.name, place.parent / f"{place.name}.log")
    opened = open_checkpoint(checkpoint)
    training = open_images(data, "train")
    try:
        named = parse_source(data.source)[1] is not None
        test = None if named else open_images(data, "test" if training.split == "train" else None)
    except DataError:
        test = None  # only a training split is fine: there is nothing to report on
    report = train(opened, finetune, output, device, images=training, test=test, seed=seed, tracking=tracking)
    add_card(output)
    if as_json:
        print_json(vars(report) | {"checkpoint": str(output)})
        return
    share = 100 * report.trainable_parameters / report.parameters
    say(
        f"{report.images} images, {report.classes} classes, {report.epochs:g} epochs, {report.steps} steps in "
        f"{report.seconds:.0f} s; {report.trainable_parameters:,} parameters trained ({share:.1f} %)"
    )
    if report.test_top1_percent is not None and test is not None:
        say(f"top-1 on {len(test)} images of the {test.split} split: {report.test_top1_percent:.1f} %")
    say(f"checkpoint: {output}")
