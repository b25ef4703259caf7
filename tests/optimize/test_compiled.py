"""Compilation for fixed shapes on the CPU, with fast stand-ins for the compiler behind torch.compile."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from torch import nn

from vitopt.data.pixels import random_pixels
from vitopt.environment.devices import DEPENDENT_LAUNCH
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.optimize.compiled import compiler_options
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")
Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One block: the compiler reads the model anew for every shape."""
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("compiled") / "tiny", blocks=1)))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backend | str], None]:
    """Let torch.compile hand its graphs to another backend, whose options are not the real compiler's."""
    real = torch.compile

    def use(backend: Backend | str) -> None:
        monkeypatch.setattr(
            torch, "compile", lambda model, *, dynamic, **_: real(model, dynamic=dynamic, backend=backend)
        )

    return use


class Counting:
    """A backend that runs graphs as they are and counts them; `refuse` makes it fail for a batch size."""

    def __init__(self, refuse: int | None = None):
        self.graphs = 0
        self.refuse = refuse

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        if any(isinstance(value, torch.Tensor) and value.shape[:2] == (self.refuse, 3) for value in inputs):
            raise RuntimeError("no kernel\nfor this shape")
        return graph.forward


def compiling(checkpoint: Checkpoint, name: str = "mine", **run: object) -> TorchRunnable:
    return prepare(checkpoint, name=name, device=CPU, run=RunSpec(compile=True, **run))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What vitopt logged, without the compiler's own traces."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("vitopt")]


def pixels(batch_size: int) -> torch.Tensor:
    return random_pixels(batch_size, (32, 32))


