"""Whether a device runs what vitopt needs, and first figures: with torch and transformers alone, in a minute.

    python scripts/device_smoke.py [--device cuda] [--model vit-large-patch16-224] [--batch-size 64]

Prints a JSON object a line, each as soon as it is known; what fails is a line with its reason.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from transformers import ViTForImageClassification

from vitopt.environment import devices
from vitopt.errors import VitoptError
from vitopt.measure.failures import explain_failure
from vitopt.measure.latency import clock_for
from vitopt.models.architectures import known_architecture
from vitopt.optimize.attention import implementation
from vitopt.optimize.compiled import Path, compiled

GEMM_SIDE = {"cuda": 8192, "cpu": 512}
CALLS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="vit-large-patch16-224")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    config = known_architecture(arguments.model)
    if config is None:
        sys.exit(f"error: no such shape: {arguments.model}")
    try:
        device = devices.resolve_device(arguments.device)
    except VitoptError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(0)
    with torch.inference_mode():
        tell("compiler", compiler)
        tell("GEMM", lambda: gemm(device))
        config._attn_implementation = "eager"
        model = ViTForImageClassification(config).to(device).eval()
        tell("fp32 eager", lambda: timed(lambda pixels: model(pixel_values=pixels).logits, 1, torch.float32, device))
        half = copy.deepcopy(model).to(torch.bfloat16)
        half.set_attn_implementation(implementation("sdpa", "auto", captured=device.type == "cuda"))
        graph = compiled(Path(half, torch.bfloat16), list(half.vit.layers), device)
        tell("compiled bf16 agrees with fp32", lambda: agreement(model, graph, device))
        for batch_size in (1, arguments.batch_size):
            tell("bf16 compiled", lambda size=batch_size: timed(graph, size, torch.bfloat16, device))
        for rows in (1, arguments.batch_size):
            tokens = rows * (1 + (config.image_size // config.patch_size) ** 2)
            for columns, outputs in (
                (config.hidden_size, config.intermediate_size),
                (config.intermediate_size, config.hidden_size),
            ):
                tell(
                    f"fp8 {tokens} x {columns} x {outputs}", lambda m=tokens, k=columns, n=outputs: fp8(m, k, n, device)
                )


def tell(name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Print what `measure` gives, or why it gives nothing."""
    try:
        found = measure()
    except Exception as error:  # each line tells something of its own
        found = {"failure": explain_failure(error)}
    print(json.dumps({"name": name} | found), flush=True)


def compiler() -> dict[str, Any]:
    """Versions of what compiles."""
    try:
        import triton
    except ModuleNotFoundError:
        return {"torch": torch.__version__, "triton": None}
    return {"torch": torch.__version__, "triton": triton.__version__}


def gemm(device: torch.device) -> dict[str, Any]:
    """Rate of a large bf16 matrix product."""
    side, clock = GEMM_SIDE[device.type], clock_for(device)
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    left @ right
    return {"flops_per_second": 2 * side**3 / (clock.queued(lambda: left @ right, CALLS) / 1000)}


def timed(
    call: Callable[[torch.Tensor], torch.Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Median wait of a caller, and time of the device, at a batch size."""
    clock = clock_for(device)
    pixels = torch.randn(size, 3, 224, 224, dtype=dtype, device=device)
    for _ in range(3):
        call(pixels)
    p50 = statistics.median(clock.time(lambda: call(pixels)) for _ in range(CALLS))
    return {"batch_size": size, "p50_ms": p50, "device_ms": clock.queued(lambda: call(pixels), CALLS)}


def agreement(model: nn.Module, graph: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Relative error of the compiled model's logits."""
    pixels = torch.randn(2, 3, 224, 224, device=device)
    expected = model(pixel_values=pixels).logits
    found = graph(pixels.to(torch.bfloat16)).float()
    return {"relative_error": float((found - expected).norm() / expected.norm())}


def fp8(rows: int, columns: int, outputs: int, device: torch.device) -> dict[str, Any]:
    """Time of a row-scaled fp8 product; cuBLAS refuses some shapes."""
    left = torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)
    right = torch.randn(outputs, columns, device=device).to(torch.float8_e4m3fn)
    scales = torch.ones(rows, 1, device=device), torch.ones(1, outputs, device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            left, right.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    product()
    return {"device_ms": clock_for(device).queued(product, CALLS)}


if __name__ == "__main__":
    main()
