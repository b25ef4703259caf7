"""One function prepares a runnable model, for the evaluator, the benchmark, predictions and serving alike."""

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vitopt.environment import support
from vitopt.errors import UnsupportedError
from vitopt.models.checkpoint import (
    Checkpoint,
    disk_bytes,
    load_model,
    weight_bytes,
)
from vitopt.models.classes import best_attention, why_not_attention, why_not_kernel
from vitopt.models.forward import flops_per_image, input_dtype
from vitopt.models.names import block_names
from vitopt.optimize import class_token, refused
from vitopt.optimize.attention import attention_of, implementation, kernel_used
from vitopt.optimize.compiled import Compiled, Path, compiled
from vitopt.optimize.expand import EXPANDABLE, expand
from vitopt.optimize.formats import live_formats, stored_formats
from vitopt.optimize.fuse import FusedAttention
from vitopt.optimize.reduction import token_counts
from vitopt.optimize.rewrites import REWRITES, rewrite, save_arithmetic
from vitopt.optimize.runnable import CheckpointRunnable
from vitopt.optimize.static import StaticLinear
from vitopt.recipe import HeldSpec, RunSpec
from vitopt.records import Option, Size, Variant

logger = logging.getLogger(__name__)


@dataclass
class TorchRunnable(CheckpointRunnable):
    """A checkpoint as a torch module on its device; a `vitopt.measure.runnable.Runnable`.

    `asked`: the variant that it was made for, None for a checkpoint from elsewhere. `reasons`: option of `run` -> why
    something else runs. `layers`: logical name -> format, read from the live model.
    """

    name: str
    checkpoint: Checkpoint
    model: PreTrainedModel
    device: torch.device
    run: RunSpec
    asked: HeldSpec | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = torch.channels_last if self.run.channels_last else torch.contiguous_format
        self.path = Path(self.model, input_dtype(self.model), layout)
        self._fused_layers: list[Any] = []
        if self.run.fused_kernels and "fused_kernels" not in self.reasons:
            from vitopt.optimize.kernels.blocks import fused_layers  # needs triton

            self._fused_layers = fused_layers(self.model)
        self._static_layers = sum(isinstance(module, StaticLinear) for module in self.model.modules())
        self._compiled: Compiled | None = None
        self._has_compiled = False
        self._settled: set[torch.Size] = set()  # shapes of which it is known what products they get
        if self.run.compile:
            blocks = block_names(self.model, self.checkpoint.config.model_type)
            modules = [self.model.get_submodule(name) for name in blocks]
            ways = {"autotune": self.run.autotune, "whole": self.run.compile_whole}
            self._compiled = compiled(self.path, modules, self.device, **ways, dependent=self._early)

    @property
    def _fused_products(self) -> int:
        """Products that take in what stands around them, for some batch at least."""
        return sum(any(layer.tiles.values()) for layer in self._fused_layers)

    @property
    def _early(self) -> bool:
        return self.run.dependent_launch and "dependent_launch" not in self.reasons

    @property
    def attention_used(self) -> str:
        """The attention implementation of the live model."""
        return attention_of(str(self.model.config._attn_implementation))

    @property
    def fixed_shapes(self) -> bool:
        """Whether calls go through a compiler, which compiles each shape anew."""
        return self._compiled is not None

    @property
    def stored_format(self) -> str | None:
        """Format on disk of the linear layers, first of several; None for one that vitopt does not make."""
        return next(iter(stored_formats(self.checkpoint.config)), None)

    @property
    def fused_attentions(self) -> int:
        """Attentions of the live model whose query, key and value are one matrix product."""
        return sum(isinstance(module, FusedAttention) for module in self.model.modules())

    def describe(self) -> dict[str, Any]:
        """Its fields of a record: variant, model, layers, size."""
        asked, folder = self.asked, self.checkpoint.folder
        return {
            "variant": Variant(
                name=self.name,
                format=self._format,
                half=asked.half if asked else None,
                skip=asked.skip if asked else (),
                layers=dict(asked.layers) if asked else {},
                rounding=asked.rounding.model_dump(mode="json") if asked and asked.rounding else None,
                stored_format=self.stored_format if self.run.run_as else None,
                asked=self.run.options,
                ran=self._ran,
                tokens=token_counts(self.checkpoint.config, self.run) if self.run.schedule else None,
                reasons=self.reasons,
            ),
            "model": self.describe_model(),
            "layer_plan": dict(Counter(self.layers.values())),
            "layers": self.layers,
            "size": Size(weight_bytes=self.weight_bytes(), disk_bytes=disk_bytes(folder) if folder else None),
        }

    @property
    def _format(self) -> str:
        """What was asked for, however many layers a skip list keeps; else what the checkpoint is stored in."""
        if self.run.run_as is not None:
            return self.run.run_as
        most = Counter(self.layers.values()).most_common(1)[0][0]
        return self.asked.format if self.asked else self.stored_format or most

    @property
    def _ran(self) -> dict[str, Option]:
        """How it runs, by option."""
        return {
            "attention": self.attention_used,
            "sdpa_kernel": None,  # a profiled call tells
            **{option: getattr(self.run, option) or False for option in REWRITES if option not in self.reasons},
            **{option: False for option in REWRITES if option in self.reasons},
            "size_bias": self.run.size_bias and self.run.merge_tokens is not None,
            "fuse_pruned": self.run.fuse_pruned,
            "static_scales": f"{self._static_layers} layers" if self._static_layers else False,
            "channels_last": self.run.channels_last,
            "scaled_decoding": self.run.scaled_decoding,
            "compile": self.fixed_shapes,
            "fused_kernels": f"{fused} products" if (fused := self._fused_products) else False,
            "autotune": self.run.autotune and self.fixed_shapes,
            "compile_whole": self.run.compile_whole and self.fixed_shapes,
            "dependent_launch": self._early and self.fixed_shapes,
        } | ({"format": f"{self._format} with some layers in bf16"} if refused.half_layers(self.model) else {})

    def flops_per_image(self) -> int:
        """Arithmetic of one image, of what runs."""
        return flops_per_image(
            self.checkpoint, lambda model: save_arithmetic(model, self.checkpoint, self.run, self.reasons)
        )

    def weight_bytes(self) -> int:
        """Bytes of the weights as held."""
        return weight_bytes(self.model)

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width), on the device. Returns logits (batch, classes).

        A shape that cannot be compiled runs eager, as do all new ones from then on; it is said, and the reason kept.
        """
        if (self._may_refuse or self._fused_layers) and pixel_values.shape not in self._settled:
            self._settle_products(pixel_values)
        if self._compiled is not None and self._compiled.knows(pixel_values.shape):
            return self._compiled(pixel_values)
        if self._compiled is not None and "compile" not in self.reasons:
            return self._first_call(self._compiled, pixel_values)
        return self._eager(pixel_values)

    def kernel_used(self, pixel_values: torch.Tensor) -> str | None:
        """The kernel of sdpa that a profiled call ran; None where it is none of torch's. Last of all timings."""
        return kernel_used(lambda: self(pixel_values), self.device) if self.attention_used == "sdpa" else None

    def graph_bytes(self, shape: torch.Size) -> int:
        """Memory that a captured CUDA graph for pixels of this shape keeps beside the weights, else 0."""
        return self._compiled.peak_bytes(shape) if self._compiled else 0

    def alone(self, batch_size: int) -> list[str]:
        """Command of a process that runs only this, uncompiled."""
        run = self.run.uncompiled.model_dump_json()
        return [sys.executable, "-m", "vitopt.optimize.alone", self.checkpoint.source, run, str(batch_size)]

    def _eager(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.path(pixel_values)

    @property
    def _may_refuse(self) -> bool:
        return self.device.type in refused.DEVICES and not {"fp8", "w8a8"}.isdisjoint(self.layers.values())

    def _settle_products(self, pixel_values: torch.Tensor) -> None:
        """Find, before a shape is compiled, the 8-bit products that the device does not have for it, and those that are
        faster in kernels of ours."""
        self._settled.add(pixel_values.shape)
        with torch.compiler.set_stance("force_eager"):
            if self._may_refuse:
                self._fit_products(pixel_values)
            if self._fused_layers:
                self._fuse_products(pixel_values)

    def _fit_products(self, pixel_values: torch.Tensor) -> None:
        found = refused.fit_where_refused(self.model, lambda: self._eager(pixel_values))
        ways = ((found.padded, "are filled up with rows of zeros"), (found.half, "run in bf16"))
        for names, instead in ((names, instead) for names, instead in ways if names):
            parts = " and ".join(sorted({name.rpartition(".")[2] for name in names}))
            self._note("format", f"the device refused {len(names)} layers, {parts}, which {instead}", pixel_values)

    def _fuse_products(self, pixel_values: torch.Tensor) -> None:
        from vitopt.optimize.kernels.blocks import choose_tiles  # needs triton

        kept = choose_tiles(
            self.model, lambda: self._eager(pixel_values), autotune=self.run.autotune, dependent=self._early
        )
        if kept:
            parts = " and ".join(sorted({name.rpartition(".")[2] for name in kept}))
            self._note("fused_kernels", f"torch is not slower at {len(kept)} products, {parts}", pixel_values)

    def _note(self, option: str, what: str, pixel_values: torch.Tensor) -> None:
        reason = f"batch {len(pixel_values)}: {what}"
        self.reasons[option] = "; ".join([*filter(None, [self.reasons.get(option)]), reason])
        logger.warning("%s: %s", self.name, reason)

    def _first_call(self, compiled: Compiled, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compile for a shape that is new."""
        try:
            logits = compiled(pixel_values)
        except torch.OutOfMemoryError:
            raise  # a smaller batch may fit
        except Exception as error:  # compilers raise whatever they run into
            compiled.undo()
            logits = self._eager(pixel_values)  # an error of the model itself is not the compiler's
            # What follows is advice to those who work on the compiler.
            text = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())
            reason = f"{type(error).__name__}: {text[:200]}"
            if self._has_compiled:
                reason = f"batch {len(pixel_values)}: {reason}"
            else:
                self._compiled = None
            self.reasons["compile"] = reason
            logger.warning("%s: compilation failed (%s); running eager", self.name, reason)
        else:
            self._has_compiled = True
        return logits


def prepare(
    checkpoint: Checkpoint,
    *,
    name: str,
    device: torch.device,
    run: RunSpec | None = None,
    asked: HeldSpec | None = None,
    strict: bool = False,
    watch_class_token: bool = False,
) -> TorchRunnable:
    """Load a checkpoint so that it can be called; `asked` is the variant that it was made for.

    With `watch_class_token` its logits are followed by one more column, see `vitopt.optimize.class_token`.

    An attention that cannot run falls back to SDPA, that to eager where a family has none, and a kernel of SDPA to
    torch's own choice; each says so once, and the reason is kept.

    Raises:
        UnsupportedError: with `strict`, the attention or its kernel cannot run; or the formats cannot; or
            `static_scales` is asked for, and no scales were observed; or this family needs all its tokens.
        RecipeError: `merge_tokens` or `prune_tokens` would remove more tokens than a block has.
        CheckpointError: the checkpoint cannot be loaded.
    """
    run = run or RunSpec()
    _require_formats(checkpoint, run, device)
    dtype = torch.bfloat16 if run.run_as else checkpoint.config.dtype or torch.float32
    config = checkpoint.config
    attention_reason = why_not_attention(config, run.attention, device, dtype)
    kernel_reason = why_not_kernel(config, run.sdpa_kernel, device, dtype)
    reasons = {}
    if attention_reason:
        reasons["attention"] = attention_reason
        _fall_back(name, run.attention, attention_reason, best_attention(config), strict)
    if kernel_reason:
        reasons["sdpa_kernel"] = kernel_reason
        _fall_back(name, f"sdpa kernel {run.sdpa_kernel}", kernel_reason, "the one torch chooses", strict)
    attention = implementation(
        best_attention(config) if attention_reason else run.attention,
        "auto" if kernel_reason else run.sdpa_kernel,
        traced=run.engine != "torch" or (run.compile and device.type == "cuda"),
    )
    model = load_model(checkpoint, device=device, attention=attention)
    if run.run_as is not None:
        expand(model, checkpoint.config.model_type, run.run_as)
    model.requires_grad_(False)
    reasons |= rewrite(model, checkpoint, run, device, name)
    if watch_class_token:
        class_token.watch(model, block_names(model, checkpoint.config.model_type))
    if run.channels_last:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    return TorchRunnable(
        name=name,
        checkpoint=checkpoint,
        model=model,
        device=device,
        run=run,
        asked=asked,
        reasons=reasons,
        layers=live_formats(model, checkpoint.config.model_type),
    )


def _fall_back(name: str, wanted: str, reason: str, instead: str, strict: bool) -> None:
    if strict:
        raise UnsupportedError(f"{name}: {wanted} cannot run: {reason}; without --strict it falls back to {instead}")
    logger.warning("%s: %s cannot run (%s); using %s", name, wanted, reason, instead)


def _require_formats(checkpoint: Checkpoint, run: RunSpec, device: torch.device) -> None:
    stored = stored_formats(checkpoint.config)
    for format in stored:
        support.require_format(format, device)
    if run.run_as is None:
        return
    support.require_format(run.run_as, device)
    if not stored or not set(stored) <= set(EXPANDABLE):
        held = " and ".join(stored) or "a format unknown to vitopt"
        raise UnsupportedError(
            f"{checkpoint.source} is stored in {held}, which does not expand to {run.run_as}; "
            f"run_as takes {', '.join(EXPANDABLE)}"
        )
