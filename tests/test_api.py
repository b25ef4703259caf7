"""`import vitopt` as a notebook uses it: the example of the README, own data, models, metrics, and wrong input."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, draw
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from transformers import AutoImageProcessor, AutoModelForImageClassification

import vitopt
from vitopt.errors import CheckpointError, DataError, MeasurementError, RecipeError, RecordError, StorageError
from vitopt.records import Record, Variant, load_record
from vitopt.report.page import write_report

README = Path(__file__).parents[1] / "README.md"
QUICK = {"latency": {"iterations": 3, "warmup_seconds": 0}, "end_to_end": False, "look_alikes": False}


def test_the_import_is_light_and_knows_its_functions() -> None:
    code = (
        "import sys, vitopt; assert {*vitopt.__all__} <= {*dir(vitopt)}; print({'torch', 'pydantic'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match="nothing"):
        vitopt.nothing  # noqa: B018


def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, shapes: Path
) -> None:
    example = re.search(r"## In Python\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    draw("cross", np.random.default_rng(0)).save("photo.png")
    code = example[1].replace("vit-quickstart", str(tiny_checkpoint)).replace('"digits")', "DATA, **QUICK)")
    names: dict[str, Any] = {"DATA": str(shapes), "QUICK": QUICK}
    exec(code.replace('"digits"', "DATA"), names)
    assert names["verdict"].decision in ("shown", "failed", "undecided")
    after = names["results"]["w8a8"].record
    assert after.layer_plan["w8a8"] > 0 and after.dataset.split == "test"
    assert names["verdict"].record.versus_baseline == after.versus_baseline
    for shown in (names["results"], names["results"]["fp32"], names["verdict"]):
        assert "| w8a8 | w8a8 |" in repr(shown) or "| fp32 | fp32 |" in shown._repr_markdown_()
    assert "loss of top-1" in repr(names["verdict"])
    (answer,) = names["model"].predict("photo.png", top=3)
    assert answer["image"] == "photo.png" and len(answer["classes"]) == 3
    opened = AutoModelForImageClassification.from_pretrained("out/w8a8")
    processor = AutoImageProcessor.from_pretrained("out/w8a8")
    pixels = processor(Image.open("photo.png"), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = opened(pixels).logits
    assert torch.allclose(names["model"](pixels).float(), expected.float(), atol=1e-2)
    assert answer["classes"][0]["index"] == int(expected.argmax())


def two_shapes(count: int, seed: int) -> list[tuple[Image.Image, set[str]]]:
    """Pictures of one or two shapes side by side, with their names."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        left, right = rng.choice(CLASSES, 2)
        pairs.append((Image.fromarray(np.hstack([draw(left, rng), draw(right, rng)])), {str(left), str(right)}))
    return pairs


