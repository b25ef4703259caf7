"""One checkpoint in another format, and the layers that should keep theirs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitopt import progress, storage
from vitopt.cli.common import CheckpointArgument, DeviceOption, JsonOption, ThreadsOption, add_card, start
from vitopt.cli.options import Fields, calibration_fields, from_fields, refuse
from vitopt.cli.printing import out, print_json, print_sensitivity, print_table, say
from vitopt.errors import RecipeError
from vitopt.formats import QUANTIZED_FORMATS, Format, HalfFormat
from vitopt.recipe import (
    AUTO,
    ENGINES,
    SKIP_GOALS,
    AutoSkipSpec,
    CalibrationSpec,
    DataSpec,
    EvaluateSpec,
    FastestSpec,
    RoundingSpec,
    RunSpec,
    VariantSpec,
    computes_itself,
)
from vitopt.recipe_file import validate

if TYPE_CHECKING:
    from vitopt.data.images import ImageSet
    from vitopt.models.checkpoint import Checkpoint

SEARCHED = (*SKIP_GOALS, "objective", "granularity", "images", "sample")


def _search_fields(*more: str) -> Fields:
    """Options of the search for a skip list."""
    return Fields(
        SEARCHED + more,
        named={"images": "limit"},
        help={"images": "most images to use, spread over the classes; with a goal one in four is used to choose"},
        unset=("max_top1_drop",),
    )


SCALES_IMAGES = 300  # of --data, that fix an engine's static scales
ENGINE_FIELDS = Fields(
    ("engine", "static_scales"), help={"static_scales": "with --engine: images of --data fix the scales of activations"}
)
HALF: HalfFormat = VariantSpec.model_fields["half"].default
HalfOption = Annotated[HalfFormat, typer.Option(help="16-bit type of the layers that are not quantized.")]


def _with_its_goal(auto: AutoSkipSpec) -> AutoSkipSpec:
    """Without the floor of top-1 that a recipe has by default, where another goal is given alone."""
    alone = set(SKIP_GOALS) & auto.model_fields_set and "max_top1_drop" not in auto.model_fields_set
    return auto.model_copy(update={"max_top1_drop": None}) if alone else auto


def _scales(data: DataSpec, run: RunSpec) -> "ImageSet | None":
    """The images that fix the static scales of an engine, None without them."""
    from vitopt.data.images import open_images

    if not run.static_scales:
        return None
    limit = min(data.limit or SCALES_IMAGES, SCALES_IMAGES)
    return open_images(data.model_copy(update={"limit": limit}), CalibrationSpec().split)


def _refuse_useless_scales(context: typer.Context) -> None:
    if not computes_itself(engine := context.params["engine"]):
        because = "--engine is not given" if engine == "torch" else f"{engine} compiles its model"
        refuse(context, "static_scales", because=f"torch takes it when the checkpoint is run, and {because}")


def _refuse_without_effect(context: typer.Context) -> None:
    _refuse_useless_scales(context)
    asked = context.params
    automatic = asked["skip"] == [AUTO]
    if asked["rounding"] == "nearest":
        because = "only --rounding gptq looks at calibration images"
        refuse(context, "calibrate", *_ROUNDED.named.values(), *_ROUNDED.paths[2:], because=because)
    if not automatic:
        because = "only --skip auto searches for a skip list"
        searching = (*SKIP_GOALS, "objective", "granularity", "sample", "sensitivity")
        refuse(context, *searching, because=because)
    if asked["format"] == "auto":
        if asked["engine"] in ENGINES:
            refuse(context, "compile", because=f"{asked['engine']} compiles in its own way")
        return
    refuse(context, "min_agreement", "compile", because="only --format auto compares formats")
    if not automatic and not asked["static_scales"]:
        because = "only --skip auto, --format auto and --static-scales look at images"
        refuse(context, "data", "data_root", "limit", "group_column", "skip_bad_images", because=because)
    if asked["format"] not in QUANTIZED_FORMATS:
        because = f"format {asked['format']} quantizes nothing, so every layer is {asked['format']}"
        refuse(context, "half", because=because)


_ROUNDED = Fields(
    ("images", "batch_size", "crops", "search_scales", "damping", "tuning_steps", "learning_rate"),
    named={"images": "calibration_images", "batch_size": "tuning_batch_size"},
)


@from_fields(_refuse_without_effect)
def quantize(
    *,
    checkpoint: CheckpointArgument,
    format: Annotated[
        Literal["auto", Format],
        typer.Option(help="Format of the linear layers; auto measures which is fastest here and agrees with fp32."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the quantized checkpoint.")],
    skip: Annotated[
        list[str] | None, typer.Option(help="Layers that stay in 16 bit, repeatable: block.21, block.*.fc2, or auto.")
    ] = None,
    data: Annotated[
        DataSpec | None,
        calibration_fields("images for --skip auto and --format auto: the train split, never your test images"),
    ],
    fastest: Annotated[
        FastestSpec,
        Fields(
            ("min_agreement", "compile"),
            help={
                "min_agreement": "with --format auto: agreement with fp32 in percent of images, at least",
                "compile": "with --format auto: try compiled models too",
            },
        ),
    ],
    auto: Annotated[AutoSkipSpec, _search_fields("sensitivity")],
    rounding: Annotated[
        Literal["nearest", "gptq"],
        typer.Option(help="How weights are rounded: one by one, or by what their layers give on calibration images."),
    ] = "nearest",
    calibrate: Annotated[
        DataSpec | None,
        Fields(
            ("source",),
            named={"source": "calibrate"},
            help={"source": "images for --rounding gptq: the train split, never your test images; labels are not used"},
        ),
    ],
    rounded: Annotated[RoundingSpec, _ROUNDED],
    run: Annotated[RunSpec, ENGINE_FIELDS],
    half: HalfOption = HALF,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another format; it opens with plain transformers."""
    calibration = data and data.model_copy(update={"limit": auto.images})
    if format == "auto":
        if calibration is None:
            raise RecipeError("--format auto needs --data: images on which the formats are compared with fp32")
        if skip:
            raise RecipeError("--format auto compares whole formats: choose one, then --skip keeps layers in 16 bit")
        if rounding != "nearest":
            raise RecipeError("--format auto compares formats as they round: choose one, then add --rounding gptq")
        start(as_json, threads)
        _quantize_to_fastest(checkpoint, calibration, output, fastest, half, run, device, as_json)
        return
    content: dict[str, Any] = {"name": "variant", "format": format, "skip": skip or [], "half": half}
    content |= {"engine": run.engine, "static_scales": run.static_scales}
    if skip == [AUTO]:
        content["auto"] = _with_its_goal(auto)
    if rounding == "gptq":
        content["rounding"] = rounded
    variant = validate(VariantSpec, content, where="quantize")
    if variant.skips_automatically and calibration is None:
        raise RecipeError("--skip auto needs --data: calibration images on which the skip list is chosen")
    if variant.rounding is not None and calibrate is None:
        raise RecipeError("--rounding gptq needs --calibrate: images on which weights are rounded")
    if run.static_scales and calibration is None:
        raise RecipeError(
            "--static-scales needs --data: calibration images that fix the scales, never your tested ones"
        )
    start(as_json, threads)
    from vitopt.data.images import open_images
    from vitopt.engines.runtime import make
    from vitopt.models.checkpoint import disk_bytes, open_checkpoint
    from vitopt.report.table import human_bytes

    opened = open_checkpoint(checkpoint)
    images = scales = seen = None
    with storage.reserved(output, opened.folder, *(data.folder for data in (calibration, calibrate) if data)):
        if calibration is not None:
            scales = _scales(calibration, run)
        if calibrate is not None and variant.rounding is not None:
            seen = open_images(calibrate.model_copy(update={"limit": variant.rounding.images}), variant.rounding.split)
        if calibration is not None and variant.skips_automatically:
            images = open_images(calibration, "train")
            variant = _choose_skip_list(opened, variant, images, scales, calibration, output, device)
        with progress.task(f"quantizing to {format}", None):
            plan = make(opened, variant, output, device, images=images, scales=scales, calibration=seen)
        add_card(output)
    size = disk_bytes(output)
    if as_json:
        print_json({"checkpoint": str(output), "skip": variant.skip, "layer_plan": plan.counts(), "disk_bytes": size})
        return
    before = f", was {human_bytes(disk_bytes(opened.folder))}" if opened.folder else ""
    say(f"{', '.join(f'{count} layers {name}' for name, count in plan.counts().items())}")
    for reason, count in plan.misfits().items():
        say(f"{count} layers stay in {half}: {reason}")
    say(f"{human_bytes(size)} on disk{before}")
    say(f"checkpoint: {output}")


