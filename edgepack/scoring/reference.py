"""What the parent says after every token of a text: computed once, kept in the cache in 16 bits a logit.

Each row is kept as a straight line from its smallest to its largest logit, in steps of a 65,535th. Rounding then
moves a logit by at most half a step, and by Hoeffding's lemma a distribution whose logits are moved by at most e
has a divergence of at most e * e / 2 from the true one: 1e-7 nats for logits that span 60.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepack import heldout, workspace
from edgepack.builders import gguf
from edgepack.errors import BadInput, BuildFailed
from edgepack.progress import Progress
from edgepack.scoring import Logits, Model
from edgepack.units import GIB, show

LIMIT = 4 * GIB
"""Most that one reference may take: 8192 tokens of a vocabulary of 262,144."""
CACHE_LIMIT = 16 * GIB
"""Most that all of them may take together; those longest unused go first."""

_STEPS = 65535
VERSION = 2
"""Raised when a reference is made otherwise, so that old ones are not taken for new ones."""
_CHUNK = 1 << 22
"""Logits worked on at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Which tokens of a text are scored."""

    text: heldout.Text
    tokens: int
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The parent's distributions; rows are those after every token of a window but its last."""

    runtime: str
    tokens: int
    """Ids of the parent below it are tokens, the others padding."""
    windows: NDArray[np.int32]
    """[windows, tokens]"""
    codes: NDArray[np.uint16]
    """[windows, tokens - 1, vocabulary], on disk"""
    lines: NDArray[np.float32]
    """[windows, tokens - 1, 2]: smallest logit below the largest, and the step."""
    top: NDArray[np.int32]
    """[windows, tokens - 1]: the parent's first choice."""
    nll: NDArray[np.float64]
    """[windows, tokens - 1]: of the next token, from the logits before rounding, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One model against the reference; each [windows, tokens - 1]."""

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]


def folder() -> Path:
    return workspace.cache_root() / "reference-logits"


def key(revision: str, runtime: str, cut: Cut) -> str:
    """Name of a reference: different for every input that changes it."""
    inputs = (
        revision,
        runtime,
        cut.text.sha256,
        str(cut.tokens),
        str(cut.window),
        str(VERSION),
        str(gguf.VERSION),
    )
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:24]


def find(name: str) -> Reference | None:
    """The reference of that name, memory-mapped, when it is in the cache."""
    place = folder() / name
    if not place.is_dir():
        return None
    os.utime(place)
    facts = json.loads((place / "reference.json").read_text(encoding="utf-8"))
    return Reference(
        runtime=facts["runtime"],
        tokens=facts["tokens"],
        windows=np.load(place / "windows.npy", allow_pickle=False),
        codes=np.memmap(place / "codes.u16", mode="r", dtype=np.uint16, shape=tuple(facts["shape"])),
        lines=np.load(place / "lines.npy", allow_pickle=False),
        top=np.load(place / "top.npy", allow_pickle=False),
        nll=np.load(place / "nll.npy", allow_pickle=False),
    )


def make(name: str, parent: Model, windows: list[list[int]], progress: Progress) -> Reference:
    """Scores the windows with the parent and keeps what it says; the folder appears whole.

    Raises BadInput for more than LIMIT, NoSpace, and what the parent's runtime raises.
    """
    tokens = np.asarray(windows, dtype=np.int32)
    count, size = tokens.shape
    shape = (count, size - 1, parent.facts.vocabulary)
    need = 2 * count * (size - 1) * (parent.facts.vocabulary + 12)
    if need > LIMIT:
        most = LIMIT // (2 * (parent.facts.vocabulary + 12))
        raise BadInput(
            f"the parent's distributions of {count * size} tokens take {show(need)}, the limit is {show(LIMIT)}",
            hint=f"--tokens {most}, or fewer",
        )
    _make_room(need)
    workspace.require_space(folder(), need)
    lines = np.empty((*shape[:2], 2), dtype=np.float32)
    top = np.empty(shape[:2], dtype=np.int32)
    nll = np.empty(shape[:2], dtype=np.float64)
    with workspace.whole_dir(folder() / name) as place, progress.bar("scoring the parent", count) as advance:
        codes = np.memmap(place / "codes.u16", mode="w+", dtype=np.uint16, shape=shape)
        for at, row in enumerate(tokens):
            logits = parent.logits(row[:-1])
            nll[at] = likelihood(logits, row[1:])
            top[at] = logits.argmax(axis=1)
            codes[at], lines[at] = encode(logits)
            advance(1)
        codes.flush()
        for title, values in (("windows", tokens), ("lines", lines), ("top", top), ("nll", nll)):
            np.save(place / f"{title}.npy", values, allow_pickle=False)
        text = json.dumps(
            {
                "runtime": parent.facts.runtime,
                "schema_version": 2,
                "shape": shape,
                "tokens": parent.facts.tokens,
            }
        )
        (place / "reference.json").write_text(text, encoding="utf-8")
    found = find(name)
    if found is None:
        raise BuildFailed(f"{folder() / name} was removed while it was made")
    return found


