"""Records a flash in a virtual machine and replays power cuts of it.

    python -m tests.powercut --states 1000 --filesystem ext4 --filesystem xfs

Needs root (loop mounts), Linux on x86-64, and Debian's qemu-system-x86, e2fsprogs, xfsprogs, btrfs-progs. The releases
are signed and of about 9 and 25 MB; mode system beside a service manager that says yes to everything, and
--no-self-test in place of the self-test: what is tested is the order in which a release is written and switched to, and
its units with it. Another device consumes a bundle of about 50 MB on its own disk (--consume). For comparison the same
runs without fsync, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.powercut import guest, replay, scenario


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.powercut", description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=1000, help="cuts of each file system")
    parser.add_argument(
        "--filesystem", choices=sorted(scenario.SIZES), action="append", help="default: ext4 and xfs"
    )
    parser.add_argument("--job", choices=("flash", "consume"), action="append", help="default: both")
    parser.add_argument("--without", choices=("all", "files", "folders"), action="append", default=[],
                        help="whose fsync the comparison goes without (default: all)")  # fmt: skip
    parser.add_argument("--compare", type=int, default=100, help="cuts of each file system without fsync")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers, and each broken state, here"
    )
    options = parser.parse_args()
    began = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory(dir=scenario.memory_folder()) as work:
        folder = Path(work)
        whats = scenario.whats(folder)
        filesystems = options.filesystem or ["ext4", "xfs"]
        disks = [
            scenario.Asked(filesystem=name, without=without, job=job)
            for without in ("", *(options.without or ["all"]))
            for job in options.job or ("flash", "consume")
            for name in filesystems
        ]
        print(f"recording a flash on {len(disks)} disks", file=sys.stderr)
        recordings = scenario.recorded(guest.guest(), whats, disks, folder, timeout=3600)
        print(f"replaying after {time.monotonic() - began:.0f} s", file=sys.stderr)
        asked = [
            replay.Asked(
                states=options.compare if recording.without else options.states,
                seed=options.seed,
                rerun_each=1 if recording.job == "consume" else 10,
                steps={"flash": scenario.SWITCH, "consume": scenario.CONSUME}[recording.job]
                if recording.without or recording.job == "consume"
                else tuple(scenario.PHASES),
            )
            for recording in recordings
        ]
        for recording, states in zip(recordings, replay.replayed(recordings, asked), strict=True):
            rows.append(_row(recording, states))
            print(json.dumps({name: value for name, value in rows[-1].items() if name != "examples"}))
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    broken = [row for row in rows if not row["without fsync"] and row["broken"]]
    harmless = [row for row in rows if row["without fsync"] == "all" and not row["broken"]]
    return 1 if broken or harmless else 0


def _row(recording: scenario.Recording, states: list[replay.State]) -> dict[str, object]:
    examples = [
        {
            "after": s.after,
            "step": s.step,
            "lossy": s.lossy,
            "faults": [f"{f.kind}: {f.message}" for f in s.faults],
        }
        for s in states
        if s.faults
    ]
    return {
        "filesystem": recording.filesystem,
        "job": recording.job,
        "without fsync": recording.without,
        "requests": len(recording.requests),
        "flushes": sum(request.flush for request in recording.requests),
        **replay.summed(states),
        "steps": Counter(state.step for state in states),
        "examples": examples,
    }


if __name__ == "__main__":
    sys.exit(main())
