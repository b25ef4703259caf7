"""What keeps a server from listening is one clear line, and leaves nothing behind."""

import socket
from multiprocessing.shared_memory import SharedMemory

import pytest

pytest.importorskip("fastapi")

from vitopt.errors import CheckpointError, RecipeError, UnsupportedError
from vitopt.recipe import RunSpec
from vitopt.serve import server
from vitopt.serve.process import ModelLost
from vitopt.serve.settings import ServeSpec


def serve(*sources, **settings):
    server.serve(list(map(str, sources)), RunSpec(), ServeSpec(**{"port": 0} | settings), "cpu", announce=pytest.fail)


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    """Shared memory outlives processes unless it is given back."""
    made = []

    class Noted(SharedMemory):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self.name)

    monkeypatch.setattr("vitopt.serve.process.SharedMemory", Noted)
    yield
    for name in made:
        with pytest.raises(FileNotFoundError):
            SharedMemory(name)


def test_a_port_that_is_taken(tiny_checkpoint, processes):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UnsupportedError, match=rf"127\.0\.0\.1:{port} .*--port"):
            serve(tiny_checkpoint, port=port)
    assert not processes


def test_a_host_of_another_machine(tiny_checkpoint, processes):
    with pytest.raises(UnsupportedError, match=r"192\.0\.2\.1.*--host"):
        serve(tiny_checkpoint, host="192.0.2.1")
    assert not processes


def test_a_checkpoint_that_is_missing_or_there_twice(tiny_checkpoint, copy_of, processes):
    with pytest.raises(CheckpointError, match="no-such-model"):
        serve(tiny_checkpoint, "./no-such-model")
    with pytest.raises(RecipeError, match=f"two checkpoints are called {tiny_checkpoint.name}"):
        serve(tiny_checkpoint, copy_of(tiny_checkpoint))
    assert not processes


def test_a_process_that_ends_while_it_loads(tiny_checkpoint, processes, monkeypatch):
    def lost(_):
        raise ModelLost("gone")

    monkeypatch.setattr("serve_stand_in.FakeProcess.ready", lost)
    with pytest.raises(UnsupportedError, match=f"{tiny_checkpoint.name} ended while it loaded"):
        serve(tiny_checkpoint)
    assert len(processes) == 1
