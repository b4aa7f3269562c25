"""Examples: a user's texts and chats as tokens, with a mark on each token that the model is to predict.

Chats are written by the model's own template and their responses are marked; of plain text every token is predicted.
The same data and seed give the same bytes, and a document is on the same side of train and held-out whatever files it
comes with.
"""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepack import serde
from edgepack.calibration import Source
from edgepack.errors import BadInput
from edgepack.workspace import require_space, whole_dir

_PASSAGE = 4000
"""Characters, about a thousand tokens: a longer document is on both sides, passage by passage."""
_LEAST = 4
"""Tokens of an example: a begin-of-text, one that was predicted before, and some to predict."""
_HELD_OUT = 2
"""Examples from which an interval can be had."""

Tokens = NDArray[np.int32]
Marks = NDArray[np.bool_]
Sequences = tuple[Tokens, Marks]
"""An example: tokens [n], and which of them are responses [n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sequence of a set."""

    tokens: Tokens
    """[n]"""
    response: Marks
    """[n]; True: predicted from the tokens before it. Never the first."""
    first_row: int
    """Responses of the examples before it: where its own start among the teacher's rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a set was made from."""

    part: Literal["train", "held-out"] | None = None
    tokenizer: str = ""
    """sha256 of tokenizer.json."""
    template: str | None = None
    """sha256 of the chat template; None where none was used."""
    length: int = 0
    """Tokens of the longest example that was allowed."""
    held_out: float = 0.0
    seed: int = 0
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """A set of examples on disk, memory-mapped: any number of processes read it."""

    folder: Path
    digest: str
    """sha256 over the arrays."""
    about: About
    tokens: Tokens
    """[total], one example after the other."""
    response: Marks
    """[total]"""
    starts: NDArray[np.int64]
    """[examples + 1]: where each starts in the two above."""
    rows: NDArray[np.int64]
    """[examples + 1]: responses before each; the teacher's row r is of the r-th response."""

    @classmethod
    def open(cls, folder: Path) -> Examples:
        """Raises BadInput for a folder that is no set of examples."""
        try:
            facts = serde.load_json(_Facts, folder / "about.json")
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("tokens", "response", "starts")
            }
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder} is no set of examples: {error}") from error
        starts: NDArray[np.int64] = arrays["starts"]
        each = np.add.reduceat(arrays["response"], starts[:-1], dtype=np.int64)
        return cls(
            folder=folder,
            digest=facts.digest,
            about=facts.about,
            **arrays,
            rows=np.concatenate(([0], each.cumsum())),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, at: int) -> Example:
        if not 0 <= at < len(self):
            raise IndexError(at)
        part = slice(int(self.starts[at]), int(self.starts[at + 1]))
        return Example(tokens=self.tokens[part], response=self.response[part], first_row=int(self.rows[at]))

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    @property
    def response_tokens(self) -> int:
        return int(self.rows[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A user's data, ready to be trained on."""

    train: Path
    held_out: Path
    sources: tuple[Source, ...]
    """In an order of their own, whatever order the files came in."""
    chats: bool
    """Whether there are conversations among them."""
    warnings: tuple[str, ...]


def write(examples: Iterable[tuple[Any, Any]], folder: Path, about: About | None = None) -> Examples:
    """Puts examples, each a sequence of tokens and one of marks, into a folder that appears whole.

    A folder that holds the same is left alone, and another set in it is replaced. Raises ValueError for an example
    that is empty or whose first token is a response, NoSpace.
    """
    tokens, response, starts = array("i"), bytearray(), array("q", [0])
    for ids, marks in examples:
        if not len(ids) or len(ids) != len(marks) or marks[0]:
            raise ValueError(f"example {len(starts)} has {len(ids)} tokens and {len(marks)} marks")
        tokens.frombytes(np.asarray(ids, dtype=np.int32).tobytes())
        response += np.asarray(marks, dtype=np.bool_).tobytes()
        starts.append(len(tokens))
    if len(starts) < 2:
        raise ValueError("no example")
    arrays: Mapping[str, NDArray[Any]] = {
        "tokens": np.frombuffer(tokens, dtype=np.int32),
        "response": np.frombuffer(response, dtype=np.bool_),
        "starts": np.frombuffer(starts, dtype=np.int64),
    }
    facts = _Facts(
        digest=_digest(arrays.values()),
        examples=len(starts) - 1,
        tokens=len(tokens),
        responses=int(arrays["response"].sum()),
        about=about or About(),
    )
    if _holds(folder, facts):
        return Examples.open(folder)
    require_space(folder, sum(values.nbytes for values in arrays.values()))
    shutil.rmtree(folder, ignore_errors=True)
    with whole_dir(folder) as place:
        for name, values in arrays.items():
            np.save(place / f"{name}.npy", values, allow_pickle=False)
        (place / "about.json").write_text(serde.to_json(facts), encoding="utf-8")
    return Examples.open(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """about.json"""

    digest: str
    examples: int
    tokens: int
    responses: int
    about: About
    schema_version: Literal[1] = 1


def _digest(arrays: Iterable[NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for values in arrays:
        digest.update(values.data)
    return digest.hexdigest()


def _holds(folder: Path, facts: _Facts) -> bool:
    """Folders appear whole, so what about.json says is there is there."""
    place = folder / "about.json"
    return place.is_file() and place.read_text(encoding="utf-8") == serde.to_json(facts)
