"""The report's drawings by Matplotlib, as SVG that takes its colors from the page: the same bytes for the same report.

Colors are drawn as markers that become CSS variables, so that one drawing is right in light and dark; each mark has a
<title> that browsers show on hover, and a drawing's <title> and <desc> say in words what it shows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from edgepack.choice import NOISE
from edgepack.errors import MissingTool
from edgepack.report import Option, Piece, Pool, Subject, memory_name, part_name
from edgepack.report.colors import COLORS, PARTS, variables
from edgepack.report.sweep import Pace
from edgepack.screen import plain
from edgepack.units import GIB, MIB, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"

WIDTH = 4.7
"""Inches: the text is readable in a column of 340 pixels and in one of 600."""

GAP = 14
"""Points between drawings in one file."""

_MARKERS = {name: f"#0000{at:02x}" for at, name in enumerate(COLORS, start=1)}
"""What is drawn in place of a color: blacks that no library draws by itself."""
_SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgepack",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": _MARKERS["soft"],
    "axes.labelcolor": _MARKERS["ink"],
    "axes.titlecolor": _MARKERS["ink"],
    "text.color": _MARKERS["ink"],
    "xtick.color": _MARKERS["soft"],
    "ytick.color": _MARKERS["soft"],
    "xtick.labelcolor": _MARKERS["ink"],
    "ytick.labelcolor": _MARKERS["ink"],
    "grid.color": _MARKERS["line"],
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One figure."""

    name: str
    title: str
    description: str
    svg: str
    """An element to stand in HTML, or, by `standalone`, in a file of its own."""


def drawings(subject: Subject) -> Iterator[Drawing]:
    """Memory map, candidates, speed over context, KV budget: each where there is something to draw.

    Raises MissingTool without Matplotlib.
    """
    if subject.pools:
        yield _memory(subject)
    if len(_of_panel(subject)) > 1:
        yield _candidates(subject)
    if len(subject.pace) > 1:
        yield _pace(subject)


def compared(subjects: Sequence[Subject]) -> Drawing | None:
    """Each subject's memory as a share of its own budget; None for fewer than two plans."""
    planned = [one for one in subjects if one.pools]
    return _compared(planned) if len(planned) > 1 else None


def standalone(drawn: Sequence[Drawing]) -> str:
    """Drawings one below the other, as an SVG file with colors of its own for light and dark."""
    pieces, top = [], 0.0
    for drawing in drawn:
        box = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', drawing.svg)
        width, height = (0.0, 0.0) if box is None else (float(box[1]), float(box[2]))
        place = f'<svg x="0" y="{top:g}" width="{width:g}" height="{height:g}" '
        pieces.append(drawing.svg.replace("<svg ", place, 1))
        top += height + GAP
    wide = 72 * WIDTH
    return (
        f'<svg xmlns="{SVG}" viewBox="0 0 {wide:g} {top:g}" width="{2 * wide:g}">'
        f"<style>{variables()}svg{{background:var(--paper)}}</style>{''.join(pieces)}</svg>\n"
    )


# ── the figures ──────────────────────────────────────────────────────────────────────────────────────


def _memory(subject: Subject) -> Drawing:
    """Per pool a bar of its parts; under it what was measured; the budget where it is in sight."""
    with _page(0.95 * len(subject.pools) + (0.45 if subject.parts_measured or subject.peak else 0)) as page:
        axes = page.axes(rows=len(subject.pools))
        for pool, ax in zip(subject.pools, axes, strict=True):
            measured = _measured(subject, pool)
            peak = subject.peak if len(subject.pools) == 1 else None
            most = max(pool.high, sum(size for _, size in measured), peak or 0, 1)
            near = pool.budget <= 3 * most
            right = max(most, pool.budget if near else 0) * 1.04
            unit, name = _unit(right)
            below = f"measured{subject.elsewhere.replace(' on ', chr(10) + 'on ', 1)}"
            rows = ["predicted", *([below] if measured or peak else [])]
            _bar(page, ax, 0, [(p.name, p.bytes, _piece_title(p)) for p in pool.pieces], unit)
            ax.errorbar(
                [pool.expected / unit], [0.42], xerr=[[(pool.expected - pool.low) / unit],
                [(pool.high - pool.expected) / unit]], color=_MARKERS["ink"], capsize=2.5, linewidth=1,
            )  # fmt: skip
            if len(rows) > 1:
                told = [
                    (part, size, f"{part_name(part)}: {size:,} bytes measured ({show(size)})")
                    for part, size in measured
                ]
                _bar(page, ax, 1, told, unit)
                if peak is not None:
                    known = sum(size for _, size in measured)
                    rest = max(peak - known, 0)
                    page.titled(
                        ax.barh(1, rest / unit, 0.5, left=known / unit, facecolor="none", hatch="////",
                                edgecolor=_MARKERS["p5"], linewidth=0.8)[0],
                        f"the rest of the peak{subject.elsewhere}: {rest:,} bytes ({show(rest)}), which the server "
                        "does not itemize",
                    )  # fmt: skip
                    ax.plot([peak / unit] * 2, [0.68, 1.32], color=_MARKERS["ink"], linewidth=1.4)
            if near:
                ax.axvline(pool.budget / unit, color=_MARKERS["accent"], linewidth=1.6)
                ax.annotate(
                    f"budget {show(pool.budget)}", (pool.budget / unit, 1), (0, 2), textcoords="offset points",
                    ha="right", va="bottom", color=_MARKERS["accent"], annotation_clip=False,
                    xycoords=("data", "axes fraction"),
                )  # fmt: skip
            ax.set_yticks(range(len(rows)), rows)
            ax.set_ylim(len(rows) - 0.4, -0.45)
            ax.set_xlim(0, right / unit)
            ax.tick_params(axis="y", length=0)
            beyond = "" if near else f"; budget {show(pool.budget)}, far to the right"
            ax.set_xlabel(f"{name} in {_pool_name(pool)}{beyond}")
        words = "; ".join(
            f"{_pool_name(pool)}: {show(pool.expected)} expected, {show(pool.low)} to {show(pool.high)}, "
            f"of a budget of {show(pool.budget)}"
            for pool in subject.pools
        )
        peak_told = "" if subject.peak is None else f"; measured peak{subject.elsewhere} {show(subject.peak)}"
        return page.drawing(f"memory-{subject.letter}", "Memory map", f"{words}{peak_told}")


