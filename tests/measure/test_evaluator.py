"""The shared evaluator: its records are complete, agree with themselves and with an independent count."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitopt import inference
from vitopt.data.images import ImageSet, open_images
from vitopt.data.labels import fit_labels
from vitopt.data.pixels import Preprocessor
from vitopt.errors import MeasurementError
from vitopt.measure import evaluator, latency_rows, rates, throughput
from vitopt.measure.comparison import speed_ratio
from vitopt.measure.evaluator import Measured, evaluate, failed
from vitopt.measure.latency import Clock
from vitopt.models.checkpoint import load_model, load_processor, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import DataSpec, EvaluateSpec, LatencySpec, RunSpec, VariantSpec
from vitopt.records import Memory, Record, load_record, save_record

CPU = torch.device("cpu")
VARIANTS = (
    VariantSpec(name="base", format="fp32"),
    VariantSpec(name="small", format="nf4", skip=["block.0"], attention="flash_attention_2"),
)
SPEC = EvaluateSpec(
    batch_size=7,
    latency={"batch_sizes": [1, 3], "iterations": 100, "rounds": 5, "warmup_seconds": 0.2},
    end_to_end=False,
)
QUICK = EvaluateSpec(latency={"iterations": 6, "rounds": 3, "warmup_seconds": 0}, end_to_end=False)


class Spoiled:
    """A subject that fails as the test says and is otherwise the one it wraps."""

    def __init__(self, subject: TorchRunnable, name: str, spoil: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        self._subject, self.name, self._spoil = subject, name, spoil

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._subject, attribute)

    def describe(self) -> dict[str, Any]:
        fields = self._subject.describe()
        return fields | {"variant": fields["variant"].model_copy(update={"name": self.name})}

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._spoil(pixels, self._subject(pixels))


class Compiling(Clock):
    """A clock of calls that take 5 ms each, and five minutes the first time."""

    def __init__(self) -> None:
        self.seconds, self.known = 0.0, list[Any]()

    def now(self) -> float:
        return self.seconds

    def time(self, call: Callable[[], object]) -> float:
        call()
        taken_ms = 5.0 if call in self.known else 300_000.0
        self.known.append(call)
        self.seconds += taken_ms / 1000
        return taken_ms


@pytest.fixture(scope="module")
def images(shapes: Path, tiny_checkpoint: Path) -> ImageSet:
    labels = open_checkpoint(str(tiny_checkpoint)).label_names
    return fit_labels(open_images(DataSpec(source=str(shapes)), "test"), labels)


@pytest.fixture(scope="module")
def preprocess(tiny_checkpoint: Path) -> Preprocessor:
    return Preprocessor(load_processor(open_checkpoint(str(tiny_checkpoint))))


@pytest.fixture(scope="module")
def subjects(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TorchRunnable]:
    root = tmp_path_factory.mktemp("variants")
    for variant in VARIANTS:
        quantize(open_checkpoint(str(tiny_checkpoint)), variant, root / variant.name, "cpu")
    return [prepare(open_checkpoint(str(root / v.name)), name=v.name, device=CPU, run=v.run, asked=v) for v in VARIANTS]


@pytest.fixture(scope="module")
def measured(subjects: list[TorchRunnable], images: ImageSet) -> list[Measured]:
    return evaluate(subjects, SPEC, images=images, baseline="base")


@pytest.fixture(scope="module")
def records(measured: list[Measured]) -> list[Record]:
    return [one.record for one in measured]


def test_one_record_per_subject_in_order(records: list[Record]) -> None:
    assert [record.variant.name for record in records] == ["base", "small"]
    assert all(record.failure is None for record in records)


def test_a_record_tells_what_was_asked_for_and_what_ran(records: list[Record]) -> None:
    base, small = (record.variant for record in records)
    assert (base.format, base.skip, base.asked["attention"], base.ran["attention"]) == ("fp32", (), "sdpa", "sdpa")
    assert (small.format, small.half, small.skip) == ("nf4", "bf16", ("block.0",))
    assert (small.asked["attention"], small.ran["attention"]) == ("flash_attention_2", "sdpa")
    assert small.reasons.get("attention") == "FlashAttention-2 needs a CUDA device"
    assert not small.asked["compile"] and not small.ran["compile"] and small.reasons.get("compile") is None


def test_the_layer_plan_counts_the_live_layers(records: list[Record], subjects: list[TorchRunnable]) -> None:
    assert records[0].layer_plan == {"fp32": 19}
    assert records[1].layer_plan == {"bf16": 7, "nf4": 12}
    for record, subject in zip(records, subjects, strict=True):
        assert record.layers == subject.layers and record.layer_plan == Counter(record.layers.values())


def test_the_model_is_described_with_its_logical_size(records: list[Record], tiny_checkpoint: Path) -> None:
    parameters = sum(p.numel() for p in load_model(open_checkpoint(str(tiny_checkpoint))).parameters())
    for record in records:
        assert record.model is not None
        assert record.model.parameters == parameters
        assert record.model.architecture == "ViTForImageClassification"
        assert (record.model.image_size, record.model.classes) == ((32, 32), 4)
        assert record.model.source.endswith(record.variant.name)
    assert records[0].model.sha256 != records[1].model.sha256


def test_sizes_are_those_of_the_files_and_of_the_weights(records: list[Record], subjects: list[TorchRunnable]) -> None:
    for record, subject in zip(records, subjects, strict=True):
        assert record.size.disk_bytes == sum(path.stat().st_size for path in subject.checkpoint.folder.glob("[!.o]*"))
    assert records[0].size.weight_bytes == 4 * records[0].model.parameters
    assert records[1].size.weight_bytes < records[0].size.weight_bytes / 2
    assert records[1].memory.batch_size == 1


def test_accuracy_equals_an_independent_count(
    measured: list[Measured], images: ImageSet, subjects: list[TorchRunnable]
) -> None:
    pixels = np.stack([np.asarray(images.image(i), np.float32) / 127.5 - 1 for i in range(len(images))])
    pixel_values = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for one, subject in zip(measured, subjects, strict=True):
        with torch.inference_mode():
            logits = subject.model(pixel_values=pixel_values.to(subject.model.dtype)).logits.float().numpy()
        accuracy = one.record.accuracy
        assert accuracy is not None and one.predictions is not None
        expected = 100 * np.mean(logits.argmax(1) == np.array(images.labels))
        assert accuracy.top1_percent == pytest.approx(expected) and accuracy.images == 24
        np.testing.assert_allclose(one.predictions.logits, logits, atol=0.1)
        assert accuracy.top1_ci95_percent[0] < accuracy.top1_percent < accuracy.top1_ci95_percent[1]
        assert [row.name for row in accuracy.classes] == ["circle", "cross", "square", "stripe"]
        assert sum(row.images * row.top1_percent for row in accuracy.classes) / 24 == pytest.approx(expected)


def test_only_the_others_are_compared_with_the_baseline(measured: list[Measured]) -> None:
    base, small = measured
    assert base.record.versus_baseline is None
    assert all(row.speedup_vs_baseline is None for row in base.record.latency)
    versus = small.record.versus_baseline
    assert versus is not None and versus.baseline == "base"
    assert versus.top1_delta_points == pytest.approx(
        small.record.accuracy.top1_percent - base.record.accuracy.top1_percent
    )
    was, is_ = base.predictions.correct, small.predictions.correct
    assert (versus.right_to_wrong, versus.wrong_to_right) == ((was & ~is_).sum(), (~was & is_).sum())
    assert versus.agreement_percent == pytest.approx(
        100 * np.mean(base.predictions.classes == small.predictions.classes)
    )
    assert versus.mean_kl_divergence > 0


def test_latency_rows_agree_with_their_samples(records: list[Record]) -> None:
    for record in records:
        assert [row.batch_size for row in record.latency] == [1, 3] and record.latency_failures == ()
        for row in record.latency:
            samples = np.array(row.samples_ms)
            assert (row.iterations, row.rounds, len(samples)) == (100, 5, 100)
            assert row.p50_ms == pytest.approx(np.percentile(samples, 50), abs=1e-3)
            assert row.p99_ms == pytest.approx(np.percentile(samples, 99), abs=1e-3)
            assert row.mean_ms == pytest.approx(samples.mean(), abs=1e-3)
            assert row.min_ms <= row.p50_ms <= row.p95_ms <= row.p99_ms
            assert row.images_per_second == pytest.approx(1000 * row.batch_size / row.p50_ms)
            assert row.warmup_iterations >= 1 and row.warmup_ms > 0
            assert row.p50_ci95_ms[0] <= row.p50_ms <= row.p50_ci95_ms[1]
            assert row.p95_ms <= row.p95_ci95_ms[1] and row.p99_ci95_ms[1] is None  # p99 takes 368 samples
            assert row.discarded_calls >= 2 and row.settled in (True, False)
            assert row.device_p50_ms is None and row.device_samples_ms is None


def test_the_speed_up_is_the_mean_of_the_rounds_ratios(records: list[Record]) -> None:
    for base, small in zip(records[0].latency, records[1].latency, strict=True):
        medians = [np.median(np.reshape(row.samples_ms, (5, 20)), axis=1) for row in (base, small)]
        assert small.speedup_vs_baseline == pytest.approx(np.exp(np.log(medians[0] / medians[1]).mean()), rel=1e-3)
        assert small.speedup_ci95[0] <= small.speedup_vs_baseline <= small.speedup_ci95[1]


def test_the_images_are_named_and_hashed(records: list[Record], images: ImageSet, shapes: Path) -> None:
    for record in records:
        dataset = record.dataset
        assert (dataset.name, dataset.split, dataset.images) == (str(shapes), "test", 24)
        assert dataset.sha256 == images.sha256 and dataset.skipped == ()
        assert dataset.preprocessor.startswith("ViTImageProcessor")


def test_the_environment_is_recorded(records: list[Record]) -> None:
    for record in records:
        assert record.environment["device"] == "cpu"
        assert record.environment["libraries"]["torch"] == torch.__version__
        assert record.command is None and record.created.endswith("+00:00")  # no command made it


def test_records_survive_the_disk(records: list[Record], tmp_path: Path) -> None:
    for record in records:
        save_record(record, tmp_path)
        assert load_record(tmp_path) == record
        assert json.loads((tmp_path / "record.json").read_text()) == record.to_json()


def test_few_samples_have_no_tail_and_few_rounds_no_interval(subjects: list[TorchRunnable]) -> None:
    spec = EvaluateSpec(latency={"iterations": 10, "rounds": 2, "warmup_seconds": 0})
    base, small = (one.record for one in evaluate(subjects, spec, baseline="base"))
    (row,) = small.latency
    assert row.p95_ms is None and row.p99_ms is None
    assert row.speedup_vs_baseline is not None and row.speedup_ci95 is None
    # Without images there is nothing to be accurate on.
    assert base.accuracy is base.dataset is small.versus_baseline is None and base.end_to_end == ()


def test_end_to_end_has_a_row_per_batch_size(subjects: list[TorchRunnable], images: ImageSet) -> None:
    spec = EvaluateSpec(latency={"batch_sizes": [1, 2], "iterations": 3, "rounds": 1, "warmup_seconds": 0})
    (one,) = evaluate(subjects[:1], spec, images=images)
    assert [row.batch_size for row in one.record.end_to_end] == [1, 2]
    for row in one.record.end_to_end:
        parts = row.decode_ms + row.preprocess_ms + row.copy_ms + row.model_ms + row.postprocess_ms
        assert row.images_per_second == pytest.approx(1000 * row.batch_size / parts)
        assert min(row.decode_ms, row.preprocess_ms, row.model_ms) > 0


def not_a_number(pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def no_batches(pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if len(pixels) == 3:
        raise RuntimeError("three are too many")
    return logits


def test_a_subject_that_fails_has_a_row_with_its_reason_and_the_others_finish(
    subjects: list[TorchRunnable], images: ImageSet
) -> None:
    broken = Spoiled(subjects[1], "broken", not_a_number)
    elsewhere = dataclasses.replace(subjects[1], asked=None)
    got = evaluate([subjects[0], broken, elsewhere], QUICK, images=images, baseline="base")
    base, failure, small = (one.record for one in got)
    assert failure.failure is not None and failure.failure.startswith(
        "logits are not finite, first for image circle/00"
    )
    assert failure.accuracy is None and failure.latency == () and got[1].predictions is None
    assert failure.layer_plan == {"bf16": 7, "nf4": 12} and failure.dataset == base.dataset
    assert base.failure is None and small.failure is None
    assert small.versus_baseline is not None and small.latency[0].speedup_vs_baseline is not None
    assert (small.variant.format, small.variant.skip) == ("nf4", ())  # nobody said what was asked for


def test_without_the_baselines_figures_the_others_are_compared_with_nothing(
    subjects: list[TorchRunnable], images: ImageSet
) -> None:
    broken = Spoiled(subjects[0], "base", not_a_number)
    got = evaluate([broken, subjects[1]], QUICK, images=images, baseline="base")
    assert got[0].record.failure is not None
    small = got[1].record
    assert small.failure is None and small.accuracy is not None
    assert small.versus_baseline is None and small.latency[0].speedup_vs_baseline is None


def test_a_batch_size_that_cannot_run_is_told_beside_those_that_can(
    subjects: list[TorchRunnable], images: ImageSet
) -> None:
    spec = QUICK.model_copy(update={"latency": QUICK.latency.model_copy(update={"batch_sizes": (1, 3)})})
    picky = Spoiled(subjects[0], "base", no_batches)
    got = evaluate([picky, subjects[1]], spec, images=images, baseline="base")
    base, small = (one.record for one in got)
    assert [row.batch_size for row in base.latency] == [1]
    assert [(row.batch_size, row.reason) for row in base.latency_failures] == [(3, "RuntimeError: three are too many")]
    assert [row.batch_size for row in small.latency] == [1, 3]
    assert small.latency[0].speedup_vs_baseline is not None and small.latency[1].speedup_vs_baseline is None


def test_skipped_images_are_in_the_record_and_not_in_the_count(
    subjects: list[TorchRunnable], shapes: Path, copy_of: Callable[[Path], Path], images: ImageSet
) -> None:
    folder = copy_of(shapes)
    (folder / "test" / "circle" / "01.png").write_bytes(b"broken")
    spoiled = fit_labels(open_images(DataSpec(source=str(folder)), "test"), images.class_names)
    (one,) = evaluate(subjects[:1], QUICK, images=spoiled, skip_bad=True)
    assert one.record.dataset.skipped == ("circle/01.png",)
    assert one.record.dataset.images == one.record.accuracy.images == len(one.predictions.ids) == 23
    kept = images.subset(index for index in range(24) if index != 1)
    assert one.record.dataset.sha256 == kept.sha256 != spoiled.sha256


def test_a_variant_that_could_not_be_made_has_a_record_with_its_reason(tmp_path: Path) -> None:
    asked = VariantSpec(name="v", format="fp8", skip=["block.1"], attention="eager", compile=True)
    one = failed("v", asked, "fp8 cannot run here", torch.device("cpu"))
    record = one.record
    assert one.predictions is None and record.failure == "fp8 cannot run here"
    assert (record.variant.name, record.variant.format, record.variant.skip) == ("v", "fp8", ("block.1",))
    assert (record.variant.asked["attention"], record.variant.ran.get("attention")) == ("eager", None)
    assert record.variant.asked["compile"] and not record.variant.ran.get("compile", False)
    assert record.model is None and record.latency == () and record.accuracy is None
    assert record.environment["libraries"]["torch"] == torch.__version__
    save_record(record, tmp_path)
    assert load_record(tmp_path) == record


def full_above(fits: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def spoil(pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if len(pixels) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    return spoil


def at(*batch_sizes: int) -> EvaluateSpec:
    return QUICK.model_copy(update={"latency": QUICK.latency.model_copy(update={"batch_sizes": batch_sizes})})


@pytest.mark.parametrize(
    ("fits", "reason"),
    [
        (7, "out of memory; batch 4 fits"),
        (4, "out of memory; batch 4 fits"),
        (1, "out of memory; batch 1 fits"),
        (0, "out of memory; not even one image fits"),
    ],
)
def test_a_batch_that_does_not_fit_is_told_with_the_largest_half_that_does(
    fits: int, reason: str, subjects: list[TorchRunnable]
) -> None:
    small = Spoiled(subjects[0], "base", full_above(fits))
    base, other = (one.record for one in evaluate([small, subjects[1]], at(8), baseline="base"))
    assert [(row.batch_size, row.reason) for row in base.latency_failures] == [(8, reason)]
    assert base.latency == () and base.memory is None and base.failure is None
    assert base.variant.ran.get("sdpa_kernel") is None  # nothing ran that could be looked at
    assert [row.batch_size for row in other.latency] == [8] and other.latency_failures == ()


def test_what_keeps_a_smaller_batch_from_running_is_told_as_well(subjects: list[TorchRunnable]) -> None:
    def spoil(pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if len(pixels) == 4:
            raise RuntimeError("no kernel for four")
        return full_above(4)(pixels, logits)

    (one,) = evaluate([Spoiled(subjects[0], "base", spoil)], at(8))
    assert [row.reason for row in one.record.latency_failures] == [
        "out of memory; at batch 4: RuntimeError: no kernel for four"
    ]


def test_a_batch_whose_pixels_do_not_fit_fails_alone(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def small_memory(batch_size: int, size: tuple[int, int]) -> torch.Tensor:
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(batch_size, 3, *size)

    monkeypatch.setattr(latency_rows, "random_pixels", small_memory)
    spec = EvaluateSpec(latency=LatencySpec(batch_sizes=(1, 8), iterations=4, rounds=2))
    (measured,) = inference.measure([inference.Candidate("v", str(tiny_checkpoint))], spec, device="cpu")
    assert [row.batch_size for row in measured.record.latency] == [1]
    assert [row.batch_size for row in measured.record.latency_failures] == [8]
    assert measured.record.latency_failures[0].reason == "out of memory; batch 4 fits"


def test_halved_batches_of_accuracy_are_a_warning_in_that_record(
    subjects: list[TorchRunnable], images: ImageSet
) -> None:
    small = Spoiled(subjects[0], "small memory", full_above(8))
    got = evaluate([small, subjects[1]], QUICK, images=images)
    note = "accuracy ran in batches of 8: 32 images did not fit the memory"
    assert [note in one.record.warnings for one in got] == [True, False]
    (whole,) = evaluate(subjects[:1], QUICK, images=images)
    # Another batch size may sum in another order.
    np.testing.assert_allclose(got[0].predictions.logits, whole.predictions.logits, atol=1e-4)


def test_the_kernel_that_ran_is_read_back(records: list[Record], tiny_checkpoint: Path) -> None:
    assert [record.variant.ran.get("sdpa_kernel") for record in records] == ["flash", "flash"]
    runs = {
        "math": RunSpec(sdpa_kernel="math"),
        "cudnn": RunSpec(sdpa_kernel="cudnn"),
        "eager": RunSpec(attention="eager"),
    }
    prepared = [
        prepare(open_checkpoint(str(tiny_checkpoint)), name=name, device=CPU, run=run) for name, run in runs.items()
    ]
    math, cudnn, eager = (one.record.variant for one in evaluate(prepared, QUICK))
    assert (math.asked["sdpa_kernel"], math.ran["sdpa_kernel"], math.reasons.get("sdpa_kernel")) == (
        "math",
        "math",
        None,
    )
    assert (cudnn.asked["sdpa_kernel"], cudnn.ran["sdpa_kernel"]) == ("cudnn", "flash")
    assert cudnn.reasons.get("sdpa_kernel") == "the cudnn kernel needs a CUDA device"
    assert (eager.asked["sdpa_kernel"], eager.ran["sdpa_kernel"]) == ("auto", None)
    assert (math.ran["attention"], eager.ran["attention"]) == ("sdpa", "eager")


def test_a_record_tells_how_the_checkpoint_was_run(
    subjects: list[TorchRunnable], records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = records[1].variant
    off = {name: False for name, about in RunSpec.model_fields.items() if about.annotation is bool}
    assert plain.stored_format is None and off.items() <= plain.ran.items()

    def no_compiler(model: torch.nn.Module, **_: Any) -> Any:
        def call(**_: torch.Tensor) -> None:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    run = RunSpec(run_as="bf16", fuse_qkv=True, channels_last=True, compile=True, autotune=True)
    expanded = prepare(subjects[1].checkpoint, name="v", device=CPU, run=run, asked=VARIANTS[1])
    (one,) = evaluate([expanded], QUICK)
    variant = one.record.variant
    assert (variant.format, variant.stored_format, variant.skip) == ("bf16", "nf4", ("block.0",))
    assert variant.ran["fuse_qkv"] and variant.ran["channels_last"]
    assert variant.asked["compile"] and variant.asked["autotune"] and not variant.ran["compile"]
    assert variant.reasons.get("compile") == "RuntimeError: no compiler here"
    assert one.record.layer_plan == {"bf16": 19}
    assert one.record.model == records[1].model.model_copy(update={"source": one.record.model.source})


def test_the_arithmetic_of_an_image_is_in_the_record(records: list[Record]) -> None:
    # 16 patches of 8 x 8 and a class token, 64 wide, 3 blocks, 128 inside the MLP, 4 classes
    block = 2 * 17 * (4 * 64 * 64 + 2 * 17 * 64 + 2 * 64 * 128)
    expected = 2 * 16 * 3 * 8 * 8 * 64 + 3 * block + 2 * 64 * 4
    assert [record.model.flops_per_image for record in records] == [expected] * 2


def test_without_being_asked_for_nothing_is_said_about_the_devices_rates(records: list[Record]) -> None:
    for record in records:
        assert record.roofline is None
        assert all(row.floor_ms is row.model_flop_utilisation_percent is None for row in record.latency)


@pytest.fixture
def small_rates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rates, "_GEMM_SIDE", {"cpu": 64})
    monkeypatch.setattr(rates, "_COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(rates, "_WARM_SECONDS", 0.0)
    yield
    for rate in (rates.gemm_rate, rates.copy_rate):  # they must serve no other test
        rate.cache_clear()


def test_rows_of_one_batch_size_are_told_before_the_next_is_begun(subjects: list[TorchRunnable]) -> None:
    told: list[tuple[str, list[int]]] = []
    spec = at(1, 3)
    only = spec.latency.model_copy(update={"only": {subjects[1].name: (3,)}})
    evaluate(
        subjects,
        spec.model_copy(update={"latency": only}),
        ready=lambda one: told.append((one.record.variant.name, [row.batch_size for row in one.record.latency])),
    )
    first, second = (subject.name for subject in subjects)
    assert told[:3] == [(first, [1]), (first, [1, 3]), (second, [3])]


def test_a_run_that_is_ended_in_a_slow_warm_up_keeps_rows_of_those_that_were_warm(
    subjects: list[TorchRunnable], images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_rows, "clock_for", lambda device: Compiling())
    timed, images_seen = dict[str, Record](), len(images)

    def ended(pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if len(timed) == 2:
            raise KeyboardInterrupt
        return logits

    settled = QUICK.latency.model_copy(update={"warmup_seconds": 1})
    slow = Spoiled(subjects[0], "autotuned", ended)
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            [*subjects, slow], QUICK.model_copy(update={"latency": settled}), images=images, baseline="base",
            ready=lambda one: timed.update({one.record.variant.name: one.record}),
        )  # fmt: skip
    assert set(timed) == {"base", "small"}  # nothing is said of what was not timed
    for record in timed.values():
        assert record.accuracy is not None and record.accuracy.images == images_seen
        assert [(row.batch_size, row.rounds) for row in record.latency] == [(1, 3)]
    assert timed["base"].measured_together == timed["small"].measured_together is not None
    assert timed["small"].latency[0].speedup_vs_baseline == pytest.approx(1)


def test_floor_and_utilisation_are_against_the_rates_in_the_record(
    subjects: list[TorchRunnable], small_rates: None
) -> None:
    spec = at(1, 3).model_copy(update={"roofline": True})
    for one, format in zip(evaluate(subjects, spec), ("fp32", "bf16"), strict=True):
        record, device = one.record, one.record.roofline
        assert device.gemm_format == format  # NF4 is expanded to bf16 and computed in it
        for row in record.latency:
            flops = row.batch_size * record.model.flops_per_image
            fastest = max(device.gemm_flops_per_second, device.gemm_flops_per_second_cold)
            seconds = max(flops / fastest, record.size.weight_bytes / device.copy_bytes_per_second)
            assert row.floor_ms == pytest.approx(1000 * seconds)
            share = flops / (row.p50_ms / 1000) / device.gemm_flops_per_second
            assert row.model_flop_utilisation_percent == pytest.approx(100 * share)
            assert row.peak_bytes is None  # of a GPU only
        assert [row.batch_size for row in record.latency] == [1, 3]


# Guessing


def mislabelled(images: ImageSet, measured: list[Measured]) -> ImageSet:
    """The same images with labels of which the first subject gets none right."""
    predictions = measured[0].predictions
    assert predictions is not None and predictions.ids == images.ids
    return replace(images, labels=tuple((predictions.classes + 1) % 4))


@pytest.mark.parametrize("baseline", ["base", None])
def test_a_baseline_that_guesses_ends_before_it_is_timed(
    subjects: list[TorchRunnable],
    images: ImageSet,
    measured: list[Measured],
    monkeypatch: pytest.MonkeyPatch,
    baseline: str | None,
) -> None:
    monkeypatch.setattr(evaluator, "time_rows", lambda *_: pytest.fail("it was timed"))
    wrong = mislabelled(images, measured)
    with pytest.raises(
        MeasurementError, match=r"^base is right on 0 of 24 images.*order.*`vitopt benchmark`"
    ) as caught:
        evaluate(subjects, QUICK, images=wrong, baseline=baseline)
    assert "\n" not in str(caught.value)


def test_a_variant_may_guess_beside_a_baseline_that_does_not(
    subjects: list[TorchRunnable], images: ImageSet, measured: list[Measured]
) -> None:
    right = replace(images, labels=tuple(measured[0].predictions.classes.tolist()))
    guessing = Spoiled(subjects[1], "small", lambda _, logits: -logits)
    found = evaluate([subjects[0], guessing], QUICK, images=right, baseline="base")
    assert [one.record.failure for one in found] == [None, None]
    assert found[0].record.accuracy.top1_percent == 100


def test_untrained_weights_guess_with_a_warning(
    subjects: list[TorchRunnable], images: ImageSet, measured: list[Measured]
) -> None:
    wrong = mislabelled(images, measured)
    found = evaluate(subjects[:1], QUICK, images=wrong, untrained=True)
    assert sum("no better than guessing" in line for line in found[0].record.warnings) == 1


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no such\ncounter")


@pytest.mark.parametrize(
    ("broken", "figure"),
    [
        ("peak_memory", "memory"),
        ("energy_per_image", "energy_joules_per_image"),
        ("find_throughput", "throughput"),
        ("roofline", "roofline"),
        ("batch_invariance", "batch_invariance"),
    ],
)
def test_a_figure_that_fails_loses_only_itself(
    broken: str,
    figure: str,
    subjects: list[TorchRunnable],
    images: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
    small_rates: None,
) -> None:
    monkeypatch.setattr(evaluator, "find_throughput", functools.partial(throughput.find_throughput, largest=1))
    monkeypatch.setattr(throughput, "_SUSTAINED_SECONDS", 0.0)
    monkeypatch.setattr(evaluator, broken, fail)
    spec = QUICK.model_copy(update={"throughput": True, "roofline": True})
    got = evaluate(subjects, spec, images=images, baseline="base")
    for one in (measured.record for measured in got):
        assert one.unmeasured == {figure: "RuntimeError: no such counter"} and one.failure is None
        known = {"memory": one.memory, "throughput": one.throughput, "roofline": one.roofline}
        known |= {"flops_per_image": one.model.flops_per_image, "batch_invariance": one.batch_invariance}
        assert {name for name, value in known.items() if value is None} == {figure} & set(known)
        assert one.accuracy is not None and len(one.latency) == 1 and one.variant.ran.get("sdpa_kernel") == "flash"


@pytest.mark.parametrize(("broken", "figure"), [("summarise", "accuracy"), ("compare", "versus_baseline")])
def test_predictions_that_cannot_be_summed_up_are_kept(
    broken: str,
    figure: str,
    subjects: list[TorchRunnable],
    images: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluator.accuracy, broken, fail)
    got = evaluate(subjects, QUICK, images=images, baseline="base")
    assert figure in got[1].record.unmeasured and getattr(got[1].record, figure) is None
    assert got[1].record.latency and got[1].predictions is not None


def test_a_profiler_that_fails_and_a_row_that_fails_lose_only_their_own(
    subjects: list[TorchRunnable], images: ImageSet
) -> None:
    class Odd(Spoiled):
        kernel_used = fail

    calls = {"count": 0}

    def after_timing(pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        calls["count"] += 1
        if len(pixels) == 2 and calls["count"] > 12:
            raise RuntimeError("no kernel for two")
        return logits

    odd = Odd(subjects[0], "base", after_timing)
    spec = at(1, 2).model_copy(update={"end_to_end": True})
    base, small = (one.record for one in evaluate([odd, subjects[1]], spec, images=images, baseline="base"))
    assert base.unmeasured["sdpa_kernel"] == "RuntimeError: no such counter"
    assert [row.batch_size for row in base.latency] == [1]
    assert [row.batch_size for row in base.end_to_end] == [1]
    assert small.unmeasured == {} and [row.batch_size for row in small.end_to_end] == [1, 2]


def test_a_checkpoint_that_cannot_be_described_is_a_failed_row(
    subjects: list[TorchRunnable], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Spoiled):
        describe = fail

    odd = Odd(subjects[0], "base", lambda pixels, logits: logits)
    base, small = (one.record for one in evaluate([odd, subjects[1]], QUICK, baseline="base"))
    assert base.failure is not None and base.variant.name == "base"
    assert small.failure is None and small.latency


def test_results_are_handed_out_as_soon_as_there_is_something_in_them(
    subjects: list[TorchRunnable], images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Record] = []

    def interrupted(*_: Any) -> Memory:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluator, "peak_memory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            subjects,
            QUICK,
            images=images,
            baseline="base",
            ready=lambda one: seen.append(one.record),
        )
    last = {record.variant.name: record for record in seen}
    assert set(last) == {"base", "small"}
    for record in last.values():
        assert record.accuracy is not None and record.latency and record.batch_invariance is not None
    assert last["small"].versus_baseline is not None and last["small"].latency[0].speedup_vs_baseline is not None


def test_the_last_result_handed_out_is_the_one_returned(subjects: list[TorchRunnable]) -> None:
    seen: dict[str, Measured] = {}
    got = evaluate(subjects, QUICK, ready=lambda one: seen.update({one.record.variant.name: one}))
    assert list(seen.values()) == got


def test_records_timed_together_say_so_and_compare_to_the_same_figure(measured: list[Measured]) -> None:
    base, small = (one.record for one in measured)
    assert base.measured_together == small.measured_together is not None
    for row in small.latency:
        found = speed_ratio(base, small, row.batch_size)
        assert found.ratio == row.speedup_vs_baseline and found.caution is None
        assert (found.interval.low, found.interval.high) == row.speedup_ci95


def test_sessions_have_names_of_their_own(subjects: list[TorchRunnable]) -> None:
    names = {evaluate(subjects[:1], QUICK)[0].record.measured_together for _ in range(2)}
    assert len(names) == 2 and None not in names


def test_an_answer_that_depends_on_its_batch_is_a_warning(subjects: list[TorchRunnable], images: ImageSet) -> None:
    def swayed(pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.flip(1) if len(pixels) > 1 else logits

    odd = Spoiled(subjects[0], "base", swayed)
    base, small = (one.record for one in evaluate([odd, subjects[1]], QUICK, images=images))
    assert base.batch_invariance.agreement_percent < 100 == small.batch_invariance.agreement_percent
    assert [
        any("depends on the other images of its batch" in line for line in one.warnings) for one in (base, small)
    ] == [
        True,
        False,
    ]


def test_the_format_of_a_record_is_what_was_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # Two of three blocks stay in 16 bit, so most layers are bf16; it is the nf4 variant all the same.
    asked = VariantSpec(name="mostly-kept", format="nf4", skip=("block.0", "block.1"))
    quantize(open_checkpoint(str(tiny_checkpoint)), asked, tmp_path / "v")
    checkpoint = open_checkpoint(str(tmp_path / "v"))
    made, elsewhere = (prepare(checkpoint, name=name, device=CPU) for name in ("made", "elsewhere"))
    records = [one.record for one in evaluate([made, elsewhere], QUICK)]
    assert [record.variant.format for record in records] == ["nf4", "nf4"]
    assert records[0].layer_plan["bf16"] > records[0].layer_plan["nf4"]


def test_variants_of_one_baseline_share_the_chance_of_an_error(subjects: list[TorchRunnable], images: ImageSet) -> None:
    three = [*subjects, dataclasses.replace(subjects[1], name="twin")]
    measured = evaluate(three, QUICK, images=images, baseline="base")
    compared = [one.record.versus_baseline for one in measured[1:]]
    assert [one.mcnemar_holm_p for one in compared] == [min(1.0, 2 * one.mcnemar_p) for one in compared]
    assert measured[0].record.versus_baseline is None
