"""A first recipe for a model and a data set: what `vitopt init` prints."""

from typing import Any

import torch
import yaml

from vitopt.checks import plans
from vitopt.data.images import ALL, open_images
from vitopt.data.labels import fit_labels
from vitopt.environment import devices, support
from vitopt.errors import DataError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe import DataSpec, Labels, Recipe
from vitopt.recipe_file import validate


def starting_recipe(model: str, data: str, name: str, labels: Labels = "name") -> str:
    """A recipe in YAML for a model and a data set: fine-tuning where the head does not fit, and the variants
    that this machine can run.

    Raises:
        CheckpointError, DataError: the model or the data cannot be opened.
    """
    device = devices.resolve_device()
    checkpoint = open_checkpoint(model)
    source = {"source": data} | ({"labels": labels} if labels != "name" else {})
    images = open_images(validate(DataSpec, source, where="data"), None)
    content: dict[str, Any] = {"name": name, "model": model, "data": source}
    try:
        fit_labels(images, checkpoint.label_names)
        why = f"The model's head fits the {len(images)} test images, so nothing is fine-tuned."
    except DataError as error:
        content["finetune"] = {"method": "lora", "rank": 8, "alpha": 32, "dropout": 0.1, "epochs": 3}
        reason = " ".join(str(error).split())  # it quotes names, and a name with a line break would end the comment
        why = f"LoRA fine-tunes the layers and a new head, because the model's does not fit: {reason}."
    if images.split == ALL and "finetune" in content:
        why += " The folder has no splits: 80 % of each class trains, 20 % tests."
    wanted: list[dict[str, Any]] = [
        {"name": "fp32", "format": "fp32"},
        {"name": "bf16", "format": "bf16"},
        {"name": "nf4", "format": "nf4"},
        {"name": "nf4-fa2", "format": "nf4", "attention": "flash_attention_2"},
        {"name": "nf4-as-bf16", "format": "nf4", "run_as": "bf16"},
        {"name": "nf4-skip-0", "format": "nf4", "skip": ["block.0"]},
        {"name": "int8", "format": "int8"},
        {"name": "w8a8", "format": "w8a8"},
        {"name": "fp8", "format": "fp8"},
    ]
    if device.type == "cuda":
        fast = {"compile": True, "fuse_qkv": True}
        wanted[2:2] = [{"name": "bf16-compiled", "format": "bf16"} | fast]
        wanted += [{"name": f"{format}-compiled", "format": format} | fast for format in ("w8a8", "fp8")]
    reasons = {
        variant["name"]: support.why_not_format(variant["format"], device)
        or support.why_not_attention(variant.get("attention", "sdpa"), device, torch.bfloat16)
        for variant in wanted
    }
    content["variants"] = [variant for variant in wanted if reasons[variant["name"]] is None]
    content |= {"baseline": "fp32", "export": "nf4", "evaluate": {"latency": {"batch_sizes": [1, 8]}}}
    recipe = validate(Recipe, content, where="recipe")
    plans(recipe)
    lines = [f"# {why}", f"# Run it: vitopt run {name}.yaml     Look first: vitopt run {name}.yaml --dry-run"]
    lines += [f"# Left out: {name} ({reason})" for name, reason in reasons.items() if reason]
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return "\n".join(lines) + "\n" + body
