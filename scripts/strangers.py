"""What becomes of inputs that somebody got wrong, or meant to?

    python scripts/strangers.py [--count 1000] [--seed 0] [--kinds recipe,config] [--json FILE]

Makes so many bad inputs of each kind from good ones, and hands each to what a command would do with it. An input may
give a result or a VitoptError. Counted are tracebacks, answers that took over 5 seconds, files of other folders that
were opened or written (an audit hook, and the times of reading for what Rust opens), pickles, programs and connections
that were started, and the most memory beside that of the good inputs.
"""

import argparse
import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vitopt.environment import libraries

libraries.quiet_libraries()

from vitopt.data.images import image_files, open_images
from vitopt.errors import VitoptError
from vitopt.models.checkpoint import built_in_path
from vitopt.models.weights import INDEX_FILE, WHOLE_FILE
from vitopt.prediction import predict
from vitopt.recipe import DataSpec
from vitopt.recipe_file import load_recipe

SLOW_SECONDS = 5
GOOD_INPUTS = 5
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
_STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")

# A kind spoils a copy of the good folder, in place; "outside" beside it is what must not be reached.
Spoil = Callable[[random.Random, Path], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    context = multiprocessing.get_context("spawn")  # each kind has its own peak of memory
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        seeds = [arguments.seed] * len(kinds)
        found = dict(zip(kinds, pool.map(meet, kinds, [arguments.count] * len(kinds), seeds), strict=True))
    text = json.dumps({"seed": arguments.seed, "kinds": found}, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    sys.exit(any(row[fault] for row in found.values() for fault in FAULTS))


FAULTS = ("tracebacks", "slow", "files_outside", "pickles_opened", "programs_or_connections_started")


def meet(kind: str, count: int, seed: int) -> dict[str, Any]:
    """Counts over `count` bad inputs of a kind."""
    counts: Counter[str] = Counter(dict.fromkeys(("results", "refusals", *FAULTS), 0))
    slowest = 0.0
    with tempfile.TemporaryDirectory() as place:
        folder, good = Path(place).resolve(), Path(place).resolve() / "good"
        _make_good(good)
        shutil.copytree(good, folder / "outside")
        for number in range(GOOD_INPUTS):
            KINDS[kind][1](Path(shutil.copytree(good, folder / f"good-{number}")))
        peak = _peak_bytes()
        watch = _Watch(folder)
        sys.addaudithook(watch)
        for number in range(count):
            outcome, seconds = _one(folder, kind, f"{kind} {seed} {number}", watch)
            if seconds > SLOW_SECONDS:  # once more, as a busy machine is slow as well
                outcome, seconds = _one(folder, kind, f"{kind} {seed} {number}", watch)
            slowest = max(slowest, seconds)
            counts[outcome] += 1
            counts["slow"] += seconds > SLOW_SECONDS
    counts.update(watch.counts)
    growth = round(_peak_bytes() / peak, 2)
    return {**counts, "inputs": count, "slowest_seconds": round(slowest, 2), "peak_memory_over_good": growth}


def _one(folder: Path, kind: str, name: str, watch: "_Watch") -> tuple[str, float]:
    """What became of one bad input, and the seconds that it took."""
    spoil, use = KINDS[kind]
    case = Path(shutil.copytree(folder / "good", folder / "case"))
    spoil(random.Random(name), case)
    outside = [path for path in (folder / "outside").rglob("*") if path.is_file()]
    for path in outside:
        os.utime(path, (0, path.stat().st_mtime))
    begin = time.perf_counter()
    watch.case = case
    outcome = _outcome(lambda: use(case), name)
    watch.case = None
    seconds = time.perf_counter() - begin
    watch.counts["files_outside"] += any(path.stat().st_atime for path in outside)
    shutil.rmtree(case)
    return outcome, seconds


def _outcome(use: Callable[[], object], name: str) -> str:
    def hang(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(6 * SLOW_SECONDS)
    try:
        use()
    except VitoptError:
        return "refusals"
    except BaseException:
        print(f"-- {name}\n{traceback.format_exc()}", file=sys.stderr)
        return "tracebacks"
    finally:
        signal.alarm(0)
    return "results"


class _Watch:
    """An audit hook: counts what a case opens or starts that is not its own."""

    def __init__(self, folder: Path):
        self.folder, self.case = folder, None
        self.counts: Counter[str] = Counter()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.case is None:
            return
        case = self.case
        if event == "open" and isinstance(arguments[0], str | bytes):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            foreign = not place.startswith(f"{case}/") and place != str(case)
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and not place.startswith("/dev/")
            # What the libraries read of themselves is theirs.
            if foreign and (writes or place.startswith((f"{self.folder}/", "/etc/"))) and "__pycache__" not in place:
                print(f"-- opened {place}", file=sys.stderr)
                self.counts["files_outside"] += 1
            self.counts["pickles_opened"] += place.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        self.counts["pickles_opened"] += event == "pickle.find_class"
        if event in _STARTED:
            self.counts["programs_or_connections_started"] += 1


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Good inputs, all in one folder


def _make_good(folder: Path) -> None:
    shutil.copytree(built_in_path(), folder)
    for kind in ("cat", "dog"):
        (folder / "images" / kind).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (40, 30), (50 * index, 90, 120)).save(folder / "images" / kind / f"{index}.png")
    rows = [f"{kind}/{index}.png,{kind}" for kind in ("cat", "dog") for index in range(2)]
    (folder / "images" / "metadata.csv").write_text("\n".join(["file_name,label", *rows]) + "\n")
    for number, format in enumerate(FORMATS):
        noise = Image.effect_noise((64, 48), 60).convert("RGB")
        noise.save(folder / f"picture-{number}.png", format=format)
    content = {
        "name": "good",
        "model": "vit-quickstart",
        "data": {"source": "digits", "limit": 10},
        "finetune": {"epochs": 1, "targets": ["query", "block.0.fc1"]},
        "variants": [{"name": "a", "format": "fp32"}, {"name": "b", "format": "nf4", "skip": ["block.0"]}],
        "evaluate": {"batch_size": 8, "latency": {"batch_sizes": [1, 2]}},
        "require": {"max_top1_drop": 1.0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))


# How they are spoiled


# fmt: off
_NASTY = (
    None, True, False, -1, 0, 1, 2, 7, 10**6, 10**12, 10**400, 1e308, -1e308, float("nan"), float("inf"), 0.5,
    "", "x", "x" * 5_000, "\0", "\x1b[2J", "\u202e", "é", "../outside/model.safetensors", "/etc/passwd", "/dev/zero",
    "~", "~root", "${HOME}", "os.system", "owner/kernel", "=1+1", [], {}, [[]], [1, 2], ["a"] * 50, {"a": 1},
    {"_type": "os.system", "_data": {}}, "float32", "int8", "auto", "nf4", "swin", "ViTForImageClassification",
)
# fmt: on


def _nasty(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_NASTY))


_KEYS = [
    "auto_map", "attn_implementation", "_attn_implementation", "transformers_weights", "quantization_config", "to_dict",
    "return_dict", "num_labels", "id2label", "dtype", "torch_dtype", "image_size", "size", "crop_size", "resample",
    "__class__", "model_type", "vision_config", "text_config", "label2id", "use_bfloat16", "pruned_heads", "do_pad",
    "<<", "problem_type", "feature_extractor_type", "image_processor", "seed", "name", "root", "device", "group_column",
]  # fmt: skip


def _spoil_data(rng: random.Random, content: Any) -> Any:
    """The same plain data with one to three places changed."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        place = content
        while True:
            if not isinstance(place, dict | list) or not place:
                break
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            what = rng.random()
            if what < 0.7:
                place[key] = _nasty(rng)
            elif what < 0.85:
                place.pop(key)
            elif isinstance(place, dict):
                place[rng.choice(_KEYS)] = _nasty(rng)
            else:
                place.append(_nasty(rng))
            break
        if rng.random() < 0.03:
            content = _nasty(rng)
    return content


def _spoil_bytes(rng: random.Random, content: bytes, places: int = 6) -> bytes:
    spoiled = bytearray(content)
    for _ in range(rng.randint(1, places)):
        at = rng.randrange(len(spoiled) + 1)
        what = rng.random()
        if what < 0.6 and at < len(spoiled):
            spoiled[at] = rng.randrange(256)
        elif what < 0.75:
            spoiled[at:at] = rng.randbytes(rng.randint(1, 20))
        elif what < 0.9:
            del spoiled[at : at + rng.randint(1, 50)]
        elif what < 0.95:
            del spoiled[at:]
    return bytes(spoiled)


def _spoil_text_file(rng: random.Random, path: Path, dump: Callable[[Any], str], load: Callable[[str], Any]) -> None:
    if rng.random() < 0.75:
        text = dump(_spoil_data(rng, load(path.read_text())))
        path.write_bytes(text.encode(errors="surrogatepass"))
    else:
        path.write_bytes(_spoil_bytes(rng, path.read_bytes()))


def _spoil_json(name: str) -> Spoil:
    return lambda rng, case: _spoil_text_file(rng, case / name, json.dumps, json.loads)


_YAML_TRICKS = (
    "\nname: twice\n",
    "\nx: &x [*x]\n",
    "\nx: " + "[" * 500,
    "\nx: !!python/object/apply:os.system [true]\n",
    "\nseed: " + "9" * 6_000 + "\n",
    "\nseed: " + "1:" * 3_000 + "1\n",
    "\na: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c]\n"
    "e: &e [*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e]\n",
    "\n---\nname: other\n",
    "\n? {a: 1}\n: 2\n",
    "\n<<: [1, 2]\n",
    "\nname: 2026-02-30\n",
)


def _spoil_recipe(rng: random.Random, case: Path) -> None:
    path = case / "recipe.yaml"
    _spoil_text_file(
        rng, path, lambda content: yaml.safe_dump(content, allow_unicode=rng.random() < 0.5), yaml.safe_load
    )
    if rng.random() < 0.25:
        path.write_bytes(path.read_bytes() + rng.choice(_YAML_TRICKS).encode())


def _spoil_weights(rng: random.Random, case: Path) -> None:
    path = case / WHOLE_FILE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    what = rng.random()
    if what < 0.5:
        spoiled = json.dumps(_spoil_data(rng, header)).encode()
        path.write_bytes((len(spoiled) if what < 0.45 else rng.getrandbits(64)).to_bytes(8, "little") + spoiled + data)
    elif what < 0.8:
        path.write_bytes(_spoil_bytes(rng, content, places=3))
    else:
        renamed = rng.choice(("part.safetensors", "pytorch_model.bin", "sub.safetensors"))
        weight_map = dict.fromkeys((name for name in header if name != "__metadata__"), renamed)
        path.rename(case / renamed)
        for _ in range(rng.randint(0, 2)):
            weight_map[rng.choice(list(weight_map))] = rng.choice(
                (
                    "../outside/model.safetensors",
                    f"{case.parent}/outside/model.safetensors",
                    "a/b.safetensors",
                    7,
                    "",
                    None,
                )
            )
        (case / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        if rng.random() < 0.3:
            (case / renamed).unlink()
            (case / renamed).symlink_to(case.parent / "outside" / WHOLE_FILE)


def _spoil_table(rng: random.Random, case: Path) -> None:
    images = case / "images"
    rows = [line.split(",") for line in (images / "metadata.csv").read_text().splitlines()]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        cell = rng.choice(
            (str(_nasty(rng)), f"{case.parent}/outside/picture-0.png", "../../outside/picture-0.png", '"', ".")
        )
        row[rng.randrange(len(row)) if row else 0 :] = [cell] * rng.randint(0, 3)
    text = "\n".join(",".join(row) for row in rows).encode(errors="surrogatepass")
    (images / "metadata.csv").write_bytes(_spoil_bytes(rng, text) if rng.random() < 0.2 else text)
    if rng.random() < 0.3:
        (images / "metadata.csv").unlink()
        trap = images / "cat" / "trap.png"
        what = rng.randrange(5)
        if what == 0:
            os.mkfifo(trap)
        elif what == 1:
            trap.mkdir()
        else:
            trap.symlink_to(("/dev/zero", case.parent / "outside" / "picture-0.png", "trap.png")[what - 2])


def _spoil_image(rng: random.Random, case: Path) -> None:
    for path in case.glob("picture-*.png"):
        content = path.read_bytes()
        spoiled = _spoil_bytes(rng, content, places=20)
        if rng.random() < 0.3:  # where sizes and tables are
            head = bytearray(spoiled[:64].ljust(64, b"\0"))
            for _ in range(rng.randint(1, 8)):
                head[rng.randrange(64)] = rng.choice((0, 1, 127, 128, 255))
            spoiled = bytes(head) + spoiled[64:]
        if rng.random() < 0.05:
            spoiled = rng.choice(
                (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"", b"\x80\x04K\x01.", b"<svg/>")
            )
        path.write_bytes(spoiled)


# What is done with them


def _use_recipe(case: Path) -> None:
    load_recipe(case / "recipe.yaml", ["evaluate.batch_size=4"])


def _use_checkpoint(case: Path) -> None:
    list(predict(str(case), [case / "images" / "cat" / "0.png"], top=1, device="cpu"))


def _use_table(case: Path) -> None:
    images = open_images(DataSpec(source=str(case / "images"), labels="name"), "all")
    assert len(images.sha256) == 64
    for index in range(len(images)):
        images.image(index)


def _use_image(case: Path) -> None:
    images = image_files(sorted(case.glob("picture-*.png")))
    refused: VitoptError | None = None
    for index in range(len(images)):
        try:
            images.image(index)
            images.image(index, smallest_side=1)
        except VitoptError as error:
            refused = error
    if refused is not None:
        raise refused


KINDS: dict[str, tuple[Spoil, Callable[[Path], None]]] = {
    "recipe": (_spoil_recipe, _use_recipe),
    "config": (_spoil_json("config.json"), _use_checkpoint),
    "preprocessor": (_spoil_json("preprocessor_config.json"), _use_checkpoint),
    "weights": (_spoil_weights, _use_checkpoint),
    "table": (_spoil_table, _use_table),
    "image": (_spoil_image, _use_image),
}


if __name__ == "__main__":
    main()
