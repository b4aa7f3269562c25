"""The log of a disk's requests, and that the states made of it are those that a power cut may leave."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.powercut import wlog
from tests.powercut.wlog import DISCARD, ENTRY, FLUSH, FUA, MAGIC, MARK, SECTOR, SUPER, Cut, Request


def log(path: Path, *entries: tuple[int, int, bytes]) -> Path:
    """A log with one entry for each sector, flags and content."""
    out = SUPER.pack(MAGIC, 1, len(entries), SECTOR).ljust(SECTOR, b"\0")
    for sector, flags, content in entries:
        length = len(content) if flags & MARK else 0
        out += ENTRY.pack(sector, 0 if flags & MARK else len(content) // SECTOR, flags, length).ljust(
            SECTOR, b"\0"
        )
        out += content + bytes(-len(content) % SECTOR)
    path.write_bytes(out)
    return path


def write(at: int, letter: str, units: int = 1, *, flush: bool = False, fua: bool = False) -> Request:
    return Request(at, letter.encode() * SECTOR * units, flush, fua)


FLUSHED = Request(0, b"", True, False)


def medium(requests: Sequence[Request], cut: Cut, size: int) -> str:
    """One letter for each sector after a cut."""
    disk = bytearray(b"." * size * SECTOR)
    for request in requests[: cut.durable]:
        disk[request.at : request.at + len(request.content)] = request.content
    for kept in cut.kept:
        disk[kept.at : kept.at + len(kept.content)] = kept.content
    return disk[::SECTOR].decode()


def test_a_log_is_read_in_the_order_of_its_requests(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log",
        (4, 0, b"a" * 1024),
        (0, FLUSH, b""),
        (0, MARK, b"a text"),
        (6, FLUSH | FUA, b"b" * 512),
    )

    found = wlog.read(path)

    assert found == [
        Request(2048, b"a" * 1024, False, False), FLUSHED, Request(3072, b"b" * 512, True, True)
    ]  # fmt: skip


def test_a_log_with_a_discard_is_refused(tmp_path: Path) -> None:
    path = log(tmp_path / "log", (4, DISCARD, b""))

    with pytest.raises(ValueError, match="discard"):
        wlog.read(path)


def test_a_prefix_has_every_write_up_to_its_request() -> None:
    requests = [write(0, "a"), write(512, "b"), FLUSHED, write(0, "c")]

    found = list(wlog.cuts(requests, [(0, False), (1, False), (2, False), (3, False)], random.Random(0)))

    assert [medium(requests, cut, 2) for cut in found] == ["a.", "ab", "ab", "cb"]
    assert [cut.durable for cut in found] == [0, 0, 2, 2]


def test_a_cut_loses_nothing_that_was_flushed_and_anything_that_was_not() -> None:
    requests = [write(0, "a"), write(512, "b"), FLUSHED, write(1024, "c"), write(1536, "d")]
    chance = random.Random(1)

    left = {medium(requests, cut, 4) for cut in wlog.cuts(requests, [(4, True)] * 200, chance)}

    assert left == {"abcd", "abc.", "ab.d", "ab.."}


def test_a_write_that_flushes_makes_those_before_it_durable_and_not_itself() -> None:
    requests = [write(0, "a"), write(512, "b", flush=True)]

    left = {medium(requests, cut, 2) for cut in wlog.cuts(requests, [(1, True)] * 50, random.Random(1))}

    assert left == {"ab", "a."}


def test_forced_unit_access_makes_only_its_own_write_durable() -> None:
    requests = [write(0, "a"), write(512, "b", fua=True)]

    left = {medium(requests, cut, 2) for cut in wlog.cuts(requests, [(1, True)] * 50, random.Random(1))}

    assert left == {"ab", ".b"}


def test_a_torn_write_leaves_whole_sectors_of_512_or_4096_bytes() -> None:
    requests = [write(0, "a", units=24)]

    left = {medium(requests, cut, 24) for cut in wlog.cuts(requests, [(0, True)] * 400, random.Random(1))}

    assert {"a" * 24, "." * 24, "a" * 8 + "." * 16, "." * 8 + "a" * 16} <= left
    assert any(state.count("a") % 8 for state in left)
    assert all(set(state) <= {"a", "."} for state in left)


def test_tearing_is_aligned_to_the_disk_and_not_to_the_write() -> None:
    requests = [write(4 * SECTOR, "a", units=8)]
    chance = random.Random(1)

    left = {tuple(w.at // SECTOR for w in wlog.torn(requests[0], 4096, chance)) for _ in range(100)}

    assert left == {(), (4,), (8,), (4, 8)}


def test_a_write_that_a_file_system_takes_for_atomic_is_not_torn() -> None:
    requests = [write(0, "a", units=8)]

    found = wlog.cuts(requests, [(0, True)] * 200, random.Random(1), whole=range(1024, 2048))

    assert {medium(requests, cut, 8) for cut in found} == {"a" * 8, "." * 8}