def mean_average_precision(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Mean over labels of the precision at each image that has the label, in order of its score."""
    order = np.argsort(-outputs, axis=0, kind="stable")
    right = np.take_along_axis(labels, order, axis=0)
    precision = right.cumsum(axis=0) / np.arange(1, len(right) + 1)[:, None]
    return float(((precision * right).sum(axis=0) / right.sum(axis=0).clip(1)).mean())


def test_a_multi_label_model(tmp_path: Path, tiny_checkpoint: Path) -> None:
    tested = two_shapes(60, seed=1)
    tuned = vitopt.finetune(
        tiny_checkpoint, two_shapes(64, seed=0), tmp_path / "tuned", method="full", epochs=4, augment=False
    )
    small = vitopt.quantize(tuned, tmp_path / "nf4", format="nf4")
    metrics = {"mAP": mean_average_precision}
    results = vitopt.evaluate({"fp32": tuned, "nf4": small}, tested, metrics=metrics, **QUICK)
    labels = np.array([[name in names for name in CLASSES] for _, names in tested])
    for name, folder in (("fp32", tmp_path / "tuned"), ("nf4", tmp_path / "nf4")):
        model = AutoModelForImageClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        with torch.inference_mode():
            logits = model(processor([image for image, _ in tested], return_tensors="pt")["pixel_values"]).logits
        expected = average_precision_score(labels, logits.float().sigmoid().numpy(), average="macro")
        record = results[name].record
        assert record.metrics["mAP"].value == pytest.approx(expected, abs=0.02)
        outputs = results[name].predictions.logits
        if name == "fp32":  # in 16 bit scores tie, which sklearn takes together
            exactly = average_precision_score(labels, outputs, average="macro")
            assert record.metrics["mAP"].value == pytest.approx(exactly)
        low, high = record.metrics["mAP"].ci95
        assert low < record.metrics["mAP"].value < high
        assert record.accuracy is None and record.versus_baseline is None and "labels" in record.unmeasured["accuracy"]
        assert record.batch_invariance.agreement_percent is None
    assert model.config.problem_type == "multi_label_classification"
    # It has learnt: labels at random have their share as average precision.
    assert results["fp32"].record.metrics["mAP"].value > labels.mean() + 0.05
    change = results["nf4"].record.metrics["mAP"]
    assert change.baseline == "fp32" and change.delta_ci95[0] <= change.delta <= change.delta_ci95[1]
    assert "mAP" in repr(results) and "top-1" not in repr(results).partition("- ")[0]
    seen = vitopt.evaluate(tuned, two_shapes(3, seed=0), **QUICK)["tuned"].record
    assert [(one.where, one.same) for one in seen.dataset.overlaps] == [("training", 3)]
    classes = vitopt.load(tuned).predict(tested[0][0], top=4)[0]["classes"]
    assert sum(one["percent"] for one in classes) != pytest.approx(100)  # labels do not exclude each other


def recall_at_1(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each image, whether the nearest of the others has its label."""
    distances = np.square(outputs[:, None] - outputs[None]).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return labels[distances.argmin(axis=1)] == labels


def as_array(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)


def test_a_retrieval_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = [(draw(name, rng), name) for name in np.tile(CLASSES, 12).tolist()]
    pooled = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())
    models = {
        "fp32": vitopt.wrap(pooled, as_array, outputs="embedding"),
        "coarse": vitopt.wrap(lambda pixels: pooled(pixels).mul(2).round(), as_array, outputs="embedding"),
    }
    results = vitopt.evaluate(models, pairs, metrics=recall_at_1, output=tmp_path / "run", **QUICK)
    labels = [name for _, name in pairs]
    for name, model in models.items():
        vectors = np.stack([model(as_array(image)[None])[0].numpy() for image, _ in pairs])
        nearest = cross_val_predict(KNeighborsClassifier(1, algorithm="brute"), vectors, labels, cv=LeaveOneOut())
        record = results[name].record
        assert record.metrics["recall_at_1"].value == pytest.approx(np.mean(nearest == labels))
        assert record.accuracy is None and record.versus_baseline is None
        assert "embedding" in record.unmeasured["accuracy"]
        assert record.latency and record.failure is None
    change = results["coarse"].record.metrics["recall_at_1"]
    assert change.delta < 0 and change.delta_ci95[0] < change.delta < change.delta_ci95[1]
    folders = [tmp_path / "run" / "variants" / name for name in ("coarse", "fp32")]
    assert load_record(folders[0]) == results["coarse"].record
    page = write_report(tmp_path / "run").with_name("report.md").read_text()
    assert "recall_at_1 0.8" in page and "random pixels" not in page and "Repeat it" not in page
    for pair in ([results["coarse"], results["fp32"]], folders):
        compared = vitopt.compare(*pair, max_kl=0.1)
        assert compared.comparison.versus is None and compared.decision == "undecided"
        assert compared.record.metrics["recall_at_1"] == change


class Plain:
    """The six members, and nothing of vitopt."""

    name, device = "own", torch.device("cpu")
    preprocess = staticmethod(as_array)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))

    def describe(self) -> dict[str, Any]:
        return {"variant": Variant(name=self.name, format="mean")}


def colours(count: int = 30) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    return [((rng.integers(0, 90, (8, 8, 3)) + 150 * np.eye(3)[i % 3]).astype(np.uint8), i % 3) for i in range(count)]


