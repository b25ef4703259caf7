"""The libraries that results depend on: their versions, and keeping them quiet."""

import contextlib
import importlib.metadata
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchao",
    "flash-attn",
    "accelerate",
    "evaluate",
    "datasets",
    "safetensors",
    "torchvision",
    "timm",
    "openvino",
    "nncf",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str | None]:
    """Installed version of every library whose version changes results; None when absent."""
    installed: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def quiet_libraries() -> None:
    """Keep the libraries' notices and bars off the terminal; vitopt shows its own."""
    for name in (
        "torchao",
        "bitsandbytes",
        "torch.utils._pytree",
        "torch._inductor",
        "transformers",
        "accelerate",
        "peft",
        "datasets",
        "huggingface_hub",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|torchao|peft)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._(inductor|functorch|dynamo)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.profiler\b")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own notices
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # For a transformers that is not imported yet; importing it here would slow every command down.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def silent(*loggers: str) -> Iterator[None]:
    """Without warnings, what is printed, and what these loggers say below an error: exporters and compilers tell much
    of which a user can make nothing."""
    known = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in known]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in known:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(known, levels, strict=True):
                logger.setLevel(level)


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without its attempt to download CPU kernels, which needs a network."""
    absent = "kernels" not in sys.modules
    if absent:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail at once
    try:
        import bitsandbytes
    finally:
        if absent:
            del sys.modules["kernels"]
    return bitsandbytes