def within(reference: Reference, vocabulary: int) -> Reference:
    """The parent's distributions among its first tokens alone, as if the rows behind them were not there.

    Likelihoods are then off by no more than the codes' rounding: half a step, times what the other rows had of 1.
    """
    if vocabulary == reference.codes.shape[2]:
        return reference
    nll, top = reference.nll.copy(), reference.top.copy()
    for window, codes in enumerate(reference.codes):
        for piece in _pieces(codes.shape):
            weights = np.exp(decode(codes[piece], reference.lines[window, piece]))
            inside = weights[:, :vocabulary]
            nll[window, piece] += np.log(inside.sum(1, dtype=np.float64) / weights.sum(1, dtype=np.float64))
            best = inside.argmax(axis=1).astype(np.int32)
            top[window, piece] = np.where(top[window, piece] < vocabulary, top[window, piece], best)
    return replace(reference, codes=reference.codes[..., :vocabulary], nll=nll, top=top)


def compare(scorer: Model, reference: Reference, progress: Progress) -> Scores:
    """Scores the reference's windows with another model, one window in memory at a time.

    The model may have more rows than the reference; they are cut off before the softmax.
    """
    shape, vocabulary = reference.top.shape, reference.codes.shape[2]
    nll, kl = np.empty(shape), np.empty(shape)
    agrees = np.empty(shape, dtype=np.bool_)
    with progress.bar("scoring the artifact", shape[0]) as advance:
        for at, row in enumerate(reference.windows):
            logits = scorer.logits(row[:-1])[:, :vocabulary]
            nll[at] = likelihood(logits, row[1:])
            agrees[at] = logits.argmax(axis=1) == reference.top[at]
            kl[at] = divergence(reference.codes[at], reference.lines[at], logits)
            advance(1)
    return Scores(nll=nll, kl=kl, agrees=agrees)


def encode(logits: Logits) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Rows as codes of 16 bits, and for each row the smallest logit below the largest, and the step between codes.

    logits: [rows, vocabulary]. Raises BuildFailed for logits that are not finite.
    """
    codes = np.empty(logits.shape, dtype=np.uint16)
    lines = np.empty((len(logits), 2), dtype=np.float32)
    for piece in _pieces(logits.shape):
        shifted = _shifted(logits[piece])
        low = shifted.min(axis=1)
        step = np.maximum(-low / _STEPS, np.finfo(np.float32).tiny)
        codes[piece] = np.rint((shifted - low[:, None]) / step[:, None]).clip(0, _STEPS)
        lines[piece] = np.stack((low, step), axis=1)
    return codes, lines


def decode(codes: NDArray[np.uint16], lines: NDArray[np.float32]) -> Logits:
    """The logits behind codes, to half a step, up to a constant of each row."""
    values: Logits = lines[:, :1] + lines[:, 1:] * codes.astype(np.float32)
    return values


def divergence(codes: NDArray[np.uint16], lines: NDArray[np.float32], logits: Logits) -> NDArray[np.float64]:
    """KL(reference || model) of each row in nats: sum of p * (ln p - ln q). [rows]"""
    found = np.empty(len(logits))
    for piece in _pieces(logits.shape):
        a, b = decode(codes[piece], lines[piece]), _shifted(logits[piece])
        weights = np.exp(a)
        total = weights.sum(axis=1, dtype=np.float64)
        cross = (weights * (a - b)).sum(axis=1, dtype=np.float64) / total
        found[piece] = cross - np.log(total) + np.log(np.exp(b).sum(axis=1, dtype=np.float64))
    return np.maximum(found, 0.0)


def likelihood(logits: Logits, targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """Negative log-likelihood of each row's target in nats. [rows]"""
    found = np.empty(len(logits))
    for piece in _pieces(logits.shape):
        shifted = _shifted(logits[piece])
        own = np.take_along_axis(shifted, targets[piece, None].astype(np.intp), axis=1)[:, 0]
        found[piece] = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64)) - own
    return found


def _shifted(logits: Logits) -> Logits:
    """Rows whose largest is 0. Raises BuildFailed when one is not finite."""
    shifted: Logits = logits - logits.max(axis=1, keepdims=True)
    if not np.isfinite(shifted).all():
        raise BuildFailed(
            "the runtime gave logits that are not finite",
            hint="the artifact is damaged, or its activations overflow 16 bits",
        )
    return shifted


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _CHUNK // shape[1])
    return (slice(at, at + rows) for at in range(0, shape[0], rows))


def _make_room(need: int) -> None:
    """Removes what killed processes left behind, and the references longest unused until the new one fits."""
    if not folder().is_dir():
        return
    workspace.sweep(folder())
    there = sorted(
        (place for place in folder().iterdir() if not place.name.startswith(".")),
        key=lambda place: place.stat().st_mtime_ns,
    )
    total = sum(_size(place) for place in there)
    for place in there:
        if total + need <= CACHE_LIMIT:
            return
        total -= _size(place)
        leaving = workspace.part(place)
        place.rename(leaving)  # so that nobody finds half of it
        shutil.rmtree(leaving)


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir())
