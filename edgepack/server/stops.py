"""Text cut at stop strings exactly, however tokens split it."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Gives text out once no stop string can begin in it any more.

    The stop string that is complete first ends the text, of two that end together the longer; neither it nor
    what follows is given out. The result does not depend on how the text is split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string was met."""
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            out, self._held = self._held[:start], ""
            return out, True
        keep = self._unsure()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out, False

    def rest(self) -> str:
        """What was held back, once the text ended without a stop string."""
        out, self._held = self._held, ""
        return out

    def _unsure(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
