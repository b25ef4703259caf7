"""What Triton's compiler makes of the kernels, for a card that need not be there; `interpreted.py` runs them."""

import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vitopt.optimize.kernels.product import _product  # noqa: E402

POINTERS = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "weight_sums": "*fp32", "out": "*bf16"}
NUMBERS = {"n_rows": "i32", "n_columns": "i32", "n_depth": "i32", "x_stride": "i32", "eps": "fp32"}
FIXED = {
    "NORM": True, "BIAS": True, "GELU": "erf", "RESIDUAL": False, "SPLIT": False, "EVEN": True, "PRECISION": "ieee",
    "DEPENDENT": True, "GROUP": 8, "ROWS": 64, "COLUMNS": 64, "DEPTH": 64, "residual": None, "partial": None,
    "statistics": None,
}  # fmt: skip


def test_hopper_gets_its_own_products_and_buffers_that_nothing_overwrites_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = _product.arg_names
    aligned = [name for name in names if name in POINTERS or name in ("n_columns", "n_depth", "x_stride")]
    source = ASTSource(
        fn=_product,
        signature={name: (POINTERS | NUMBERS).get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in FIXED.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    stages = 4
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": stages, "launch_pdl": True}
    )
    assert "wgmma.mma_async" in made.asm["ptx"] and "cp.async" in made.asm["ptx"]
    assert made.asm["ptx"].count("griddepcontrol.wait") == 1
    # A copy of inputs goes `stages - 1` iterations ahead while the product of this one still reads: one buffer more.
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x64x64xbf16", made.asm["ttgir"])
    assert buffers == [str(stages)] * 2
    assert made.metadata.shared <= 2 * stages * 64 * 64 * 2
