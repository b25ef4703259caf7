"""The order of things in capturing and replaying CUDA graphs, with torch.cuda played by stand-ins.

What only a GPU can show (that a captured graph computes, and fast) is in tests/test_gpu.py.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.models.names import block_names
from vitopt.optimize.compiled import GraphedModel, Path, compiled


class FakeGraph:
    """Replays by computing anew from the buffer that was captured, into the buffer that was captured."""

    def __init__(self) -> None:
        self.capture: tuple[torch.Tensor, torch.Tensor] | None = None
        self.replays = 0

    def replay(self) -> None:
        assert self.capture is not None
        pixels, logits = self.capture
        self.replays += 1
        logits.copy_(self.model(pixel_values=pixels, recorded=False).logits)


class FakeCuda:
    """As much of torch.cuda as GraphedModel uses; `events` tells in which order it was used."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.graphs: list[FakeGraph] = []
        self.capturing: FakeGraph | None = None
        self.allocated = 100

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def CUDAGraph(self) -> FakeGraph:
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream, capture_error_mode) == ((0, 1), self, "thread_local")
        self.events.append("capture")
        self.capturing = graph
        yield
        self.capturing = None
        self.allocated += 50

    def Stream(self, device: torch.device) -> "FakeCuda":
        return self

    current_stream = Stream

    def wait_stream(self, other: object) -> None:
        self.events.append("wait")

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def set_stream(self, stream: object) -> None:
        self.events.append("back")

    def synchronize(self, device: torch.device) -> None:
        self.events.append("synchronize")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        pass

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    max_memory_allocated = memory_allocated


class Recorded(nn.Module):
    """A model whose calls are counted, and whose call within a capture is what the graph replays."""

    def __init__(self, model: nn.Module, cuda: FakeCuda):
        super().__init__()
        self.model, self.cuda = model, cuda

    def forward(self, pixel_values: torch.Tensor, recorded: bool = True) -> Any:
        output = self.model(pixel_values=pixel_values)
        if recorded:
            self.cuda.events.append("call")
        if self.cuda.capturing is not None:
            self.cuda.capturing.capture = (pixel_values, output.logits)
            self.cuda.capturing.model = self  # type: ignore[attr-defined]
        return output


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in [name for name in vars(FakeCuda) if not name.startswith("_") and hasattr(torch.cuda, name)]:
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


