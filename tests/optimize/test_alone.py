"""The process whose peak memory is measured; tests/measure/test_memory.py starts it."""

import json
from pathlib import Path

import pytest

from vitopt.errors import UnsupportedError
from vitopt.optimize.alone import main
from vitopt.recipe import RunSpec


def highest_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("run", [RunSpec(), RunSpec(run_as="w8a8", fuse_qkv=True, sdpa_kernel="math")])
def test_it_prints_the_peak_as_its_last_line(
    run: RunSpec, random: bool, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("random:vit-tiny-patch16-32" if random else str(tiny_checkpoint), run.model_dump_json(), "2")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The system counts pages per thread and adds them up now and then.
    assert printed["peak_bytes"] == pytest.approx(highest_resident_bytes(), abs=2**24)


def test_it_runs_what_the_specification_says(tiny_checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match="format fp8 cannot run on cpu"):
        main(str(tiny_checkpoint), RunSpec(run_as="fp8").model_dump_json(), "2")