def _quantize_to_fastest(
    checkpoint: str,
    data: DataSpec,
    output: Path,
    spec: FastestSpec,
    half: HalfFormat,
    run: RunSpec,
    device: str,
    as_json: bool,
) -> None:
    from vitopt.data.images import open_images
    from vitopt.engines.runtime import make
    from vitopt.models.checkpoint import disk_bytes, open_checkpoint
    from vitopt.search.fastest import find_fastest

    opened = open_checkpoint(checkpoint)
    with storage.reserved(output, opened.folder, data.folder):  # now, not after minutes of measuring
        images = open_images(data, "train")
        engine: dict[str, Any] = {"engine": run.engine, "scales": (scales := _scales(data, run))}
        choice = find_fastest(
            opened, images, spec, EvaluateSpec(), half=half, **engine, device=device, skip_bad=data.skip_bad_images
        )
        if choice is None:
            return  # not the main process
        plan = make(opened, choice.variant, output, device, images=images, purpose="format", scales=scales)
        add_card(output)
    if as_json:
        result: dict[str, Any] = {"checkpoint": str(output), "chosen": choice.variant.name}
        result |= {"run": choice.variant.run.model_dump(mode="json"), "layer_plan": plan.counts()}
        result |= {"why": choice.sentence(), "undecided": choice.undecided()}
        result |= {"disk_bytes": disk_bytes(output), "records": [record.to_json() for record in choice.records]}
        print_json(result)
        return
    print_table(choice.records)
    for line in (choice.sentence(), *choice.undecided()):
        say(line)
    how = "--compile --fuse-qkv" if choice.variant.compile else ""
    how = f"--engine {choice.variant.engine}" if choice.variant.engine in ENGINES else how
    say(f"checkpoint: {output}" + (f"; run it with {how}" if how else ""))


