"""Build against bare convert and quantize, in one run: wall time as a ratio, and the build's peak anonymous memory.

    python benchmarks/build_time.py MODEL_DIR [--scheme Q4_K_M] [--runs 2]

Both sides convert the same Hugging Face folder and quantize it with the same library and threads; the build also
plans, hashes, records the quality probe, renders and writes the bundle. Recording runs the model and so has a cost
of its own, as an importance matrix has: the build is timed with it and, its answers kept, again without. Runs
alternate; the median ratios are shown.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import comparison

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
            bare = comparison.watched([sys.executable, "-c", BARE, options.model, folder, options.scheme])
            build = ["build", "--profile", "jetson-orin", "--model", str(options.model), "--scheme", options.scheme,
                     "--min-tokens-per-second", "0", "--no-quality", "-q", "-o", str(folder / "out")]  # fmt: skip
            command = [sys.executable, "-m", "edgepack", *build]
            whole = comparison.watched(command, env={"EDGEPACK_CACHE": str(cache)})
            forget_all_but_answers(cache)
            plain = comparison.watched(command, env={"EDGEPACK_CACHE": str(cache)})
        ratios.append(plain.seconds / bare.seconds)
        recorded.append(whole.seconds / bare.seconds)
        peaks.append(whole.memory)
        print(f"run {run + 1}: bare {bare.seconds:.1f} s ({show(bare.memory)}), build {plain.seconds:.1f} s, "
              f"ratio {ratios[-1]:.3f}; with the recording {whole.seconds:.1f} s, {recorded[-1]:.3f} "
              f"({show(whole.memory)})", flush=True)  # fmt: skip
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


if __name__ == "__main__":
    main()