def test_own_models_of_any_kind_are_compared() -> None:
    models = {"plain": Plain(), "wrapped": vitopt.wrap(lambda pixels: Plain()(pixels) + 1, as_array)}
    results = vitopt.evaluate(models, colours(), baseline="wrapped", **QUICK)
    assert results["plain"].record.accuracy.top1_percent == 100
    assert results["plain"].record.versus_baseline.agreement_percent == 100 and len(results) == 2
    assert Plain.name == "own"
    named = vitopt.wrap(Plain(), as_array, name="named", label_names=["red", "green", "blue"])
    pairs = [(pixels, ("red", "green", "blue")[label]) for pixels, label in colours()]
    record = vitopt.evaluate(named, vitopt.images(pairs, name="c", groups=range(30)), **QUICK)["named"].record
    assert record.accuracy.top1_percent == 100 and record.dataset.groups == 30 and record.dataset.name == "c"


def test_own_preprocessing_stands_instead_of_the_checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def dark(image: Image.Image) -> torch.Tensor:
        seen.append(image.size)
        return torch.zeros(3, 32, 32)

    pairs = colours(16)
    tuned = vitopt.finetune(tiny_checkpoint, pairs, tmp_path / "dark", preprocess=dark, epochs=1)
    assert len(seen) >= 16
    result = vitopt.evaluate(tuned, pairs, preprocess=dark, **QUICK)["dark"]
    assert np.ptp(result.predictions.logits, axis=0).max() < 1e-4 < np.ptp(result.predictions.logits)
    assert torch.equal(vitopt.load(tuned, preprocess=dark).preprocess(pairs[0][0]), torch.zeros(3, 32, 32))


def test_a_skip_list_is_chosen_on_pairs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pairs = [(draw(name, rng), name) for name in np.tile(CLASSES, 4).tolist()]
    auto = {"max_top1_drop": None, "max_kl_share": 0.9}
    small = vitopt.quantize(tiny_checkpoint, tmp_path / "small", format="nf4", skip="auto", auto=auto, data=pairs)
    assert (tmp_path / "small.sensitivity" / "sensitivity.json").is_file()
    overlaps = vitopt.evaluate(vitopt.load(small), pairs[:4], limit=2, **QUICK)["small"].record.dataset.overlaps
    assert [(one.where, one.same) for one in overlaps] == [("skip list", 2)]


def test_help_shows_the_fields_of_the_specs() -> None:
    shown = inspect.signature(vitopt.evaluate).parameters
    assert shown["compile"].default is False and shown["limit"].default is None and "source" not in shown
    assert "epochs" in inspect.signature(vitopt.finetune).parameters
    quantize = inspect.signature(vitopt.quantize).parameters
    assert quantize["layers"].default == {} and "compile" not in quantize


