"""Progress on stderr: a bar on a terminal, one line per step otherwise, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

LINE_SECONDS = 30.0


class Progress(Protocol):
    """What long work reports to."""

    def step(self, text: str) -> None:
        """A line that says what starts now."""
        ...

    def bar(self, text: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """A context manager that yields ``advance(n)``; ``total`` in the unit of ``n``, None if unknown."""
        ...


class Silent:
    """Says nothing; for libraries and tests."""

    def step(self, text: str) -> None:
        return

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int], None]]:
        yield lambda _: None

    def bar(self, text: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        return self._bar()


class _Lines:
    """A bar where there is no terminal: one line whenever LINE_SECONDS have passed."""

    def __init__(self, out: Terminal, text: str, total: int | None) -> None:
        self._out, self._text, self._total = out, text, total
        self._done = 0
        self._said = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._total and now - self._said >= LINE_SECONDS:
            self._said = now
            self._out.step(f"{self._text}: {self._done / self._total:.0%}")


class Terminal:
    """Lines and rich bars on stderr; bars only when stderr is a terminal."""

    def __init__(self, *, verbose: bool = False) -> None:
        self.verbose = verbose

    def step(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def bar(self, text: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        return self._bar(text, total)

    @contextmanager
    def _bar(self, text: str, total: int | None) -> Iterator[Callable[[int], None]]:
        if not sys.stderr.isatty():
            self.step(text)
            yield _Lines(self, text, total)
            return
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(text, total=total)
            yield lambda n: bars.advance(task, n)
