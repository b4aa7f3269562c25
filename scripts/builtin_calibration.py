"""Writes the calibration data that edgepack ships: prose, verse, Chinese poems, source code, pages and conversations.

    python scripts/builtin_calibration.py --prose war-and-peace.txt --verse shakespeare.txt \
        --poems poet.tang.0.json --code edgepack --pages docs README.md --out edgepack/calibration/builtin.jsonl

The books are those of the demo model, and only what it was trained on is taken, so that its held-out text stays unseen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo_corpus import corpus

EXCERPT = 4000
"""Characters of one excerpt, up to the next empty line."""
POEMS = 12
SHARES = {"prose": 150_000, "verse": 40_000, "poems": 10_000, "code": 75_000, "pages": 20_000}
"""Characters taken of each kind; Chinese has about as many tokens in 10 000 as English in 45 000."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prose", type=Path, nargs="+", required=True)
    parser.add_argument("--verse", type=Path, nargs="+", required=True)
    parser.add_argument("--poems", type=Path, required=True, help='JSON: [{"title", "author", "paragraphs"}]')
    parser.add_argument("--code", type=Path, required=True, help="a tree of .py files")
    parser.add_argument("--pages", type=Path, nargs="+", required=True, help="Markdown files")
    parser.add_argument(
        "--conversations", type=Path, default=Path(__file__).with_name("builtin_conversations.jsonl")
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    texts = {
        "prose": list(corpus(given.prose, []).training),
        "verse": list(corpus([], given.verse).training),
        "poems": poems(given.poems),
        "code": [path.read_text(encoding="utf-8") for path in sorted(given.code.rglob("*.py"))],
        "pages": [path.read_text(encoding="utf-8") for path in given.pages],
    }
    rows: list[dict[str, object]] = [
        {"text": text} for kind, share in SHARES.items() for text in spread(texts[kind], share)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    lines.append(given.conversations.read_text(encoding="utf-8"))
    given.out.write_text("".join(lines), encoding="utf-8")
    print(f"{given.out}: {given.out.stat().st_size} bytes")


def spread(texts: Sequence[str], share: int) -> list[str]:
    """About ``share`` characters in excerpts that lie evenly over all of the texts."""
    excerpts = [excerpt for text in texts for excerpt in cut(text)]
    total = sum(map(len, excerpts))
    taken: list[str] = []
    seen = held = 0
    for excerpt in excerpts:
        seen += len(excerpt)
        if held + len(excerpt) / 2 < seen * share / total:
            taken.append(excerpt)
            held += len(excerpt)
    return taken


def cut(text: str) -> Iterator[str]:
    """The text in excerpts of at least `EXCERPT` characters, each up to an empty line."""
    held: list[str] = []
    for paragraph in filter(None, text.strip().split("\n\n")):
        held.append(paragraph)
        if sum(map(len, held)) >= EXCERPT:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def poems(path: Path) -> list[str]:
    """A dozen poems a text, each with title and author."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    each = ["\n".join([row["title"], row["author"], *row["paragraphs"]]) for row in rows]
    return ["\n\n".join(each[first : first + POEMS]) for first in range(0, len(each), POEMS)]


if __name__ == "__main__":
    main(sys.argv[1:])
