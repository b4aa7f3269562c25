"""What the cache holds, how large and how old, and how it is made smaller.

Everything in it can be made again by the command that made it; nothing in it is a result that was handed out.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from edgepack import serde, workspace
from edgepack.errors import BadInput
from edgepack.screen import PLAIN, Screen
from edgepack.units import show

KINDS: Mapping[str, str] = {
    "artifacts": "quantized weights, and what they were made from",
    "calibration": "texts that were drawn for calibration, as token ids",
    "digests": "sha256 of large files that have not changed since",
    "distilled": "students, and what teachers answered for them",
    "measured": "quality that was measured",
    "reference-answers": "answers of parents to the tasks of quality",
    "reference-logits": "logits of parents on the held-out text",
    "run": "weights of bundles that `run` has unpacked",
    "toolchain": "llama.cpp: its source, and what was compiled (minutes to make again)",
}
"""Folders of the cache, each with what is in it."""
_DAY = 24 * 60 * 60
_BLOCK = 512
"""What st_blocks counts in, on every file system (stat(2))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One thing that the cache holds, which goes as a whole."""

    kind: str
    path: Path
    bytes: int
    """On the disk; what has a second name outside of the cache is not counted, for removing it frees nothing."""
    used: str
    """Day, in UTC, of the last use that the disk tells: reading counts where it is mounted with relatime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What is in the cache, or what was taken out of it."""

    root: Path
    removed: bool
    """Whether ``kept`` is gone; with --dry-run it would have gone."""
    kept: tuple[Kept, ...]
    bytes: int
    schema_version: int = 1


def contents(kinds: Collection[str] = (), *, unused: int = 0, now: float | None = None) -> Account:
    """What the cache holds of some kinds (none named: of all) that was not used for so many days.

    Raises BadInput for a kind that is not there.
    """
    root = workspace.cache_root()
    for kind in kinds:
        if kind not in KINDS:
            near = serde.did_you_mean(kind, KINDS)
            raise BadInput(f"the cache has no {kind!r}{near}", hint=f"it has {', '.join(KINDS)}")
    before = (time.time() if now is None else now) - unused * _DAY
    found: list[Kept] = []
    for kind in sorted(kinds or KINDS):
        for path in _things(root / kind):
            used = _used(path)
            if unused == 0 or used <= before:
                day = datetime.fromtimestamp(used, timezone.utc).date().isoformat()
                found.append(Kept(kind=kind, path=path, bytes=_size(path), used=day))
    return Account(root=root, removed=False, kept=tuple(found), bytes=sum(one.bytes for one in found))


def remove(what: Account) -> Account:
    """Takes all of an account out of the cache, and what killed runs have left. Raises Busy while another works."""
    with workspace.cache_alone():
        for place in (what.root, *(what.root / kind for kind in KINDS)):
            workspace.sweep(place)
        for one in what.kept:
            gone = workspace.part(one.path)
            one.path.rename(gone)
            if gone.is_dir() and not gone.is_symlink():
                shutil.rmtree(gone)
            else:
                gone.unlink()
    return Account(root=what.root, removed=True, kept=what.kept, bytes=what.bytes)


def table(account: Account, *, each: bool, screen: Screen = PLAIN) -> str:
    """Kinds with their number, size and last use; ``each``: every single thing instead."""
    rows: list[tuple[str, ...]]
    if each:
        rows = [("kind", "size", "last used", "path")]
        rows += [
            (one.kind, show(one.bytes), one.used, str(one.path.relative_to(account.root)))
            for one in account.kept
        ]
    else:
        rows = [("kind", "things", "size", "last used", "what"), *_summed(account.kept)]
    below = (len(rows[0]) - 1,)
    lines = screen.columns(rows, below=below) if account.kept else []
    told = "removed from" if account.removed else "in"
    lines += screen.line(f"{show(account.bytes)} {told} {account.root}")
    return "\n".join(lines) + "\n"


def _summed(kept: Iterable[Kept]) -> Iterator[tuple[str, str, str, str, str]]:
    by_kind: dict[str, list[Kept]] = {}
    for one in kept:
        by_kind.setdefault(one.kind, []).append(one)
    for kind, things in by_kind.items():
        size = show(sum(one.bytes for one in things))
        yield kind, str(len(things)), size, max(one.used for one in things), KINDS[kind]


def _things(folder: Path) -> list[Path]:
    """What lies in a folder of the cache, without what somebody is writing now."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not workspace.is_part(path))


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of the file, or of the folder and all that is below it; no link is followed."""
    yield path.lstat()
    if path.is_dir() and not path.is_symlink():
        for below in path.rglob("*"):
            yield below.lstat()


def _size(path: Path) -> int:
    """Bytes on the disk that removing it frees: not of files which have a name elsewhere too."""
    names: Counter[tuple[int, int]] = Counter()
    freed = 0
    for facts in _stats(path):
        inode = (facts.st_dev, facts.st_ino)
        names[inode] += 1
        if stat.S_ISDIR(facts.st_mode) or names[inode] == facts.st_nlink:
            freed += facts.st_blocks * _BLOCK
    return freed


def _used(path: Path) -> float:
    """Seconds since the epoch when one of its files was written or read; listing a folder does not count."""
    return max(
        facts.st_mtime if stat.S_ISDIR(facts.st_mode) else max(facts.st_mtime, facts.st_atime)
        for facts in _stats(path)
    )
