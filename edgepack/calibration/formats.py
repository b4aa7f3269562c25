"""Files of data to documents: text, and the rows of JSON that instruction data comes in.

A row is {"text"}, {"messages": [{"role", "content"}]}, Alpaca's {"instruction", "input", "output"} or ShareGPT's
{"conversations": [{"from", "value"}]}; other keys of a row are let be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack.calibration.chat import PLAIN, ChatTemplate, Message
from edgepack.errors import BadInput, NotFound
from edgepack.units import GIB, show

_ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""ShareGPT's names to those of chat templates."""

_SHAPES = '"text", "messages", "conversations" or "instruction" and "output"'
_MOST = GIB
"""Bytes of one file: it is held in memory."""
_LISTED = 20
"""Problems that are written out; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, or one conversation that is not rendered yet."""

    place: str
    """File and line, for messages."""
    text: str
    """Empty for a conversation."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content)"""


def read_all(paths: Sequence[Path]) -> list[tuple[list[Document], str]]:
    """Documents and sha256 of each file. Raises NotFound, and BadInput with all problems of all files."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise NotFound(f"no data file {', '.join(missing)}", hint="check the path")
    problems: list[str] = []
    found = []
    for path in paths:
        try:
            size = path.stat().st_size
            if size > _MOST:
                problems.append(f"{path} has {show(size)}; the limit is {show(_MOST)}: take a sample of it")
                continue
            raw = path.read_bytes()
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
            continue
        found.append((_documents(path, raw, problems), hashlib.sha256(raw).hexdigest()))
    raise_all(problems)
    return found


def raise_all(problems: Sequence[str]) -> None:
    """Raises BadInput with the problems, if there are any."""
    if not problems:
        return
    more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    raise BadInput(
        "\n".join([*problems[:_LISTED], *more]),
        hint=f"data are UTF-8 text, or .jsonl or .json with rows of {_SHAPES}",
    )


def pieces(document: Document, size: int) -> Iterator[Document]:
    """The document, or a long text in pieces of about ``size`` characters that end with a line where there is one."""
    text = document.text
    if len(text) <= 2 * size:
        yield document
        return
    for start, end in cuts(text, size):
        piece = text[start:end].strip("\n")
        if piece.strip():
            yield replace(document, text=piece)


def cuts(text: str, size: int) -> Iterator[tuple[int, int]]:
    """Where its pieces start and end: they are the whole text, each of ``size`` to twice as many characters."""
    at = 0
    while at < len(text):
        end = len(text) if len(text) - at <= 2 * size else text.find("\n", at + size, at + 2 * size) + 1
        end = end or at + size
        yield at, end
        at = end


def render(document: Document, template: ChatTemplate | None) -> str:
    """Its text; a conversation in the model's template, or as lines "role: content" without one."""
    if not document.messages:
        return document.text
    return (template or PLAIN).render(turns(document))


def turns(document: Document) -> list[Message]:
    """A conversation as templates take it."""
    return [{"role": role, "content": content} for role, content in document.messages]


def _documents(path: Path, raw: bytes, problems: list[str]) -> list[Document]:
    nul = raw.find(b"\0")
    if nul >= 0:
        problems.append(f"{path} is binary: byte {nul} is 0")
        return []
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        problems.append(f"{path} is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}")
        return []
    if not text.strip():
        problems.append(f"{path} is empty")
        return []
    if path.suffix not in (".jsonl", ".json"):
        return [Document(place=str(path), text=text.strip("\n"))]
    found = []
    before = len(problems)
    for place, row in _rows(path, text, problems):
        try:
            document = _document(place, row)
        except BadInput as error:
            problems.append(f"{place}: {error.message}")
            continue
        if document.text.strip() or document.messages:
            found.append(document)
    if not found and len(problems) == before:
        problems.append(f"{path} has no row with text in it")
    return found


def _rows(path: Path, text: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON texts may hold U+2028 and its like.
        for number, line in enumerate(text.split("\n"), 1):
            place = f"{path} line {number}"
            if line.strip():
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    problems.append(f"{place} is not JSON: {_reason(error)}")
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path} is not JSON: {_reason(error)}")
        return
    if not isinstance(rows, list):
        problems.append(f"{path} is not a list of rows")
        return
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno} column {error.colno}" if error.lineno > 1 else (
            f"{error.msg} at column {error.colno}"
        )  # fmt: skip
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _document(place: str, row: object) -> Document:
    """Raises BadInput with what is wrong with the row."""
    if not isinstance(row, dict):
        raise BadInput("is not a set of fields")
    if "text" in row:
        return Document(place=place, text=_text(row["text"], "text").strip("\n"))
    if "messages" in row:
        return _conversation(place, row["messages"], "messages", "role", "content")
    if "conversations" in row:
        return _conversation(place, row["conversations"], "conversations", "from", "value")
    if "instruction" in row and "output" in row:
        asked = [_text(row[name], name) for name in ("instruction", "input") if row.get(name)]
        turns = (("user", "\n\n".join(asked)), ("assistant", _text(row["output"], "output")))
        return Document(place=place, text="", messages=turns)
    seen = ", ".join(repr(key) for key in sorted(row)[:8]) or "none"
    raise BadInput(f"has none of the known keys; its keys: {seen}")


def _conversation(place: str, turns: object, name: str, speaker: str, words: str) -> Document:
    if not isinstance(turns, list) or not turns:
        raise BadInput(f"{name!r} is not a list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {speaker, words} <= set(turn):
            raise BadInput(f"turn {number} of {name!r} is not {{{speaker!r}: …, {words!r}: …}}")
        role = _text(turn[speaker], speaker)
        if speaker == "from":
            if role not in _ROLES:
                raise BadInput(f"turn {number} is from {role!r}, not from one of {', '.join(_ROLES)}")
            role = _ROLES[role]
        messages.append((role, _content(turn[words], words)))
    return Document(place=place, text="", messages=tuple(messages))


def _content(value: object, name: str) -> str:
    """A text, or OpenAI's list of parts when all of them are text."""
    if not isinstance(value, list):
        return _text(value, name)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadInput(f"{name!r} has a part of type {kind!r}; only text is used")
        parts.append(_text(part.get("text"), "text"))
    return "".join(parts)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{name!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{name!r} has half of a character (an escape of D800 to DFFF)") from error
    return value
