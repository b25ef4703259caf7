"""The command line: arguments become specs, errors become one clear line.

Nothing heavy is imported before a command needs it, so that help and refused recipes answer at once.
"""

import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer
from rich.table import Table
from rich.text import Text

from vitopt import __version__, progress, storage
from vitopt.errors import MeasurementError, RecipeError, StorageError, VitoptError
from vitopt.formats import QUANTIZED_FORMATS, Format, HalfFormat, RunAs
from vitopt.recipe import (
    AUTO,
    LINEARS,
    Attention,
    AutoSkipSpec,
    DataSpec,
    EvaluateSpec,
    FinetuneSpec,
    Labels,
    Recipe,
    RequireSpec,
    RunSpec,
    SdpaKernel,
    VariantSpec,
    dump_yaml,
    load_recipe,
    validate,
)
from vitopt.records import RECORD_FILE, Record
from vitopt.terminal import Console, NoteFormatter
from vitopt.threads import bind

if TYPE_CHECKING:
    from vitopt.data.images import ImageSet
    from vitopt.measure.evaluator import Measured
    from vitopt.measure.planning import Need
    from vitopt.models.checkpoint import Checkpoint
    from vitopt.optimize.plan import LayerPlan
    from vitopt.preview import Preview
    from vitopt.search.results import Sensitivity

LORA_KEYS = ("rank", "alpha", "dropout", "target")
SEARCH_OPTIONS = ("max_top1_drop", "max_kl_share", "objective", "granularity")

