"""What a long piece of work looks like while it runs: bars on a terminal, a line each tenth elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from nybble.terminal import console


class Display(Protocol):
    """A context; `update(phase, fraction)` may come from any thread. A new phase ends the one before."""

    def __enter__(self) -> Self: ...

    def close(self) -> None:
        """All is done: the last phase is complete. Leaving the context after this changes nothing."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, phase: str, fraction: float) -> None: ...

    def note(self, line: str) -> None:
        """A line that stays, above whatever moves."""
        ...


def display() -> Display:
    """Bars if a person is watching, lines if not."""
    return Bars() if console().is_terminal else Lines()


class Bars:
    """One bar a phase, with the time left."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console())
        self._phase: str | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def close(self) -> None:
        self._finish()
        self._progress.stop()

    def update(self, phase: str, fraction: float) -> None:
        if phase != self._phase or self._task is None:
            self._finish()
            self._phase, self._task = phase, self._progress.add_task(phase, total=1.0)
        self._progress.update(self._task, completed=min(max(fraction, 0.0), 1.0))

    def note(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1.0)


class Lines:
    """A line when a phase begins and at each further tenth of it, with the seconds left."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._tenth = -1
        self._began = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def close(self) -> None:
        return None

    def update(self, phase: str, fraction: float) -> None:
        if phase != self._phase:
            self._phase, self._tenth, self._began = phase, -1, time.monotonic()
        tenth = int(min(max(fraction, 0.0), 1.0) * 10)
        if tenth == self._tenth:
            return
        self._tenth = tenth
        print(f"{phase}: {tenth * 10}%{self._left(fraction)}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _left(self, fraction: float) -> str:
        spent = time.monotonic() - self._began
        if not 0 < fraction < 1 or spent < 1:
            return ""
        return f", about {spent * (1 - fraction) / fraction:.0f} s left"
