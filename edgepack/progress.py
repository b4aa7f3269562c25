"""Progress on stderr: a bar on a terminal, one line per step otherwise, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from edgepack.units import show

LINE_SECONDS = 30.0


class Progress(Protocol):
    """What long work reports to."""

    def step(self, text: str) -> None:
        """A line that says what starts now."""
        ...

    def bar(
        self, text: str, total: int | None, *, rate: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A context manager that yields ``advance(n)``; ``total`` in the unit of ``n``, None if unknown.

        ``rate``: they are bytes, and how fast they come is worth saying.
        """
        ...


class Silent:
    """Says nothing; for libraries and tests."""

    def step(self, text: str) -> None:
        return

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int], None]]:
        yield lambda _: None

    def bar(
        self, text: str, total: int | None, *, rate: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        return self._bar()


class _Lines:
    """A bar where there is no terminal: one line whenever LINE_SECONDS have passed."""

    def __init__(self, out: Terminal, text: str, total: int | None, rate: bool) -> None:
        self._out, self._text, self._total, self._rate = out, text, total, rate
        self._done = 0
        self._began = self._said = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._total and now - self._said >= LINE_SECONDS:
            self._said = now
            pace = max(self._done / max(now - self._began, 1e-3), 1.0)
            told = (
                f", {show(round(pace))}/s, {(self._total - self._done) / pace:.0f} s left"
                if self._rate
                else ""
            )
            self._out.step(f"{self._text}: {self._done / self._total:.0%}{told}")


class Terminal:
    """Lines and rich bars on stderr; bars only when stderr is a terminal."""

    def __init__(self, *, verbose: bool = False) -> None:
        self.verbose = verbose

    def step(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def bar(
        self, text: str, total: int | None, *, rate: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        return self._bar(text, total, rate)

    @contextmanager
    def _bar(self, text: str, total: int | None, rate: bool) -> Iterator[Callable[[int], None]]:
        if not sys.stderr.isatty():
            self.step(text)
            yield _Lines(self, text, total, rate)
            return
        from rich import progress as rich
        from rich.console import Console

        columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TaskProgressColumn()]
        columns += [rich.TransferSpeedColumn()] if rate else []
        columns += [rich.TimeRemainingColumn()]
        with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(text, total=total)
            yield lambda n: bars.advance(task, n)
