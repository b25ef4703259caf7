"""`--format auto`: which candidates there are, and which of them is chosen."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from vitopt import inference
from vitopt.data.images import ImageSet, open_images
from vitopt.environment import launch, support
from vitopt.errors import CheckpointError, DataError, RecipeError, RecordError
from vitopt.measure import evaluator
from vitopt.measure.intervals import wilson_interval
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.recipe import DataSpec, EvaluateSpec, FastestSpec, LatencySpec, VariantSpec
from vitopt.records import Dataset, Latency, Record, Variant, VersusBaseline
from vitopt.search import fastest
from vitopt.search.fastest import candidates, choose, find_fastest, load_choice, save_choice

CPU = torch.device("cpu")
QUICK = EvaluateSpec(batch_size=8, end_to_end=False, latency=LatencySpec(iterations=8, rounds=4, warmup_seconds=0))


ROUNDS = 10


def record(name: str, p50_ms: float | None, agreement: float | None = None, images: int = 1000) -> Record:
    """What `choose` looks at; a None time is a variant that could not be timed. Rounds differ by up to 1 %."""
    versus, dataset = None, None
    if agreement is not None:
        dataset = Dataset(name="images", split="train", images=images, sha256="", preprocessor="")
        versus = VersusBaseline(
            baseline="fp32",
            top1_delta_points=0,
            top1_delta_ci95_points=(0, 0),
            agreement_percent=agreement,
            agreement_ci95_percent=[
                100 * limit for limit in proportion_confint(round(images * agreement / 100), images, method="wilson")
            ],
            right_to_wrong=0,
            wrong_to_right=0,
            mcnemar_p=1,
            mean_kl_divergence=0,
            normalised_logit_error=0,
            smallest_visible_loss_points=1,
            verdict="",
        )
    latency = []
    if p50_ms is not None:
        times = {"mean_ms": p50_ms, "std_ms": 0, "min_ms": p50_ms, "p50_ms": p50_ms, "p95_ms": None, "p99_ms": None}
        counts = {"batch_size": 1, "iterations": 2 * ROUNDS, "rounds": ROUNDS, "warmup_ms": 0, "warmup_iterations": 1}
        rng = np.random.default_rng(list(name.encode()))
        samples = np.repeat(p50_ms * (1 + rng.uniform(-0.01, 0.01, ROUNDS)), 2).tolist()
        latency = [Latency(**times, **counts, images_per_second=1000 / p50_ms, samples_ms=tuple(samples))]
    variant = Variant(name=name, format=name)
    return Record(variant=variant, versus_baseline=versus, latency=tuple(latency), dataset=dataset)


def test_the_fastest_that_is_shown_to_agree_is_chosen() -> None:
    reference = record("fp32", 10.0)
    agreeing, disagreeing, slow = record("bf16", 4.0, 99.0), record("fp8", 1.0, 97.9), record("w8a8", 12.0, 100.0)
    assert choose([reference, disagreeing, agreeing, slow], 98) == "bf16"
    assert choose([reference, disagreeing, agreeing, slow], 96) == "fp8"


def test_an_agreement_that_only_the_estimate_has_is_not_enough() -> None:
    """49 of 50 is not 98 %: the interval begins at 89.5 %."""
    few, many = record("bf16", 5.0, 98.0, images=50), record("bf16", 5.0, 99.0, images=2000)
    assert choose([record("fp32", 10.0), few], 98) == "fp32"
    assert choose([record("fp32", 10.0), few], 89) == "bf16"
    assert choose([record("fp32", 10.0), many], 98) == "bf16"


def test_what_is_not_shown_to_be_faster_does_not_displace_what_is_simpler() -> None:
    """9.99 ms against 10.00 is no difference on rounds that differ by 1 %."""
    assert choose([record("fp32", 10.0), record("bf16", 9.99, 100.0)], 98) == "fp32"
    compiled, plain = record("bf16-compiled", 4.99, 100.0), record("bf16", 5.0, 100.0)
    assert choose([record("fp32", 10.0), plain, compiled], 98) == "bf16"
    assert choose([record("fp32", 10.0), plain, record("bf16-compiled", 4.5, 100.0)], 98) == "bf16-compiled"


def test_an_undecided_candidate_is_named_with_the_images_that_it_takes() -> None:
    variants = {variant.name: variant for variant in candidates(CPU, "bf16", compile=False)}
    undecided, slow = record("w8a8", 4.0, 99.0, images=400), record("bf16", 20.0, 99.0, images=400)
    worse = record("fp8", 4.0, 97.5, images=400)
    measured = (record("fp32", 10.0), undecided, slow, worse)
    choice = fastest.Choice(variant=variants["fp32"], records=measured, min_agreement_percent=98)
    first, second = choice.undecided()  # what is slower anyway is not worth more images
    assert first.startswith("w8a8 agrees on 99.0 % of 400 images, which does not show 98 %")
    needed = int(first.split("about ")[1].split()[0].replace(",", ""))
    fewest = next(count for count in range(needed + 1) if wilson_interval(count, needed).low >= 0.98)
    assert 0.75 <= stats.binom.sf(fewest - 1, needed, 0.99) <= 0.85
    assert second.startswith("fp8 agrees on 97.5 %") and "images:" not in second.split("(95 %): ")[1]


@pytest.mark.parametrize(("least", "remedy"), [(98, r"give at least \d"), (100, "less than 100 %")])
def test_too_few_images_are_refused_before_the_work(
    checkpoint: Checkpoint, shapes: Path, monkeypatch: pytest.MonkeyPatch, least: float, remedy: str
) -> None:
    monkeypatch.setattr(inference, "make", lambda *_, **__: pytest.fail("measured anyway"))
    images = open_images(DataSpec(source=str(shapes)), "train")
    with pytest.raises(RecipeError, match=f"32 images cannot show.*{remedy}"):
        fastest_of(checkpoint, images, min_agreement=least)


def test_fp32_stays_where_nothing_faster_agrees() -> None:
    assert choose([record("fp32", 10.0), record("w8a8", 5.0, 90.0), record("bf16", 11.0, 100.0)], 98) == "fp32"


def test_what_could_not_be_timed_is_not_chosen() -> None:
    assert choose([record("fp32", 10.0), record("bf16", None, 100.0), record("w8a8", 9.0, 100.0)], 98) == "w8a8"


def test_candidates_are_what_the_device_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [variant.name for variant in candidates(CPU, "bf16", compile=True)]
    assert names == ["fp32", "fp32-compiled", "bf16", "bf16-compiled", "w8a8", "w8a8-compiled"]
    assert [variant.name for variant in candidates(CPU, "bf16", compile=False)] == ["fp32", "bf16", "w8a8"]
    compiled = {variant.name: variant for variant in candidates(CPU, "bf16", compile=True)}["bf16-compiled"]
    assert compiled.run.compile and compiled.run.fuse_qkv
    monkeypatch.setattr(support, "why_not_format", lambda format, device: None)
    on_gpu = [variant.format for variant in candidates(torch.device("cuda"), "fp16", compile=False)]
    assert on_gpu == ["fp32", "fp16", "bf16", "w8a8", "fp8"]


def test_candidates_of_an_engine_are_its_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    able = SimpleNamespace(why_not=lambda format: "no bf16 arithmetic" if format == "bf16" else None)
    monkeypatch.setattr(fastest, "engine_module", lambda name: able)
    monkeypatch.setattr(support, "why_not_engine", lambda engine, device: None)
    found = candidates(CPU, "bf16", True, "openvino", static_scales=True)
    assert [(one.name, one.engine, one.static_scales) for one in found] == [
        ("fp32", "torch", False),
        ("openvino-fp32", "openvino", False),
        ("openvino-w8a8", "openvino", False),
        ("openvino-w8a8-static", "openvino", True),
    ]
    assert len(candidates(CPU, "bf16", True, "openvino")) == 3
    monkeypatch.setattr(support, "why_not_engine", lambda engine, device: "it is not installed")
    assert [one.name for one in candidates(CPU, "bf16", True, "openvino")] == ["fp32"]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


def fastest_of(checkpoint: Checkpoint, images: ImageSet, min_agreement: float = 0) -> fastest.Choice:
    spec = FastestSpec(min_agreement=min_agreement, compile=False)
    choice = find_fastest(checkpoint, images, spec, QUICK, device="cpu")
    assert choice is not None
    return choice


def test_candidates_of_a_compiled_file_are_torchs_formats_that_run_here() -> None:
    found = candidates(CPU, "fp16", compile=True, engine="aoti")
    assert [one.name for one in found] == ["fp32", "aoti-fp32", "aoti-bf16", "aoti-w8a8"]
    assert all(one.fuse_qkv for one in found[1:]) and found[-1].half == "fp16"


def test_all_candidates_are_measured_against_fp32(checkpoint: Checkpoint, shapes: Path) -> None:
    images = open_images(DataSpec(source=str(shapes)), "train")
    choice = fastest_of(checkpoint, images)
    assert [record.variant.format for record in choice.records] == ["fp32", "bf16", "w8a8"]
    reference, *others = choice.records
    assert reference.versus_baseline is None
    for other in others:
        assert other.versus_baseline is not None and other.versus_baseline.baseline == "fp32"
        assert other.dataset is not None and other.dataset.images == len(images)
    assert choice.variant.name == choose(choice.records, 0)


def test_the_choice_is_told_with_its_figures(checkpoint: Checkpoint, shapes: Path) -> None:
    images = open_images(DataSpec(source=str(shapes)), "train")
    choice = fastest_of(checkpoint, images)
    by_name = {variant.name: variant for variant in candidates(CPU, "bf16", compile=False)}
    told = fastest.Choice(variant=by_name["bf16"], records=choice.records, min_agreement_percent=98).sentence()
    reference, measured = choice.records[:2]
    found = fastest.speedup(reference, measured)
    assert measured.versus_baseline is not None and found.interval is not None
    assert told.startswith(f"bf16 is chosen: {found.ratio:.2f} times as fast as fp32 ({found.interval.low:.2f} to ")
    assert f"on {measured.versus_baseline.agreement_percent:.1f} % (" in told and told.endswith(
        f"of {len(images)} images"
    )
    kept = fastest.Choice(variant=by_name["fp32"], records=choice.records, min_agreement_percent=99.5).sentence()
    assert kept == "no format is shown to be faster and to agree with fp32 on 99.5 %: fp32 is kept"


def test_a_candidate_that_cannot_be_made_is_left_out(
    checkpoint: Checkpoint, shapes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Callable[..., object] = inference.make

    def no_w8a8(source: Checkpoint, variant: object, *rest: object, **options: object) -> object:
        if variant.format == "w8a8":  # type: ignore[attr-defined]
            raise CheckpointError("no such luck")
        return real(source, variant, *rest, **options)

    monkeypatch.setattr(inference, "make", no_w8a8)
    images = open_images(DataSpec(source=str(shapes)), "train")
    choice = fastest_of(checkpoint, images)
    assert {record.variant.name: record.failure for record in choice.records} == {
        "fp32": None,
        "bf16": None,
        "w8a8": "no such luck",
    }
    assert choice.variant.name != "w8a8"
    assert "w8a8 is left out: no such luck" in caplog.messages


def test_the_main_process_alone_chooses(checkpoint: Checkpoint, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others know of no figures, only of candidates that could not be made."""
    row = evaluator.failed("w8a8", VariantSpec(name="w8a8", format="w8a8"), "not here", CPU)
    monkeypatch.setattr(fastest, "measure", lambda *_, **__: [row])
    monkeypatch.setattr(inference, "make", lambda *_, **__: None)
    monkeypatch.setattr(launch, "is_main_process", lambda: False)
    images = open_images(DataSpec(source=str(shapes)), "train")
    assert find_fastest(checkpoint, images, FastestSpec(min_agreement=0), QUICK, device="cpu") is None


