"""How a checkpoint is run: one field for each run option, and the engines that can. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from vitopt.formats import Format, RunAs
from vitopt.spec import Spec
from vitopt.token_schedule import Schedule

Attention = Literal["eager", "sdpa", "flash_attention_2"]
SdpaKernel = Literal["auto", "flash", "cudnn", "efficient", "math"]
Engine = Literal["torch", "openvino", "onnxruntime", "tensorrt", "aoti"]


@dataclass(frozen=True)
class EngineFacts:
    """A runtime with a model file of its own.

    `module`: what implements `vitopt.engines.package.EngineModule`. `package`: what must be installed to run it, and
    `extra`, of vitopt, to make files for it. `formats`: those that it runs. `devices`: torch's names of where it runs.
    `takes_tensors`: it is called with torch tensors on their device, not with numpy arrays. `for_one_device`: its file
    runs on the kind of device that made it alone. `torch_model`: it compiles torch's own model in torch's formats.
    `options`: the run options of torch that it takes.
    """

    module: str
    package: str
    extra: str
    formats: tuple[Format, ...]
    devices: tuple[str, ...] = ("cpu",)
    takes_tensors: bool = False
    for_one_device: bool = False
    torch_model: bool = False
    options: tuple[str, ...] = ()

    @property
    def example_packages(self) -> tuple[str, ...]:
        """What runs an exported file beside numpy and Pillow."""
        return tuple(dict.fromkeys((self.package, *(("torch",) if self.takes_tensors else ()))))


ENGINES: dict[str, EngineFacts] = {
    "openvino": EngineFacts(
        "vitopt.engines.openvino", "openvino", "openvino", ("fp32", "bf16", "w8a8"), options=("static_scales",)
    ),
    "onnxruntime": EngineFacts(
        "vitopt.engines.onnxruntime", "onnxruntime", "onnx", ("fp32", "fp16", "w8a8"), options=("static_scales",)
    ),
    "tensorrt": EngineFacts(
        "vitopt.engines.tensorrt",
        "tensorrt",
        "tensorrt",
        ("fp32", "fp16", "bf16", "w8a8", "fp8"),
        devices=("cuda",),
        takes_tensors=True,
        for_one_device=True,
        options=("static_scales",),
    ),
    "aoti": EngineFacts(
        "vitopt.engines.aoti",
        "torch",
        "",
        ("fp32", "fp16", "bf16", "w8a8", "fp8"),
        devices=("cpu", "cuda"),
        takes_tensors=True,
        for_one_device=True,
        torch_model=True,
        options=(
            "attention",
            "fuse_qkv",
            "class_token_last",
            "carry_residual",
            "static_scales",
            "merge_tokens",
            "size_bias",
            "patch_product",
            "channels_last",
        ),
    ),
}


def computes_itself(engine: str) -> bool:
    """Whether a runtime of its own computes, and not torch's model, however that is compiled."""
    return engine in ENGINES and not ENGINES[engine].torch_model


def objective_of(engine: str) -> Literal["size", "latency"]:
    """What a kept layer costs where a recipe does not say."""
    return "latency" if computes_itself(engine) else "size"


def granularity_of(engine: str) -> Literal["block", "kind"]:
    """The units of a sensitivity where a recipe does not say: a file of an engine takes long to make."""
    return "kind" if computes_itself(engine) else "block"