def _bar(page: _Page, ax: Axes, row: int, pieces: Sequence[tuple[str, int, str]], unit: int) -> None:
    left = 0.0
    for name, size, title in pieces:
        color = _MARKERS[PARTS.get(name, "p5")]
        drawn = ax.barh(row, size / unit, 0.5, left=left, facecolor=color, edgecolor=_MARKERS["paper"],
                        linewidth=0.6)  # fmt: skip
        page.titled(drawn[0], title)
        left += size / unit


def _piece_title(piece: Piece) -> str:
    ends = "" if piece.low == piece.high else f", {show(piece.low)} to {show(piece.high)}"
    return (
        f"{part_name(piece.name, piece.place)} ({piece.place}): {piece.bytes:,} bytes ({show(piece.bytes)}{ends}), "
        f"{piece.provenance}"
    )


def _measured(subject: Subject, pool: Pool) -> list[tuple[str, int]]:
    """Parts that the server reported, in the pool where the plan has the most of them."""
    found = []
    for one in subject.parts_measured:
        sizes = [
            sum(piece.bytes for piece in other.pieces if piece.name == one.name) for other in subject.pools
        ]
        if subject.pools[sizes.index(max(sizes))].name == pool.name:
            found.append((one.name, one.measured))
    return found


def _pool_name(pool: Pool) -> str:
    return {"memory": "memory", "card": "the card's memory", "host": "the host's memory"}[pool.name]


def _of_panel(subject: Subject) -> list[Option]:
    """Candidates that fit and whose scores compare with the chosen one's."""
    panel = None if subject.plan is None else subject.plan.quality.panel
    return [one for one in subject.options if one.verdict != "refused" and one.panel == panel]


def _candidates(subject: Subject) -> Drawing:
    """Sure quality over memory, and over speed, each with the line of the best for less memory or more speed."""
    options = _of_panel(subject)
    unit, name = _unit(max(one.memory_high or 0 for one in options))
    with _page(2.9) as page:
        left, right = page.axes(columns=2)
        _scatter(page, left, [((one.memory_high or 0) / unit, one) for one in options], rising=True)
        _scatter(page, right, [(one.decode or 0.0, one) for one in options], rising=False)
        left.set_ylim(_widened(*left.get_ylim()))
        memory = "memory" if subject.plan is None else memory_name(subject.plan)
        left.set_xlabel(f"{memory}, at most ({name})")
        left.set_ylabel("score, at least")
        right.set_xlabel("tokens a second, context full")
        right.tick_params(labelleft=False)
        panel = "" if subject.plan is None else subject.plan.quality.panel
        scored, best = f" that are scored in {panel}", "the best score"
        if panel == "none":
            scored, best = "", "what keeps most for sure"
        return page.drawing(
            f"candidates-{subject.letter}",
            "Candidates by quality, memory and speed",
            f"{len(options)} candidates that fit{scored}; the line joins {best} for each memory, and for each speed; "
            "the diamond is the choice. The table of candidates has every figure.",
        )


