"""How text for people is laid out: as it is in a pipe or a file, to its width and in color on a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Style = Literal["title", "good", "bad", "warning", "quiet", "weights", "copy", "cache", "scratch", "process"]

_CODES: Mapping[Style, str] = {
    "title": "1", "good": "32", "bad": "1;31", "warning": "33", "quiet": "2",
    "weights": "34", "copy": "36", "cache": "35", "scratch": "33", "process": "37",
}  # fmt: skip
"""Select Graphic Rendition, ECMA-48 8.3.117. A color only repeats what a word or a sign says already."""
SIGNS: Mapping[str, tuple[str, Style]] = {
    "weights": ("█", "weights"), "host_copy": ("▓", "copy"), "kv_cache": ("▒", "cache"),
    "recurrent_state": ("▒", "cache"), "compute": ("░", "scratch"), "output": ("░", "scratch"),
    "rope_cache": ("░", "scratch"), "graphs": ("░", "scratch"), "workspace": ("░", "scratch"),
    "process": ("·", "process"),
}  # fmt: skip
"""How a part of the memory is drawn in a bar; the sign says which it is, the color repeats it."""
BAR = 48
"""Signs of a bar where there is no width."""
WIDEST_BAR = 72
GAP = 2
LEAST = 7
"""Columns to which a column of a table is narrowed at most."""
STACKED = 72
"""Columns below which the second of a pair stands under the first."""


def plain(text: str) -> str:
    """Text of a stranger without what has no place before a reader: control characters, and marks that turn its way."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Where text goes."""

    width: int | None = None
    """Columns; None for a pipe or a file, where lines are as long as they are."""
    color: bool = False

    def paint(self, text: str, style: Style | None) -> str:
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if self.color and style is not None and text else text

    def line(self, text: str, style: Style | None = None) -> list[str]:
        """A line, or several: what does not fit goes on below the last column of the first, or indented."""
        if self.width is None:
            return [text.rstrip()]
        return [self.paint(part, style) for part in _folded(text.rstrip(), self.width)]

    def lines(self, texts: Iterable[str], style: Style | None = None) -> list[str]:
        return [part for text in texts for part in self.line(text, style)]

    def pairs(self, rows: Sequence[tuple[str, str]], *, least: int, gap: int = 1) -> list[str]:
        """A name and a text on each line, indented; ``least``: columns of the names where there is no width."""
        if self.width is None:
            return [f"  {name:<{least}}{' ' * gap}{text}".rstrip() for name, text in rows]
        first = max((len(name) for name, _ in rows), default=0)
        if self.width < STACKED or first > self.width // 2:
            return [
                part
                for name, text in rows
                for part in (*self.line(f"  {name}"), *_wrapped(text, self.width, "    ", "    "))
            ]
        return [
            part
            for name, text in rows
            for part in _wrapped(
                text, self.width, f"  {name:<{first}}{' ' * GAP}", " " * (2 + first + GAP), always=True
            )
        ]

    def columns(
        self,
        rows: Sequence[Sequence[str]],
        *,
        styles: Mapping[str, Style] | None = None,
        below: Sequence[int] = (),
    ) -> list[str]:
        """A table, its heading first; cells wrap where it is wider than the screen.

        ``styles``: of a first cell, by its text. ``below``: columns that may then stand under their row, first first.
        """
        heading, *table = self._table(rows, styles or {}, below)
        return [*(self.paint(line, "title") for line in heading), *(line for row in table for line in row)]

    def _table(
        self, rows: Sequence[Sequence[str]], styles: Mapping[str, Style], below: Sequence[int]
    ) -> list[list[str]]:
        """The lines of each row."""
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        gaps = GAP * (len(widths) - 1)
        if self.width is None or sum(widths) + gaps <= self.width:
            return [self._row([[cell] for cell in row], widths, styles) for row in rows]
        if below:
            return self._with_rest_below(rows, styles, below)
        while sum(widths) + gaps > self.width and max(widths) > LEAST:
            widest = widths.index(max(widths))
            second = max((width for i, width in enumerate(widths) if i != widest), default=LEAST)
            over = sum(widths) + gaps - self.width
            widths[widest] = max(min(widths[widest] - 1, second), widths[widest] - over, LEAST)
        return [
            self._row(
                [_wrapped(cell, width, "", "") or [""] for cell, width in zip(row, widths, strict=True)],
                widths,
                styles,
            )
            for row in rows
        ]

    def _row(
        self, cells: Sequence[Sequence[str]], widths: Sequence[int], styles: Mapping[str, Style]
    ) -> list[str]:
        style = styles.get(cells[0][0])
        found = []
        for number in range(max(len(cell) for cell in cells)):
            parts = [
                (cell[number] if number < len(cell) else "").ljust(width)
                for cell, width in zip(cells, widths, strict=True)
            ]
            first, *rest = parts
            text = (" " * GAP).join(["", *rest]).rstrip() if rest else ""
            found.append(self.paint(first, style) + text if text else self.paint(first.rstrip(), style))
        return found

    def _with_rest_below(
        self, rows: Sequence[Sequence[str]], styles: Mapping[str, Style], below: Sequence[int]
    ) -> list[list[str]]:
        """As few of ``below`` as make the rest fit, each with its heading."""
        heading, *others = rows
        widths = [max(len(row[i]) for row in rows) + GAP for i in range(len(heading))]
        for count in range(1, len(below) + 1):
            room = sum(width for i, width in enumerate(widths) if i not in below[:count]) - GAP
            if room <= (self.width or room):
                below = below[:count]
                break
        kept = [[cell for i, cell in enumerate(row) if i not in below] for row in rows]
        first, *table = self._table(kept, styles, ())
        found = [first]
        for lines, row in zip(table, others, strict=True):
            rest = "; ".join(f"{heading[i]}: {row[i]}" for i in below if row[i])
            under = _wrapped(rest, self.width or 0, "  ", "  ")
            found.append([*lines, *(self.paint(part, "quiet") for part in under)])
        return found

    def bar(self, parts: Sequence[tuple[str, int]], limit: int, told: str) -> list[str]:
        """Parts, by name and bytes, against a limit, and ``told`` beside or below it; ``!`` runs over the edge."""
        room = BAR if self.width is None else max(8, min(WIDEST_BAR, self.width - 2))
        scale = max(limit, sum(size for _, size in parts)) or 1
        drawn: list[tuple[str, Style | None]] = []
        for name, size in parts:
            drawn += [SIGNS.get(name, ("?", None))] * round(room * size / scale)
        edge = round(room * limit / scale)
        inside, over = drawn[:edge], "!" * len(drawn[edge:])
        runs = groupby(inside, key=lambda one: one[1])
        painted = "".join(self.paint("".join(sign for sign, _ in run), style) for style, run in runs)
        line = f"[{painted}{' ' * (edge - len(inside))}]{self.paint(over, 'bad')}"
        if self.width is None or edge + len(over) + 3 + len(told) <= self.width:
            return [f"{line} {told}"]
        return [line, *self.line(f" {told}")]

    def legend(self, parts: Iterable[tuple[str, int]]) -> list[str]:
        """What the signs of a bar are; nothing in a pipe."""
        if self.width is None:
            return []
        names: dict[str, str] = {}
        for name, size in parts:
            if size and name in SIGNS:
                names.setdefault(SIGNS[name][0], name)
        return self.line(" " + ", ".join(f"{sign} {name}" for sign, name in names.items()), "quiet")


