"""Trains the second small model that quantizers are measured on: Python source, another shape, wider norms.

    python scripts/train_code.py --work run --out code-model

The text is the standard library of the Python that runs this, so nothing is fetched; files are held out by their
name's hash. It is trained like the built-in model (train_demo.py), in about 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_corpus import Corpus
from train_demo import Recipe, Shape, Stage, train

SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "__pycache__",
}
LIMIT = 48_000
"""Characters of one file: a few tables of thousands of lines would be half of the text."""

CALIBRATION = 400_000
"""Characters of the training text that are put beside the model, for quantizers."""

SHAPE = Shape(ffn=768, layers=4, heads=8, kv_heads=4, head=32)
RECIPE = Recipe(
    stages=(Stage(steps=1500, length=256, peak=3e-3, warmup=100, fall=1600),), dropout=0.05, decay=0.1
)


def library(root: Path) -> Corpus:
    """Of every 25 files one is held out and one is for validation; the rest is trained on."""
    parts: dict[str, list[str]] = {"training": [], "validation": [], "heldout": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")[:LIMIT].strip()
        number = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:4], "big") % 25
        if text:
            parts["heldout" if number == 0 else "validation" if number == 1 else "training"].append(text)
    return Corpus(
        training=tuple(parts["training"]),
        validation="\n\n".join(parts["validation"])[:100_000] + "\n",
        heldout="\n\n".join(parts["heldout"])[:120_000] + "\n",
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--text", type=Path, default=Path(sysconfig.get_path("stdlib")), help="a tree of .py files"
    )
    parser.add_argument("--work", type=Path, default=Path("run"), help="where checkpoints go")
    parser.add_argument("--out", type=Path, default=Path("code-model"), help="where the trained model goes")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    text = library(given.text)
    train(text, given.work, given.out, SHAPE, RECIPE)
    sample = "\n\n".join(text.training[::7])[:CALIBRATION]
    (given.out / "calibration.txt").write_text(sample, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