app = typer.Typer(
    name="vitopt",
    help="Make Vision Transformers small and fast, and prove what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

CommandFunction = TypeVar("CommandFunction", bound=Callable[..., None])

CheckpointArgument = Annotated[
    str, typer.Argument(help="Folder, hub id, [b]vit-quickstart[/b], or random:vit-large-patch16-224.")
]
DataOption = Annotated[str, typer.Option(help="Image folder, hub data set id, or digits; NAME:SPLIT names a split.")]
LabelsOption = Annotated[
    Labels, typer.Option(help="name, or index: labels are numbers that count the head's outputs from 0.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Only JSON on standard output, no bars.")]
AttentionOption = Annotated[Attention, typer.Option(help="Attention implementation.")]
KernelOption = Annotated[SdpaKernel, typer.Option(help="Kernel of sdpa; auto lets torch choose.")]
RunAsOption = Annotated[
    RunAs | None, typer.Option(help="Expand packed layers (nf4, int8) to this format at load; adds a row.")
]
FuseOption = Annotated[bool, typer.Option("--fuse-qkv", help="Query, key and value as one matrix product.")]
LayoutOption = Annotated[bool, typer.Option("--channels-last", help="Pixels and patch embedding in NHWC order.")]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile for each batch size; on a GPU, as one CUDA graph.")
]
AutotuneOption = Annotated[bool, typer.Option("--autotune", help="With --compile: time its kernels first.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse instead of falling back to SDPA.")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad-images", help="Leave out and count undecodable images.")]
LimitOption = Annotated[int | None, typer.Option(help="Use only so many images, spread over the classes.")]
GroupOption = Annotated[
    str | None,
    typer.Option(help="Column of metadata.csv whose groups of images depend on each other: frames of one video."),
]
CalibrationLimitOption = Annotated[
    int, typer.Option(help="At most so many images, spread over the classes; with a goal one in four chooses.")
]
CALIBRATION_IMAGES = AutoSkipSpec().images
MaxTop1DropOption = Annotated[float | None, typer.Option(help="Largest loss of top-1 in points.")]
MaxKlShareOption = Annotated[float | None, typer.Option(help="KL at most this share of the quantized model's.")]
ObjectiveOption = Annotated[Literal["size", "latency"], typer.Option(help="What a kept layer costs.")]
GranularityOption = Annotated[Literal["block", "linear"], typer.Option(help="Whole blocks or single linear layers.")]


def _limit(key: str) -> Any:
    return typer.Option(help=f"Required: {RequireSpec.model_fields[key].description}.")


RequireTop1Option = Annotated[float | None, _limit("max_top1_drop")]
RequireAgreementOption = Annotated[float | None, _limit("min_agreement")]
RequireKlOption = Annotated[float | None, _limit("max_kl")]
RequireSpeedupOption = Annotated[float | None, _limit("min_speedup")]
RequireP99Option = Annotated[float | None, _limit("max_p99_ms")]
RequireMegabytesOption = Annotated[float | None, _limit("max_megabytes")]
RequireBatchOption = Annotated[int | None, typer.Option(help="Batch size of the limits on speed; the first without.")]
IterationsOption = Annotated[int, typer.Option(help="Timed calls per checkpoint and batch size.")]
RoundsOption = Annotated[int, typer.Option(help="Interleaved rounds that share the iterations.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Compute on the CPU with so many threads, each bound to its own core.")
]


def main() -> None:
    """Entry point of the console script."""
    # A terminated run cleans up after itself exactly like an interrupted one.
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _clear_errors(command: CommandFunction) -> CommandFunction:
    """Print a VitoptError as one line and exit with 1; Ctrl-C exits with 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except VitoptError as error:
            err.print("error:", style="bold red", end=" ")
            err.print(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err.print("interrupted: finished stages are kept; the same command goes on from there")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of our output has gone; there is nobody to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return wrapped  # type: ignore[return-value]


def _start(as_json: bool, threads: int | None = None) -> None:
    """Set up what every working command needs: bound threads, quiet libraries, notices, bars for a person at a
    terminal."""
    if threads is not None:
        bind(threads)  # before anything imports torch
    from vitopt import environment

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    logging.root.handlers[0].setFormatter(NoteFormatter("note: %(message)s"))
    environment.quiet_libraries()
    progress.enable(not as_json and sys.stderr.isatty() and environment.is_main_process())


def _say(line: str) -> None:
    from vitopt import environment

    if environment.is_main_process():
        err.print(line)


def _print_json(value: Any) -> None:
    from vitopt import environment

    if environment.is_main_process():
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()  # here, where a reader that has gone away is expected


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make Vision Transformers small and fast, and prove what that cost."""


@app.command()
@_clear_errors
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME without it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as in finetune.epochs=1.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved recipe, the layer plans, what its claims need and about how long it takes.",
        ),
    ] = False,
    strict: StrictOption = False,
    skip_bad_images: SkipBadOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Carry out a recipe: fine-tune, quantize, measure, report, export."""
    overrides = [*(set_ or []), *(["strict=true"] if strict else [])]
    overrides += ["data.skip_bad_images=true"] if skip_bad_images else []
    resolved = load_recipe(recipe, overrides)
    _start(as_json, threads)
    if dry_run:
        from vitopt.checks import plans
        from vitopt.preview import preview

        _print_dry_run(resolved, plans(resolved), preview(resolved), as_json)
        return
    from vitopt import pipeline

    result = pipeline.run(resolved, output or Path("runs") / resolved.name, _say)
    if as_json:
        _print_json([record.to_json() for record in result.records])
        return
    from vitopt import environment

    if environment.is_main_process():
        _print_table(result.records)
        if result.report is not None:
            out.print(f"\nreport: {result.report}")
        if result.export is not None:
            out.print(f"export: {result.export}")
        if result.export is not None and result.report is not None:
            from vitopt.report.card import loading_code

            chosen = next(record for record in result.records if record.variant.name == resolved.export)
            out.print("\nIt opens with plain transformers:\n")
            out.print(loading_code(chosen, str(result.export)))


@app.command()
@_clear_errors
def finetune(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Folder for the merged checkpoint.")],
    method: Annotated[str, typer.Option(help="lora or full.")] = "lora",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA updates.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA scale; updates count alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="Dropout before the LoRA updates.")] = 0.1,
    target: Annotated[
        list[str] | None,
        typer.Option(help=f"Layers to adapt, repeatable: {', '.join(LINEARS)}, block.11.fc1 ..."),
    ] = None,
    epochs: Annotated[float, typer.Option()] = 3,
    batch_size: Annotated[int, typer.Option(help="Images per device and step.")] = 16,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    augment: Annotated[bool, typer.Option(help="Random crops and mirror images.")] = True,
    flip: Annotated[bool, typer.Option(help="Mirror images; wrong for digits and text.")] = True,
    group_column: GroupOption = None,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    labels: LabelsOption = "name",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a checkpoint on labelled images and merge the result."""
    if method == "full":
        _refuse(context, *LORA_KEYS, because="--method full trains every weight and has no LoRA updates")
    spec = validate(
        FinetuneSpec,
        {
            "method": method,
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "targets": target or LINEARS,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "precision": precision,
            "augment": augment,
            "flip": flip,
            "workers": workers,
        },
        where="finetune",
    )
    _start(as_json)
    from vitopt.data.images import open_images
    from vitopt.data.sources import parse_source
    from vitopt.errors import DataError
    from vitopt.finetune.training import finetune as train
    from vitopt.models.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    source = DataSpec(source=data, labels=labels, group_column=group_column)
    training = open_images(source, "train")
    try:
        named = parse_source(data)[1] is not None
        test = None if named else open_images(source, "test" if training.split == "train" else None)
    except DataError:
        test = None  # only a training split is fine: there is nothing to report on
    report = train(opened, spec, output, device, images=training, test=test, seed=seed)
    if as_json:
        _print_json(vars(report) | {"checkpoint": str(output)})
        return
    share = 100 * report.trainable_parameters / report.parameters
    _say(
        f"{report.images} images, {report.classes} classes, {report.epochs:g} epochs, {report.steps} steps in "
        f"{report.seconds:.0f} s; {report.trainable_parameters:,} parameters trained ({share:.1f} %)"
    )
    if report.test_top1_percent is not None and test is not None:
        _say(f"top-1 on {len(test)} images of the {test.split} split: {report.test_top1_percent:.1f} %")
    _say(f"checkpoint: {output}")


