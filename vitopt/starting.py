"""A first recipe for a model and a data set: what `vitopt init` prints."""

import textwrap
from typing import Any

import torch
import yaml

from vitopt.checks import plans, tested_images
from vitopt.data.images import ALL, ImageSet, open_images
from vitopt.data.labels import fit_labels
from vitopt.engines.package import engine_module
from vitopt.environment import devices, support
from vitopt.errors import DataError
from vitopt.measure.planning import needs
from vitopt.models.checkpoint import open_checkpoint
from vitopt.preview import preview
from vitopt.recipe import DataSpec, Labels, Recipe, RequireSpec
from vitopt.recipe_file import validate
from vitopt.terminal import visible

# Largest losses of top-1 that a recipe begins with, in points; the first that the tested images likely show is taken.
_LOSSES = (0.5, 1, 1.5, 2, 3, 5, 10, 20, 30)
_GOOD_LOSS = 1  # for more than it, the recipe says how many images would show it

_LORA = {"method": "lora", "rank": 8, "alpha": 32, "dropout": 0.1, "epochs": 3}


def starting_recipe(model: str, data: str, name: str, labels: Labels = "name") -> str:
    """A recipe in YAML to ship from: fine-tuning where the head does not fit, the variants that may be fast or small on
    this machine, limits that the tested images can show, and the best variant exported.

    Raises:
        CheckpointError, DataError: the model or the data cannot be opened.
    """
    device = devices.resolve_device()
    source = {"source": data} | ({"labels": labels} if labels != "name" else {})
    spec = validate(DataSpec, source, where="data")
    images = open_images(spec, None)
    finetune, why = _finetuning(model, images)
    variants, left_out = _variants(device)
    content: dict[str, Any] = {"name": name, "model": model, "data": source}
    content |= {"finetune": finetune} if finetune else {}
    content |= {"variants": variants, "baseline": "fp32"}
    content["evaluate"] = {"latency": {"batch_sizes": [1, 32] if device.type == "cuda" else [1]}}
    recipe = validate(Recipe, content, where="recipe")
    plans(recipe)
    tested = len(tested_images(recipe, spec))
    if finetune and images.split == ALL:
        why += f" The data has no splits, so it is divided: {tested:,} images test, the others train."
    require, what_can_be_shown = _requirements(tested)
    content |= {"require": require, "prefer": "latency", "export": "best"}
    validate(Recipe, content, where="recipe")
    rows = "".join(f"  - {_flow(variant)}\n" for variant in variants)
    comments = "".join(f"# Left out: {name} ({reason})\n" for name, reason in left_out.items())
    sizes = "one image" if device.type == "cpu" else "one image and with 32"
    return f"""\
# Which version of the model to ship from this machine ({device.type}).
#   vitopt run recipe.yaml --dry-run    what it will do, layer by layer
#   vitopt run recipe.yaml              {_duration(recipe)}
{_lines(content, "name", "model", "data")}
{_comment(why)}
{_lines(content, "finetune") if finetune else ""}
# What is compared. Compiled rows are fast. nf4 is small; nf4-as-bf16 is the same file, expanded when it is loaded.
# openvino is another runtime, for processors; its int8 is often the fastest there, and `vitopt export` takes it along.
variants:
{rows}{comments}
# All others are compared with it, image by image and call by call.
{_lines(content, "baseline")}
# Calls with {sizes} are timed: add the batch sizes that you serve.
{_lines(content, "evaluate")}
{_comment(f"What a variant must be shown (95 %) to keep. {what_can_be_shown}")}
# min_speedup 1: not slower than the baseline. More keys: min_agreement, max_kl, max_p99_ms, max_megabytes.
{_lines(content, "require")}
# Which of the variants that keep all limits is the best: by latency, size, throughput, or cost (with price_per_hour).
{_lines(content, "prefer")}
# The best is copied to runs/{name}/export; give a variant's name to copy that one instead.
{_lines(content, "export")}"""


