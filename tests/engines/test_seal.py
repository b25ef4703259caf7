"""Seals of files that are machine code: only of what was written here, as it was written."""

import stat

import pytest

from vitopt.engines.seal import is_sealed, sealed


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "model.pt2").write_bytes(b"code")
    return tmp_path / "model.pt2"


def test_it_holds_for_this_file_this_checkpoint_and_this_user(file, tmp_path, monkeypatch):
    seal = sealed(file, "checkpoint")
    assert is_sealed(file, "checkpoint", seal)
    assert not is_sealed(file, "another", seal)
    assert not any(is_sealed(file, "checkpoint", other) for other in (None, "", "0" * 64, "\u00e9", 7))
    file.write_bytes(b"codf")
    assert not is_sealed(file, "checkpoint", seal)
    file.write_bytes(b"code")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another"))
    assert not is_sealed(file, "checkpoint", seal)
    file.unlink()
    assert not is_sealed(file, "checkpoint", seal)


def test_the_key_is_its_owners_alone(file, tmp_path):
    sealed(file, "checkpoint")
    key = tmp_path / "state" / "vitopt" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_bytes()) == 32


def test_without_a_place_for_the_key_nothing_is_sealed(file, tmp_path, monkeypatch):
    (tmp_path / "taken").write_bytes(b"")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "taken"))
    assert sealed(file, "checkpoint") is None and not is_sealed(file, "checkpoint", "0" * 64)
    (tmp_path / "damaged" / "vitopt").mkdir(parents=True)
    (tmp_path / "damaged" / "vitopt" / "key").write_bytes(b"short")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "damaged"))
    assert sealed(file, "checkpoint") is None
