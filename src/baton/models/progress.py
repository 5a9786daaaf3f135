"""What a long fetch tells about itself, and who listens: nobody, or a person at a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bars


class Progress(Protocol):
    def stage(self, title: str, total: int | None = None) -> None:
        """A new stage begins; `total` bytes of work, None if unknown."""
        ...

    def reached(self, done: int, total: int | None = None) -> None:
        """`done` bytes of the current stage are there (absolute, so that a repeated report does no harm); `total`
        where it becomes known only now."""
        ...

    def note(self, text: str) -> None:
        """One line worth reading: a source that failed, a lock that is waited for."""
        ...


class NoProgress:
    """The null object."""

    def stage(self, title: str, total: int | None = None) -> None:
        pass

    def reached(self, done: int, total: int | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class RichProgress:
    """A progress bar on stderr while used as a context manager; plain lines where stderr is not a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._finish_stage(complete=error is None)
        self._bars.stop()

    def stage(self, title: str, total: int | None = None) -> None:
        self._finish_stage(complete=True)
        if not self._console.is_terminal:
            self._console.print(title, highlight=False)
        self._task = self._bars.add_task(title, total=total)

    def reached(self, done: int, total: int | None = None) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _finish_stage(self, complete: bool) -> None:
        """A finished stage shows a full bar, whatever the estimate of its size was."""
        if self._task is None:
            return
        if complete:
            done = self._bars.tasks[self._task].completed
            self._bars.update(self._task, total=done or 1, completed=done or 1)
        self._task = None
