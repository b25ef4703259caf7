"""The rows of a run: what was measured of a variant stands while all that it depends on is the same.

A new or changed variant is measured with the baseline, call by call in turns; the other rows stay. Every row is
compared with the baseline of its own session, and the baseline's newest row is the one that is shown.
"""

from collections.abc import Mapping, Sequence

import torch

from vitopt import ownership, threads
from vitopt.data.images import ImageSet
from vitopt.environment import devices, launch, machine, support
from vitopt.inference import Candidate, measure
from vitopt.measure.evaluator import Measured, failed
from vitopt.measure.predictions import PREDICTIONS_FILE, save_predictions
from vitopt.recipe import Recipe
from vitopt.records import RECORD_FILE, Record, load_record, save_record
from vitopt.stages import Product, RunFolder
from vitopt.tracking import Tracking
from vitopt.variants import Settled

Failures = Mapping[str, str | None]  # of each variant why it could not be made, None where it was


def rows_of(
    run: RunFolder, recipe: Recipe, images: ImageSet | None, variants: Sequence[Settled], failures: Failures
) -> dict[str, Product[Record]]:
    """The row of every variant, by name; those of the others depend on the baseline too."""

    def held(settled: Settled) -> list[object]:
        variant = settled.variant
        asked = variant.model_dump(mode="json", exclude={"auto", "fastest"})  # how it was chosen changes no figure
        return [asked, settled.chosen, run.completed.get(f"variant {variant.name}"), failures[variant.name]]

    baseline = next(settled for settled in variants if settled.variant.name == recipe.baseline_name)
    shared = [
        held(baseline),
        recipe.evaluate.model_dump(mode="json"),
        recipe.data.model_dump(mode="json") if recipe.data else None,
        [images.sha256, images.groups] if images else None,
        [torch.get_num_threads(), machine.threads_bound(), threads.waiting()],
    ]

    def row(settled: Settled) -> Product[Record]:
        name = settled.variant.name
        folder = run.variant(name)
        files = [folder / RECORD_FILE, *filter(ownership.is_listed, [folder / PREDICTIONS_FILE])]
        inputs, device = [held(settled), *shared], devices.resolve_device(recipe.device)
        return Product(f"evaluate {name}", inputs, files, lambda: load_record(folder), measured_on=device)

    return {settled.variant.name: row(settled) for settled in variants}


def measured_rows(
    run: RunFolder, recipe: Recipe, images: ImageSet | None, variants: Sequence[Settled], failures: Failures
) -> list[Record]:
    """The records of all variants, of which those are measured whose rows do not stand."""
    rows = rows_of(run, recipe, images, variants, failures)
    standing = [name for name, row in rows.items() if run.stands(row)]
    new = rows_to_measure(recipe, standing, failures)
    if not new:
        run.say("evaluate: up to date, skipped")
        return [row.read() for row in rows.values()]
    kept = [name for name in rows if name not in new]
    on = f"on {len(images)} images of {images.name}" if images else "on random pixels"
    who = f"{', '.join(new)} {on}; {', '.join(kept)} stand as measured" if kept else f"{len(new)} variants {on}"
    run.say(f"evaluate: {who}")
    earlier = [rows[name].read() for name in standing]
    for name in new:
        run.forget(rows[name].name)  # its record on disk is replaced from now on
    _measure(run, recipe, images, {s.variant.name: s for s in variants if s.variant.name in new}, failures, earlier)
    launch.wait_for_all()  # no process reads before the main one has written
    for name in new:
        run.note(rows[name])
    return [row.read() for row in rows.values()]


def rows_to_measure(recipe: Recipe, standing: Sequence[str], failures: Failures) -> list[str]:
    """The variants whose rows do not stand, and the baseline where one of them can be timed against it."""
    new = [variant.name for variant in recipe.variants if variant.name not in standing]
    if any(failures[name] is None for name in new):
        new.append(recipe.baseline_name)
    return [variant.name for variant in recipe.variants if variant.name in new]


def _measure(
    run: RunFolder,
    recipe: Recipe,
    images: ImageSet | None,
    new: Mapping[str, Settled],
    failures: Failures,
    earlier: Sequence[Record],
) -> None:
    """Measure the variants of `new` together and save their records; `earlier`: those of the rows that stood."""
    sessions = [session for record in earlier for session in (*record.baseline_of, record.measured_together) if session]

    def save(measured: Measured) -> None:
        record = measured.record
        settled = new[record.variant.name]
        steps = tuple(step.model_dump(mode="json") for step in settled.variant.steps)
        changes: dict[str, object] = {
            "variant": record.variant.model_copy(update={"steps": steps, "chosen": settled.chosen})
        }
        if record.variant.name == recipe.baseline_name:
            changes["baseline_of"] = tuple(dict.fromkeys(sessions))
        folder = run.variant(record.variant.name)
        save_record(record.model_copy(update=changes), folder)
        if measured.predictions is not None and support.installed("pyarrow"):
            save_predictions(measured.predictions, folder)

    if earlier and not any(failures[name] is None for name in new):
        device = devices.resolve_device(recipe.device)
        results = [failed(name, settled.variant, str(failures[name]), device) for name, settled in new.items()]
    else:
        results = measure(
            [
                Candidate(name, str(run.variant(name)), settled.variant.run, settled.variant, failures[name])
                for name, settled in new.items()
            ],
            recipe.evaluate,
            images=images,
            skip_bad=recipe.data is not None and recipe.data.skip_bad_images,
            baseline=recipe.baseline_name,
            device=recipe.device,
            strict=recipe.strict,
            untrained=new[recipe.baseline_name].base.is_random,
            ready=save,
        )
    if launch.is_main_process():
        for result in results:
            save(result)
            if result.record.failure:
                run.say(f"evaluate: {result.record.variant.name} failed: {result.record.failure}")
        Tracking(recipe.log_to, recipe.name, run.path / "log").log(result.record for result in results)