@pytest.fixture
def graphed(cuda: FakeCuda, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[GraphedModel, nn.Module]:
    model = load_model(open_checkpoint(str(tiny_checkpoint)))
    blocks = [model.get_submodule(name) for name in block_names(model, "vit")]
    for block in blocks:
        real = block.compile
        monkeypatch.setattr(
            block, "compile", lambda fullgraph, dynamic, options, real=real: real(fullgraph=fullgraph, backend="eager")
        )
    return GraphedModel(Path(Recorded(model, cuda), torch.float32), blocks, autotune=False), model


def pixels(batch_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_each_shape_is_captured_once_after_it_has_run(graphed: tuple[GraphedModel, nn.Module], cuda: FakeCuda) -> None:
    graph, model = graphed
    with torch.inference_mode():
        for batch_size, seed in ((2, 0), (2, 1), (3, 2), (2, 3)):
            found = graph(pixels(batch_size, seed))
            expected = model(pixel_values=pixels(batch_size, seed)).logits
            torch.testing.assert_close(found, expected)
    assert [one.replays for one in cuda.graphs] == [3, 1]
    before_capture = cuda.events[: cuda.events.index("capture")]
    assert before_capture.count("call") == 3
    assert before_capture[-1] == "synchronize"
    assert graph.knows(pixels(3).shape) and not graph.knows(pixels(4).shape)


def test_what_was_returned_is_no_buffer_of_the_graph(graphed: tuple[GraphedModel, nn.Module]) -> None:
    graph, _ = graphed
    with torch.inference_mode():
        first = graph(pixels(2, seed=0))
        kept = first.clone()
        graph(pixels(2, seed=1))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_a_replay_changes_no_pixels_of_the_caller(graphed: tuple[GraphedModel, nn.Module]) -> None:
    graph, _ = graphed
    with torch.inference_mode():
        mine = pixels(2, seed=0)
        graph(mine)
        graph(pixels(2, seed=1))
    torch.testing.assert_close(mine, pixels(2, seed=0), rtol=0, atol=0)


def test_one_block_is_compiled_for_all(cuda: FakeCuda, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(open_checkpoint(str(tiny_checkpoint)))
    blocks = [model.get_submodule(name) for name in block_names(model, "vit")]
    programs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        programs.append(1)
        return module.forward

    for block in blocks:
        real = block.compile
        monkeypatch.setattr(
            block, "compile", lambda real=real, **_: real(fullgraph=True, dynamic=False, backend=backend)
        )
    torch._dynamo.reset()
    graph = GraphedModel(Path(Recorded(model, cuda), torch.float32), blocks, autotune=False)
    with torch.inference_mode():
        graph(pixels(2))
        assert len(programs) == 1
        graph(pixels(3))
    assert len(programs) == 2
    torch._dynamo.reset()


def test_the_copy_into_the_graph_is_what_casts(cuda: FakeCuda, tiny_checkpoint: Any) -> None:
    model = load_model(open_checkpoint(str(tiny_checkpoint))).to(torch.bfloat16)
    path = Path(Recorded(model, cuda), torch.bfloat16, torch.channels_last)
    graph = GraphedModel(path, [nn.Identity()], autotune=False)
    copies: list[tuple[torch.dtype, torch.dtype]] = []
    with torch.inference_mode(), Copies(copies):
        found = graph(pixels(2)).float()
        copies.clear()
        again = graph(pixels(2)).float()
    # One copy to the graph, and one of the logits out of it, which the stand-in's replay also fills.
    assert copies[0] == (torch.float32, torch.bfloat16) and len(copies) == 2
    buffer, _ = cuda.graphs[0].capture or (None, None)
    assert buffer is not None and buffer.is_contiguous(memory_format=torch.channels_last)
    expected = model(pixel_values=pixels(2).to(torch.bfloat16)).logits.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


class Copies(TorchFunctionMode):
    """Notes the types of every copy into a tensor that is there already."""

    def __init__(self, noted: list[tuple[torch.dtype, torch.dtype]]):
        self.noted = noted

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.copy_:
            self.noted.append((args[1].dtype, args[0].dtype))
        return function(*args, **(kwargs or {}))


def test_the_whole_model_can_be_one_program(
    cuda: FakeCuda, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(open_checkpoint(str(tiny_checkpoint)))
    programs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        programs.append(sum("layer_norm" in str(node.target) for node in module.graph.nodes))
        return module.forward

    real = torch.compile

    def compile(whole: nn.Module, *, dynamic: bool, options: dict[str, bool] | None) -> nn.Module:
        return Recorded(real(whole, dynamic=dynamic, backend=backend), cuda)

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    blocks = [model.get_submodule(name) for name in block_names(model, "vit")]
    graph = compiled(Path(model, torch.float32), blocks, torch.device("cuda"), whole=True)
    with torch.inference_mode():
        found = graph(pixels(2))
    torch._dynamo.reset()
    assert max(programs) == 2 * len(blocks) + 1  # all norms of the model in one program
    assert all(block._compiled_call_impl is None for block in blocks)
    torch.testing.assert_close(found, model(pixel_values=pixels(2)).logits)


def test_memory_set_aside_is_known_for_captured_shapes(graphed: tuple[GraphedModel, nn.Module]) -> None:
    graph, _ = graphed
    with torch.inference_mode():
        graph(pixels(2))
    assert graph.peak_bytes(pixels(2).shape) == 50
    assert graph.peak_bytes(pixels(3).shape) == 0


def test_undoing_leaves_blocks_uncompiled(graphed: tuple[GraphedModel, nn.Module]) -> None:
    graph, model = graphed
    blocks = [model.get_submodule(name) for name in block_names(model, "vit")]
    assert all(block._compiled_call_impl is not None for block in blocks)
    graph.undo()
    assert all(block._compiled_call_impl is None for block in blocks)


def test_torch_takes_what_it_is_given() -> None:
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"pool", "cuda_graph", "stream"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    for name in ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit"):
        assert hasattr(torch._dynamo.config, name)
    assert "max-autotune-no-cudagraphs" in torch._inductor.list_mode_options()
