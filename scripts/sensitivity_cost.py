"""What does the sensitivity table cost against evaluating every mixture anew?

    python scripts/sensitivity_cost.py vit-tiny-patch16-224 [--blocks 24] [--images 32] [--json FILE]

The model has random weights, so any depth can be timed. Both ways give the same logits to the bit, which is
checked; they run in turn, and the ratio is paired by round.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vitopt.environment import libraries, machine

libraries.quiet_libraries()

from vitopt.environment.devices import DTYPES
from vitopt.models.checkpoint import load_model, load_processor, open_checkpoint, save_checkpoint
from vitopt.models.names import block_names, linear_layers
from vitopt.optimize.formats import quantization_config
from vitopt.optimize.hybrid import Hybrid
from vitopt.optimize.quantize import plan_for
from vitopt.recipe import VariantSpec
from vitopt.search.sensitivity import Calibration, Unit, mixture_logits, units


def naive(hybrid: Hybrid, calibration: Calibration, chosen: list[Unit]) -> dict[str, list[torch.Tensor]]:
    """The base and every mixture from the pixels on."""
    found = {"base": [hybrid.logits(pixels) for pixels in calibration.stream()]}
    for unit in chosen:
        with hybrid.lending(unit.layers):
            found[unit.name] = [hybrid.logits(pixels) for pixels in calibration.stream()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture")
    parser.add_argument("--blocks", type=int, help="depth, where it is not the architecture's own")
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    source = open_checkpoint(f"random:{arguments.architecture}")
    if arguments.blocks:
        source.config.num_hidden_layers = arguments.blocks
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(load_model(source), load_processor(source), Path(folder))
        checkpoint = open_checkpoint(folder)
        config = quantization_config(
            plan_for(checkpoint, VariantSpec(name="x", format=arguments.format)), DTYPES["bf16"]
        )
        exact = load_model(checkpoint, dtype=DTYPES["bf16"])
        packed = load_model(checkpoint, dtype=DTYPES["bf16"], quantization=config)
    layers = linear_layers(exact, checkpoint.config.model_type)
    hybrid = Hybrid(exact, packed, block_names(exact, checkpoint.config.model_type))
    chosen = units(layers, "block")

    generator = torch.Generator().manual_seed(0)
    size = checkpoint.image_size
    count = -(-arguments.images // arguments.batch_size)
    pixels = tuple(torch.randn(arguments.batch_size, 3, *size, generator=generator) for _ in range(count))
    names = tuple(map(str, range(count * arguments.batch_size)))
    calibration = Calibration(names, names, np.zeros(len(names), dtype=np.int64), lambda: pixels, count)

    # Both models once: bitsandbytes repacks its weights at the first call.
    for one in (hybrid, Hybrid(packed, exact, hybrid.blocks)):
        one.logits(pixels[0])
    seconds: dict[str, list[float]] = {"naive": [], "vitopt": []}
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        slow = naive(hybrid, calibration, chosen)
        seconds["naive"].append(time.perf_counter() - started)
        started = time.perf_counter()
        fast: dict[str, list[torch.Tensor]] = {}
        fast["base"] = mixture_logits(hybrid, calibration, chosen, done=fast.__setitem__)
        seconds["vitopt"].append(time.perf_counter() - started)
        assert all(torch.equal(a, b) for unit in slow for a, b in zip(slow[unit], fast[unit], strict=True))

    ratio = statistics.median(fast / slow for fast, slow in zip(seconds["vitopt"], seconds["naive"], strict=True))
    print(f"{arguments.architecture}: {len(chosen)} blocks, {len(names)} images, {arguments.format}")
    print(f"  every mixture anew  {statistics.median(seconds['naive']):7.2f} s")
    print(f"  vitopt              {statistics.median(seconds['vitopt']):7.2f} s, the same logits to the bit")
    print(f"ratio {ratio:.3f}")
    if arguments.json:
        result = {
            "architecture": arguments.architecture,
            "blocks": len(chosen),
            "images": len(names),
            "format": arguments.format,
            "naive_seconds": seconds["naive"],
            "vitopt_seconds": seconds["vitopt"],
            "ratio": ratio,
            "environment": machine.describe(torch.device("cpu")),
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
