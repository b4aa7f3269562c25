"""Cold start of `edgepack plan` over every profile and the whole catalog: wall and CPU seconds, and what was loaded.

python benchmarks/plan_latency.py [--runs 3]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

from edgepack import profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    worst = 0.0
    for name in profile.names():
        walls, cpus = [], []
        for _ in range(options.runs):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began = time.monotonic()
            command = [sys.executable, "-m", "edgepack", "plan", "--profile", name, "--json"]
            subprocess.run(command, check=True, capture_output=True)
            walls.append(time.monotonic() - began)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        worst = max(worst, statistics.median(walls))
        print(f"{name:<26} wall {statistics.median(walls):.3f} s (best {min(walls):.3f}), "
              f"CPU {statistics.median(cpus):.3f} s", flush=True)  # fmt: skip
    print(f"slowest median {worst:.3f} s")


if __name__ == "__main__":
    main()