@app.command()
@_clear_errors
def quantize(
    context: typer.Context,
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
        str | None,
        typer.Option(help="Images for --skip auto and --format auto: the train split, never your test images."),
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=100, help="With --format auto: agreement with fp32 in percent of images.")
    ] = 98,
    compile: Annotated[bool, typer.Option(help="With --format auto: try compiled models too.")] = True,
    max_top1_drop: MaxTop1DropOption = None,
    max_kl_share: MaxKlShareOption = None,
    objective: ObjectiveOption = "size",
    granularity: GranularityOption = "block",
    limit: CalibrationLimitOption = CALIBRATION_IMAGES,
    labels: LabelsOption = "name",
    group_column: GroupOption = None,
    skip_bad_images: SkipBadOption = False,
    half: Annotated[HalfFormat, typer.Option(help="16-bit type of the layers that are not quantized.")] = "bf16",
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another format; it opens with plain transformers."""
    automatic = skip == [AUTO]
    if not automatic:
        _refuse(context, *SEARCH_OPTIONS, because="only --skip auto searches for a skip list")
    if format != "auto":
        _refuse(context, "min_agreement", "compile", because="only --format auto compares formats")
        if not automatic:
            unused = "only --skip auto and --format auto look at images"
            _refuse(context, "data", "limit", "group_column", "skip_bad_images", because=unused)
        if format not in QUANTIZED_FORMATS:
            _refuse(context, "half", because=f"format {format} quantizes nothing, so every layer is {format}")
    images_from = {"source": data, "limit": limit, "labels": labels, "group_column": group_column}
    images_from["skip_bad_images"] = skip_bad_images
    calibration = None if data is None else validate(DataSpec, images_from, where="data")
    if format == "auto":
        if calibration is None:
            raise RecipeError("--format auto needs --data: images on which the formats are compared with fp32")
        if skip:
            raise RecipeError("--format auto compares whole formats: choose one, then --skip keeps layers in 16 bit")
        _start(as_json, threads)
        options = {"min_agreement_percent": min_agreement, "half": half, "compile": compile, "device": device}
        _quantize_to_fastest(checkpoint, calibration, output, options, as_json)
        return
    content: dict[str, Any] = {"name": "variant", "format": format, "skip": skip or [], "half": half}
    goal = {"max_top1_drop": max_top1_drop, "max_kl_share": max_kl_share}
    if goal == {"max_top1_drop": None, "max_kl_share": None}:
        goal = {}
    if automatic:
        content["auto"] = goal | {"objective": objective, "granularity": granularity}
    variant = validate(VariantSpec, content, where="quantize")
    if variant.skips_automatically and calibration is None:
        raise RecipeError("--skip auto needs --data: calibration images on which the skip list is chosen")
    _start(as_json, threads)
    from vitopt.data.images import open_images
    from vitopt.models.checkpoint import disk_bytes, open_checkpoint
    from vitopt.optimize.quantize import quantize as write
    from vitopt.report.table import human_bytes

    opened = open_checkpoint(checkpoint)
    images = None
    with storage.reserved(output, opened.folder, calibration.folder if calibration else None):
        if calibration is not None and variant.skips_automatically:
            images = open_images(calibration, "train")
            variant = _choose_skip_list(opened, variant, images, calibration, output, device)
        with progress.task(f"quantizing to {format}", None):
            plan = write(opened, variant, output, device, images=images)
    size = disk_bytes(output)
    if as_json:
        _print_json({"checkpoint": str(output), "skip": variant.skip, "layer_plan": plan.counts(), "disk_bytes": size})
        return
    before = f", was {human_bytes(disk_bytes(opened.folder))}" if opened.folder else ""
    _say(f"{', '.join(f'{count} layers {name}' for name, count in plan.counts().items())}")
    for reason, count in plan.misfits().items():
        _say(f"{count} layers stay in {half}: {reason}")
    _say(f"{human_bytes(size)} on disk{before}")
    _say(f"checkpoint: {output}")


def _quantize_to_fastest(checkpoint: str, data: DataSpec, output: Path, options: dict[str, Any], as_json: bool) -> None:
    from vitopt.data.images import open_images
    from vitopt.models.checkpoint import disk_bytes, open_checkpoint
    from vitopt.optimize.quantize import quantize as write
    from vitopt.search.fastest import find_fastest

    opened = open_checkpoint(checkpoint)
    with storage.reserved(output, opened.folder, data.folder):  # now, not after minutes of measuring
        images = open_images(data, "train")
        skip_bad = data.skip_bad_images
        choice = find_fastest(opened, images, EvaluateSpec(end_to_end=False), skip_bad=skip_bad, **options)
        plan = write(opened, choice.variant, output, options["device"], images=images, purpose="format")
    if as_json:
        found: dict[str, Any] = {"checkpoint": str(output), "chosen": choice.variant.name}
        found |= {"run": choice.variant.run.model_dump(mode="json"), "layer_plan": plan.counts()}
        found |= {"why": choice.sentence(), "undecided": choice.undecided()}
        found |= {"disk_bytes": disk_bytes(output), "records": [record.to_json() for record in choice.records]}
        _print_json(found)
        return
    _print_table(choice.records)
    for line in (choice.sentence(), *choice.undecided()):
        _say(line)
    _say(f"checkpoint: {output}" + ("; run it with --compile --fuse-qkv" if choice.variant.compile else ""))


def _choose_skip_list(
    checkpoint: "Checkpoint", variant: VariantSpec, images: "ImageSet", data: DataSpec, output: Path, device: str
) -> VariantSpec:
    from vitopt.search.analysis import analyse_for

    place = output.resolve()
    folder = place.with_name(f"{place.name}.sensitivity")  # `vitopt report` shows it
    with storage.claimed(folder, checkpoint.folder, data.folder):
        scores = folder / "sensitivity.json"
        found = analyse_for(checkpoint, images, variant, scores, device, skip_bad=data.skip_bad_images).search
    assert found is not None
    _say(f"keeps {', '.join(found.chosen) or 'nothing'} in 16 bit, chosen on {found.choosing_images:,} images")
    _say(found.advice or f"shown on {found.confirming_images:,} other images (95 %): {found.goal}")
    return variant.skipping(found.chosen)


@app.command()
@_clear_errors
def sensitivity(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    data: Annotated[
        str, typer.Option(help="Calibration images: the train split, or DATA:SPLIT; never your test images.")
    ],
    format: Annotated[Format, typer.Option(help="Format whose damage is measured.")],
    output: Annotated[Path, typer.Option(help="Folder for sensitivity.json.")],
    granularity: GranularityOption = "block",
    half: Annotated[HalfFormat, typer.Option(help="16-bit type of the layers that are kept.")] = "bf16",
    limit: CalibrationLimitOption = CALIBRATION_IMAGES,
    labels: LabelsOption = "name",
    group_column: GroupOption = None,
    skip_bad_images: SkipBadOption = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="First rank by KL on so many images, then score only the best exactly.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Units to score exactly after --sample.")] = 8,
    max_top1_drop: MaxTop1DropOption = None,
    max_kl_share: MaxKlShareOption = None,
    objective: ObjectiveOption = "size",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 32,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score every block or linear layer: what quantizing it breaks, what keeping it brings back and costs."""
    content = {"source": data, "limit": limit, "labels": labels, "group_column": group_column}
    content["skip_bad_images"] = skip_bad_images
    source = validate(DataSpec, content, where="data")
    wanted = max_top1_drop is not None or max_kl_share is not None
    if sample is None:
        _refuse(context, "candidates", because="without --sample every unit is scored exactly")
    if not wanted:
        _refuse(context, "objective", because="a skip list is searched only with --max-top1-drop or --max-kl-share")
    floors = {"max_top1_drop": max_top1_drop, "max_kl_share": max_kl_share} if wanted else {}
    validate(AutoSkipSpec, floors, where="sensitivity")
    _start(as_json)
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
            granularity=granularity,
            sample=sample,
            candidates=candidates,
            goal=Goal(max_top1_drop, max_kl_share) if wanted else None,
            objective=objective,
            device=device,
            batch_size=batch_size,
            skip_bad=skip_bad_images,
        )
    if as_json:
        _print_json(result.to_json())
        return
    _print_sensitivity(result)
    from vitopt.report.sensitivity import write_sensitivity_page

    out.print(f"\nresult: {output / 'sensitivity.json'}")
    out.print(f"page: {write_sensitivity_page(output / 'sensitivity.json')}")