class RunSpec(Spec):
    """How a checkpoint is run; nothing of it is in the file."""

    engine: Engine = Field("torch", description="what computes: torch, or a runtime that has a model file of its own")
    attention: Attention = Field("sdpa", description="attention implementation")
    sdpa_kernel: SdpaKernel = Field("auto", description="kernel of sdpa; auto lets torch choose")
    run_as: RunAs | None = Field(
        None, description="format that packed layers expand to at load; without it they run packed"
    )
    fuse_qkv: bool = Field(False, description="query, key and value as one matrix product; exact")
    class_token_last: bool = Field(
        False, description="the last block computes the class token alone, from keys and values of all; exact"
    )
    carry_residual: bool = Field(
        False, description="a block leaves its last addition to the norm of the next block; exact"
    )
    gelu_epilogue: bool = Field(
        False, description="GELU within the product before it, by tanh: answers change, accuracy must be measured"
    )
    static_scales: bool = Field(
        False, description="inputs of w8a8 and fp8 layers by scales that the images of the step `calibrate` gave"
    )
    fused_kernels: bool = Field(
        False,
        description="with compile on a GPU: norm, GELU and addition within the product, where that is measured faster",
    )
    merge_tokens: Schedule | None = Field(
        None,
        description="tokens that each block merges into similar ones: 8 in every block, 16..0 falling, 48@4_24@8 in "
        "blocks 4 and 8: answers change",
    )
    size_bias: bool = Field(
        True, description="with merge_tokens: attention counts a token as the patches that it stands for, by a mask"
    )
    prune_tokens: Schedule | None = Field(
        None, description="tokens that leave, those that the class token attends to least; as merge_tokens"
    )
    fuse_pruned: bool = Field(False, description="with prune_tokens: those that leave become one token more")
    patch_product: bool = Field(False, description="patch embedding as a matrix product, no convolution; exact")
    scaled_decoding: bool = Field(
        False,
        description="JPEG files of four times the input's size and more are decoded at a fraction: answers change",
    )
    channels_last: bool = Field(False, description="pixels and patch embedding in NHWC memory order")
    compile: bool = Field(False, description="compile for each batch size; on a GPU, replay it as one CUDA graph")
    autotune: bool = Field(False, description="with compile: time its kernels first, slower to start")
    dependent_launch: bool = Field(
        False, description="with compile on a GPU: a kernel is launched before the one before it has ended; exact"
    )
    compile_whole: bool = Field(
        False, description="with compile on a GPU: all blocks as one program, slower to start; on a CPU it is always so"
    )

    @property
    def uncompiled(self) -> "RunSpec":
        """The same without a compiler, and without what needs one."""
        ways = ("compile", "autotune", "compile_whole", "fused_kernels", "dependent_launch")
        return self.model_copy(update=dict.fromkeys(ways, False))

    @property
    def options(self) -> dict[str, Any]:
        """What is set, by option; `run_as` is a format, and told as one."""
        return {name: getattr(self, name) for name in RunSpec.model_fields if name != "run_as"}

    @model_validator(mode="after")
    def _options_fit(self) -> "RunSpec":
        taken = ENGINES[self.engine].options if self.engine in ENGINES else RunSpec.model_fields
        if useless := self.changed(*(set(RunSpec.model_fields) - {"engine", "scaled_decoding", *taken})):
            raise ValueError(f"`engine: {self.engine}` computes in its own way, so leave {useless} out")
        for way in ("autotune", "compile_whole", "fused_kernels", "dependent_launch"):
            if getattr(self, way) and not self.compile:
                raise ValueError(f"`{way}` is a way to compile: set `compile` too")
        if self.patch_product and self.channels_last:
            raise ValueError("`channels_last` is for a convolution, and `patch_product` replaces it: take one of them")
        if self.fused_kernels and self.carry_residual:
            raise ValueError("`fused_kernels` adds within products, `carry_residual` before norms: take one of them")
        if self.sdpa_kernel != "auto" and self.attention != "sdpa":
            raise ValueError(f"`sdpa_kernel` chooses a kernel of sdpa, and `attention` is {self.attention}")
        return self

    @model_validator(mode="after")
    def _fewer_tokens_fit(self) -> "RunSpec":
        if self.merge_tokens and self.prune_tokens:
            raise ValueError("`merge_tokens` and `prune_tokens` both remove tokens: take one of them")
        if not self.merge_tokens and not self.size_bias:
            raise ValueError("`size_bias` is of merged tokens: set `merge_tokens` too, or leave it out")
        if not self.prune_tokens and self.fuse_pruned:
            raise ValueError("`fuse_pruned` is of pruned tokens: set `prune_tokens` too")
        if self.schedule and self.attention == "eager":
            raise ValueError("fewer tokens need `attention: sdpa` or flash_attention_2, not eager")
        if self.schedule and self.fused_kernels:
            raise ValueError("`fused_kernels` has blocks of its own, which keep all tokens: take one of them")
        masked = self.merge_tokens and self.size_bias
        if masked and (self.attention == "flash_attention_2" or self.sdpa_kernel == "flash"):
            raise ValueError("the size bias of `merge_tokens` is a mask, and flash takes none: set `size_bias: false`")
        return self

    @property
    def schedule(self) -> str | None:
        """How many tokens leave where, by merging or pruning; None where all stay."""
        return self.merge_tokens or self.prune_tokens
