"""Fails, or kills the agent at, each of its system calls that changes the disk; what is left must be whole.

    python -m tests.sysfaults [--mode none|user|system]

Needs strace. For each command of a flash, a rollback, a repair and an enrolling those calls of the first thread are
counted that are about the store (or the bundle beside it), or write to stdout or stderr; then the command is run once
for each of them and each of KILL (instead of the call), ENOSPC and EIO. After each `current` must name one of the two
releases, with every byte that its manifest says, as must every other release that has a name; the command without a
fault must then end well, and fsck find nothing. A device that is being enrolled is not enrolled, or whole; one that was
before stays usable.

The modes with services (user, system) have a service manager of ours (tests/services.py), whose every call also fails,
hangs, and is the last thing that the agent does. No release may be started that is not whole, or by another one's unit;
whatever happened the server runs again from the current release; each unit is an old one, a new one or none. Exit
status 1 if anything else was found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from tests import services
from tests.powercut.scenario import memory_folder
from tests.sysfaults.trial import FAULTS, MODES, Mode, Result, flushing, managed, stage, trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sysfaults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--each", type=int, default=1, metavar="N", help="one of so many calls (default: all)"
    )
    parser.add_argument("--command", action="append", metavar="NAME", help="default: all commands")
    parser.add_argument("--mode", action="append", choices=MODES, help="default: all modes")
    asked = parser.parse_args()
    began = time.monotonic()
    results = [
        result
        for mode in asked.mode or MODES
        for result in _tried(mode, each=asked.each, names=asked.command)
    ]
    print("command", *COLUMNS, "found", sep="\t")
    _table([(result.command, result) for result in results])
    print("call", *COLUMNS, "found", sep="\t")
    _table([(result.point.call, result) for result in results])
    broken = sum(bool(result.faults) for result in results)
    print(f"{len(results)} faults injected, {broken} left something wrong")
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if broken or not results else 0


COLUMNS = (*FAULTS, *services.FAULTS)


def _tried(mode: Mode, *, each: int, names: list[str] | None) -> Iterator[Result]:
    """All that is tried in a mode; what is wrong is printed as it comes."""
    with TemporaryDirectory(dir=memory_folder()) as work:
        folder = Path(work)
        on = stage(folder, mode=mode)
        found = [trial(on, folder, each=each, names=names)]
        if on.programs is not None:
            found.append(managed(on, folder, each=each, names=names))
        elif not names:
            (folder / "flushing").mkdir()
            found.append(flushing(folder / "flushing"))
        for result in chain(*found):
            for fault in result.faults:
                where = f"{result.point.call} {result.point.when} ({' '.join(result.point.what)})"
                print(f"{mode}: {result.command}: {result.fault} at {where}: {fault}", flush=True)
            yield replace(result, command=f"{mode}: {result.command}")


def _table(rows: list[tuple[str, Result]]) -> None:
    """How often each fault was injected, and how many of them left something wrong."""
    tried = Counter((name, result.fault) for name, result in rows)
    found = Counter(name for name, result in rows if result.faults)
    for name in dict.fromkeys(name for name, _ in rows):
        print(name, *(tried[name, fault] for fault in COLUMNS), found[name], sep="\t")


if __name__ == "__main__":
    sys.exit(main())