@app.command()
@_clear_errors
def evaluate(
    checkpoint: CheckpointArgument,
    data: DataOption,
    baseline: Annotated[str | None, typer.Option(help="Checkpoint to compare with, image by image.")] = None,
    attention: AttentionOption = "sdpa",
    sdpa_kernel: KernelOption = "auto",
    run_as: RunAsOption = None,
    fuse_qkv: FuseOption = False,
    channels_last: LayoutOption = False,
    compile: CompileOption = False,
    autotune: AutotuneOption = False,
    batch_size: Annotated[int, typer.Option(help="Images per call while accuracy is measured.")] = 32,
    latency_batch_size: Annotated[str, typer.Option(help="Batch sizes to time, as in 1,8,32.")] = "1",
    iterations: IterationsOption = 100,
    rounds: RoundsOption = 10,
    workers: Annotated[int, typer.Option(help="Processes that decode images; 0 uses a thread.")] = 0,
    limit: LimitOption = None,
    labels: LabelsOption = "name",
    group_column: GroupOption = None,
    skip_bad_images: SkipBadOption = False,
    look_alikes: Annotated[
        bool, typer.Option(help="Count images that look like others, or like what the model was trained on.")
    ] = True,
    strict: StrictOption = False,
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for record.json and predictions.parquet.")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, latency, size and memory of a checkpoint."""
    spec = _evaluate_spec(batch_size, workers, latency_batch_size, iterations, rounds)
    spec = spec.model_copy(update={"look_alikes": look_alikes})
    run = _run_spec(attention, sdpa_kernel, run_as, fuse_qkv, channels_last, compile, autotune)
    content = {"source": data, "limit": limit, "labels": labels, "group_column": group_column}
    content["skip_bad_images"] = skip_bad_images
    source = validate(DataSpec, content, where="data")
    _start(as_json, threads)
    from vitopt.data.images import open_images

    sources = [checkpoint] if baseline is None else [baseline, checkpoint]
    candidates = _candidates(sources, run, expanded=[checkpoint])
    from vitopt import inference

    with _claimed(output, source.folder, *sources):
        measured = inference.measure(
            candidates,
            spec,
            images=open_images(source, None),
            skip_bad=skip_bad_images,
            baseline=candidates[0].name if baseline is not None else None,
            device=device,
            strict=strict,
        )
        if not measured:
            return  # not the main process
        if output is not None:
            _keep(measured[-1], output)
    record = measured[-1].record
    _print_json(record.to_json()) if as_json else _print_table([one.record for one in measured])
    _exit_if_failed(one.record for one in measured)


@app.command()
@_clear_errors
def benchmark(
    checkpoints: Annotated[list[str], typer.Argument(help="Folders, hub ids or random:ARCHITECTURE.")],
    batch_size: Annotated[str, typer.Option(help="Batch sizes, as in 1,8,32.")] = "1",
    attention: AttentionOption = "sdpa",
    sdpa_kernel: KernelOption = "auto",
    run_as: RunAsOption = None,
    fuse_qkv: FuseOption = False,
    channels_last: LayoutOption = False,
    compile: CompileOption = False,
    autotune: AutotuneOption = False,
    iterations: IterationsOption = 100,
    rounds: RoundsOption = 10,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Also double the batch to the highest rate.")
    ] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Also measure what the device's GEMM and copy rates allow.")
    ] = False,
    strict: StrictOption = False,
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder that gets one record per checkpoint.")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time checkpoints against each other, interleaved; the first is the baseline."""
    spec = _evaluate_spec(32, 0, batch_size, iterations, rounds, throughput, roofline)
    run = _run_spec(attention, sdpa_kernel, run_as, fuse_qkv, channels_last, compile, autotune)
    _start(as_json, threads)
    candidates = _candidates(checkpoints, run, expanded=checkpoints)
    from vitopt import inference

    folders = [f"variants/{candidate.name}" for candidate in candidates]
    with _claimed(output, *checkpoints, folders=folders):
        measured = inference.measure(candidates, spec, baseline=candidates[0].name, device=device, strict=strict)
        if output is not None:
            for one in measured:
                _keep(one, output / "variants" / one.record.variant.name)
    records = [one.record for one in measured]
    _print_json([record.to_json() for record in records]) if as_json else _print_table(records)
    _exit_if_failed(records)


