"""Kernels of scaled dot product attention: choosing one, and reading back which one ran.

The names are those of torch: `flash` (FlashAttention-2, arXiv 2307.08691), `cudnn`, `efficient` (memory-efficient
attention, arXiv 2112.05682), `math` (plain matrix products and a softmax).
"""

import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:  # a GPU machine may have transformers and no pydantic
    from vitopt.recipe import Attention, SdpaKernel

# kernel -> name under which transformers knows sdpa held to it, and torch's own name of it; transformers looks for a
# package wherever it reads "flash"
_KERNELS: dict["SdpaKernel", tuple[str, SDPBackend]] = {
    "flash": ("sdpa_tiled", SDPBackend.FLASH_ATTENTION),
    "cudnn": ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    "efficient": ("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
    "math": ("sdpa_math", SDPBackend.MATH),
}

_UNMASKED = "sdpa_any"
_NOTING: dict[str, str] = {}  # name under which `noting` registered an attention -> that attention

# What a profile calls a kernel, most telling first: operators of torch, then GPU kernels, which are all that a
# replayed CUDA graph shows.
_SIGNS: tuple[tuple[str, "SdpaKernel"], ...] = (
    ("_scaled_dot_product_cudnn_attention", "cudnn"),
    ("_scaled_dot_product_flash_attention", "flash"),
    ("_scaled_dot_product_efficient_attention", "efficient"),
    ("_scaled_dot_product_attention_math", "math"),
    ("cudnn_generated_fort_native_sdpa", "cudnn"),
    ("cudnn_generated_oss_sdpa", "cudnn"),
    ("flash_fwd", "flash"),
    ("fmha_cutlass", "efficient"),
)


def implementation(attention: "Attention", kernel: "SdpaKernel", traced: bool = False) -> str:
    """Name under which transformers knows an attention; one that is held to a kernel runs that or raises.

    The choice is made inside the attention function, where a compiler sees it: around the model it would be part
    of no guard, and code that was compiled for one kernel would serve all.

    `traced` tells that the model will be captured as a CUDA graph or exported. Meanwhile transformers (5.17 and later)
    makes a mask for its own sdpa, which it makes at no other time; for a function of ours it never makes any.
    """
    if attention != "sdpa" or (kernel == "auto" and not traced):
        return attention
    if kernel == "auto":
        AttentionInterface.register(_UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
        return _UNMASKED
    name, backend = _KERNELS[kernel]
    AttentionInterface.register(name, functools.partial(_held_to, backend))
    return name


def attention_of(implementation: str) -> str:
    """The attention behind a name that `implementation` or `noting` gave."""
    implementation = _NOTING.get(implementation, implementation)
    return "sdpa" if implementation in (_UNMASKED, *(name for name, _ in _KERNELS.values())) else implementation


def noting(implementation: str) -> str:
    """Name of the same attention that also adds a bias to its scores, and tells of queries and keys what is asked.

    In the place of attention weights it returns what the attention module's `note` makes of (query, key), each (batch,
    heads, tokens, head width), if it has one. `bias`, (batch, 1, 1, tokens), is an option of the module's call.
    """
    name = f"noting_{len(_NOTING)}"  # without "flash", see above
    if implementation in _NOTING.values():
        return next(name for name, known in _NOTING.items() if known == implementation)
    attend = functools.partial(ALL_ATTENTION_FUNCTIONS[implementation], _As(implementation))
    AttentionInterface.register(name, functools.partial(_noting, attend))
    _NOTING[name] = implementation
    return name


class _As(torch.nn.Module):
    """Self-attention of an encoder as an attention function sees it: flash_attention_2 asks its module for the name."""

    def __init__(self, implementation: str):
        super().__init__()
        self.config, self.is_causal = SimpleNamespace(_attn_implementation=implementation), False
        self.eval()


def _noting(
    attend: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    attended, _ = attend(query, key, value, attention_mask if bias is None else bias, **options)
    note = getattr(module, "note", None)
    return attended, None if note is None else note(query, key)


def _held_to(backend: SDPBackend, *args: Any, **options: Any) -> Any:
    with sdpa_kernel(backend):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **options)


def kernel_used(call: Callable[[], object], device: torch.device) -> "SdpaKernel | None":
    """The attention kernel that a profiled `call` ran; None if it ran none that is known here.

    Profile only when nothing remains to be timed: the profiler's hooks slow later calls down.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return recognise({event.name for event in profile.events()})


def recognise(names: Iterable[str]) -> "SdpaKernel | None":
    """The attention kernel behind the operators and GPU kernels of a profile."""
    seen = list(names)
    return next((kernel for sign, kernel in _SIGNS if any(sign in name for name in seen)), None)
