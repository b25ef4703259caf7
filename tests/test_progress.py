"""How far the work is: what a line says, and when one is written."""

import queue
from collections.abc import Iterator

import pytest

from vitopt import progress


@pytest.fixture(autouse=True)
def silent_afterwards() -> Iterator[None]:
    yield
    progress.enable("off")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (0.4, "0 s"), (59.6, "1 min"), (100, "1 min 40 s"), (3600, "1 h"), (7265, "2 h 1 min 5 s")],
)
def test_durations(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words


@pytest.mark.parametrize(
    ("done", "total", "line"),
    [
        (300, 2400, "accuracy: 300 of 2,400, 7.5/s, 4 min 40 s left"),  # 2,100 more at 7.5 a second
        (0, 10, "accuracy: 0 of 10"),
        (0, None, "accuracy: since 40 s"),
    ],
)
def test_a_line_tells_rate_and_remaining_time(done: float, total: float | None, line: str) -> None:
    assert progress.state("accuracy", done, total, 40) == line


@pytest.mark.parametrize("total", [4, None])
def test_lines_are_written_while_a_step_takes_long(total: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    written: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(progress.Console, "print", lambda console, line: written.put(line))
    progress.enable("lines")
    with progress.task("calibrating", total) as counted:
        counted.advance(2)
        assert written.get(timeout=20).startswith("calibrating: 2 of 4, " if total else "calibrating: since ")
        written.get(timeout=20)


def test_many_short_tasks_are_told_of_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    written: queue.Queue[str] = queue.Queue()
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.Console, "print", lambda console, line: written.put(line))
    progress.enable("lines")
    for number in range(3):
        now[0] += 20.0  # each is shorter than the time between two lines
        with progress.task(f"memory of variant {number}", None):
            if number == 1:
                assert written.get(timeout=20).startswith("memory of variant 1: ")
            assert written.empty()


@pytest.mark.parametrize("mode", ["off", "lines"])
def test_what_is_done_soon_is_not_told(mode: progress.Mode, capsys: pytest.CaptureFixture[str]) -> None:
    progress.enable(mode)
    assert list(progress.track("abc", "reading", 3)) == list("abc")
    assert capsys.readouterr() == ("", "")


def test_nothing_is_written_after_a_task_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    written: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(progress.Console, "print", lambda console, line: written.put(line))
    progress.enable("lines")
    with pytest.raises(RuntimeError), progress.task("calibrating", 4):
        written.get(timeout=20)
        raise RuntimeError
    before = written.qsize()
    with pytest.raises(queue.Empty):
        for _ in range(before + 1):
            written.get(timeout=0.05)
