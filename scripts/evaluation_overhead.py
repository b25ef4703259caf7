"""How much slower is evaluating image files than a bare loop over tensors that are already in memory?

    python scripts/evaluation_overhead.py CHECKPOINT DATA [--batch-size 32] [--rounds 5] [--labels index] [--json FILE]

Both run the same forward passes, in turn, round by round. Decoding and preprocessing happen in a background
thread while the model computes; where they need the same cores, they cannot hide, and the arithmetic says so:
the speed that can be reached is model time / max(model time, (model time x cores used + decode time) / cores).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from vitopt.environment import devices, libraries, machine

libraries.quiet_libraries()

from vitopt.data.images import open_images
from vitopt.data.labels import fit_labels
from vitopt.data.pixels import Preprocessor, batches
from vitopt.measure.accuracy import predict
from vitopt.models.checkpoint import load_processor, open_checkpoint
from vitopt.optimize.runtime import prepare
from vitopt.recipe import DataSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--labels", default="name", choices=("name", "index"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    device = devices.resolve_device(arguments.device)

    checkpoint = open_checkpoint(arguments.checkpoint)
    data = DataSpec(source=arguments.data, labels=arguments.labels)
    images = fit_labels(open_images(data, None), checkpoint.label_names)
    preprocess = Preprocessor(load_processor(checkpoint))
    model = prepare(checkpoint, name="model", device=device)
    in_memory = [batch.pixel_values.to(device) for batch in batches(images, preprocess, arguments.batch_size)]

    def bare() -> None:
        for pixels in in_memory:
            model(pixels).float().cpu()

    def evaluation() -> None:
        predict([model], images, preprocess, batch_size=arguments.batch_size, workers=arguments.workers)

    def decoding() -> None:
        for _ in batches(images, preprocess, arguments.batch_size):
            pass

    bare()
    seconds: dict[str, list[float]] = {"bare": [], "evaluation": [], "decoding": []}
    for _ in range(arguments.rounds):
        for name, work in (("bare", bare), ("evaluation", evaluation), ("decoding", decoding)):
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)

    median = {name: statistics.median(samples) for name, samples in seconds.items()}
    # Speed against the bare loop, paired by round.
    speed = statistics.median(b / e for b, e in zip(seconds["bare"], seconds["evaluation"], strict=True))
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    busy = threads if device.type == "cpu" else 0
    reachable = median["bare"] / max(median["bare"], (median["bare"] * busy + median["decoding"]) / cores)
    result = {
        "images": len(images),
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "bare_seconds": seconds["bare"],
        "evaluation_seconds": seconds["evaluation"],
        "decoding_seconds": seconds["decoding"],
        "speed_of_bare_loop": speed,
        "reachable_on_these_cores": reachable,
        "environment": machine.describe(device),
    }
    print(f"{len(images)} images at batch {arguments.batch_size} on {device}, medians of {arguments.rounds} rounds")
    print(f"  bare loop over tensors  {median['bare']:6.2f} s")
    print(f"  evaluation from files   {median['evaluation']:6.2f} s")
    print(f"  decoding alone          {median['decoding']:6.2f} s")
    print(f"evaluation runs at {speed:.2f} of the bare loop; {reachable:.2f} is what {cores} cores allow")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
