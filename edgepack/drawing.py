"""Curves as SVG: a drawing that any browser and model card shows, the same text for the same figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by color-blind people too (Okabe and Ito 2008)."""
_TICKS = 6
_MOST_POINTS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(x, y), by rising x; y that is not finite is left out."""
    dashed: bool = False


def curves(title: str, series: Sequence[Series], *, x: str, y: str) -> str:
    """An SVG of curves over one pair of axes; ``x`` and ``y`` name these with their units.

    A curve of more than 400 points is drawn through the means of as many equal stretches. Without any point there are
    axes from 0 to 1.
    """
    drawn = [(one, _thinned([p for p in one.points if math.isfinite(p[1])])) for one in series]
    across = [point[0] for _, points in drawn for point in points] or [0.0, 1.0]
    upward = [point[1] for _, points in drawn for point in points] or [0.0, 1.0]
    horizontal = _Axis.of(min(across), max(across), _LEFT, WIDTH - _RIGHT)
    vertical = _Axis.of(min(upward), max(upward), HEIGHT - _BOTTOM, _TOP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(title)}</text>',
        *_grid(horizontal, vertical),
        f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 10}" text-anchor="end">{escape(x)}</text>',
        f'<text x="{_LEFT}" y="{_TOP - 8}" fill="#555">{escape(y)}</text>',
    ]
    for number, (one, points) in enumerate(drawn):
        color = _COLORS[number % len(_COLORS)]
        path = " ".join(f"{horizontal.place(a):.1f},{vertical.place(b):.1f}" for a, b in points)
        dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dashes}/>')
        top = _TOP + 14 + 16 * number
        lines.append(
            f'<text x="{WIDTH - _RIGHT - 8}" y="{top}" text-anchor="end" fill="{color}">{escape(one.name)}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    step: float
    start: float
    end: float

    @classmethod
    def of(cls, low: float, high: float, start: float, end: float) -> _Axis:
        """Whole steps of 1, 2 or 5 times a power of ten around the values."""
        spread = high - low or abs(high) or 1.0
        rough = spread / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(times for times in (1, 2, 5, 10) if times * power >= rough)
        first = math.floor(low / step) * step
        last = max(math.ceil(high / step) * step, first + step)
        return cls(low=first, high=last, step=step, start=start, end=end)

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return [self.low + at * self.step for at in range(round((self.high - self.low) / self.step) + 1)]


def _grid(horizontal: _Axis, vertical: _Axis) -> Iterator[str]:
    for value in horizontal.ticks():
        at = horizontal.place(value)
        yield f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{HEIGHT - _BOTTOM}" stroke="#eee"/>'
        yield f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:.6g}</text>'
    for value in vertical.ticks():
        at = vertical.place(value)
        yield f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{WIDTH - _RIGHT}" y2="{at:.1f}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.6g}</text>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return list(points)
    pieces = [points[at : at + size] for at in range(0, len(points), size)]
    return [
        (math.fsum(p[0] for p in piece) / len(piece), math.fsum(p[1] for p in piece) / len(piece))
        for piece in pieces
    ]
