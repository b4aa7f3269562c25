"""`make bench`: every benchmark on random weights in the shape of Qwen2.5-0.5B, smallest first.

python benchmarks/run.py [FOLDER]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "bench-out")
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "qwen2.5-0.5b"
    if not model.exists():
        run(HERE.parent / "scripts" / "random_model.py", "qwen2.5-0.5b", str(model))
    run(HERE / "plan_latency.py")
    run(HERE / "build_time.py", str(model))
    run(HERE / "memory_accuracy.py", str(folder), "--shapes", "qwen2.5-0.5b")


def run(script: Path, *words: str) -> None:
    """One benchmark with its command shown; stops at the first that fails."""
    print(f"\n$ python {script.relative_to(HERE.parent)} {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, str(script), *words], check=True)


if __name__ == "__main__":
    main()