def _choose_skip_list(
    checkpoint: "Checkpoint",
    variant: VariantSpec,
    images: "ImageSet",
    scales: "ImageSet | None",
    data: DataSpec,
    output: Path,
    device: str,
) -> VariantSpec:
    from vitopt.search.analysis import analyse_for

    place = output.resolve()
    folder = place.with_name(f"{place.name}.sensitivity")  # `vitopt report` shows it
    with storage.claimed(folder, checkpoint.folder, data.folder):
        file, bad = folder / "sensitivity.json", data.skip_bad_images
        search = analyse_for(checkpoint, images, variant, file, device, scales=scales, skip_bad=bad).search
    assert search is not None
    say(f"keeps {', '.join(search.chosen) or 'nothing'} in 16 bit, chosen on {search.choosing_images:,} images")
    say(search.advice or f"shown on {search.confirming_images:,} other images (95 %): {search.goal}")
    return variant.skipping(search.chosen)


def _refuse_useless_scores(context: typer.Context) -> None:
    _refuse_useless_scales(context)
    asked = context.params
    if computes_itself(asked["engine"]):
        refuse(context, "batch_size", because=f"{asked['engine']} answers the images one by one")
    if asked["sample"] is None:
        refuse(context, "candidates", because="without --sample every unit is scored exactly")
    if all(asked[goal] is None for goal in SKIP_GOALS):
        because = "a skip list is searched only with --max-top1-drop, --max-kl-share or --max-kl"
        refuse(context, "objective", because=because)


@from_fields(_refuse_useless_scores)
def sensitivity(
    *,
    checkpoint: CheckpointArgument,
    data: Annotated[DataSpec, calibration_fields()],
    format: Annotated[Format, typer.Option(help="Format whose damage is measured.")],
    output: Annotated[Path, typer.Option(help="Folder for sensitivity.json.")],
    half: HalfOption = HALF,
    auto: Annotated[AutoSkipSpec, _search_fields()],
    run: Annotated[RunSpec, ENGINE_FIELDS],
    candidates: Annotated[int, typer.Option(min=1, help="Units to score exactly after --sample.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 32,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score every block or linear layer: what quantizing it breaks, what keeping it brings back and costs."""
    source = data.model_copy(update={"limit": auto.images})
    wanted = set(SKIP_GOALS) & auto.model_fields_set
    auto = _with_its_goal(auto)
    start(as_json)
    from vitopt.data.images import open_images
    from vitopt.models.checkpoint import open_checkpoint
    from vitopt.search.analysis import analyse
    from vitopt.search.goal import Goal

    files = ("sensitivity.json", "sensitivity.html")
    with storage.claimed(output, checkpoint, source.folder, files=files):
        result = analyse(
            open_checkpoint(checkpoint),
            open_images(source, "train"),
            format,
            output / "sensitivity.json",
            half=half,
            engine=run.engine,
            static_scales=run.static_scales,
            scales=_scales(source, run),
            granularity=auto.granularity,
            sample=auto.sample,
            candidates=candidates,
            goal=Goal.of(auto) if wanted else None,
            objective=auto.objective,
            device=device,
            batch_size=batch_size,
            skip_bad=data.skip_bad_images,
        )
    if as_json:
        print_json(result.to_json())
        return
    print_sensitivity(result)
    from vitopt.report.sensitivity import write_sensitivity_page

    out.print(f"\nresult: {output / 'sensitivity.json'}")
    out.print(f"page: {write_sensitivity_page(output / 'sensitivity.json')}")
