"""Two processes do what one does: a whole run under torch's launcher, then the same in this process.

`accelerate launch --cpu --num_processes 2` starts one process only (it wants MPI for more); the launcher behind
`accelerate launch --multi_gpu` is torch's, which is used here directly.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vitopt import inference, pipeline
from vitopt.data.images import open_images
from vitopt.measure import evaluator
from vitopt.measure.accuracy import compare
from vitopt.measure.predictions import load_predictions
from vitopt.ownership import LIST_FILE
from vitopt.recipe import EvaluateSpec
from vitopt.recipe_file import load_recipe

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")

NAMES = ("fp32", "nf4")


@pytest.fixture(scope="module")
def launched(
    tiny_checkpoint: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run by two processes over 24 test images, one of which is broken; the folder above `run`."""
    root = tmp_path_factory.mktemp("two")
    shutil.copytree(shapes, root / "shapes")
    (root / "shapes" / "test" / "cross" / "03.png").write_bytes(b"broken")
    recipe = {
        "name": "two",
        "model": str(tiny_checkpoint),
        "data": {"source": str(root / "shapes"), "skip_bad_images": True},
        "device": "cpu",
        "finetune": {"epochs": 2, "batch_size": 4, "rank": 4, "precision": "fp32"},
        "variants": [{"name": "fp32", "format": "fp32"}, {"name": "nf4", "format": "nf4", "skip": ["block.0"]}],
        "evaluate": {
            "batch_size": 4,
            "latency": {"iterations": 6, "rounds": 3, "warmup_seconds": 0},
            "end_to_end": False,
        },
        "export": "nf4",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    program = root / "program.py"  # `python -m vitopt`, without processes that measure memory
    program.write_text(
        "from vitopt.cli import main\nfrom vitopt.measure import evaluator\n"
        "evaluator.peak_memory = lambda *_: None\nmain()\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    command = [sys.executable, *launcher, "run", str(root / "recipe.yaml"), "--output", str(root / "run"), "--json"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env=dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )
    assert done.returncode == 0, done.stderr
    return root, done


def test_one_process_speaks(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root, done = launched
    records = json.loads(done.stdout)
    assert [record["variant"]["name"] for record in records] == list(NAMES)
    assert [json.loads((root / "run" / "variants" / name / "record.json").read_text()) for name in NAMES] == records
    for line in ("finetune: lora on 32 images", "finetune: 8 steps", "variant nf4: ", "evaluate: 2 variants"):
        assert done.stderr.count(line) == 1, line


def test_training_is_shared_and_leaves_one_complete_checkpoint(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tiny_checkpoint: Path
) -> None:
    folder = launched[0] / "run" / "finetune"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "calibration.json",
        "origin.json",
        "training.json",
        LIST_FILE,
    }
    report = json.loads((folder / "training.json").read_text())
    # 32 images in batches of 4 for each of two processes: 4 steps an epoch instead of 8
    assert (report["images"], report["epochs"], report["steps"]) == (32, 2, 8)
    original, tuned = (load_file(f / "model.safetensors") for f in (tiny_checkpoint, folder))
    assert original.keys() == tuned.keys()
    assert sum(not torch.equal(tuned[name], original[name]) for name in tuned) == 18 + 2
    assert {path.name for path in (launched[0] / "run").rglob(".*")} == {LIST_FILE}


def test_predictions_and_accuracy_are_those_of_one_process(
    launched: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = launched
    monkeypatch.setattr(evaluator, "peak_memory", lambda subject, batch_size: None)
    recipe = load_recipe(root / "recipe.yaml")
    alone = inference.measure(
        [inference.Candidate(name, str(root / "run" / "variants" / name)) for name in NAMES],
        EvaluateSpec(batch_size=4, latency={"iterations": 3, "rounds": 3, "warmup_seconds": 0}, end_to_end=False),
        images=open_images(recipe.data, None),
        skip_bad=True,
        baseline="fp32",
        device="cpu",
    )
    for one in alone:
        folder = root / "run" / "variants" / one.record.variant.name
        record, predictions = json.loads((folder / "record.json").read_text()), load_predictions(folder)
        assert predictions.ids == one.predictions.ids and len(predictions.ids) == 23
        assert predictions.image_sha256 == one.predictions.image_sha256
        np.testing.assert_array_equal(predictions.labels, one.predictions.labels)
        np.testing.assert_allclose(predictions.logits, one.predictions.logits, rtol=1e-3, atol=1e-3)
        assert record["dataset"] == one.record.to_json()["dataset"]
        assert record["dataset"]["skipped"] == ["cross/03.png"]
        assert record["accuracy"]["top1_percent"] == one.record.accuracy.top1_percent
        difference = compare("alone", one.predictions, predictions)
        assert difference.agreement_percent == 100 and difference.mean_kl_divergence < 1e-6
    versus = json.loads((root / "run" / "variants" / "nf4" / "record.json").read_text())["versus_baseline"]
    assert versus["mean_kl_divergence"] == pytest.approx(alone[1].record.versus_baseline.mean_kl_divergence, rel=1e-2)


def test_one_process_finds_all_stages_of_two_complete(
    launched: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured_again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(inference, "evaluate", measured_again)
    said: list[str] = []
    pipeline.run(load_recipe(launched[0] / "recipe.yaml"), launched[0] / "run", said.append)
    assert said == [
        "finetune: up to date, skipped",
        "variant fp32: up to date, skipped",
        "variant nf4: up to date, skipped",
        "evaluate: up to date, skipped",
    ]
