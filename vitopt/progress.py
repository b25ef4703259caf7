"""Progress bars on standard error: on for a person at a terminal, off for everyone else."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_enabled = False


def enable(wanted: bool) -> None:
    """Show bars from now on, or stop showing them."""
    global _enabled
    _enabled = wanted


class Task:
    """Handle to move one bar forward."""

    def advance(self, steps: float = 1) -> None:
        """Move on by `steps`."""


class _RichTask(Task):
    def __init__(self, progress: object, identifier: object):
        self._progress, self._identifier = progress, identifier

    def advance(self, steps: float = 1) -> None:
        self._progress.advance(self._identifier, steps)  # type: ignore[attr-defined]


@contextmanager
def task(description: str, total: float | None) -> Iterator[Task]:
    """Show a bar while the block runs; `total` None shows one without an end."""
    if not _enabled:
        yield Task()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vitopt.terminal import Console, visible

    what = TextColumn("{task.description}", markup=False)
    columns = what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _RichTask(progress, progress.add_task(visible(description), total=total))


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` while a bar counts them."""
    with task(description, total) as bar:
        for item in items:
            yield item
            bar.advance()