def test_images_of_other_classes_are_refused(checkpoint: Checkpoint) -> None:
    images = open_images(DataSpec(source="digits", limit=20), "train")
    with pytest.raises(DataError):
        fastest_of(checkpoint, images)


def test_a_choice_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    variant = candidates(CPU, "bf16", compile=True)[-1]
    measured = (record("fp32", 10.0), record("w8a8", 4.0, 99.0))
    choice = fastest.Choice(variant=variant, records=measured, min_agreement_percent=97)
    save_choice(choice, tmp_path / "choice.json")
    assert load_choice(tmp_path / "choice.json") == choice


@pytest.mark.parametrize("broken", [None, "", "{}", "[1"])
def test_a_choice_that_cannot_be_read_is_an_error(broken: str | None, tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    if broken is not None:
        path.write_text(broken)
    with pytest.raises(RecordError, match=r"choice\.json"):
        load_choice(path)


def test_only_what_decides_is_measured() -> None:
    asked = EvaluateSpec(throughput=True, roofline=True, latency=LatencySpec(batch_sizes=(8, 32), iterations=20))
    wanted = fastest.how_measured(asked)
    assert wanted.latency.batch_sizes == (8,) and wanted.latency.iterations == 20
    assert not (wanted.end_to_end or wanted.throughput or wanted.roofline)