@pytest.mark.parametrize("autotune", [False, True])
def test_the_compilers_settings_are_as_before(
    autotune: bool, tiny: Checkpoint, compile_with: Callable[[Backend | str], None]
) -> None:
    from torch._inductor import select_algorithm

    def settings() -> tuple[dict[str, Any], dict[str, Any], bool]:
        dynamo, inductor = (c.get_config_copy() for c in (torch._dynamo.config, torch._inductor.config))
        return dynamo, inductor, select_algorithm.PRINT_AUTOTUNE

    before, seen = settings(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(torch._dynamo.config.recompile_limit)
        return graph.forward

    compile_with(backend)
    compiling(tiny, autotune=autotune)(pixels(1))
    assert seen and min(seen) > 8  # dynamo's own limit
    assert settings() == before


@pytest.mark.parametrize(("backend", "run"), [("eager", {}), ("aot_eager", {"fuse_qkv": True, "channels_last": True})])
def test_a_compiled_model_gives_the_same_answers(
    backend: str, run: dict[str, object], tiny: Checkpoint, compile_with: Callable[[Backend | str], None]
) -> None:
    compile_with(backend)
    runnable = compiling(tiny, **run)
    plain = prepare(tiny, name="plain", device=CPU)
    torch.testing.assert_close(runnable(pixels(2)), plain(pixels(2)), rtol=1e-4, atol=1e-5)
    assert runnable.fixed_shapes and runnable.run.compile and runnable.reasons.get("compile") is None
    assert not plain.fixed_shapes


def test_a_new_shape_is_compiled_and_a_known_one_is_not(
    tiny: Checkpoint, compile_with: Callable[[Backend | str], None]
) -> None:
    backend = Counting()
    compile_with(backend)
    runnable = compiling(tiny)
    counts = []
    for batch_size in (1, 1, 2, 1, 2, 3, 3, 1):
        assert len(runnable(pixels(batch_size))) == batch_size
        counts.append(backend.graphs)
    assert counts == [1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("autotune", [False, True])
def test_weights_are_frozen_while_compiling_and_at_no_other_time(
    autotune: bool, tiny: Checkpoint, compile_with: Callable[[Backend | str], None]
) -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append((torch._inductor.config.freezing, torch._inductor.config.max_autotune))
        return graph.forward

    compile_with(backend)
    compiling(tiny, autotune=autotune)(pixels(2))
    assert seen == [(True, autotune)]
    assert not torch._inductor.config.freezing and not torch._inductor.config.max_autotune


def test_known_shapes_may_be_called_where_nothing_may_be_compiled(
    tiny: Checkpoint, compile_with: Callable[[Backend | str], None]
) -> None:
    compile_with("eager")
    runnable = compiling(tiny)
    expected = [runnable(pixels(size)) for size in (1, 2)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (2, 1):
            torch.testing.assert_close(runnable(pixels(size)), expected[size - 1], rtol=0, atol=0)
    assert runnable.fixed_shapes


def test_many_variants_and_shapes_are_all_compiled(
    tiny: Checkpoint, compile_with: Callable[[Backend | str], None]
) -> None:
    # Variants share the code of their model's class, of which the compiler by default makes eight versions; after
    # that it runs the code as it is, without a word.
    backend = Counting()
    compile_with(backend)
    runnables = [compiling(tiny, name) for name in ("one", "two")]
    for size in range(1, 6):
        for runnable in runnables:
            runnable(pixels(size))
    assert backend.graphs == 2 * 5
    assert all(runnable.fixed_shapes and runnable.reasons.get("compile") is None for runnable in runnables)


def test_a_model_that_cannot_be_compiled_runs_all_the_same_and_keeps_the_reason(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []

    def no_compiler(**_: torch.Tensor) -> None:
        tries.append(1)
        raise RuntimeError("no C++\ncompiler")

    monkeypatch.setattr(torch, "compile", lambda model, **_: no_compiler)
    runnable = compiling(tiny)
    assert runnable.fixed_shapes
    expected = prepare(tiny, name="v", device=CPU)(pixels(2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(runnable(pixels(2)), expected, rtol=0, atol=0)
    assert len(tries) == 1
    assert runnable.run.compile and not runnable.fixed_shapes
    assert runnable.reasons.get("compile") == "RuntimeError: no C++ compiler"
    assert said(caplog) == ["mine: compilation failed (RuntimeError: no C++ compiler); running eager"]


def test_a_later_shape_that_cannot_be_compiled_runs_eager_and_leaves_the_earlier_ones(
    tiny: Checkpoint, compile_with: Callable[[Backend | str], None], caplog: pytest.LogCaptureFixture
) -> None:
    backend = Counting(refuse=3)
    compile_with(backend)
    runnable, plain = compiling(tiny), prepare(tiny, name="plain", device=CPU)
    runnable(pixels(2))
    assert runnable.fixed_shapes and backend.graphs == 1
    with caplog.at_level(logging.WARNING):
        for size in (3, 3, 2, 4):
            torch.testing.assert_close(runnable(pixels(size)), plain(pixels(size)), rtol=0, atol=0)
    assert runnable.fixed_shapes and backend.graphs == 2  # a third size was not even tried
    reason = runnable.reasons["compile"]
    assert reason.startswith("batch 3: ") and "RuntimeError: no kernel for this shape" in reason
    assert "\n" not in reason
    assert said(caplog) == [f"mine: compilation failed ({reason}); running eager"]


def test_full_memory_is_no_reason_to_give_up_compilation(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiled(model: torch.nn.Module, **_: object) -> Callable[..., Any]:
        def call(pixel_values: torch.Tensor) -> Any:
            if len(pixel_values) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model(pixel_values=pixel_values)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    runnable = compiling(tiny)
    for size in (3, 2, 3):
        if size > 2:
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                runnable(pixels(size))
        else:
            assert runnable(pixels(size)).shape == (2, 4)
    assert runnable.fixed_shapes and runnable.reasons.get("compile") is None and said(caplog) == []


def test_an_error_of_the_model_is_not_blamed_on_the_compiler(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    runnable = compiling(tiny)
    with pytest.raises(ValueError, match="Input image size"):
        runnable(random_pixels(1, (64, 64)))
    assert runnable.fixed_shapes and runnable.reasons.get("compile") is None


def test_code_that_is_launched_early_is_not_that_of_other_variants() -> None:
    plain, early, tried = compiler_options(False, False), compiler_options(False, True), compiler_options(True, True)
    assert plain is None and early == {DEPENDENT_LAUNCH: True}
    assert tried == {**(compiler_options(True, False) or {}), DEPENDENT_LAUNCH: True}
    found: list[bool] = []

    def notes(nodes: list[Any]) -> list[Any]:
        found.append(bool(torch._inductor.config.triton.enable_pdl))
        return nodes

    module = nn.Linear(8, 8).requires_grad_(False)
    with torch._inductor.config.patch(_post_fusion_custom_pass=notes, force_disable_caches=True):
        for options in (plain, early, plain, early):
            torch.compile(module, dynamic=False, options=options)(torch.zeros(2, 8))
    assert found == [False, True]  # each was compiled once, with its own setting, and served again
