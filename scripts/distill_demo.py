"""Makes the students of the built-in model, by `edgepack distill`, out of the books that it was trained on.

    python scripts/distill_demo.py --prose war-and-peace.txt --verse shakespeare.txt --work run

Each is what is kept of the built-in model (STUDENTS), taught with scripts/demo_students.yaml. Only the training part of
the books is used, never what is in edgepack/models/demo/heldout.txt. A core needs about half an hour for each; stopped,
the same command goes on. Sums depend on the kind of CPU: another one gives a student as good but not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from demo_corpus import corpus

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_name("demo_students.yaml")
SEED = 1869

STUDENTS = {"demo-half": "layers=3", "demo-quarter": "layers=3,ffn=256"}
"""Rows stay multiples of 256, as K-quants need them."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prose", type=Path, action="append", default=[], help="a book of paragraphs")
    parser.add_argument("--verse", type=Path, action="append", default=[], help="a book of lines")
    parser.add_argument(
        "--work", type=Path, default=Path("run"), help="where the books' training part is put"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "edgepack" / "models", help="where students go")
    parser.add_argument("--only", choices=STUDENTS, action="append", help="this one, and not all")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    data = given.work / "books.jsonl"
    rows = (json.dumps({"text": document}) for document in corpus(given.prose, given.verse).training)
    data.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    for name in given.only or STUDENTS:
        subprocess.run(
            [sys.executable, "-m", "edgepack", "distill", "--teacher", "demo", "--prune", STUDENTS[name],
             "--data", data, "--preset", RECIPE, "--seed", str(SEED), "--jobs", "1", "-o", given.out / name],
            check=True,
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
