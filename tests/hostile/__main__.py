"""python -m tests.hostile [--count 10000] [--seed 1]: exit status 1 if a device did what it must not."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.hostile.trial import stage, trial, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, stage(Path(folder)) as made:
        outcome = trial(made, count=asked.count, seed=asked.seed)
        honest = whole(made)
    for kind, count in outcome.tried.most_common():
        print(f"{count:7}  {kind}")
    print(
        "exit statuses:",
        ", ".join(f"{status}: {count}" for status, count in sorted(outcome.statuses.items())),
    )
    print(f"{sum(outcome.tried.values())} cases, {len(outcome.faults)} faults; then the honest one:", end=" ")
    print("installed" if honest else "NOT INSTALLED")
    for fault in outcome.faults[:20]:
        print(fault)
    sys.exit(1 if outcome.faults or not honest else 0)


if __name__ == "__main__":
    main()
