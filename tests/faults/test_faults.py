"""Nothing gets in, nothing is lost: bad inputs of every kind, full disks, runs that are ended."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vitopt.errors import StorageError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.recipe import VariantSpec

ROOT = Path(__file__).parents[2]
STRANGERS = ROOT / "scripts" / "strangers.py"


@pytest.fixture(scope="module")
def strangers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("strangers", STRANGERS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["recipe", "config", "preprocessor", "weights", "table", "image"])
def test_bad_inputs_give_a_result_or_a_clear_error(strangers, kind, capfd):
    found = strangers.meet(kind, 12, seed=1)
    assert {fault: found[fault] for fault in strangers.FAULTS} == dict.fromkeys(strangers.FAULTS, 0), capfd.readouterr()
    assert found["results"] + found["refusals"] == 12
    assert found["refusals"] > 0


def test_the_watch_sees_what_leaves_the_folder(strangers, tmp_path):
    watch = strangers._Watch(tmp_path)
    watch.case = tmp_path / "case"
    for place in ("case/own", "outside/file", "case/weights.pkl"):
        watch("open", (str(tmp_path / place), "r", os.O_RDONLY))
    watch("open", ("/elsewhere", "w", os.O_WRONLY | os.O_CREAT))
    watch("pickle.find_class", ("os", "system"))
    watch("subprocess.Popen", ("gs", [], None, None))
    assert watch.counts == {"files_outside": 2, "pickles_opened": 2, "programs_or_connections_started": 1}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 200,000 bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", place], capture_output=True).returncode
    if mounted != 0:
        pytest.skip("mounting a small file system takes root")
    yield place
    # An error on its way still holds what it was about.
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_is_too_small_is_told_with_the_bytes_and_left_as_it_was(tiny_checkpoint, small_disk):
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    with pytest.raises(StorageError, match=r"disk.*bytes are needed and [\d,]+ are free"):
        quantize(checkpoint, VariantSpec(name="fp32", format="fp32"), small_disk / "out", device="cpu")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_keeps_the_earlier_result_whole(tiny_checkpoint, small_disk, monkeypatch):
    monkeypatch.setattr("vitopt.storage.require_space", lambda folder, needed: None)  # others fill it meanwhile
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    quantize(checkpoint, VariantSpec(name="nf4", format="nf4"), small_disk / "out", device="cpu")
    before = (small_disk / "out" / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match=f"the disk is full while writing {small_disk / 'out'}"):
        quantize(checkpoint, VariantSpec(name="fp32", format="fp32"), small_disk / "out", device="cpu")
    assert (small_disk / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_full_temporary_folder_is_one_line(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    checkpoint = open_checkpoint("random:vit-tiny-patch16-32")
    with pytest.raises(StorageError, match=str(small_disk)):
        quantize(checkpoint, VariantSpec(name="nf4", format="nf4"), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
@pytest.mark.parametrize("arguments", [["--boundaries"], ["--kills", "10", "--seed", "7"]])
def test_a_run_that_is_ended_goes_on_to_the_same_result(tmp_path, arguments):
    command = [sys.executable, ROOT / "scripts" / "kills.py", *arguments, "--json", tmp_path / "found.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "found.json").read_text())["kills"] >= 8