def _scatter(page: _Page, ax: Axes, points: Sequence[tuple[float, Option]], *, rising: bool) -> None:
    """Each candidate by its score, filled on the Pareto front; the line is the best score up to, or down to, there."""
    sign = 1 if rising else -1
    line = _front([(sign * x, one.quality_low or 0.0) for x, one in points])
    ax.plot([sign * x for x, _ in line], [y for _, y in line], drawstyle="steps-post", color=_MARKERS["p1"],
            linewidth=1.1, zorder=1)  # fmt: skip
    for x, one in sorted(points, key=lambda point: (point[1].verdict == "chosen", point[1].on_front)):
        chosen = one.verdict == "chosen"
        drawn = ax.plot(
            [x], [one.quality_low or 0.0], marker="D" if chosen else "o", linestyle="none",
            markersize=8 if chosen else 4.4 if one.on_front else 3.2,
            markerfacecolor=_MARKERS["accent" if chosen else "p1" if one.on_front else "paper"],
            markeredgecolor=_MARKERS["paper" if chosen else "p1" if one.on_front else "p5"],
            markeredgewidth=0.8, zorder=3 if chosen else 2,
        )  # fmt: skip
        page.titled(drawn[0], _option_title(one))
    values = [x for x, _ in points]
    if min(values) > 0 and max(values) > 8 * min(values):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.minorticks_off()
    else:
        ax.locator_params(axis="x", nbins=4)
    ax.grid(axis="y")


def _widened(low: float, high: float) -> tuple[float, float]:
    """Both ends, no nearer to each other than what counts as noise in a score: equal scores look equal."""
    middle, reach = (low + high) / 2, (high - low) / 2
    reach = max(reach, NOISE * abs(middle) / 2)
    return middle - reach, middle + reach


def _unit(most: float) -> tuple[int, str]:
    return (GIB, "GiB") if most >= GIB else (MIB, "MiB")


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """By rising x the points whose y no earlier one has."""
    line: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not line or y > line[-1][1]:
            line.append((x, y))
    return line


def _option_title(one: Option) -> str:
    why = "the choice" if one.verdict == "chosen" else f"not chosen: {one.reason}"
    return (
        f"{one.model} {one.scheme} on {one.runtime}, KV {one.kv_type}, context {one.context}: scores at least "
        f"{one.quality_low or 0:.1f}, takes up to {show(one.memory_high or 0)}, writes at least "
        f"{one.decode_low or 0:.1f} tok/s with a full context ({one.decode or 0:.1f} expected); {why}"
    )


def _pace(subject: Subject) -> Drawing:
    """Decode speed with so many tokens in the context: expected, the lower end, and what was measured."""
    with _page(2.6) as page:
        (ax,) = page.axes()
        points = subject.pace
        for line, name, style in (
            (_between(points, low=False), "expected", "-"),
            (_between(points, low=True), "at least", "--"),
        ):
            ax.plot(
                [x for x, _ in line],
                [y for _, y in line],
                style,
                color=_MARKERS["p1"],
                linewidth=1.4,
                label=name,
            )
        for one in points:
            page.titled(
                ax.plot([one.tokens], [one.decode], "o", markersize=4, color=_MARKERS["p1"])[0],
                f"{one.tokens:,} tokens: {one.decode:.1f} tok/s expected, at least {one.decode_low:.1f}",
            )
        for at, found in enumerate(subject.pace_measured):
            where = "measured" if found.same_device else "measured on another machine"
            page.titled(
                ax.plot([found.tokens], [found.decode], "X", markersize=7, linestyle="none", clip_on=False,
                        color=_MARKERS["accent"], label=where if at == 0 else None)[0],
                f"{found.tokens:,} tokens: {found.decode:.1f} tok/s {where}",
            )  # fmt: skip
        ax.set_ylim(bottom=0)
        ax.set_xlabel("tokens in the context of one user")
        ax.set_ylabel("tokens a second")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.grid(axis="y")
        above = (0, 1)  # where no line can be
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=above, ncols=3, borderaxespad=0)
        first, last = points[0], points[-1]
        return page.drawing(
            f"pace-{subject.letter}",
            "Speed over context",
            f"from {first.decode:.1f} tok/s with {first.tokens:,} tokens to {last.decode:.1f} with {last.tokens:,}",
        )


def _between(points: Sequence[Pace], *, low: bool) -> list[tuple[float, float]]:
    """Through the points as the law goes: the time of a token rises in a line with the KV cache that it reads."""
    speeds = [(p.tokens, p.decode_low if low else p.decode) for p in points]
    if len(speeds) != 2 or min(speed for _, speed in speeds) <= 0:
        return [(float(x), y) for x, y in speeds]
    (start, fast), (end, slow) = speeds
    shares = [at / 24 for at in range(25)]
    return [(start + (end - start) * share, 1 / ((1 - share) / fast + share / slow)) for share in shares]


