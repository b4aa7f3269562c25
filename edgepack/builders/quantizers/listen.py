"""Progress out of what a library prints: for libraries that call nobody back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from io import TextIOBase
from typing import TextIO

from edgepack.builders.child import report


class Listener(TextIOBase):
    """Stands in for stdout or stderr: passes on what is written and reports the percentage that it means.

    ``meanings``: what to look for, and the percent that follows from the numbers found. It never goes back.
    """

    def __init__(self, out: TextIO, meanings: Mapping[re.Pattern[str], Callable[..., int]]) -> None:
        self._out, self._meanings, self._percent = out, meanings, 0

    def write(self, text: str) -> int:
        self._out.write(text)
        for pattern, meaning in self._meanings.items():
            for found in pattern.finditer(text):
                percent = meaning(*(int(number) for number in found.groups()))
                if percent > self._percent:
                    self._percent = percent
                    report(percent, 100)
        return len(text)

    def flush(self) -> None:
        self._out.flush()
