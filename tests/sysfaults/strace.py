"""Counts the system calls of a process that change the disk, and makes one of them fail or be the last."""

from __future__ import annotations

import re
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Fault = Literal["KILL", "ENOSPC", "EIO"]

CHANGES = (
    "open", "openat", "openat2", "creat", "write", "writev", "pwrite64", "pwritev", "pwritev2", "fsync", "fdatasync",
    "sync_file_range", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink",
    "unlinkat", "mkdir", "mkdirat", "rmdir", "truncate", "ftruncate", "fallocate", "chmod", "fchmod", "fchmodat",
    "chown", "fchown", "lchown", "fchownat", "utimensat", "sendfile", "copy_file_range", "mknod", "mknodat",
)  # fmt: skip
"""System calls that change a disk; which of them there are differs between machines."""
_OPENS = ("open", "openat", "openat2")
_TO_CHANGE = re.compile(r"\bO_(?:WRONLY|RDWR|CREAT|TRUNC)\b")
_CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)")
_RANDOM = re.compile(r"(edgepack-sig-)\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A system call of a process, in its first thread."""

    call: str
    when: int
    """The how manieth of its name in this thread, from 1: what strace counts."""
    what: tuple[str, ...]
    """Paths within the folder, or the standard stream, that it is about."""
    beside: bool = False
    """In another thread, which is the first that makes this call on this file: only those are counted then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a process ended under strace."""

    status: int
    """Its exit status; the negative number of the signal that ended it."""
    stdout: str
    stderr: str
    log: tuple[str, ...]
    """A line for each call."""


class Missed(AssertionError):
    """The fault was not injected where it should have been: the harness is wrong, or the process is not the same."""


def counted(argv: Sequence[str], stdin: bytes, folder: Path, log: Path) -> tuple[Run, list[Point]]:
    """Runs a program to its end; its calls that change something in a folder, or write to stdout or stderr."""
    run = _run(["-e", "trace=" + ",".join(f"?{name}" for name in CHANGES)], argv, stdin, log)
    seen: Counter[str] = Counter()
    points = []
    for line in run.log:
        found = _CALL.match(line)
        if found is None:
            continue
        name, rest = found.groups()
        seen[name] += 1
        what = _about(line, folder)
        if what and (name not in _OPENS or _TO_CHANGE.search(rest)):
            points.append(Point(call=name, when=seen[name], what=what))
    return run, points


def first_beside(argv: Sequence[str], stdin: bytes, folder: Path, log: Path, call: str, path: str) -> Point:
    """The first call on a file, where another thread than the first makes it. Raises Missed where none does."""
    run = _run(["-f", "-P", str(folder / path), "-e", f"trace={call}"], argv, stdin, log)
    threads = [line.split()[0] for line in run.log]
    if len({*threads}) < 2 or threads[0] == threads[-1]:  # the last one gives the file its name
        raise Missed(f"{call} of {path}: {threads}")
    return Point(call=call, when=1, what=(path,), beside=True)


def injected(argv: Sequence[str], stdin: bytes, folder: Path, log: Path, point: Point, fault: Fault) -> Run:
    """Runs a program whose call fails, or is never made. Raises Missed."""
    how = "signal=KILL" if fault == "KILL" else f"error={fault}"
    tampering = f"inject={point.call}:{how}:when={point.when}"
    options = ["-f", "-P", str(folder / point.what[0])] if point.beside else []
    run = _run([*options, "-e", f"trace={point.call}", "-e", tampering], argv, stdin, log)
    calls = [line for line in run.log if _CALL.match(line)]
    if fault == "KILL":
        if run.status != -signal.SIGKILL or len(calls) != point.when:
            raise Missed(f"{point}: status {run.status} after {len(calls)} calls")
        hit = calls[-1]
    else:
        hits = [line for line in calls if line.endswith("(INJECTED)")]
        if len(hits) != 1 or f" = -1 {fault} " not in hits[0]:
            raise Missed(f"{point}: {hits}")
        hit = hits[0]
    if _about(hit, folder) != point.what:
        raise Missed(f"{point}: {hit}")
    return run


def _run(options: Sequence[str], argv: Sequence[str], stdin: bytes, log: Path) -> Run:
    command = ["strace", "-qq", "-y", "-s", "0", "-e", "signal=none", "-o", str(log), *options, "--", *argv]
    given = log.with_suffix(".stdin")
    given.write_bytes(stdin)
    # Of a pipe each read gives another part, and the number of writes would be chance.
    with given.open("rb") as stream:
        done = subprocess.run(command, stdin=stream, capture_output=True, timeout=600, check=False)
    return Run(
        status=done.returncode,
        stdout=done.stdout.decode(),
        stderr=done.stderr.decode(),
        log=tuple(log.read_text(encoding="utf-8").splitlines()),
    )


def _about(line: str, folder: Path) -> tuple[str, ...]:
    """What a line of the log is about, but for random names; of what open returns nothing, since a fault has none."""
    asked = line.rpartition(" = ")[0]
    inside = re.findall(re.escape(str(folder)) + r'/([^"<>]*)', asked)
    if inside:
        return tuple(_RANDOM.sub(r"\1", path) for path in inside)
    stream = re.match(r"\w+\(([12])<", asked)
    return () if stream is None else (("stdout", "stderr")[int(stream.group(1)) - 1],)