@app.command()
@_clear_errors
def compare(
    baseline: Annotated[Path, typer.Argument(help="record.json or its folder: what to compare with.")],
    variant: Annotated[Path, typer.Argument(help="record.json or its folder: what is compared.")],
    max_top1_drop: RequireTop1Option = None,
    min_agreement: RequireAgreementOption = None,
    max_kl: RequireKlOption = None,
    min_speedup: RequireSpeedupOption = None,
    max_p99_ms: RequireP99Option = None,
    max_megabytes: RequireMegabytesOption = None,
    batch_size: RequireBatchOption = None,
    markdown: Annotated[Path | None, typer.Option(help="File for a summary, as of a pull request.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two stored results image by image; refuses results over different images.

    With any limit it is a gate: it ends with 0 if the 95 % intervals show all limits met, with 3 if one is shown to
    be missed, else with 4.
    """
    require = _require(max_top1_drop, min_agreement, max_kl, min_speedup, max_p99_ms, max_megabytes, batch_size)
    _start(as_json)
    if markdown is not None:
        _refuse_to_overwrite(markdown)
    from vitopt.measure.comparison import compare_stored
    from vitopt.measure.gate import judge, overall

    comparison = compare_stored(baseline, variant)
    before, after = comparison.records
    required = judge(require, after, before)
    records = before, after.model_copy(update={"requirements": required})
    if markdown is not None:
        from vitopt.report.table import pull_request

        storage.write_text(markdown, pull_request(records))
    if as_json:
        gate = {"decision": overall(required), "requirements": [one.model_dump(mode="json") for one in required]}
        _print_json(comparison.to_json() | (gate if required else {}))
    else:
        _print_table(records)
        for line in comparison.lines():
            out.print(f"• {line}")
    raise typer.Exit({"shown": 0, "failed": 3, "undecided": 4}[overall(required)])


def _refuse_to_overwrite(markdown: Path) -> None:
    from vitopt.report.table import SUMMARY_MARK

    there = markdown.is_dir() or (markdown.exists() and markdown.stat().st_size > 0)
    if there and not (markdown.is_file() and markdown.read_bytes().startswith(SUMMARY_MARK.encode())):
        raise StorageError(f"{markdown} is there and is no summary of an earlier comparison: choose another --markdown")


@app.command()
@_clear_errors
def plan(
    max_top1_drop: RequireTop1Option = None,
    min_agreement: RequireAgreementOption = None,
    max_kl: RequireKlOption = None,
    min_speedup: RequireSpeedupOption = None,
    max_p99_ms: RequireP99Option = None,
    pilot: Annotated[
        Path | None, typer.Option(help="Record of a small comparison, whose rates are taken for the true ones.")
    ] = None,
    batch_size: RequireBatchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how many images and calls a claim needs, before anything is measured."""
    require = _require(max_top1_drop, min_agreement, max_kl, min_speedup, max_p99_ms, None, batch_size)
    if not require.limits:
        raise RecipeError("nothing to plan for: give at least one limit, as in --max-top1-drop 0.5")
    from vitopt.measure.planning import needs
    from vitopt.records import load_record

    found = needs(require, load_record(pilot) if pilot else None)
    if as_json:
        _print_json([vars(need) for need in found])
        return
    _print_needs(found)


@app.command()
@_clear_errors
def predict(
    checkpoint: CheckpointArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to print per image.")] = 5,
    attention: AttentionOption = "sdpa",
    sdpa_kernel: KernelOption = "auto",
    run_as: RunAsOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images."""
    run = _run_spec(attention, sdpa_kernel, run_as)
    _start(as_json, threads)

    from vitopt import inference

    predictions = inference.predict(checkpoint, images, top=top, run=run, device=device)
    if as_json:
        _print_json(predictions)
        return
    for prediction in predictions:
        out.print(prediction["image"], style="bold")
        for guess in prediction["classes"]:
            out.print(f"  {guess['percent']:5.1f} %  {guess['label']}")


@app.command()
@_clear_errors
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN-DIR", help="Folder of a run.")],
    as_json: JsonOption = False,
) -> None:
    """Write report.md and report.html of a run again from its records."""
    _start(as_json)
    from vitopt.report.page import load_run, write_report
    from vitopt.report.sensitivity import write_sensitivity_page

    if (run_folder / "sensitivity.json").is_file() and not (run_folder / "variants").is_dir():
        with storage.locked(run_folder):
            page = write_sensitivity_page(run_folder / "sensitivity.json")
        _print_json({"report": str(page), "variants": []}) if as_json else out.print(f"page: {page}")
        return
    records = load_run(run_folder)
    with storage.locked(run_folder):
        path = write_report(run_folder)
    if as_json:
        _print_json({"report": str(path), "variants": [record.variant.name for record in records]})
        return
    _print_table(records)
    out.print(f"\nreport: {path}")


@app.command()
@_clear_errors
def doctor(as_json: JsonOption = False, device: DeviceOption = "auto") -> None:
    """Tell what this machine can run and why it cannot run the rest."""
    _start(as_json)
    from vitopt import environment

    facts = environment.diagnose(environment.resolve_device(device))
    if as_json:
        _print_json(facts)
        return
    yes = Text("yes", "green")
    for title, section in facts.items():
        table = Table(title=title.replace("_", " "), title_justify="left", show_header=False, box=None)
        for name, value in section.items():
            mark = {None: yes, True: yes, False: Text("no")}.get(value) if title == "can_run" else None
            table.add_row(name, mark or ("not installed" if value is None else str(value)))
        out.print(table)
        out.print()


@app.command()
@_clear_errors
def init(
    model: Annotated[str, typer.Argument(help="Checkpoint to start from.")],
    data: Annotated[str, typer.Argument(help="Images to fine-tune and measure on.")],
    name: Annotated[str, typer.Option(help="Name of the run.")] = "my-run",
    labels: LabelsOption = "name",
) -> None:
    """Print a recipe for a model and a data set, fitted to this machine."""
    _start(as_json=False)
    from vitopt.starting import starting_recipe

    sys.stdout.write(starting_recipe(model, data, name, labels))
    sys.stdout.flush()


def _refuse(context: typer.Context, *names: str, because: str) -> None:
    """Refuse those of the options that stand on the command line: they would do nothing.

    Raises:
        RecipeError: at least one of them is there.
    """
    given = [name for name in names if context.get_parameter_source(name).name != "DEFAULT"]  # type: ignore[union-attr]
    if given:
        written = (f"--{'no-' if context.params[name] is False else ''}{name.replace('_', '-')}" for name in given)
        raise RecipeError(f"{', '.join(written)}: {because}")


def _evaluate_spec(
    batch_size: int,
    workers: int,
    latency: str,
    iterations: int,
    rounds: int,
    throughput: bool = False,
    roofline: bool = False,
) -> EvaluateSpec:
    sizes = [int(part) if part.strip().isdigit() else part for part in latency.split(",")]
    return validate(
        EvaluateSpec,
        {
            "batch_size": batch_size,
            "workers": workers,
            "throughput": throughput,
            "roofline": roofline,
            "latency": {"batch_sizes": sizes, "iterations": iterations, "rounds": min(rounds, iterations)},
        },
        where="arguments",
    )


def _run_spec(
    attention: Attention,
    sdpa_kernel: SdpaKernel,
    run_as: RunAs | None,
    fuse_qkv: bool = False,
    channels_last: bool = False,
    compile: bool = False,
    autotune: bool = False,
) -> RunSpec:
    return validate(
        RunSpec,
        {
            "attention": attention,
            "sdpa_kernel": sdpa_kernel,
            "run_as": run_as,
            "fuse_qkv": fuse_qkv,
            "channels_last": channels_last,
            "compile": compile,
            "autotune": autotune,
        },
        where="arguments",
    )


def _require(
    max_top1_drop: float | None,
    min_agreement: float | None,
    max_kl: float | None,
    min_speedup: float | None,
    max_p99_ms: float | None,
    max_megabytes: float | None,
    batch_size: int | None,
) -> RequireSpec:
    return validate(RequireSpec, dict(locals()), where="arguments")


def _candidates(sources: Sequence[str], run: RunSpec, expanded: Sequence[str]) -> list[Any]:
    """One candidate per source and, with `run_as`, one more for each of `expanded`: packed layers beside expanded
    ones, so that the memory of the one and the speed of the other are both seen."""
    from vitopt.inference import Candidate

    short = [source.rstrip("/").rsplit("/", 1)[-1] for source in sources]
    # Folders of one name are told apart by their whole path; names are also folder names, so without slashes.
    whole = [source.strip("/.").replace("/", "_") for source in sources]
    names = [long if short.count(name) > 1 else name for long, name in zip(whole, short, strict=True)]
    if len(set(names)) < len(names):
        raise RecipeError("the same checkpoint is given twice; compare two different ones")
    packed = run.model_copy(update={"run_as": None})
    candidates = []
    for name, source in zip(names, sources, strict=True):
        candidates.append(Candidate(name, source, packed))
        if run.run_as is not None and source in expanded:
            candidates.append(Candidate(f"{name}-as-{run.run_as}", source, run))
    return candidates


def _exit_if_failed(records: Iterable[Record]) -> None:
    failures = [f"{record.variant.name} failed: {record.failure}" for record in records if record.failure]
    if failures:
        raise MeasurementError("; ".join(failures))


def _claimed(
    output: Path | None, *inputs: str | Path | None, folders: Iterable[str] = (".",)
) -> AbstractContextManager[None]:
    """Take `output` for the records of its `folders` before they are measured; nothing to take without one."""
    from vitopt import environment

    files = [f"{folder}/{name}" for folder in folders for name in (RECORD_FILE, "predictions.parquet")]
    if output is None:
        return nullcontext()
    return environment.in_main_process(storage.claimed(output, *inputs, files=files))


def _keep(measured: "Measured", folder: Path) -> None:
    from vitopt.measure.predictions import save_predictions
    from vitopt.records import save_record

    save_record(measured.record, folder)
    if measured.predictions is not None:
        save_predictions(measured.predictions, folder)


@contextmanager
def _full_width() -> Iterator[None]:
    # Piped output has no width; a table cut at 80 columns would lose its figures.
    if out.is_terminal:
        yield
        return
    width, out.width = out.width, 200
    yield
    out.width = width


def _print_table(records: Sequence[Record]) -> None:
    from vitopt.report.table import HEADINGS, UNKNOWN, batch_sizes, notes, row

    with _full_width():
        for size in batch_sizes(records) or (None,):
            rows = [row(record, size) for record in records]
            shown = [i for i in range(len(HEADINGS)) if any(cells[i] != UNKNOWN for cells in rows)]
            table = Table(title=f"batch size {size}" if size else None, title_justify="left")
            for index in shown:
                table.add_column(HEADINGS[index], justify="left" if index < 3 else "right")
            for cells in rows:
                table.add_row(*(cells[index] for index in shown))
            out.print(table)
    for record in records:
        if (found := record.throughput) is not None:
            rate = f"{found.images_per_second:,.0f} images/s at batch {found.batch_size}"
            out.print(f"• {record.variant.name}: at most {rate}")
    for note in notes(records):
        out.print(f"• {note}")


def _print_sensitivity(result: "Sensitivity") -> None:
    from vitopt.report.table import human_bytes

    quantized = result.quantized
    table = Table(
        title=f"{result.format} on {result.images} images; all quantized: KL {quantized.kl:.4f}, "
        f"agreement {quantized.agreement_percent:.1f} %",
        title_justify="left",
    )
    for heading in ("unit", "damage KL", "Δ points (95 %)", "kept: KL", "Δ points (95 %)", "costs", "costs ms"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for unit in sorted(result.units, key=lambda unit: unit.recovery.kl if unit.recovery else 0):
        cells = [unit.unit]
        for loss in (unit.damage, unit.recovery):
            low, high = loss.top1_delta_ci95_points if loss else (0, 0)
            delta = f"{loss.top1_delta_points:+.1f} ({low:+.1f} to {high:+.1f})" if loss else ""
            cells += [f"{loss.kl:.4f}" if loss else "", delta]
        cells += [human_bytes(unit.extra_bytes), "" if unit.extra_ms is None else f"{unit.extra_ms:+.3f}"]
        table.add_row(*cells)
    with _full_width():
        out.print(table)
    if result.search is not None:
        found = result.search
        out.print(f"• {found.goal}: keep {', '.join(found.chosen) or 'nothing'} in 16 bit")
        out.print(f"• {found.advice or f'shown on {found.confirming_images:,} images that did not choose (95 %)'}")


def _print_dry_run(recipe: Recipe, plans: "dict[str, LayerPlan]", preview: "Preview", as_json: bool) -> None:
    if as_json:
        layers = {
            name: {
                p.layer.logical: {"format": p.format, "module": p.layer.module, "reason": p.reason} for p in plan.layers
            }
            for name, plan in plans.items()
        }
        _print_json({"recipe": recipe.model_dump(mode="json"), "layer_plans": layers, **preview.to_json()})
        return
    out.print(dump_yaml(recipe))
    with _full_width():
        _print_plans(plans)
    _print_needs(
        [claim.need for claim in preview.claims],
        [f"{claim.about}: " for claim in preview.claims],
        [claim.there for claim in preview.claims],
    )
    for stage in preview.stages:
        out.print(f"• {stage.name}: about {max(1, round(stage.seconds)):,} s (an estimate from a few calls)")
    for note in preview.notes:
        out.print(f"• {note}")


def _print_needs(needs: "Sequence[Need]", about: Sequence[str] = (), there: Sequence[int | None] = ()) -> None:
    """A row per requirement; `about` whom and how many images or calls are `there`, where that is known."""
    if not needs:
        return
    from vitopt.report.requirements import asked

    table = Table(title="needed to show what is required", title_justify="left")
    for heading in ("required", "at least", "8 times in 10", *(["there are"] if there else []), "if"):
        table.add_column(heading, justify="left" if heading in ("required", "if") else "right")
    for index, need in enumerate(needs):
        counts = ["–" if count is None else f"{count:,} {need.unit}" for count in (need.least, need.likely)]
        counts += [f"{there[index]:,}" if there[index] is not None else "–"] if there else []
        who = about[index] if about else ""
        table.add_row(who + asked(need.requirement, need.limit), *counts, need.assumption)
    with _full_width():
        out.print(table)


def _print_plans(plans: "dict[str, LayerPlan]") -> None:
    for name, plan in plans.items():
        table = Table(title=f"layer plan of {name}", title_justify="left")
        for heading in ("layers", "format", "reason", "module of the first"):
            table.add_column(heading)
        for first, last, count in plan.groups():
            span = first.layer.logical if count == 1 else f"{first.layer.logical} … {last.layer.logical} ({count})"
            table.add_row(span, first.format, first.reason, first.layer.module)
        out.print(table)
