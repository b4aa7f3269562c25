"""A record of a disk's requests (format of Linux' dm-log-writes), and the states that a power cut may have left.

Until a flush a disk may hold writes in its cache: a cut loses any of them, and tears one into sectors that came and
sectors that did not. A write with FUA is on the medium when it completes. The format: linux/drivers/md/dm-log-writes.c.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0x6A736677736872
SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SECTOR = 512

KEPT = 0.7
"""Share of the unflushed writes that a cut leaves."""
TORN = 0.4
"""Share of those that it tears."""
TEARS = (512, 4096)
"""Bytes that a disk writes as one: sectors of old disks and of new ones."""


@dataclass(frozen=True, slots=True)
class Request:
    """A write, a flush, or both (then the flush comes first). ``at``: bytes from the disk's begin."""

    at: int
    content: bytes
    flush: bool
    fua: bool


def read(path: Path) -> list[Request]:
    """The requests of a log in the order in which they were completed. Raises ValueError for what is none."""
    log = path.read_bytes()
    magic, version, count, sector = SUPER.unpack_from(log)
    if (magic, version) != (MAGIC, 1):
        raise ValueError(f"{path} is no log of writes: magic {magic:x}, version {version}")
    found, at = [], sector
    for _ in range(count):
        begin, sectors, flags, data = ENTRY.unpack_from(log, at)
        at += sector
        if flags & DISCARD:
            raise ValueError("a discarded block may read as anything: the guest must not discard")
        if flags & MARK:  # a text, which its length says
            at += -(-data // sector) * sector
            continue
        length = sectors * sector
        found.append(Request(begin * sector, log[at : at + length], bool(flags & FLUSH), bool(flags & FUA)))
        at += length
    return found


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes on their way to the medium."""

    at: int
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What a cut after the request ``after`` left: all before ``durable``, and of those since then these writes."""

    after: int
    durable: int
    kept: tuple[Write, ...]
    lossy: bool
    """What was in the disk's cache came in part."""


def cuts(
    requests: Sequence[Request],
    places: Sequence[tuple[int, bool]],
    chance: random.Random,
    *,
    units: Sequence[int] = TEARS,
    whole: range = range(0),
) -> Iterator[Cut]:
    """A cut at each place (ascending): the request that was the last, and whether the cache then is lost in part.

    Writes are torn into ``units`` of bytes; one that touches the bytes ``whole`` is not torn.
    """
    durable = seen = 0
    for after, lossy in places:
        durable = max((n for n in range(seen, after + 1) if requests[n].flush), default=durable)
        seen = after + 1
        cache = [request for request in requests[durable:seen] if request.content]
        kept = _left(cache, chance, units, whole) if lossy else (Write(r.at, r.content) for r in cache)
        yield Cut(after=after, durable=durable, kept=tuple(kept), lossy=lossy)


def _left(
    cache: Sequence[Request], chance: random.Random, units: Sequence[int], whole: range
) -> Iterator[Write]:
    for request in cache:
        if request.fua:
            yield Write(request.at, request.content)
        elif chance.random() < KEPT:
            unit = chance.choice(units)
            tears = request.at >= whole.stop or request.at + len(request.content) <= whole.start
            if chance.random() < TORN and tears and len(request.content) > unit:
                yield from torn(request, unit, chance)
            else:
                yield Write(request.at, request.content)


def torn(request: Request, unit: int, chance: random.Random) -> Iterator[Write]:
    """Half of the torn ones lack their end, half any of their units, which are aligned to the disk."""
    first = -request.at % unit
    edges = [0, *range(first or unit, len(request.content), unit), len(request.content)]
    parts = list(itertools.pairwise(edges))
    if chance.random() < 0.5:
        there = parts[: chance.randrange(len(parts))]
    else:
        there = [part for part in parts if chance.random() < 0.5]
    for begin, end in there:
        yield Write(request.at + begin, request.content[begin:end])
