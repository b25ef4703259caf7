"""The analysis of an engine: every list is a file of it, and the figures are those of the files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint

from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import Preprocessor, batches
from vitopt.engines import package
from vitopt.engines.runtime import prepare
from vitopt.errors import UnsupportedError
from vitopt.measure.logit_statistics import mean_kl_divergence
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.recipe import AutoSkipSpec, DataSpec, LatencySpec, RunSpec, VariantSpec
from vitopt.report.sensitivity import write_sensitivity_page
from vitopt.search import rebuilt
from vitopt.search.analysis import analyse, analyse_for
from vitopt.search.confirmation import divide
from vitopt.search.goal import Goal

ENGINE = {"engine": "openvino"}


@dataclass
class RoundingEngine:
    """Rounds the weights of int8 layers, those of fc2 coarsely; notes what it wrote, and on how many images."""

    MODEL_FILE = "model.bin"
    EXAMPLE = ""

    def __post_init__(self):
        self.wrote = []

    def why_not(self, format):
        return None

    @torch.no_grad()
    def write(self, model, size, plan, images, folder):
        int8 = plan.modules("w8a8")
        self.wrote.append((len(int8), None if images is None else len(images)))
        for module in int8:
            weight = model.get_submodule(f"model.{module}").weight
            step = weight.abs().max() / (1.5 if module.endswith("fc2") else 20)
            weight.copy_((weight / step).round() * step)
        torch.save(model, folder / "model.bin")
        return {"int8": int8}

    def load(self, folder, settings):
        return _Call(torch.load(folder / "model.bin", weights_only=False), settings["int8"])


@dataclass
class _Call:
    model: torch.nn.Module
    int8: list[str]
    fixed_shapes = True

    @torch.inference_mode()
    def __call__(self, pixel_values):
        return self.model(torch.from_numpy(pixel_values)).numpy()

    def formats(self, modules):
        return {module: "w8a8" if module in self.int8 else "fp32" for module in modules}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RoundingEngine:
    fake = RoundingEngine()
    for place in ("vitopt.engines.package", "vitopt.engines.runtime"):
        monkeypatch.setattr(f"{place}.engine_module", lambda name: fake)
    for place in ("vitopt.engines.package", "vitopt.engines.note", "vitopt.search.rebuilt"):
        monkeypatch.setattr(f"{place}.installed_version", lambda name: "1")
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: True)
    monkeypatch.setattr(rebuilt, "LATENCY", LatencySpec(iterations=4, rounds=2, warmup_seconds=0))
    return fake


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("rebuilt") / "two", blocks=2)))


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes), limit=40), "train")


def kl_of(folder: Path, checkpoint: Checkpoint, images: ImageSet) -> float:
    """Of the file that `package.make` wrote, from the checkpoint in fp32."""
    runnable = prepare(
        open_checkpoint(str(folder)), name="x", device=torch.device("cpu"), run=RunSpec(engine="openvino")
    )
    exact, found = [], []
    model = load_model(checkpoint, dtype=torch.float32)
    for batch in batches(images, Preprocessor(load_processor(checkpoint)), 8):
        with torch.inference_mode():
            exact.append(model(batch.pixel_values).logits.numpy())
        found.append(runnable(batch.pixel_values).numpy())
    return mean_kl_divergence(np.concatenate(exact), np.concatenate(found))


def test_the_kind_that_carries_the_damage_is_kept(engine, checkpoint, images, tmp_path):
    result = analyse(checkpoint, images, "w8a8", tmp_path / "s.json", **ENGINE, goal=Goal(None, 0.5))
    assert [unit.unit for unit in result.units] == ["query", "key", "value", "output", "fc1", "fc2"]
    assert result.granularity == "kind" and result.half == "fp32" and result.search.objective == "latency"
    assert min(result.units, key=lambda unit: unit.recovery.kl).unit == "fc2"
    assert "fc2" in result.search.chosen
    points = {point.skip: point for point in result.search.points}
    assert set(points) >= {(), ("fc2",), ("query",)}
    assert all(point.extra_ms is not None and point.extra_bytes >= 0 for point in points.values())
    variant = VariantSpec(name="v", format="w8a8", engine="openvino", skip=["fc2"])
    package.make(checkpoint, variant, tmp_path / "made")
    choosing = divide(images)[0]
    assert points[("fc2",)].loss.kl == pytest.approx(kl_of(tmp_path / "made", checkpoint, choosing), rel=1e-3)
    parameters = sum(p.numel() for n, p in load_model(checkpoint).named_parameters() if "fc2.weight" in n)
    assert points[("fc2",)].extra_bytes == 3 * parameters  # 4 bytes instead of 1
    assert sorted(file.name for file in tmp_path.iterdir() if not file.name.startswith(".")) == ["made", "s.json"]
    page = write_sensitivity_page(tmp_path / "s.json").read_text()
    assert "timed as a whole" in page and "milliseconds" in page
    assert "kinds of layer" in page and f"skip: [{', '.join(result.search.chosen)}]" in page


def test_scales_come_from_their_images_and_are_an_input(engine, checkpoint, images, tmp_path):
    scales = images.subset(range(3))
    fixed = {**ENGINE, "static_scales": True}
    with pytest.raises(UnsupportedError, match="static scales of openvino take calibration images"):
        analyse(checkpoint, images, "w8a8", tmp_path / "s.json", **fixed)
    result = analyse(checkpoint, images, "w8a8", tmp_path / "s.json", **fixed, scales=scales)
    assert {count for _, count in engine.wrote} == {None, 3}
    files = len(engine.wrote)
    again = analyse(checkpoint, images, "w8a8", tmp_path / "s.json", **fixed, scales=scales)
    assert again == result and len(engine.wrote) == files
    analyse(checkpoint, images, "w8a8", tmp_path / "s.json", **fixed, scales=images.subset(range(4)))
    assert len(engine.wrote) == 2 * files


def test_an_interrupted_analysis_builds_no_file_again(engine, checkpoint, images, monkeypatch, tmp_path):
    kinds = iter(("query", "key"))

    def stop(self, runnable):
        if next(kinds, None) is None:
            raise KeyboardInterrupt
        return 0.0

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rebuilt.Rebuilt, "_extra_ms", stop)
        analyse(checkpoint, images, "w8a8", tmp_path / "s.json", **ENGINE)
    left = sorted((tmp_path / "s.partial").glob("*.safetensors"))
    assert len(left) == 1 + 2
    engine.wrote.clear()
    analyse(checkpoint, images, "w8a8", tmp_path / "s.json", **ENGINE)
    assert len(engine.wrote) == 6  # fp32, all int8, and one for each of the four kinds that are left


def test_blocks_can_be_asked_for_and_a_sample_narrows_them(engine, checkpoint, images, tmp_path):
    asked = {"granularity": "block", "sample": 4, "candidates": 1}
    result = analyse(checkpoint, images, "w8a8", tmp_path / "s.json", **ENGINE, **asked)
    assert set(result.sample_kl) == {"block.0", "block.1"} and len(result.units) == 1


def test_a_variant_gets_its_list_in_its_engine(engine, checkpoint, images, tmp_path):
    asked = {"skip": ["auto"], "auto": {"max_top1_drop": None, "max_kl_share": 0.5, "objective": "size"}}
    variant = VariantSpec(name="v", format="w8a8", engine="openvino", static_scales=True, **asked)
    result = analyse_for(checkpoint, images, variant, tmp_path / "s.json", scales=images.subset(range(2)))
    assert "fc2" in result.search.chosen and result.inputs["engine"] == "openvino"
    assert [count for _, count in engine.wrote].count(None) == 1  # the fp32 file, for scores and search


def test_by_default_an_engine_is_given_a_goal_of_kl(engine, checkpoint, images, tmp_path):
    engines = VariantSpec(name="v", format="w8a8", engine="openvino", skip=["auto"])
    assert "KL is at most 0.005 nats" in analyse_for(checkpoint, images, engines, tmp_path / "s.json").search.goal
    asked = engines.model_copy(update={"auto": AutoSkipSpec(max_top1_drop=1)})
    torchs = VariantSpec(name="v", format="nf4", skip=["auto"])
    assert Goal.of(asked.search_spec) == Goal.of(torchs.search_spec) == Goal(max_top1_drop=1)