PAIRS = colours(4)
MODEL = Plain()


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: vitopt.finetune("vit-quickstart", PAIRS, "x", epoch=1), RecipeError, "epoch.*did you mean 'epochs'"),
        (lambda: vitopt.finetune("vit-quickstart", PAIRS, "x", epochs=-1), RecipeError, "epochs.*-1"),
        (lambda: vitopt.finetune("vit-quickstart", PAIRS, "x", test="test"), RecipeError, "test"),
        (lambda: vitopt.finetune("vit-quickstart", PAIRS, "x", group_column="video"), RecipeError, "group_column"),
        (
            lambda: vitopt.finetune("vit-quickstart", [(PAIRS[0][0], {1})], "x", label_smoothing=0.1),
            RecipeError,
            "label_smoothing",
        ),
        (lambda: vitopt.finetune("vit-quickstart", [(PAIRS[0][0], 10), PAIRS[0]], "x"), DataError, "label 10"),
        (lambda: vitopt.finetune("nowhere/at/all", PAIRS, "x"), CheckpointError, "nowhere"),
        (lambda: vitopt.quantize("vit-quickstart", "x", format="int3"), RecipeError, "int3"),
        (lambda: vitopt.quantize("vit-quickstart", "x", format="nf4", compile=True), RecipeError, "compile"),
        (lambda: vitopt.quantize("vit-quickstart", "x", format="nf4", skip="auto"), RecipeError, "skip='auto'"),
        (lambda: vitopt.quantize("vit-quickstart", "x", format="nf4", data=PAIRS), RecipeError, "skip='auto'"),
        (
            lambda: vitopt.quantize("vit-quickstart", "x", format="nf4", skip="auto", data=[(PAIRS[0][0], {1})]),
            RecipeError,
            "sets of labels",
        ),
        (lambda: vitopt.evaluate(MODEL, PAIRS, compil=True), RecipeError, "compil.*'compile'"),
        (lambda: vitopt.evaluate(MODEL, PAIRS, compile=True), RecipeError, "compile.*checkpoints"),
        (lambda: vitopt.evaluate({}, PAIRS), RecipeError, "no model"),
        (lambda: vitopt.evaluate({"a": MODEL}, PAIRS, baseline="b"), RecipeError, "'b'"),
        (lambda: vitopt.evaluate(lambda pixels: pixels, PAIRS), RecipeError, "describe|name.*wrap"),
        (lambda: vitopt.evaluate({"a/b": MODEL}, PAIRS, output="x"), RecipeError, "a/b"),
        (lambda: vitopt.evaluate(MODEL, metrics=recall_at_1), RecipeError, "metrics"),
        (lambda: vitopt.evaluate(MODEL, [(PAIRS[0][0], 0), 3]), DataError, "item 1"),
        (lambda: vitopt.evaluate(MODEL, [(PAIRS[0][0], 3)]), DataError, "label 3.*own"),
        (lambda: vitopt.evaluate(MODEL, [(PAIRS[0][0], {0, 3})]), DataError, "label 3.*own"),
        (lambda: vitopt.evaluate(MODEL, [(PAIRS[0][0], "red")]), DataError, "own.*label_names"),
        (lambda: vitopt.evaluate("vit-quickstart", [(PAIRS[0][0], "zebra")]), DataError, "zebra"),
        (lambda: vitopt.evaluate(MODEL, PAIRS, metrics=lambda o, y: 1 / 0), MeasurementError, "lambda.*ZeroDivision"),
        (
            lambda: vitopt.evaluate(MODEL, PAIRS, metrics={"own metric": lambda o, y: "x"}),
            MeasurementError,
            "own metric",
        ),
        (lambda: vitopt.compare("nowhere", "nowhere"), RecordError, "nowhere"),
        (lambda: vitopt.load("vit-quickstart", autotune=True), RecipeError, "compile"),
        (lambda: vitopt.load("vit-quickstart", preprocess=lambda image: image), RecipeError, "preprocess.*Image"),
        (lambda: vitopt.wrap(3, as_array), RecipeError, "int"),
        (lambda: vitopt.wrap(MODEL, as_array, outputs="class"), RecipeError, "'classes'"),
        (lambda: vitopt.wrap(MODEL, lambda image: 1 / 0), RecipeError, "ZeroDivision"),
    ],
)
def test_wrong_input_is_refused_in_words(
    call: Any, kind: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words) as refused:
        call()
    assert len(str(refused.value).splitlines()) <= 2  # a count of mistakes stands above them
    assert not list(tmp_path.iterdir())


def test_a_folder_of_others_is_never_replaced(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for call in (
        lambda: vitopt.finetune(tiny_checkpoint, PAIRS, tmp_path),
        lambda: vitopt.quantize(tiny_checkpoint, tmp_path, format="nf4"),
        lambda: vitopt.evaluate(MODEL, PAIRS, output=tmp_path),
    ):
        with pytest.raises(StorageError, match=r"mine\.txt"):
            call()


def test_a_result_that_failed_or_has_no_images_is_not_compared() -> None:
    timed = vitopt.evaluate(MODEL, **QUICK)["own"]
    assert isinstance(timed.record, Record) and timed.record.latency
    with pytest.raises(RecordError, match="without data"):
        vitopt.compare(timed, timed)


def test_a_wrapped_module_runs_in_evaluation_mode_and_must_return_vectors() -> None:
    model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Dropout(0.9))
    assert vitopt.evaluate(vitopt.wrap(model, as_array), colours(), **QUICK)["Sequential"].record.size is not None
    assert not model.training
    result = vitopt.evaluate(vitopt.wrap(lambda pixels: pixels, as_array, name="flat"), colours(), **QUICK)["flat"]
    assert "(images, outputs)" in result.record.failure
