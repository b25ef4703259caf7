"""One function prepares a runnable model, for the evaluator, the benchmark, predictions and serving alike."""

import logging
from dataclasses import dataclass, field

import torch

from vitopt import environment
from vitopt.environment import DTYPES
from vitopt.errors import UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model
from vitopt.optimize.formats import live_formats
from vitopt.recipe import Attention, Format

# format -> what names it in torchao's configuration
_TORCHAO_SIGNS: dict[Format, str] = {
    "fp8": "Float8DynamicActivationFloat8Weight",
    "int4": "Int4WeightOnly",
    "w8a8": "Int8DynamicActivationInt8Weight",
}

logger = logging.getLogger(__name__)


@dataclass
class Runnable:
    """A model on its device, with what was asked for and what will run."""

    name: str
    checkpoint: Checkpoint
    model: torch.nn.Module
    device: torch.device
    attention_requested: Attention
    attention_reason: str | None
    compile_requested: bool = False
    compile_reason: str | None = None
    layers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Some families do not cast their input themselves.
        self._dtype = next(p.dtype for p in self.model.parameters() if p.dtype in DTYPES.values())
        self._has_run = False
        self._forward = torch.compile(self.model) if self.compiled else self.model

    @property
    def attention_used(self) -> str:
        """The attention implementation of the live model."""
        return str(self.model.config._attn_implementation)

    @property
    def compiled(self) -> bool:
        """Whether calls go through torch.compile."""
        return self.compile_requested and self.compile_reason is None

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width), on the device. Returns logits (batch, classes).

        A model that cannot be compiled runs eager from its first call on, says so, and keeps the reason.
        """
        pixel_values = pixel_values.to(self._dtype)
        if self._forward is not self.model and not self._has_run:
            return self._first_compiled_call(pixel_values)
        return self._forward(pixel_values=pixel_values).logits

    def _first_compiled_call(self, pixel_values: torch.Tensor) -> torch.Tensor:
        try:
            logits = self._forward(pixel_values=pixel_values).logits
            self._has_run = True
            return logits
        except Exception as error:  # compilers raise whatever they run into
            eager = self.model(pixel_values=pixel_values).logits  # an error of the model itself is not the compiler's
            self.compile_reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            logger.warning("%s: compilation failed (%s); running eager", self.name, self.compile_reason)
            self._forward = self.model
            return eager


def prepare(
    checkpoint: Checkpoint,
    *,
    name: str,
    device: torch.device,
    attention: Attention = "sdpa",
    compile: bool = False,
    strict: bool = False,
) -> Runnable:
    """Load a checkpoint so that it can be called.

    FlashAttention-2 falls back to SDPA where it cannot run, says so once, and the reason is kept.

    Raises:
        UnsupportedError: with `strict`, the attention implementation cannot run; or the formats cannot.
        CheckpointError: the checkpoint cannot be loaded.
    """
    _require_formats(checkpoint, device)
    dtype = checkpoint.config.dtype or torch.float32
    reason = environment.why_not_attention(attention, device, dtype)
    if reason and strict:
        raise UnsupportedError(f"{name}: {attention} cannot run: {reason}; without --strict it falls back to sdpa")
    if reason:
        logger.warning("%s: %s cannot run (%s); using sdpa", name, attention, reason)
    model = load_model(checkpoint, device=device, attention="sdpa" if reason else attention)
    model.requires_grad_(False)
    return Runnable(
        name=name,
        checkpoint=checkpoint,
        model=model,
        device=device,
        attention_requested=attention,
        attention_reason=reason,
        compile_requested=compile,
        layers=live_formats(model, checkpoint.config.model_type),
    )


def _require_formats(checkpoint: Checkpoint, device: torch.device) -> None:
    config = getattr(checkpoint.config, "quantization_config", None)
    if config is None:
        return
    content = config if isinstance(config, dict) else config.to_dict()
    if content.get("load_in_4bit"):
        environment.require_format("nf4", device)
    elif content.get("load_in_8bit"):
        environment.require_format("int8", device)
    elif content.get("quant_method") == "torchao":
        for format, sign in _TORCHAO_SIGNS.items():
            if sign in str(content):
                environment.require_format(format, device)
