"""How far the work is, on standard error: bars for a person at a terminal, lines for a log file."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from vitopt.terminal import Console, visible

T = TypeVar("T")
Mode = Literal["off", "bars", "lines"]

EVERY_SECONDS = 30.0  # between two lines, of one task or of many short ones

_mode: Mode = "off"
_told_at = 0.0


def enable(mode: Mode) -> None:
    """Show bars or lines from now on, or nothing."""
    global _mode, _told_at
    _mode, _told_at = mode, time.monotonic()


class Task:
    """A piece of work whose steps are counted. `total`: steps in all, None where that is not known."""

    def __init__(self, description: str, total: float | None):
        self.description, self.total, self.done = description, total, 0.0
        self._began = time.monotonic()

    def advance(self, steps: float = 1) -> None:
        """Move on by `steps`."""
        self.done += steps

    def seconds(self) -> float:
        """Since the task began."""
        return time.monotonic() - self._began


class _BarTask(Task):
    def __init__(self, description: str, total: float | None, move: Callable[[float], None]):
        super().__init__(description, total)
        self._move = move

    def advance(self, steps: float = 1) -> None:
        self._move(steps)


@contextmanager
def task(description: str, total: float | None) -> Iterator[Task]:
    """Show how far the block is while it runs; `total` None shows only that it runs."""
    shown = {"off": _nothing, "bars": _bar, "lines": _lines}[_mode]
    with shown(description, total) as counted:
        yield counted


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and count them."""
    with task(description, total) as counted:
        for item in items:
            yield item
            counted.advance()


def state(description: str, done: float, total: float | None, seconds: float) -> str:
    """One line: what, done of all, rate per second, and the time left at that rate."""
    if total is None:
        return f"{description}: since {duration(seconds)}"
    parts = [f"{description}: {done:,.0f} of {total:,.0f}"]
    if done > 0 and seconds > 0:
        parts += [f"{done / seconds:.3g}/s", f"{duration((total - done) * seconds / done)} left"]
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """As in `1 min 40 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


@contextmanager
def _nothing(description: str, total: float | None) -> Iterator[Task]:
    yield Task(description, total)


@contextmanager
def _bar(description: str, total: float | None) -> Iterator[Task]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    what = TextColumn("{task.description}", markup=False)
    columns = what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(visible(description), total=total)
        yield _BarTask(description, total, lambda steps: progress.advance(bar, steps))


@contextmanager
def _lines(description: str, total: float | None) -> Iterator[Task]:
    console = Console(stderr=True)
    counted = Task(description, total)
    ended = threading.Event()

    def tell() -> None:
        global _told_at
        while not ended.wait(max(0.0, _told_at + EVERY_SECONDS - time.monotonic())):
            _told_at = time.monotonic()
            console.print(state(description, counted.done, total, counted.seconds()))

    # A thread of its own, so that one long step is told of as well.
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield counted
    finally:
        ended.set()
        teller.join()