def _finetuning(model: str, images: ImageSet) -> tuple[dict[str, Any] | None, str]:
    """The section `finetune`, None where the head fits the images, and why."""
    try:
        fit_labels(images, open_checkpoint(model).label_names)
        return None, f"The model's head fits the {len(images):,} test images, so nothing is fine-tuned."
    except DataError as error:
        reason = " ".join(str(error).split())  # it quotes names, and a name with a line break would end the comment
        return _LORA, f"LoRA fine-tunes the layers and a new head, because the model's does not fit: {reason}."


def _variants(device: torch.device) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows that may be the fastest or the smallest here, and by name why others are left out."""
    not_compiled = support.why_not_compile(device)
    slow = None if devices.computes_in_bf16(device) else f"{device.type} has no bf16 arithmetic"
    fast = {"compile": True} | ({"fuse_qkv": True} if device.type == "cuda" else {})
    wanted: list[tuple[dict[str, Any], str | None]] = [
        ({"name": "fp32", "format": "fp32"}, None),
        ({"name": "bf16", "format": "bf16"}, None),
        ({"name": "bf16-compiled", "format": "bf16"} | fast, slow or not_compiled),
        ({"name": "w8a8-compiled", "format": "w8a8"} | fast, not_compiled),
        ({"name": "fp8-compiled", "format": "fp8"} | fast, not_compiled),
        ({"name": "nf4", "format": "nf4"}, None),
        ({"name": "nf4-as-bf16", "format": "nf4", "run_as": "bf16"} | fast, slow or not_compiled),
    ]
    engine = "openvino"
    missing = support.why_not_engine(engine, device)
    lacks = missing or engine_module(engine).why_not("bf16")
    wanted += [
        ({"name": f"{engine}-bf16", "format": "bf16", "engine": engine}, lacks),
        ({"name": f"{engine}-int8", "format": "w8a8", "engine": engine}, missing),
    ]
    if slow:
        wanted.insert(2, ({"name": "fp32-compiled", "format": "fp32"} | fast, not_compiled))
    reasons = {row["name"]: support.why_not_format(row["format"], device) or reason for row, reason in wanted}
    rows = [row for row, _ in wanted if reasons[row["name"]] is None]
    return rows, {name: reason for name, reason in reasons.items() if reason}


def _requirements(images: int) -> tuple[dict[str, float], str]:
    """The section `require` that so many tested images can show, and what that says about the loss."""
    likely = {loss: needs(RequireSpec(max_top1_drop=loss))[0].likely or 0 for loss in _LOSSES}
    loss = next((loss for loss in _LOSSES if likely[loss] <= images), None)
    if loss is None:
        return {"min_speedup": 1}, f"{images:,} test images cannot show a useful limit on the loss of top-1."
    shown = f"{images:,} test images are likely to show that at most {loss:g} points of top-1 are lost"
    more = f"; {_GOOD_LOSS} point takes about {likely[_GOOD_LOSS]:,}" if loss > _GOOD_LOSS else ""
    return {"max_top1_drop": loss, "min_speedup": 1}, f"{shown}{more}."


def _duration(recipe: Recipe) -> str:
    stages = preview(recipe).stages
    if not stages:
        return "carries it out"
    longest = max(stages, key=lambda stage: stage.seconds)
    total, most = _minutes(sum(stage.seconds for stage in stages)), _minutes(longest.seconds)
    uncounted = "loading and compiling" if any(variant.compile for variant in recipe.variants) else "loading"
    return f"about {total} here, {most} of it for {longest.name} (a guess, without {uncounted})"


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 90 else f"{round(minutes / 60)} h"


def _comment(text: str) -> str:
    return textwrap.fill(
        visible(text), 110, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def _lines(content: dict[str, Any], *keys: str) -> str:
    """A line for each key: its own YAML without the braces."""
    return "".join(f"{_flow({key: content[key]})[1:-1]}\n" for key in keys)


def _flow(value: dict[str, Any]) -> str:
    dumped: str = yaml.safe_dump(
        value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=float("inf")
    )
    return dumped.strip()
