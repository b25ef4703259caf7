"""From a photo to a class with numpy and Pillow alone: the example that lies beside every exported model."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

_TEXT = '''"""Class of a photo: python example.py photo.jpg

Needs: pip install {packages} numpy pillow
"""

import json
import sys
from pathlib import Path
from typing import Any

import {package}
import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent
if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
    sys.exit("usage: python example.py PHOTO")


{pixels}

labels = json.loads((FOLDER / "labels.json").read_text(encoding="utf-8"))
SETTINGS = json.loads((FOLDER / "engine.json").read_text(encoding="utf-8"))["settings"]
preprocessor = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
values = pixels(Image.open(sys.argv[1]), preprocessor)

{lines}

odds = np.exp(logits[0] - logits[0].max())
for index in np.argsort(-odds)[:5]:
    print(f"{{100 * odds[index] / odds.sum():5.1f}} %  {{labels[index]}}")
'''

_MEMORY = """import json
import sys
from pathlib import Path

import {package}
import numpy as np

FOLDER = Path(sys.argv[1])
SETTINGS = json.loads((FOLDER / "engine.json").read_text(encoding="utf-8"))["settings"]
values = np.random.default_rng(0).standard_normal([int(size) for size in sys.argv[2:]], dtype=np.float32)
{lines}
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(json.dumps({{"peak_bytes": 1024 * peak}}))
"""


def pixels(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """(1, 3, height, width), float32, as `preprocessor_config.json` asks for."""
    image = image.convert("RGB")
    size = settings["size"]
    if settings.get("do_resize", True):
        if "height" in size:
            wanted = (size["width"], size["height"])
        else:
            scale = size["shortest_edge"] / min(image.size)
            wanted = (int(image.width * scale), int(image.height * scale))
        image = image.resize(wanted, Image.Resampling(settings.get("resample", 2)))
    if settings.get("do_center_crop"):
        height, width = settings["crop_size"]["height"], settings["crop_size"]["width"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image, np.float32)
    if settings.get("do_rescale", True):
        values = values * np.float32(settings.get("rescale_factor", 1 / 255))
    if settings.get("do_normalize", True):
        values = (values - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None], dtype=np.float32)


def example_text(packages: Sequence[str], lines: str) -> str:
    """A script that prints the classes of a photo; `lines` make `logits` of `values` by the first of `packages`."""
    source = inspect.getsource(pixels)
    return _TEXT.format(package=packages[0], packages=" ".join(packages), pixels=source, lines=lines.strip())


def memory_text(package: str, lines: str) -> str:
    """A script of FOLDER and the shape of the pixels that runs a model as the example does, and prints its peak memory:
    `{"peak_bytes": …}`. Linux alone tells."""
    return _MEMORY.format(package=package, lines=lines.strip())
