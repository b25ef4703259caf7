"""Kernels and bytes that one block of a compiled ViT takes, by run option, counted in the compiler's own schedule.

    python scripts/block_costs.py [--model vit-large-patch16-224] [--batch-size 1]

Counts are of inductor's scheduler after it has fused: what it generates and what it calls, in bf16 or w8a8, without
generating or running anything. They are for the CPU; for a GPU it fuses by other rules, which these counts do not show.
Bytes are what those kernels read and write, weights included, as if no cache held any.
"""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._inductor.config
from torch import nn
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from transformers import ViTConfig, ViTForImageClassification

from vitopt.models.activations import LayerInputs
from vitopt.models.architectures import known_architecture
from vitopt.models.names import block_names, linear_layers
from vitopt.optimize.blocks import Carried, carry_residuals, join_gelu, narrow_last_block
from vitopt.optimize.formats import QUANTIZES
from vitopt.optimize.fuse import fuse_projections
from vitopt.optimize.static import use_static_scales

_BLOCKS = 3  # the middle one is neither first nor last

# row -> the options that it adds to those before
ROWS = {
    "bf16 compiled": (),
    "+ fuse_qkv": ("fuse_qkv",),
    "+ carry_residual": ("carry_residual",),
    "+ gelu_epilogue": ("gelu_epilogue",),
}


@dataclass(frozen=True)
class Cost:
    """What a call takes: kernels that the compiler generates, those of libraries that it calls, and bytes."""

    generated: int
    called: int
    bytes: int


class _Counted(Exception):
    """The schedule is known; nothing need be generated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit-large-patch16-224")
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    config = known_architecture(arguments.model)
    if config is None:
        sys.exit(f"error: no such shape: {arguments.model}")
    print(table(config, arguments.batch_size))


def table(config: ViTConfig, batch_size: int) -> str:
    """A Markdown table with a row for each option that is added, and one for the last block."""
    lines = ["| one block | generated | called | MB |", "|---|---:|---:|---:|"]
    options: tuple[str, ...] = ()
    for name, added in ROWS.items():
        options += added
        lines.append(_line(name, block_cost(config, batch_size, options)))
    kernels = block_cost(config, batch_size, (*options[:1], "fused_kernels")) if _has_triton() else None
    lines.append(_line("fuse_qkv + fused_kernels, no split", kernels))
    lines.append(_line("the last block, exact options", block_cost(config, batch_size, options[:2], block=-1)))
    narrow = (*options[:2], "class_token_last")
    lines.append(_line("+ class_token_last", block_cost(config, batch_size, narrow, block=-1)))
    lines.append(_line("w8a8, fuse_qkv", block_cost(config, batch_size, ("w8a8", "fuse_qkv"))))
    lines.append(_line("+ static_scales", block_cost(config, batch_size, ("w8a8", "fuse_qkv", "static_scales"))))
    return "\n".join(lines)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _line(name: str, cost: Cost | None) -> str:
    if cost is None:
        return f"| {name} | needs triton | | |"
    return f"| {name} | {cost.generated} | {cost.called} | {cost.bytes / 1e6:.1f} |"


def block_cost(config: ViTConfig, batch_size: int, options: tuple[str, ...], block: int = 1) -> Cost:
    """What one block takes that is compiled by itself, as `compile` does on a GPU."""
    config.num_hidden_layers, config._attn_implementation = _BLOCKS, "sdpa"
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval().to(torch.bfloat16).requires_grad_(False)
    names = block_names(model, "vit")
    count = 1 + (config.image_size // config.patch_size) ** 2
    observed = {layer.logical: _any_inputs(model.get_submodule(layer.module)) for layer in linear_layers(model, "vit")}
    rewrites: dict[str, Callable[[nn.Module], int]] = {
        "class_token_last": lambda model: narrow_last_block(model, names),
        "carry_residual": lambda model: carry_residuals(model, names),
        "gelu_epilogue": join_gelu,
        "w8a8": _quantize,
        "fuse_qkv": fuse_projections,
        "fused_kernels": lambda model: _fuse_products(model, names, batch_size * count),
        "static_scales": lambda model: use_static_scales(model, "vit", observed),
    }
    for option, rewrite in rewrites.items():
        if option in options and rewrite(model) == 0:
            raise ValueError(f"{option} changes nothing here")
    tokens = torch.zeros(batch_size, count, config.hidden_size, dtype=torch.bfloat16)
    hidden = Carried(tokens, tokens.clone()) if "carry_residual" in options else tokens
    return cost(model.get_submodule(names[block]), hidden)


def _any_inputs(linear: nn.Module) -> LayerInputs:
    largest = torch.ones(2, linear.in_features)  # of the class token and of patches
    return LayerInputs(-largest, largest, {"w8a8": 0.0})


def _quantize(model: nn.Module) -> int:
    from torchao.quantization import quantize_

    quantize_(model.vit.layers, QUANTIZES["w8a8"]())
    return 1


def _fuse_products(model: nn.Module, names: tuple[str, ...], rows: int) -> int:
    from vitopt.optimize.kernels.blocks import fuse_products, fused_layers  # needs triton
    from vitopt.optimize.kernels.product import Tile

    done = fuse_products(model, names)
    for layer in fused_layers(model):
        layer.tiles = {rows: Tile(64, 64, 64, 4, 4)}
    return done


def cost(module: nn.Module, *inputs: Any) -> Cost:
    """What one call of a compiled module takes; it is neither generated nor run."""
    found: list[Cost] = []

    def count(nodes: list[Any]) -> list[Any]:
        work = [
            node
            for node in nodes
            # A MultiOutput only names one of the outputs of the kernel before it.
            if not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, MultiOutput)
        ]
        called = sum(isinstance(node, ExternKernelSchedulerNode) for node in work)
        moved = sum(int(node.get_read_write_buffers_sizes()) for node in work)
        found.append(Cost(len(work) - called, called, moved))
        raise _Counted

    torch._dynamo.reset()
    settings = torch._inductor.config.patch(_post_fusion_custom_pass=count, force_disable_caches=True)
    with settings, torch.inference_mode(), contextlib.suppress(Exception):  # the compiler wraps what ends it
        torch.compile(module, dynamic=False, fullgraph=True)(*inputs)
    torch._dynamo.reset()
    if not found:
        raise RuntimeError("this version of the compiler has no schedule to look at")
    return found[-1]


if __name__ == "__main__":
    main()
