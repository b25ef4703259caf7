"""What only a GPU can show; skipped where there is none."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vitopt import inference, pipeline
from vitopt.data.images import open_images
from vitopt.data.pixels import Preprocessor, batches, on_device, random_pixels
from vitopt.engines import package
from vitopt.engines.runtime import make
from vitopt.engines.runtime import prepare as prepare_any
from vitopt.environment import support
from vitopt.formats import QUANTIZED_FORMATS, Format
from vitopt.inference import Candidate
from vitopt.measure.rates import copy_rate, gemm_rate
from vitopt.models.activations import save_activations
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.optimize.calibrate import observe
from vitopt.optimize.formats import quantization_config
from vitopt.optimize.packed import PACKINGS
from vitopt.optimize.quantize import plan_for, quantize
from vitopt.optimize.rounding import compensated
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import DataSpec, EvaluateSpec, LatencySpec, Recipe, RunSpec, VariantSpec
from vitopt.recipe_file import validate

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)

# Relative error of compiled against eager logits: twice what inductor gives on the CPU for this model, 0.009, 0.028 and
# 0.065. It keeps what lies between two operators in fp32, which quantizing rounds otherwise than bf16.
COMPILED_ERROR = {None: 0.02, "w8a8": 0.06, "fp8": 0.13}


@pytest.fixture(autouse=True)
def _needs_no_packages_beyond(request: pytest.FixtureRequest) -> None:
    format = getattr(request.node, "callspec", None) and request.node.callspec.params.get("format")
    reason = support.why_not_format(format, CUDA) if format else None
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("format", ["bf16", "fp16", "nf4", "int8", "w8a8", "fp8"])
def test_formats_run_and_agree_with_fp32(format: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny_checkpoint))
    plan = quantize(source, VariantSpec(name="v", format=format), tmp_path / "v", "cuda")
    exact = prepare(source, name="fp32", device=CUDA)
    runnable = prepare(open_checkpoint(str(tmp_path / "v")), name=format, device=CUDA)
    assert set(runnable.layers.values()) == set(plan.counts())
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(CUDA)
    expected, found = exact(pixels).float(), runnable(pixels).float()
    error = (found - expected).norm() / expected.norm()
    assert error < {"nf4": 0.5, "fp8": 0.15}.get(format, 0.1)


@pytest.mark.parametrize("format", ["nf4", "int4", "w8a8"])
def test_layers_compute_with_the_codes_that_were_written(format: Format, tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    plan = plan_for(checkpoint, VariantSpec(name="v", format=format))
    config = quantization_config(plan, torch.bfloat16)
    model = load_model(checkpoint, dtype=torch.bfloat16, device=CUDA, quantization=config)
    linear = model.get_submodule(next(item.layer.module for item in plan.layers if item.layer.logical == "block.1.fc2"))
    weight = torch.randn(linear.out_features, linear.in_features, device=CUDA)
    chosen = compensated(weight, torch.eye(linear.in_features, device=CUDA), PACKINGS[format].grid(linear))
    PACKINGS[format].write(linear, chosen)
    inputs = torch.randn(32, linear.in_features, device=CUDA)
    with torch.inference_mode():
        found = linear(inputs.bfloat16()).float() - linear.bias.float()
    expected = inputs @ chosen.values().T
    assert (found - expected).norm() / expected.norm() < 0.03


def test_flash_attention_runs_or_says_why_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="v", format="bf16"), tmp_path / "v", "cuda")
    half = open_checkpoint(str(tmp_path / "v"))
    flash = prepare(half, name="flash", device=CUDA, run=RunSpec(attention="flash_attention_2"))
    if support.installed("flash_attn"):
        assert (flash.attention_used, flash.reasons.get("attention")) == ("flash_attention_2", None)
    else:
        assert (flash.attention_used, flash.reasons.get("attention")) == (
            "sdpa",
            "flash_attn is not installed (pip install flash-attn)",
        )
    full = prepare(
        open_checkpoint(str(tiny_checkpoint)), name="full", device=CUDA, run=RunSpec(attention="flash_attention_2")
    )
    assert full.attention_used == "sdpa"


def test_records_hold_device_time_memory_and_the_gpu(tiny_checkpoint: Path, shapes: Path) -> None:
    spec = EvaluateSpec(batch_size=8, latency=LatencySpec(batch_sizes=(1, 8), iterations=20, rounds=4))
    images = open_images(DataSpec(source=str(shapes)), "test")
    (measured,) = inference.measure([Candidate("v", str(tiny_checkpoint))], spec, images=images, device="cuda")
    record = measured.record
    assert record.failure is None
    assert record.environment["gpu"]["name"] == torch.cuda.get_device_name(0)
    assert record.memory is not None and record.size is not None
    assert record.memory.kind == "cuda_allocated"
    assert record.memory.peak_bytes > record.size.weight_bytes
    for row in record.latency:
        assert row.device_p50_ms is not None
        assert 0 < row.device_p50_ms <= row.p50_ms and len(row.device_samples_ms or ()) == row.rounds
    assert record.memory.reserved_bytes is not None and record.memory.reserved_bytes > 0
    assert record.gpu_load is None or record.gpu_load.polls > 0


@pytest.fixture
def half(tiny_checkpoint: Path, tmp_path: Path) -> Checkpoint:
    """The tiny checkpoint in bf16."""
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="h", format="bf16"), tmp_path / "half", "cuda")
    return open_checkpoint(str(tmp_path / "half"))


def pixels_of(batch_size: int) -> torch.Tensor:
    return random_pixels(batch_size, (32, 32)).to(CUDA)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("format", ["fp32", "bf16", "w8a8", "fp8"])
@pytest.mark.parametrize("engine", ["aoti", "tensorrt"])
def test_the_file_of_an_engine_gives_the_logits_of_torch_in_a_graph_and_is_used_again(
    engine: str, format: str, tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := support.why_not_engine(engine, CUDA):
        pytest.skip(reason)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    source = open_checkpoint(str(tiny_checkpoint))
    scales = engine == "tensorrt" and format in QUANTIZED_FORMATS
    asked = VariantSpec(name="v", format=format, engine=engine, static_scales=scales)
    images = open_images(DataSpec(source=str(shapes)), "train") if scales else None
    make(source, asked, tmp_path / "v", "cuda", scales=images)
    monkeypatch.setattr(package.engine_module(engine), "write", lambda *_: pytest.fail("the file is there"))
    made = open_checkpoint(str(tmp_path / "v"))
    runnable = prepare_any(made, name="v", device=CUDA, run=asked.run, asked=asked)
    exact = prepare(source, name="fp32", device=CUDA)
    for batch_size in (8, 1, 8):
        pixels = pixels_of(batch_size)
        for _ in range(2):  # captured, then replayed
            error = relative_error(runnable(pixels), exact(pixels))
            assert error < {"fp32": 1e-3, "fp8": 0.15}.get(format, 0.1)
    # Whether each size has a graph: the file itself takes any. A capture that failed leaves a reason.
    assert runnable.fixed_shapes and "cuda graph" not in runnable.reasons
    assert set(runnable.describe()["layers"].values()) >= {format}


@pytest.mark.parametrize("run_as", [None, "w8a8", "fp8"])
@pytest.mark.parametrize("fuse_qkv", [False, True])
def test_a_graph_gives_the_logits_of_the_eager_model(half: Checkpoint, run_as: str | None, fuse_qkv: bool) -> None:
    if run_as and (reason := support.why_not_format(run_as, CUDA)):
        pytest.skip(reason)
    eager = prepare(half, name="eager", device=CUDA, run=RunSpec(run_as=run_as))
    graph = prepare(half, name="graph", device=CUDA, run=RunSpec(run_as=run_as, compile=True, fuse_qkv=fuse_qkv))
    assert graph.fused_attentions == (3 if fuse_qkv else 0)
    for batch_size in (8, 2, 8):
        pixels = pixels_of(batch_size)
        for _ in range(2):  # captured, then replayed
            assert relative_error(graph(pixels), eager(pixels)) < COMPILED_ERROR[run_as]
        assert graph.graph_bytes(pixels.shape) > 0
    assert graph.fixed_shapes and graph.reasons.get("compile") is None


@pytest.mark.parametrize(
    "options",
    [
        {"class_token_last": True},
        {"carry_residual": True},
        {"patch_product": True},
        {"gelu_epilogue": True},
        {"class_token_last": True, "carry_residual": True, "patch_product": True, "compile_whole": True},
    ],
)
def test_a_rewritten_model_gives_the_logits_of_the_eager_one(half: Checkpoint, options: dict[str, bool]) -> None:
    eager = prepare(half, name="eager", device=CUDA)
    graph = prepare(half, name="graph", device=CUDA, run=RunSpec(compile=True, fuse_qkv=True, **options))
    for batch_size in (8, 1):
        assert relative_error(graph(pixels_of(batch_size)), eager(pixels_of(batch_size))) < COMPILED_ERROR[None]
    assert graph.reasons == {}


@pytest.mark.parametrize(
    "options",
    [
        {"merge_tokens": "5"},
        {"merge_tokens": "5", "size_bias": False, "sdpa_kernel": "flash"},
        {"prune_tokens": "5", "fuse_pruned": True, "compile_whole": True},
    ],
)
def test_a_graph_with_fewer_tokens_gives_the_logits_of_the_eager_model(
    half: Checkpoint, options: dict[str, object]
) -> None:
    eager_options = {name: value for name, value in options.items() if name != "compile_whole"}
    eager = prepare(half, name="eager", device=CUDA, run=RunSpec(**eager_options))
    graph = prepare(half, name="graph", device=CUDA, run=RunSpec(compile=True, fuse_qkv=True, **options))
    for batch_size in (8, 1):
        assert relative_error(graph(pixels_of(batch_size)), eager(pixels_of(batch_size))) < 2 * COMPILED_ERROR[None]
        assert graph.graph_bytes(pixels_of(batch_size).shape) > 0
    assert graph.reasons == {}


@pytest.mark.parametrize("run_as", ["w8a8", "fp8"])
def test_a_graph_with_static_scales_gives_the_logits_of_the_eager_model(half: Checkpoint, run_as: str) -> None:
    if reason := support.why_not_format(run_as, CUDA):
        pytest.skip(reason)
    model = load_model(half, device=CUDA)
    save_activations(observe(model, half.config.model_type, [pixels_of(8)]), Path(str(half.folder)))
    run = RunSpec(run_as=run_as, static_scales=True)
    eager = prepare(half, name="eager", device=CUDA, run=run)
    fast = {"compile": True, "fuse_qkv": True, "class_token_last": True}
    graph = prepare(half, name="graph", device=CUDA, run=run.model_copy(update=fast))
    for batch_size in (8, 1):
        pixels = pixels_of(batch_size)
        assert relative_error(graph(pixels), eager(pixels)) < COMPILED_ERROR[run_as]
    assert graph.reasons.get("compile") is None and graph.describe()["variant"].ran["static_scales"]


def test_what_a_graph_returned_is_not_overwritten_by_its_next_call(half: Checkpoint) -> None:
    graph = prepare(half, name="graph", device=CUDA, run=RunSpec(compile=True))
    first = graph(pixels_of(4))
    assert graph.fixed_shapes
    kept = first.clone()
    graph(-pixels_of(4))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_a_replayed_graph_compiles_nothing(half: Checkpoint) -> None:
    graph = prepare(half, name="graph", device=CUDA, run=RunSpec(compile=True))
    graph(pixels_of(4))
    assert graph.fixed_shapes
    with torch.compiler.set_stance("fail_on_recompile"):
        graph(pixels_of(4))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient", "math"])
def test_the_attention_kernel_asked_for_runs(half: Checkpoint, kernel: str, compile: bool) -> None:
    expected = prepare(half, name="auto", device=CUDA)(pixels_of(4))
    held: TorchRunnable = prepare(half, name=kernel, device=CUDA, run=RunSpec(sdpa_kernel=kernel, compile=compile))
    assert held.reasons.get("sdpa_kernel") is None
    assert relative_error(held(pixels_of(4)), expected) < 0.05
    assert held.reasons.get("compile") is None
    # Compiled, plain matrix products are no operator of their own any more.
    assert held.kernel_used(pixels_of(4)) == (None if compile and kernel == "math" else kernel)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("run_as", ["bf16", "w8a8", "fp8"])
def test_packed_checkpoints_expand_at_load(tiny_checkpoint: Path, tmp_path: Path, format: str, run_as: str) -> None:
    if reason := support.why_not_format(run_as, CUDA):
        pytest.skip(reason)
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="v", format=format), tmp_path / "v", "cuda")
    stored = open_checkpoint(str(tmp_path / "v"))
    packed = prepare(stored, name="packed", device=CUDA)
    expanded = prepare(stored, name="expanded", device=CUDA, run=RunSpec(run_as=run_as, compile=True, fuse_qkv=True))
    assert (expanded.stored_format, set(expanded.layers.values())) == (format, {run_as, "bf16"})
    assert relative_error(expanded(pixels_of(8)), packed(pixels_of(8))) < 0.15
    assert expanded.fixed_shapes and expanded.reasons.get("compile") is None


def test_compiled_variants_are_measured_on_images_that_another_thread_pins(half: Checkpoint, shapes: Path) -> None:
    spec = EvaluateSpec(batch_size=5, roofline=True, latency=LatencySpec(batch_sizes=(1, 5), iterations=20, rounds=4))
    images = open_images(DataSpec(source=str(shapes)), "test")
    candidates = [
        Candidate("eager", str(half.folder)),
        Candidate("graph", str(half.folder), RunSpec(compile=True, fuse_qkv=True)),
    ]
    eager, graph = (
        one.record for one in inference.measure(candidates, spec, images=images, baseline="eager", device="cuda")
    )
    assert graph.failure is None and graph.variant.ran.get("compile", False) and not graph.latency_failures
    assert graph.versus_baseline is not None and graph.versus_baseline.agreement_percent > 95
    assert eager.variant.ran.get("sdpa_kernel") is not None
    for row in graph.latency:
        assert row.floor_ms is not None and row.peak_bytes is not None
        assert 0 < row.floor_ms < row.p50_ms
    assert graph.roofline is not None and graph.roofline.gemm_format == "bf16"


def test_batches_arrive_on_the_device_as_they_were(tiny_checkpoint: Path, shapes: Path) -> None:
    images = open_images(DataSpec(source=str(shapes)), "test")
    preprocess = Preprocessor(load_processor(open_checkpoint(str(tiny_checkpoint))))
    plain = list(batches(images, preprocess, 5))
    copied = list(on_device(batches(images, preprocess, 5, pin=True), CUDA))
    assert [batch.indices for batch in copied] == [batch.indices for batch in plain]
    for here, there in zip(plain, copied, strict=True):
        assert there.pixel_values.device == CUDA
        torch.testing.assert_close(there.pixel_values.cpu(), here.pixel_values, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_gpu_captures_times_and_replays_as_the_first(half: Checkpoint) -> None:
    spec = EvaluateSpec(latency=LatencySpec(batch_sizes=(1,), iterations=20, rounds=4))
    candidate = Candidate("v", str(half.folder), RunSpec(compile=True, fuse_qkv=True))
    try:
        (measured,) = inference.measure([candidate], spec, device="cuda:1")
    finally:
        torch.cuda.set_device(CUDA)
    assert measured.record.failure is None and measured.record.variant.reasons == {}
    (row,) = measured.record.latency
    assert row.device_p50_ms is not None and 0 < row.device_p50_ms <= row.p50_ms


def test_a_batch_that_does_not_fit_is_told_with_one_that_does() -> None:
    spec = EvaluateSpec(latency=LatencySpec(batch_sizes=(1, 4096), iterations=2, rounds=1))
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3e9 / total))
    try:
        (measured,) = inference.measure([Candidate("v", "random:vit-base-patch16-224")], spec, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [row.batch_size for row in measured.record.latency] == [1]
    (failure,) = measured.record.latency_failures
    assert failure.batch_size == 4096
    assert failure.reason.startswith("out of memory; batch ") and failure.reason.endswith(" fits")


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_the_rates_of_the_device_are_measured(format: str) -> None:
    if format == "fp8" and (reason := support.why_not_format("fp8", CUDA)):
        pytest.skip(reason)
    assert min(gemm_rate(format, CUDA)) > 1e12
    assert copy_rate(CUDA) > 1e11


def test_random_weights_in_every_format_without_data(tmp_path: Path) -> None:
    recipe = validate(
        Recipe,
        {
            "name": "small",
            "model": "random:vit-tiny-patch16-224",
            "variants": [
                {"name": "fp32", "format": "fp32", "attention": "eager"},
                {"name": "fp8", "format": "fp8", "compile": True, "fuse_qkv": True},
                {"name": "nf4-as-bf16", "format": "nf4", "run_as": "bf16", "compile": True},
            ],
            "evaluate": {"roofline": True, "latency": {"batch_sizes": [1, 2], "iterations": 4, "rounds": 2}},
        },
        where="test",
    )
    records = pipeline.run(recipe, tmp_path / "run").records
    for record in records:
        reason = support.why_not_format(record.variant.format, CUDA)
        assert (record.failure is None) == (reason is None), record.failure
        assert record.failure or [row.batch_size for row in record.latency] == [1, 2]
        assert record.variant.reasons.get("compile") is None


@pytest.fixture
def no_choices_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier runs measured does not count."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("rows", "dtype", "dependent"),
    [
        (197, torch.bfloat16, False),
        (12608, torch.bfloat16, False),
        (197, torch.bfloat16, True),
        (70, torch.float16, False),
        (70, torch.float32, False),
    ],
)
def test_kernels_that_may_be_chosen_are_the_product_in_float64(rows: int, dtype: torch.dtype, dependent: bool) -> None:
    if dependent and (reason := support.why_not_dependent_launch(CUDA)):
        pytest.skip(reason)
    from vitopt.optimize.kernels.product import fused_linear
    from vitopt.optimize.kernels.tiles import candidates

    # The larger is fc2 of ViT-L/16; the smaller fills no tile.
    columns, depth = (1024, 4096) if dtype == torch.bfloat16 else (72, 40)
    generator = torch.Generator(CUDA).manual_seed(0)

    def values(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=CUDA, generator=generator) * scale).to(dtype)

    x, weight, bias = values(rows, depth) + 1, values(columns, depth, scale=depth**-0.5), values(columns)
    residual, sums = values(rows, columns), weight.float().sum(1)
    normed = nn.functional.layer_norm(x.double(), (depth,), eps=1e-6)
    expected = nn.functional.gelu(nn.functional.linear(normed, weight.double(), bias.double())) + residual.double()
    bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    ran = 0
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    for tile in candidates(rows, columns, depth, x.itemsize, processors)[: 1 if dependent else None]:
        try:
            found = fused_linear(x, weight, bias, sums, residual, 1e-6, "erf", list(tile), dependent)
        except Exception as error:
            assert type(error).__name__ == "OutOfResources", error  # shared memory of an older card
            continue
        ran += 1
        assert float((found - expected).abs().max() / expected.abs().max()) < bound, tile
        again = fused_linear(x, weight, bias, sums, residual, 1e-6, "erf", list(tile), dependent)
        torch.testing.assert_close(again, found, rtol=0, atol=0)
    assert ran


def test_fused_kernels_give_the_logits_of_the_eager_model_in_a_graph(half: Checkpoint, no_choices_yet: None) -> None:
    from vitopt.optimize.kernels import blocks, tiles

    eager = prepare(half, name="eager", device=CUDA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_MUST_WIN", float("inf"))  # all of them, faster or not
        patch.setattr(blocks, "candidates", lambda *how: tiles.candidates(*how)[:1])
        for more in ({}, {"class_token_last": True, "patch_product": True}, {"gelu_epilogue": True}):
            run = RunSpec(compile=True, fuse_qkv=True, fused_kernels=True, **more)
            graph = prepare(half, name="graph", device=CUDA, run=run)
            for batch_size in (8, 1, 8):
                found = [graph(pixels_of(batch_size)) for _ in range(2)]
                assert relative_error(found[0], eager(pixels_of(batch_size))) < COMPILED_ERROR[None]
                torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
            assert graph.reasons == {}
            assert graph.describe()["variant"].ran["fused_kernels"] in ("12 products", "10 products")


def test_early_launches_change_no_logit(half: Checkpoint) -> None:
    if reason := support.why_not_dependent_launch(CUDA):
        pytest.skip(reason)
    run = RunSpec(compile=True, fuse_qkv=True)
    plain = prepare(half, name="plain", device=CUDA, run=run)
    early = prepare(half, name="early", device=CUDA, run=run.model_copy(update={"dependent_launch": True}))
    for batch_size in (8, 1):
        expected = plain(pixels_of(batch_size))
        for _ in range(20):
            torch.testing.assert_close(early(pixels_of(batch_size)), expected, rtol=0, atol=0)
    assert early.reasons == {} and early.describe()["variant"].ran["dependent_launch"]


def test_products_that_were_chosen_make_no_model_slower(tmp_path: Path, no_choices_yet: None) -> None:
    run = RunSpec(compile=True, fuse_qkv=True)
    quantize(
        open_checkpoint("random:vit-base-patch16-224"), VariantSpec(name="b", format="bf16"), tmp_path / "b", "cuda"
    )
    candidates = [
        Candidate("plain", str(tmp_path / "b"), run),
        Candidate("fused", str(tmp_path / "b"), run.model_copy(update={"fused_kernels": True})),
    ]
    spec = EvaluateSpec(latency=LatencySpec(batch_sizes=(1, 32), iterations=40, rounds=8))
    _, fused = (one.record for one in inference.measure(candidates, spec, baseline="plain", device="cuda"))
    assert fused.failure is None and not fused.latency_failures
    for row in fused.latency:
        assert row.speedup_vs_baseline is not None and row.speedup_vs_baseline > 0.97, fused.variant
