"""Make Vision Transformers small and fast, and prove what that cost."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitopt.api import compare, evaluate, finetune, images, load, open_checkpoint, quantize, wrap

__version__ = "0.1.0"
__all__ = ["compare", "evaluate", "finetune", "images", "load", "open_checkpoint", "quantize", "wrap"]


def __getattr__(name: str) -> Any:
    """The functions of `vitopt.api`, which imports torch: only when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'vitopt' has no attribute {name!r}")
    import importlib

    from vitopt.environment import libraries

    libraries.quiet_libraries()  # before they are imported
    return getattr(importlib.import_module("vitopt.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
