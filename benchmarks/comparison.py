"""What all comparisons share: rounds in turns, a ratio with its interval, and a table of edgepack against its peers."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NoReturn

import psutil

CORES = len(os.sched_getaffinity(0))
DRAWS = 2000
"""Of the bootstrap."""
FEWEST = 5
"""Rounds of a verdict: two equal programs are on one side of each other in all of 5 rounds once in 16, in all of 3 once
in 4."""
Verdict = Literal["edgepack", "peer", "level", "too few rounds", "not compared"]
UNITS: Mapping[str, tuple[float, str]] = {
    "s": (1, "{:.2f} s"),
    "ms": (1e-3, "{:.0f} ms"),
    "MiB": (2**20, "{:.0f} MiB"),
    "bytes": (1, "{:,.0f} B"),
    "tokens/s": (1, "{:.1f} tokens/s"),
    "%": (0.01, "{:.2f} %"),
    "nats": (1, "{:.5f} nats"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What edgepack is held against."""

    name: str
    version: str
    command: str
    """What is run, word by word; capitals are files."""
    missing: str = ""
    """Why it cannot be run here; empty when it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A median, and the interval that holds it nine times of ten (bootstrap over rounds)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantity of edgepack and of one peer, from the same rounds."""

    what: str
    unit: str
    """A key of UNITS; figures are in seconds, bytes, tokens a second, nats, or shares."""
    better: Literal["less", "more"]
    ours: Figure | None
    peer: str
    theirs: Figure | None
    ratio: Figure | None
    """Of one round's two figures, edgepack's over the peer's; the median over rounds."""
    rounds: int
    """0: the interval is not of rounds; 1: the figures have no spread."""
    note: str
    """Why edgepack is not ahead, where it is not; where there is no ratio, the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options that all comparisons have."""

    folder: Path
    rounds: int


def of(what: str, unit: str, better: Literal["less", "more"], peer: Peer, ours: Sequence[float],
       theirs: Sequence[float], *, why: str, note: str = "") -> Row:  # fmt: skip
    """A row of the rounds' figures, pair by pair; ``why`` is added to ``note`` where edgepack is not ahead."""
    ratio = middle([a / b for a, b in zip(ours, theirs, strict=True)])
    row = Row(
        what=what, unit=unit, better=better, ours=middle(ours), peer=f"{peer.name} {peer.version}".strip(),
        theirs=middle(theirs), ratio=ratio, rounds=len(ours), note=note,
    )  # fmt: skip
    return row if ahead(row) == "edgepack" else _noted(row, "; ".join(filter(None, (note, why))))


def exactly(what: str, unit: str, better: Literal["less", "more"], peer: Peer, ours: float, theirs: float, *,
            why: str) -> Row:  # fmt: skip
    """A row of two figures that have no spread, such as bytes."""
    return of(what, unit, better, peer, [ours], [theirs], why=why)


def figures(what: str, unit: str, better: Literal["less", "more"], peer: Peer, ours: Figure, theirs: Figure, *,
            note: str, why: str) -> Row:  # fmt: skip
    """A row of two figures that each bring an interval; the ratio's holds all that the two allow."""
    ratio = Figure(value=ours.value / theirs.value, low=ours.low / theirs.high, high=ours.high / theirs.low)
    row = Row(
        what=what, unit=unit, better=better, ours=ours, peer=f"{peer.name} {peer.version}".strip(), theirs=theirs,
        ratio=ratio, rounds=0, note=note,
    )  # fmt: skip
    return row if ahead(row) == "edgepack" else _noted(row, f"{note}; {why}")


def absent(what: str, unit: str, better: Literal["less", "more"], peer: Peer, reason: str) -> Row:
    """The row of a peer that could not be run."""
    return Row(
        what=what, unit=unit, better=better, ours=None, peer=f"{peer.name} {peer.version}".strip(),
        theirs=None, ratio=None, rounds=0, note=reason,
    )  # fmt: skip


def with_ours(row: Row, ours: Sequence[float]) -> Row:
    """The same row with edgepack's own figure, which nothing is held against."""
    return Row(**{name: getattr(row, name) for name in row.__slots__} | {"ours": middle(ours)})


def _noted(row: Row, note: str) -> Row:
    return Row(**{name: getattr(row, name) for name in row.__slots__} | {"note": note})


