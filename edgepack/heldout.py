"""The text that quality is measured on, cut into windows; never the text that an artifact was calibrated on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.errors import BadInput, NotFound

BUILT_IN = Path(__file__).parent / "models" / "demo" / "heldout.txt"
"""Public-domain text that the built-in model was not trained on."""

MOST_BYTES = 16 << 20
"""A longer text is read to here: far more than any measurement takes."""

SHINGLE = 64
"""Characters, without white space, that two texts must have in common to count as the same passage."""
FINGERPRINTS = 4096
"""Fingerprints that are kept of a text, its smallest: a passage of a text is known by one in so many characters."""
SHARED = 500
"""Characters in common from which an evaluation is refused: a paragraph. Less may be a quotation or a licence's."""

_DIGITS = 12
"""Hex digits of a fingerprint: among 85,000 passages and 4096 fingerprints one in a million is taken for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text to measure on."""

    name: str
    """File name, or "built-in"."""
    sha256: str
    """Of the file's bytes."""
    content: str


def read(path: Path | None = None) -> Text:
    """A text file, or a .jsonl whose lines have a "text"; the built-in text when none is named.

    Raises NotFound, and BadInput for what is empty, not UTF-8, or a line without text (all lines at once).
    """
    place = BUILT_IN if path is None else path
    if not place.is_file():
        raise NotFound(f"there is no file {place}", hint='--text FILE: text, or jsonl with a field "text"')
    raw = place.read_bytes()
    # A longer file ends with its last whole line.
    end = len(raw) if len(raw) <= MOST_BYTES else raw.rfind(b"\n", 0, MOST_BYTES) + 1 or MOST_BYTES
    try:
        content = raw[:end].decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{place} is not UTF-8 text (byte {error.start})", hint="convert it") from error
    if place.suffix == ".jsonl":
        content = "\n\n".join(_documents(place, content))
    if not content.strip():
        raise BadInput(f"{place} is empty", hint="give some thousand words that the model was not trained on")
    name = "built-in" if path is None else place.name
    return Text(name=name, sha256=hashlib.sha256(raw).hexdigest(), content=content)


def windows(tokens: Sequence[int], *, count: int, size: int, bos: int | None) -> list[list[int]]:
    """``count`` pieces of ``size`` tokens, evenly spread and disjoint, or as many as there are.

    With ``bos`` each starts with that token, as the model expects of a text, and has one less of the text's.
    """
    own = size - (bos is not None)
    there = min(count, len(tokens) // own)
    apart = len(tokens) // there if there else 0
    start = [] if bos is None else [bos]
    return [[*start, *tokens[at * apart : at * apart + own]] for at in range(there)]


def fingerprints(text: str) -> tuple[str, ...]:
    """The FINGERPRINTS smallest hashes of the text's runs of SHINGLE characters, sorted.

    White space and case do not count, so that a chat template or other line breaks change nothing. It is a sketch
    that can be published: it holds nothing of the text, and tells whether another text shares passages with it
    (Broder 1997, "On the resemblance and containment of documents").
    """
    return tuple(sorted(set(_shingles(text)))[:FINGERPRINTS])


def shared(text: str, known: Sequence[str]) -> int:
    """About how many characters of the text whose fingerprints are ``known`` are in passages of this text.

    Exact for texts of up to FINGERPRINTS different runs; of longer ones the sketch is a sample, which finds 1000
    common characters in a text of 260,000 as 1000 +- 250.
    """
    wanted = frozenset(known)
    found = wanted.intersection(_shingles(text))
    sampled = int(max(wanted), 16) / 16**_DIGITS if len(wanted) >= FINGERPRINTS else 1.0
    return round(len(found) / sampled) + (SHINGLE - 1 if found else 0)


def require_held_out(text: Text, known: Sequence[str]) -> None:
    """Raises BadInput when the artifact was calibrated on passages of this text; ``known``: that one's fingerprints."""
    count = shared(text.content, known) if known else 0
    if count >= SHARED:
        raise BadInput(
            f"{text.name} shares about {count} characters with the text that the artifact was calibrated on: "
            "a quality measured on it would flatter",
            hint="--text FILE with another text",
        )


def _shingles(text: str) -> Iterator[str]:
    flat = "".join(text.split()).lower().encode("utf-32-le")
    for at in range(0, max(0, len(flat) - 4 * SHINGLE) + 4, 4):
        piece = flat[at : at + 4 * SHINGLE]
        yield hashlib.blake2b(piece, digest_size=_DIGITS // 2).hexdigest()


_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON can hold and no text can."""


def _documents(path: Path, content: str) -> list[str]:
    found, wrong = [], []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if isinstance(text, str) and not _SURROGATE.search(text):
            found.append(text)
        else:
            wrong.append(str(number))
    if wrong:
        shown = ", ".join(wrong[:10]) + (" …" if len(wrong) > 10 else "")
        raise BadInput(f'{path} has no JSON with a field "text" in {len(wrong)} lines: {shown}')
    return found
