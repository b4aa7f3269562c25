"""Build against bare convert and quantize, in one run: wall time as a ratio, and the build's peak anonymous memory.

    python benchmarks/build_time.py MODEL_DIR [--scheme Q4_K_M] [--runs 2]

Both sides convert the same Hugging Face folder and quantize it with the same library and threads; the build also
plans, hashes, records the quality probe, renders and writes the bundle. Recording runs the model and so has a cost
of its own, as an importance matrix has: the build is timed with it and, its answers kept, again without. Runs
alternate; the median ratios are shown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from edgepack import workspace
from edgepack.units import show

BARE = """
import sys
from pathlib import Path
from edgepack import toolchain
from edgepack.builders import convert, quantize
from edgepack.progress import Silent
source, folder, scheme = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
whole = convert.convert(source, folder / "whole.gguf", outtype=convert.stored_type(source), progress=Silent())
quantize.quantize(
    whole, folder / "small.gguf", scheme, imatrix=None, toolchain=toolchain.find(), progress=Silent()
)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme", default="Q4_K_M")
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    ratios, recorded, peaks = [], [], []
    for run in range(options.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cache = folder / "cache"
            cache.mkdir()
            (cache / "toolchain").symlink_to(workspace.cache_root() / "toolchain")
            bare, bare_peak = timed(
                [sys.executable, "-c", BARE, str(options.model), str(folder), options.scheme], {}
            )
            build = ["build", "--profile", "jetson-orin", "--model", str(options.model), "--scheme", options.scheme,
                     "--min-tokens-per-second", "0", "--no-quality", "-q", "-o", str(folder / "out")]  # fmt: skip
            command = [sys.executable, "-m", "edgepack", *build]
            whole, peak = timed(command, {"EDGEPACK_CACHE": str(cache)})
            forget_all_but_answers(cache)
            plain, _ = timed(command, {"EDGEPACK_CACHE": str(cache)})
        ratios.append(plain / bare)
        recorded.append(whole / bare)
        peaks.append(peak)
        print(f"run {run + 1}: bare {bare:.1f} s ({show(bare_peak)}), build {plain:.1f} s, ratio {plain / bare:.3f}; "
              f"with the recording {whole:.1f} s, {whole / bare:.3f} ({show(peak)})", flush=True)  # fmt: skip
    print(
        f"median ratio {statistics.median(ratios):.3f}, with the recording {statistics.median(recorded):.3f}; "
        f"peak anonymous memory {show(max(peaks))}"
    )


def forget_all_but_answers(cache: Path) -> None:
    """So that the next build converts, quantizes and hashes again."""
    for entry in cache.iterdir():
        if entry.name == "artifacts":
            for artifact in entry.glob("*.gguf"):
                artifact.unlink()
        elif not entry.is_symlink():
            shutil.rmtree(entry)


def timed(command: list[str], env: dict[str, str]) -> tuple[float, int]:
    """Seconds, and the highest sum of anonymous memory over the process and its children, sampled at 20 Hz."""
    began = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, sum(anonymous(pid) for pid in family(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code != 0:
        sys.exit(f"{command[:4]} ended with status {code}")
    return time.monotonic() - began, peak


def family(pid: int) -> list[int]:
    import psutil

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def anonymous(pid: int) -> int:
    """RssAnon in bytes; 0 when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    main()