def _compared(subjects: Sequence[Subject]) -> Drawing:
    with _page(0.42 * len(subjects) + 0.75) as page:
        (ax,) = page.axes()
        for row, subject in enumerate(subjects):
            pool = max(subject.pools, key=lambda pool: pool.high / max(pool.budget, 1))
            left = 0.0
            for piece in pool.pieces:
                share = 100 * piece.bytes / max(pool.budget, 1)
                drawn = ax.barh(row, share, 0.55, left=left, facecolor=_MARKERS[PARTS.get(piece.name, "p5")],
                                edgecolor=_MARKERS["paper"], linewidth=0.5)  # fmt: skip
                page.titled(drawn[0], _piece_title(piece))
                left += share
            high = 100 * pool.high / max(pool.budget, 1)
            ax.plot([high] * 2, [row - 0.34, row + 0.34], color=_MARKERS["ink"], linewidth=1.4)
            ax.annotate(f"{high:.0f} %" if high >= 1 else f"{high:.1f} %", (max(left, high), row), (4, 0),
                        textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
        ax.axvline(100, color=_MARKERS["accent"], linewidth=1.6)
        ax.set_yticks(range(len(subjects)), [one.letter for one in subjects])
        ax.set_ylim(len(subjects) - 0.4, -0.6)
        ax.set_xlim(0, max(115.0, ax.get_xlim()[1]))
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("percent of each device's budget, and the upper end")
        told = ", ".join(
            f"{one.letter} {max(100 * pool.high / max(pool.budget, 1) for pool in one.pools):.1f} %"
            for one in subjects
        )
        return page.drawing("compared", "Memory against each device's budget", f"upper ends: {told}")


# ── from Matplotlib to the page ──────────────────────────────────────────────────────────────────────


class _Page:
    """A figure being drawn, and the words that belong to its marks."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self._titles: list[str] = []

    def axes(self, *, rows: int = 1, columns: int = 1) -> list[Axes]:
        found = self.figure.subplots(rows, columns, squeeze=False, sharey="row" if columns > 1 else False)
        return [ax for row in found for ax in row]

    def titled(self, artist: Any, text: str) -> None:
        """The words that a browser shows over the mark."""
        artist.set_gid(f"t{len(self._titles)}")
        self._titles.append(text)

    def drawing(self, name: str, title: str, description: str) -> Drawing:
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(out, format="svg", metadata=nothing)
        svg = _for_the_page(out.getvalue(), name, title, description, self._titles)
        return Drawing(name=name, title=title, description=description, svg=svg)


@contextmanager
def _page(height: float) -> Iterator[_Page]:
    """Matplotlib with the report's settings, and nobody else's; ``height`` in inches."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingTool(
            "the report's drawings need Matplotlib",
            hint="pip install 'edgepack[report]'; or --format md, or json, which need none",
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield _Page(Figure(figsize=(WIDTH, height), layout="constrained"))


_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"font: (?:[a-z0-9]+ )*?([\d.]+px) [^;]*")


def _for_the_page(text: str, name: str, title: str, description: str, titles: Sequence[str]) -> str:
    """Matplotlib's SVG as an element of a page: named, titled, in the page's font and colors, its ids its own."""
    root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for attribute in [key for key in element.attrib if key.startswith("{")]:
            element.set(attribute.rpartition("}")[2], element.attrib.pop(attribute))
        for attribute, value in element.attrib.items():
            element.set(attribute, _colored(value))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):  # a style would be the whole page's
                parent.remove(child)
    for element in list(root.iter()):
        own = element.get("id", "")
        if re.fullmatch(r"t\d+", own) and element.tag == "g":
            told = ElementTree.Element("title")
            told.text = plain(titles[int(own[1:])])
            element.insert(0, told)
    _named(root, name)
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib.pop("version", None)
    for at, (tag, words) in enumerate((("title", title), ("desc", description))):
        told = ElementTree.Element(tag, id=f"{name}-{tag}")
        told.text = plain(words)
        root.insert(at, told)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    root.set("style", "stroke-linejoin:round")
    return ElementTree.tostring(root, encoding="unicode")


def _named(root: ElementTree.Element, name: str) -> None:
    """Ids that something refers to, with the drawing's name before them; all others are left out."""
    used = {
        found
        for element in root.iter()
        for key, value in element.attrib.items()
        for found in ([value[1:]] if key == "href" else _REFERENCE.findall(value))
    }
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            if key == "href":
                element.set(key, f"#{name}-{value[1:]}")
            elif key != "id":
                element.set(key, _REFERENCE.sub(lambda found: f"url(#{name}-{found[1]})", value))


def _colored(value: str) -> str:
    for name, marker in _MARKERS.items():
        value = value.replace(marker, f"var(--{name})")
    return _FONT.sub(r"font: \1 system-ui, sans-serif", value)
