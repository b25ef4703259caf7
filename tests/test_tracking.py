"""What experiment trackers get: trainings by transformers' own integrations, records as scalars."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import integration_utils
from typer.testing import CliRunner

from vitopt import pipeline
from vitopt.cli import app
from vitopt.data.images import open_images
from vitopt.environment import support
from vitopt.errors import RecipeError, UnsupportedError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe import DataSpec, FinetuneSpec, Recipe
from vitopt.records import Accuracy, Latency, Memory, Record, Size, Variant, VersusBaseline
from vitopt.tracking import Tracking, scalars
from vitopt.training.finetune import finetune

SPEC = FinetuneSpec(epochs=2, batch_size=16, rank=2)


def make_record(name: str = "nf4", **fields: Any) -> Record:
    row = Latency(
        batch_size=8, iterations=4, rounds=2, mean_ms=2.5, std_ms=None, min_ms=1.0, p50_ms=2.5, p95_ms=None,
        p99_ms=None, p50_ci95_ms=(1.5, None), images_per_second=3200.0, speedup_vs_baseline=1.5,
        speedup_ci95=(1.4, 1.6),
        warmup_ms=1.0, warmup_iterations=1, samples_ms=(1.0, 2.0, 3.0, 4.0),
    )  # fmt: skip
    accuracy = Accuracy(
        images=40, top1_percent=90.0, top1_ci95_percent=(76.9, 96.0), top5_percent=None, expected_calibration_error=0.1
    )
    content: dict[str, Any] = {
        "accuracy": accuracy,
        "latency": (row,),
        "size": Size(weight_bytes=1000, disk_bytes=None),
        "memory": Memory(peak_bytes=5000, kind="resident_set", batch_size=1),
    }
    return Record(variant=Variant(name=name, format="nf4"), **content | fields)


EXPECTED = {
    "top1_percent": 90.0,
    "top1_percent_ci95_low": 76.9,
    "top1_percent_ci95_high": 96.0,
    "batch_8/p50_ms": 2.5,
    "batch_8/p50_ms_ci95_low": 1.5,
    "batch_8/images_per_second": 3200.0,
    "batch_8/speedup": 1.5,
    "batch_8/speedup_ci95_low": 1.4,
    "batch_8/speedup_ci95_high": 1.6,
    "weight_bytes": 1000.0,
    "peak_bytes": 5000.0,
}


def test_scalars_are_the_figures_that_are_known_with_their_intervals() -> None:
    assert scalars(make_record()) == EXPECTED


def test_a_record_that_was_compared_has_the_comparison() -> None:
    versus = VersusBaseline(
        baseline="fp32", top1_delta_points=-2.0, top1_delta_ci95_points=(-5.0, 0.9), agreement_percent=90.0,
        agreement_ci95_percent=None, right_to_wrong=3, wrong_to_right=1, mcnemar_p=0.6, mean_kl_divergence=0.12,
        kl_ci95=(0.1, 0.14), normalised_logit_error=0.1, smallest_visible_loss_points=3.0, verdict="no loss shown",
    )  # fmt: skip
    assert scalars(make_record(versus_baseline=versus)) == EXPECTED | {
        "top1_delta_points": -2.0,
        "top1_delta_points_ci95_low": -5.0,
        "top1_delta_points_ci95_high": 0.9,
        "agreement_percent": 90.0,
        "mean_kl_divergence": 0.12,
        "mean_kl_divergence_ci95_low": 0.1,
        "mean_kl_divergence_ci95_high": 0.14,
    }


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'tensorbord'.*'tensorboard'"):
        Tracking(("tensorbord",))


def test_a_tracker_that_is_not_installed_is_refused_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "installed", lambda package: package == "tensorboard")
    with pytest.raises(UnsupportedError, match=r"mlflow and wandb.*pip install mlflow wandb"):
        Tracking(("mlflow", "tensorboard", "wandb"))


def test_a_folder_of_that_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where the package itself is not
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(UnsupportedError, match="pip install mlflow"):
        Tracking(("mlflow",))


def test_a_run_with_such_a_tracker_is_refused_before_it_does_anything(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "installed", lambda package: package != "mlflow")
    content = {"name": "x", "model": str(tiny_checkpoint), "data": str(shapes), "log_to": "mlflow"}
    recipe = Recipe.model_validate(content | {"variants": [{"name": "fp32", "format": "fp32"}], "finetune": {}})
    with pytest.raises(UnsupportedError, match="pip install mlflow"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_opens_no_run_ends_no_measurement_and_starts_no_training(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("no API key\nlog in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, init=refuse))
    monkeypatch.setattr(support, "installed", lambda package: True)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    tracking = Tracking(("wandb",), "run", tmp_path / "log")

    tracking.log([make_record()])
    assert "nf4 not logged to wandb: RuntimeError: no API key log in" in caplog.text

    images = open_images(DataSpec(source=str(shapes)), "train")
    with pytest.raises(UnsupportedError, match="cannot log to wandb: RuntimeError: no API key log in"):
        finetune(open_checkpoint(str(tiny_checkpoint)), SPEC, tmp_path / "out", "cpu", images=images, tracking=tracking)
    assert not (tmp_path / "out").exists()


# The trackers themselves, where they are installed


def train(checkpoint: Path, shapes: Path, output: Path, tracking: Tracking) -> float:
    """Top-1 in percent after a short training that is logged."""
    data = DataSpec(source=str(shapes))
    splits = {"images": open_images(data, "train"), "test": open_images(data, "test")}
    report = finetune(open_checkpoint(str(checkpoint)), SPEC, output, "cpu", **splits, tracking=tracking)
    assert report.test_top1_percent is not None
    return report.test_top1_percent


def read_events(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: [one.value for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracking = Tracking(("tensorboard",), "run", tmp_path / "log")
    top1 = train(tiny_checkpoint, shapes, tmp_path / "out", tracking)
    tracking.log([make_record("nf4"), make_record("fp8", failure="fp8 cannot run on cpu")])

    assert {path.name for path in tmp_path.iterdir()} == {"out", "log"}
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"training", "nf4"}
    training = read_events(tmp_path / "log" / "training")
    assert len(training["train/loss"]) == SPEC.epochs and training["eval/top1_percent"] == pytest.approx([top1])
    assert {name: value for name, (value,) in read_events(tmp_path / "log" / "nf4").items()} == pytest.approx(EXPECTED)


def test_a_run_logs_its_records_and_is_not_measured_again_for_it(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    evaluate = {"latency": {"iterations": 4, "rounds": 2, "warmup_seconds": 0}, "end_to_end": False}
    variants = [{"name": "fp32", "format": "fp32"}, {"name": "bf16", "format": "bf16"}]
    content = {"name": "x", "model": str(tiny_checkpoint), "data": str(shapes), "evaluate": evaluate, "device": "cpu"}
    content |= {"variants": variants, "log_to": ["tensorboard"]}
    result = pipeline.run(Recipe.model_validate(content), tmp_path / "run")

    for record in result.records:
        logged = read_events(tmp_path / "run" / "log" / record.variant.name)
        assert logged["top1_percent"] == pytest.approx([record.accuracy.top1_percent])
        assert logged["batch_1/p50_ms"] == pytest.approx([record.latency[0].p50_ms])
    said: list[str] = []
    pipeline.run(Recipe.model_validate(content | {"log_to": []}), tmp_path / "run", said.append)
    assert said and all("skipped" in line for line in said)

    shutil.rmtree(tmp_path / "run" / "log")
    told = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--log-to", "tensorboard"])
    assert told.exit_code == 0 and {path.name for path in (tmp_path / "run" / "log").iterdir()} == {"fp32", "bf16"}


def test_mlflow(tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())

    tracking = Tracking(("mlflow",), "run")
    top1 = train(tiny_checkpoint, shapes, tmp_path / "out", tracking)
    tracking.log([make_record("nf4")])

    assert mlflow.active_run() is None
    runs = {run.info.run_name: run.data.metrics for run in mlflow.search_runs(output_format="list")}
    assert set(runs) == {"run training", "run nf4"}
    assert "loss" in runs["run training"] and runs["run training"]["eval_top1_percent"] == pytest.approx(top1)
    assert runs["run nf4"] == pytest.approx(EXPECTED)


def test_wandb(tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")

    tracking = Tracking(("wandb",), "run")
    train(tiny_checkpoint, shapes, tmp_path / "out", tracking)
    tracking.log([make_record("nf4")])

    assert wandb.run is None
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
