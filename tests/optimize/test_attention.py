"""Kernels of scaled dot product attention: the one asked for runs, and which one ran is read back."""

import functools
import logging
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitopt.data.pixels import random_pixels
from vitopt.errors import UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model
from vitopt.models.names import block_names
from vitopt.optimize.attention import attention_of, implementation, noting, recognise
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")
PIXELS = random_pixels(3, (32, 32))


def running(checkpoint: Checkpoint, name: str = "v", **run: object) -> TorchRunnable:
    return prepare(checkpoint, name=name, device=CPU, run=RunSpec(**run))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_the_kernel_asked_for_runs_and_answers_the_same(kernel: str, fuse: bool, tiny: Checkpoint) -> None:
    runnable = running(tiny, sdpa_kernel=kernel, fuse_qkv=fuse)
    assert runnable.kernel_used(PIXELS) == kernel
    assert runnable.reasons.get("sdpa_kernel") is None
    assert (runnable.attention_used, runnable.reasons.get("attention")) == ("sdpa", None)
    torch.testing.assert_close(runnable(PIXELS), running(tiny)(PIXELS), rtol=0, atol=1e-5)


def test_each_variant_keeps_its_own_kernel(tiny: Checkpoint) -> None:
    flash, free, plain = (running(tiny, sdpa_kernel=kernel) for kernel in ("flash", "auto", "math"))
    assert [one.kernel_used(PIXELS) for one in (flash, plain, free, flash)] == ["flash", "math", "flash", "flash"]


@pytest.mark.parametrize("family", ["beit", "siglip", "swin"])
def test_other_families_take_a_kernel_too(family: str, make_family: Callable[..., Checkpoint]) -> None:
    checkpoint = make_family(family)
    runnable = running(checkpoint, sdpa_kernel="math")
    assert runnable.kernel_used(PIXELS) == "math"
    torch.testing.assert_close(runnable(PIXELS), running(checkpoint)(PIXELS), rtol=0, atol=1e-5)


def test_eager_attention_runs_none_of_the_kernels(tiny: Checkpoint) -> None:
    assert running(tiny, attention="eager").kernel_used(PIXELS) is None


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_cannot_run_falls_back_says_so_once_and_keeps_the_reason(
    kernel: str, tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    reason = f"the {kernel} kernel needs a CUDA device"
    with caplog.at_level(logging.WARNING):
        runnable = running(tiny, "mine", sdpa_kernel=kernel)
        logits = [runnable(PIXELS) for _ in range(2)]
    assert caplog.messages == [f"mine: sdpa kernel {kernel} cannot run ({reason}); using the one torch chooses"]
    assert (runnable.run.sdpa_kernel, runnable.reasons.get("sdpa_kernel")) == (kernel, reason)
    assert runnable.kernel_used(PIXELS) == running(tiny).kernel_used(PIXELS) == "flash"
    torch.testing.assert_close(logits[1], running(tiny)(PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_strict_refuses_a_kernel_that_cannot_run(kernel: str, tiny: Checkpoint) -> None:
    with pytest.raises(UnsupportedError) as caught:
        prepare(tiny, name="mine", device=CPU, run=RunSpec(sdpa_kernel=kernel), strict=True)
    assert str(caught.value) == (
        f"mine: sdpa kernel {kernel} cannot run: the {kernel} kernel needs a CUDA device; "
        "without --strict it falls back to the one torch chooses"
    )


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        # operators of torch
        ("aten::_scaled_dot_product_flash_attention", "flash"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "flash"),
        ("aten::_scaled_dot_product_cudnn_attention", "cudnn"),
        ("aten::_scaled_dot_product_efficient_attention", "efficient"),
        ("aten::_scaled_dot_product_attention_math", "math"),
        # kernels of a GPU
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, "
            "cutlass::bfloat16_t>, false, false, false, false, true, true, false>(pytorch_flash::Flash_fwd_params)",
            "flash",
        ),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<...>(pytorch_flash::Flash_fwd_params)", "flash"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)", "efficient"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0", "cudnn"),
        # what says nothing about it
        ("aten::scaled_dot_product_attention", None),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", None),
        ("aten::softmax", None),
    ],
)
def test_kernels_are_recognised_by_the_names_of_a_profile(name: str, kernel: str | None) -> None:
    assert recognise(["aten::linear", name, "Memcpy DtoD (Device -> Device)"]) == kernel


def test_nothing_is_recognised_in_an_empty_profile() -> None:
    assert recognise(iter(())) is None


def test_an_operator_tells_more_than_the_kernels_beside_it() -> None:
    names = {"aten::_scaled_dot_product_cudnn_attention", "void pytorch_flash::flash_fwd_kernel<...>"}
    assert recognise(sorted(names)) == recognise(sorted(names, reverse=True)) == "cudnn"


def test_a_capture_is_given_the_code_that_was_compiled_before_it(tiny: Checkpoint) -> None:
    # transformers 5.17 hands its own sdpa a mask while a CUDA stream is capturing, and at no other time.
    model = load_model(tiny, attention=implementation("sdpa", "auto", traced=True))
    assert attention_of(model.config._attn_implementation) == "sdpa"
    torch._dynamo.reset()
    for name in block_names(model, "vit"):
        model.get_submodule(name).compile(fullgraph=True, dynamic=False, backend="eager")
    with torch.inference_mode():
        expected = model(pixel_values=PIXELS).logits
        with (
            mock.patch("torch.cuda.is_available", lambda: True),
            mock.patch("torch.cuda.is_current_stream_capturing", lambda: True),
            torch.compiler.set_stance("fail_on_recompile"),
        ):
            captured = model(pixel_values=PIXELS).logits
    torch._dynamo.reset()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
    torch.testing.assert_close(captured, running(tiny)(PIXELS), rtol=0, atol=1e-5)


def test_only_a_capture_changes_how_plain_attention_is_known() -> None:
    assert implementation("sdpa", "auto") == "sdpa"
    assert implementation("eager", "auto", traced=True) == "eager"
    assert implementation("flash_attention_2", "auto", traced=True) == "flash_attention_2"


def test_an_attention_that_notes_runs_as_itself_and_hands_on_what_is_asked() -> None:
    seen = list[str]()

    def attend(module: nn.Module, query: torch.Tensor, *rest: object, **options: object) -> tuple[torch.Tensor, None]:
        seen.append(module.config._attn_implementation)  # as flash_attention_2 does
        assert not module.is_causal and not module.training and options == {"dropout": 0.0, "scaling": 0.5}
        return query.transpose(1, 2), None

    AttentionInterface.register("mine", attend)
    name = noting("mine")
    assert noting("mine") == name and "flash" not in noting("flash_attention_2") and attention_of(name) == "mine"
    host, query, key = nn.Module(), torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    call = functools.partial(ALL_ATTENTION_FUNCTIONS[name], host, query, key, key, None, dropout=0.0, scaling=0.5)
    assert call()[1] is None and seen == ["mine"]
    host.note = lambda query, key: query.sum() + key.sum()
    assert call()[1] == 24


def test_an_attention_that_notes_adds_a_bias() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    bias = torch.randn(1, 1, 1, 5)
    attended, _ = ALL_ATTENTION_FUNCTIONS[noting("sdpa")](nn.Module(), query, key, value, None, bias=bias, scaling=0.5)
    expected = (query @ key.transpose(2, 3) * 0.5 + bias).softmax(-1) @ value
    torch.testing.assert_close(attended, expected.transpose(1, 2), rtol=0, atol=1e-6)
