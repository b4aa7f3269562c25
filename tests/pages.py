"""README.md and docs/ as a reader takes them: commands with what they print, links with where they lead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_SPEED = re.compile(r"(?:(?:ok|warn|-) +)?(?:decode|prefill)(?:,|:|  )")
"""A row of a check, and the remark below it, that others on the same cores change."""
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    page: str
    text: str
    """One line, without prompt and comment."""
    shown: tuple[str, ...]
    """Lines of its output, as printed; "…" is anything."""

    @property
    def words(self) -> list[str]:
        """Without a redirection."""
        return shlex.split(self.text.partition(" > ")[0])


def commands(page: Path) -> list[Command]:
    """The commands of a page's ``console`` blocks (after "$ ") and ``sh`` blocks (every line), in order."""
    return [
        Command(page=page.name, text=text, shown=shown)
        for kind, block in _BLOCK.findall(page.read_text(encoding="utf-8"))
        for text, shown in _parsed(kind, block)
    ]


def _parsed(kind: str, block: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    lines = block.replace("\\\n", " ").splitlines()
    if kind == "sh":
        yield from ((text, ()) for line in lines if (text := line.partition("  #")[0].strip()))
    if kind == "console":
        starts = [at for at, line in enumerate(lines) if line.startswith("$ ")]
        for at, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            yield lines[at][2:].strip(), tuple(lines[at + 1 : end])


def yaml_blocks(page: Path) -> list[str]:
    return [block for kind, block in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == "yaml"]


def ini_blocks(page: Path) -> list[str]:
    return [block for kind, block in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == "ini"]


def links(page: Path) -> list[str]:
    """Where a page links to, but for what another site answers for."""
    text = re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    return [to for to in _LINK.findall(text) if not re.match(r"[a-z]+:", to)]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub gives them."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing(shown: tuple[str, ...], printed: str, *, figures: bool) -> str | None:
    """The first shown line that is not printed where it is shown, or None.

    "…" alone stands for any lines, within a line for anything. Columns may be wider. Without ``figures`` digits,
    sizes and digests may be others, as on another machine, and so may a check say of speeds what it will.
    """
    shown = tuple(line for line in shown if figures or not _SPEED.match(line))
    printed_lines = [line for line in printed.splitlines() if figures or not _SPEED.match(line)]
    lines = [_plain(line, figures=figures) for line in printed_lines if line.strip()]
    at, anywhere = 0, False
    for line in shown:
        if line.strip() == "…":
            anywhere = True
            continue
        if not line.strip():
            continue
        matches = _matcher(line, figures=figures)
        end = len(lines) if anywhere else at + 1
        found = next((n for n in range(at, min(end, len(lines))) if matches.fullmatch(lines[n])), None)
        if found is None:
            return line
        at, anywhere = found + 1, False
    return None if anywhere or at == len(lines) else f"and after that: {lines[at]}"


def _matcher(line: str, *, figures: bool) -> re.Pattern[str]:
    return re.compile(re.escape(_plain(line, figures=figures)).replace("…", ".*"))


def _plain(line: str, *, figures: bool) -> str:
    """A line in single spaces; without ``figures`` with a word for each digest, number and unit of bytes."""
    text = " ".join(line.split())
    if not figures:
        text = re.sub(r"\b[0-9a-f]{12,64}\b", "DIGEST", text)
        text = re.sub(r"(?<![\w.-])[+-]?\d[\d,]*(?:\.\d+)?", "NUMBER", text)
        text = re.sub(r"\b(?:KiB|MiB|GiB|B)\b", "BYTES", text)
    return text