PLAIN = Screen()


def _folded(text: str, width: int) -> list[str]:
    """A line in pieces of at most ``width`` columns."""
    if len(text) <= width:
        return [text]
    indent = len(text) - len(text.lstrip())
    starts = [found.end() for found in re.finditer(r"(?<=\S) {2,}", text) if found.end() <= width // 2]
    hang = starts[-1] if starts else indent + 2
    longest = max(map(len, text.split()))
    if hang + longest > width >= indent + 2 + longest:
        hang = indent + 2
    if not starts:
        return _wrapped(text[indent:], width, " " * indent, " " * hang)
    first, rest = text[: starts[-1]], text[starts[-1] :]
    if len(first) + len(rest.split()[0]) > width:
        return [first.rstrip(), *_wrapped(rest, width, " " * hang, " " * hang)]
    return _wrapped(rest, width, first, " " * hang)


def _wrapped(text: str, width: int, first: str, later: str, *, always: bool = False) -> list[str]:
    """Words of ``text`` behind ``first`` and, on the next lines, ``later``; only what fits no line is broken."""
    found = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False,
        break_long_words=len(later) + max(map(len, text.split()), default=0) > width, drop_whitespace=True,
    )  # fmt: skip
    return [line.rstrip() for line in found] or ([first.rstrip()] if always else [])
