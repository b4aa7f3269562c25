"""Fails, or kills the agent at, each of its system calls that changes the disk; what is left must be whole.

    python -m tests.sysfaults

Needs strace. For each command of a flash, a rollback and a repair the calls of the first thread are counted that are
about the store (or the bundle beside it), or write to stdout or stderr; then the command is run once for each of them
and each of KILL (instead of the call), ENOSPC and EIO. After each `current` must name one of the two releases, with
every byte that its manifest says, as must every other release that has a name; the command without a fault must then
end well, and fsck find nothing. Exit status 1 if anything else was found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.powercut.scenario import memory_folder
from tests.sysfaults.trial import FAULTS, Result, flushing, stage, trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sysfaults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--each", type=int, default=1, metavar="N", help="one of so many calls (default: all)"
    )
    parser.add_argument("--command", action="append", metavar="NAME", help="default: all commands")
    asked = parser.parse_args()
    began = time.monotonic()
    with TemporaryDirectory(dir=memory_folder()) as work:
        folder = Path(work)
        (folder / "flushing").mkdir()
        results = []
        found = trial(stage(folder), folder, each=asked.each, names=asked.command)
        for result in chain(found, () if asked.command else flushing(folder / "flushing")):
            results.append(result)
            for fault in result.faults:
                where = f"{result.point.call} {result.point.when} ({' '.join(result.point.what)})"
                print(f"{result.command}: {result.fault} at {where}: {fault}", flush=True)
    print("command", *FAULTS, "found", sep="\t")
    _table([(result.command, result) for result in results])
    print("call", *FAULTS, "found", sep="\t")
    _table([(result.point.call, result) for result in results])
    broken = sum(bool(result.faults) for result in results)
    print(f"{len(results)} faults injected, {broken} left something wrong")
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if broken or not results else 0


def _table(rows: list[tuple[str, Result]]) -> None:
    """How often each fault was injected, and how many of them left something wrong."""
    tried = Counter((name, result.fault) for name, result in rows)
    found = Counter(name for name, result in rows if result.faults)
    for name in dict.fromkeys(name for name, _ in rows):
        print(name, *(tried[name, fault] for fault in FAULTS), found[name], sep="\t")


if __name__ == "__main__":
    sys.exit(main())
