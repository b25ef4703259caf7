"""AOTInductor: torch's own model, as torch would run it, compiled to a file of machine code with its weights inside.

`torch.export` traces the model after its rewrites and with its quantized layers; inductor compiles what was traced for
any number of images. The file needs torch and none of the model's Python. Opening it runs its code, as importing a
package does. https://docs.pytorch.org/docs/stable/user_guide/torch_compiler/torch.compiler_aot_inductor.html
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitopt.data.pixels import random_pixels
from vitopt.environment import libraries, support
from vitopt.errors import UnsupportedError
from vitopt.formats import Format
from vitopt.models.checkpoint import empty_model
from vitopt.models.names import linear_layers
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.runtime import TorchRunnable
from vitopt.recipe import ENGINES

MODEL_FILE = "model.pt2"
EXAMPLE = """
if torch.__version__ != SETTINGS["torch"]:
    sys.exit(f"model.pt2 is for torch {SETTINGS['torch']}, this is {torch.__version__}")
model = torch._inductor.aoti_load_package(str(FOLDER / "model.pt2"))
with torch.inference_mode():
    logits = model(torch.from_numpy(values).to(SETTINGS["device"])).float().cpu().numpy()
"""


def why_not(format: Format) -> str | None:
    """None: torch itself refuses the formats that it cannot compute in."""
    return None


def write(
    model: TorchRunnable,
    size: tuple[int, int],
    plan: LayerPlan,
    images: Sequence[np.ndarray] | None,
    folder: Path,
) -> dict[str, Any]:
    """Compile the model for its device and the kind of processor that this is.

    Raises:
        UnsupportedError: there is no compiler, or torch cannot trace or compile this model.
    """
    if reason := support.why_not_compile(model.device):
        raise UnsupportedError(f"engine aoti compiles the model: {reason}")
    pixels = random_pixels(2, size).to(model.device)
    model(pixels)  # finds 8-bit products that the device refuses
    try:
        with libraries.silent("torch._inductor"), torch.no_grad():
            shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
            exported = torch.export.export(model.path, (pixels,), dynamic_shapes=shapes)
            # On the CPU weights are laid out once for the processor's matrix kernels.
            options = {"freezing": model.device.type == "cpu"}
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(folder / MODEL_FILE), inductor_configs=options
            )
    except Exception as error:  # tracer and compilers raise whatever they run into
        text = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())
        raise UnsupportedError(
            f"torch cannot compile this {type(model.model).__name__} to a file: {type(error).__name__}: {text[:300]}"
        ) from error
    ran = model.describe()["variant"].ran
    modules = {layer.logical: layer.module for layer in _layers(model)}
    return {
        "device": model.device.type,
        "torch": torch.__version__,
        "layers": {modules[logical]: format for logical, format in model.layers.items()},
        "weight_bytes": model.weight_bytes(),
        "ran": {option: ran[option] for option in (*ENGINES["aoti"].options, "format") if option in ran},
        "reasons": model.reasons,
    }


def _layers(model: TorchRunnable) -> Any:
    return linear_layers(empty_model(model.checkpoint), model.checkpoint.config.model_type)


def load(folder: Path, settings: Mapping[str, Any]) -> "AotiCall":
    """Open the compiled file; on CUDA for the current device."""
    return AotiCall(folder / MODEL_FILE, settings)


class AotiCall:
    """A compiled file, for any number of images of the size that it was made for; it checks neither."""

    fixed_shapes = False

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        on_gpu = settings["device"] == "cuda"
        index = torch.cuda.current_device() if on_gpu else -1
        # Its locks between threads would wait for the device, which a CUDA graph that is captured must not.
        self._model = torch._inductor.aoti_load_package(str(file), run_single_threaded=on_gpu, device_index=index)
        self._layers = settings["layers"]

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width). Returns logits (batch, classes)."""
        logits: torch.Tensor = self._model(pixel_values.float().contiguous())
        return logits

    def formats(self, modules: Iterable[str]) -> dict[str, str]:
        """As read from the model that was compiled: the file itself does not tell."""
        return {module: self._layers.get(module, "unknown") for module in modules}