def middle(values: Sequence[float]) -> Figure:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("no rounds")
    drawn = random.Random(0)
    medians = sorted(median(drawn.choices(values, k=len(values))) for _ in range(DRAWS))
    return Figure(value=median(values), low=medians[DRAWS // 20], high=medians[DRAWS - DRAWS // 20 - 1])


def ahead(row: Row) -> Verdict:
    """Who is, by the whole interval of the ratio; level where it holds 1."""
    if row.ratio is None:
        return "not compared"
    if 1 < row.rounds < FEWEST:
        return "too few rounds"
    if row.ratio.low <= 1 <= row.ratio.high:
        return "level"
    return "edgepack" if (row.ratio.high < 1) == (row.better == "less") else "peer"


def hardest(rows: Sequence[Row]) -> list[Row]:
    """Of each quantity the row of the peer that edgepack does worst against; one without a ratio where none has one."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.what not in found or _behind(row) > _behind(found[row.what]):
            found[row.what] = row
    return list(found.values())


def _behind(row: Row) -> float:
    if row.ratio is None:
        return 0.0
    return row.ratio.value if row.better == "less" else 1 / row.ratio.value


# ── as text ──


def listing(peers: Sequence[Peer]) -> str:
    """Each peer with its version and command, or the reason why it is not there."""
    lines = []
    for peer in peers:
        lines.append(f"{peer.name} {peer.version}".strip())
        lines.append(f"    {peer.command}")
        if peer.missing:
            lines.append(f"    NOT COMPARED: {peer.missing}")
    return "\n".join(lines)


def cells(row: Row) -> tuple[str, str, str, str, str, str]:
    """What, edgepack's figure, the peer, its figure, the ratio with interval and rounds, who is ahead."""
    ratio = "-"
    if row.ratio is not None:
        ratio = f"{row.ratio.value:.3g}"
        if row.rounds != 1:
            ratio += f" [{row.ratio.low:.3g}, {row.ratio.high:.3g}]"
        if row.rounds > 1:
            ratio += f", n = {row.rounds}"
    return row.what, shown(row.ours, row.unit), row.peer, shown(row.theirs, row.unit), ratio, ahead(row)


def shown(figure: Figure | None, unit: str) -> str:
    if figure is None:
        return "-"
    scale, form = UNITS[unit]
    return form.format(figure.value / scale)


HEADS = ("what", "edgepack", "peer", "peer's", "ratio", "ahead")


def table(rows: Sequence[Row]) -> str:
    """Columns under each other, and below a row its note."""
    lines = [HEADS, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    out = []
    for line, row in zip(lines, (None, *rows), strict=True):
        out.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if row is not None and row.note:
            out += textwrap.wrap(row.note, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(out)


# ── what every comparison does ──


def main(
    doc: str | None,
    peers: Callable[[], Sequence[Peer]],
    compare: Callable[[Asked, Mapping[str, Peer]], Iterator[Row]],
    *,
    rounds: int,
) -> None:
    """Lists the peers, compares, prints the table; ``compare`` is given the peers by name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("bench-out"), help="for models, kept (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="of each pair (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--peers", type=Path, help="only write the peers, as JSON, here")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds must be at least 2: one round has no spread")
    found = peers()
    if given.peers:
        given.peers.write_text(json.dumps([asdict(peer) for peer in found]), encoding="utf-8")
        return
    print(listing(found), flush=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    asked = Asked(folder=given.folder.resolve(), rounds=given.rounds)
    rows: list[Row] = []
    for row in compare(asked, {peer.name: peer for peer in found}):
        rows.append(row)
        if given.json:  # after each, so that one that fails later costs no other its figures
            given.json.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    print(table(rows))


def paired(
    rounds: int, ours: Callable[[], float], theirs: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Both, round by round; who goes first changes, because the machine may get warmer or busier."""
    a, b = [], []
    for number in range(rounds):
        if number % 2 == 0:
            a.append(ours())
            b.append(theirs())
        else:
            b.append(theirs())
            a.append(ours())
    return a, b


Command = Sequence[str | Path]

clock = time.monotonic


def seconds(*commands: Command, env: Mapping[str, str] | None = None) -> float:
    """Wall time of the commands one after another; ends the benchmark with what a failing one said."""
    began = time.monotonic()
    for command in commands:
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, **(env or {})},
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            _failed(command, done.returncode, done.stderr or done.stdout)
    return time.monotonic() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    seconds: float
    memory: int
    """Highest sum of anonymous memory over the process and its children, sampled at 20 Hz; bytes."""


def watched(*commands: Command, env: Mapping[str, str] | None = None) -> Run:
    """As ``seconds``, with the memory."""
    began = time.monotonic()
    peak = 0
    for command in commands:
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [str(word) for word in command], env={**os.environ, **(env or {})}, stdout=said, stderr=said
            )
            while process.poll() is None:
                peak = max(peak, sum(_anonymous(pid) for pid in _family(process.pid)))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
            if process.returncode != 0:
                said.seek(0)
                _failed(command, process.returncode, said.read())
    return Run(seconds=time.monotonic() - began, memory=peak)


def _family(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _anonymous(pid: int) -> int:
    """RssAnon in bytes; 0 when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


def _failed(command: Command, status: int, said: bytes) -> NoReturn:
    words = " ".join(str(word) for word in command)
    sys.exit(f"{words[:300]} ended with status {status}:\n{said[-2000:].decode(errors='replace')}")
