"""Which writing systems a text uses, and whether they are those of the languages on a model's card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepack import serde
from edgepack.errors import BadInput

_RANGES: Sequence[tuple[int, int, str]] = (
    (0x0041, 0x024F, "Latin"),
    (0x0370, 0x03FF, "Greek"),
    (0x0400, 0x052F, "Cyrillic"),
    (0x0530, 0x058F, "Armenian"),
    (0x0590, 0x05FF, "Hebrew"),
    (0x0600, 0x077F, "Arabic"),
    (0x0900, 0x097F, "Devanagari"),
    (0x0980, 0x09FF, "Bengali"),
    (0x0B80, 0x0BFF, "Tamil"),
    (0x0C00, 0x0C7F, "Telugu"),
    (0x0E00, 0x0E7F, "Thai"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x3040, 0x30FF, "Kana"),
    (0x3400, 0x9FFF, "Han"),
    (0xAC00, 0xD7AF, "Hangul"),
    (0x20000, 0x323AF, "Han"),
)
"""Blocks of Unicode, first and last code point (https://www.unicode.org/Public/UNIDATA/Blocks.txt); only the letters in
them count."""

_WRITTEN: Mapping[str, tuple[str, ...]] = {
    "Latin": (
        "en", "fr", "de", "es", "it", "pt", "nl", "pl", "cs", "sk", "sl", "hr", "bs", "sr", "ro", "hu", "sv",
        "da", "nb", "nn", "no", "fi", "is", "et", "lv", "lt", "tr", "az", "id", "ms", "vi", "tl", "sw", "ca", "eu",
        "gl", "cy", "ga",
    ),
    "Han": ("zh", "ja"), "Kana": ("ja",), "Hangul": ("ko",), "Greek": ("el",), "Armenian": ("hy",), "Hebrew": ("he",),
    "Arabic": ("ar", "fa", "ur"), "Devanagari": ("hi", "mr", "ne"), "Bengali": ("bn",), "Tamil": ("ta",),
    "Telugu": ("te",), "Thai": ("th",), "Georgian": ("ka",),
    "Cyrillic": ("ru", "uk", "be", "bg", "mk", "sr", "kk", "mn"),
}  # fmt: skip
"""Script: the ISO 639-1 codes of languages written in it."""

_MOSTLY = 0.5
"""Below this share of letters in the model's scripts, the data are not what it reads and writes."""


def found(text: str) -> Mapping[str, float]:
    """Share of each script among the letters of the text that are of a script known here; empty without any."""
    counts: Counter[str] = Counter()
    for character, times in Counter(text).items():
        if character.isalpha():
            code = ord(character)
            name = next((name for first, last, name in _RANGES if first <= code <= last), None)
            if name is not None:
                counts[name] += times
    total = sum(counts.values())
    return {name: count / total for name, count in counts.most_common()}


def languages(model: Path) -> tuple[str, ...]:
    """Codes under ``language:`` in the front matter of a model's README.md; none without a card that can be read."""
    card = model / "README.md"
    if not card.is_file():
        return ()
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    if front is None:
        return ()
    try:
        fields, _ = serde.parse_yaml(front.group(1), source=str(card))
    except BadInput:
        # Cards are written by hand and are no input of ours: one that is not YAML claims nothing.
        return ()
    told = fields.get("language") if isinstance(fields, dict) else None
    codes = told if isinstance(told, list) else [told]
    return tuple(code.lower() for code in codes if isinstance(code, str))


def mismatch(text: str, codes: Sequence[str]) -> tuple[str, ...]:
    """A warning when most letters of the text are of no script that the languages are written in.

    Languages of one script are not told apart, and a card with a language not known here claims nothing.
    """
    wanted: set[str] = set()
    for code in codes:
        base = re.split("[-_]", code)[0]
        written = {name for name, known in _WRITTEN.items() if base in known}
        if not written:
            return ()
        wanted |= written
    shares = found(text)
    inside = sum(share for name, share in shares.items() if name in wanted)
    if not wanted or not shares or inside >= _MOSTLY:
        return ()
    most, share = next(iter(shares.items()))
    return (
        f"the calibration data are {share:.0%} {most}, and the model's card says {', '.join(codes)}: "
        f"{inside:.0%} of the letters are {' or '.join(sorted(wanted))}",
    )
