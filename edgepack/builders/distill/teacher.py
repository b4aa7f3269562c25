"""What a teacher says of every token of a response, kept on disk by one pass over the data and read by any students."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import BadInput

ABOUT = "about.json"
"""Written last: where it is, all shards are."""
VERSION = 1
"""Raised when the same inputs give other bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """n tokens of responses, each as the teacher predicted it from those before it."""

    ids: NDArray[np.int32]
    """[n, k]: the most likely outcomes, most likely first."""
    logits: NDArray[np.float32]
    """[n, k]: theirs, less the largest of the row, to 16 bits."""
    lse: NDArray[np.float32]
    """[n]: log-sum-exp over the whole vocabulary of such logits; with it the tail's mass is exact, not to 16 bits."""
    lse_t: NDArray[np.float32]
    """[n]: of the logits divided by ``temperature``."""
    target: NDArray[np.float32]
    """[n]: log-probability of the token that the data has, at temperature 1, in nats."""
    temperature: float
    vocabulary: int
    """The ids from 0 that the log-sum-exps are over."""


class Kept:
    """A teacher's rows, memory-mapped; row r is of the r-th token of a response in the examples' order."""

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        self.folder = folder
        self.about = about
        self.k = _whole(about, "k", folder)
        self.vocabulary = _whole(about, "vocabulary", folder)
        self.temperature = float(str(about["temperature"]))
        self._row = row_type(self.k, self.vocabulary)
        self._shards: list[NDArray[np.void]] = []
        starts = [0]
        for name in _names(about, folder):
            shard = _open(folder / name, self._row)
            self._shards.append(shard)
            starts.append(starts[-1] + len(shard))
        self._starts = np.array(starts)
        if starts[-1] != _whole(about, "rows", folder):
            raise BadInput(f"{folder} has {starts[-1]} rows and not {about['rows']}", hint=_AGAIN)

    @classmethod
    def open(cls, folder: Path) -> Kept:
        """Raises BadInput for a folder that is not whole."""
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder} holds no kept teacher: {error}", hint=_AGAIN) from error
        if not isinstance(about, dict) or about.get("version") != VERSION:
            raise BadInput(f"{folder / ABOUT} is not of version {VERSION}", hint=_AGAIN)
        return cls(folder, about)

    @property
    def bytes_per_token(self) -> float:
        return float(self._row.itemsize)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, first: int, last: int) -> Rows:
        """Those from ``first`` up to and without ``last``."""
        if not 0 <= first <= last <= len(self):
            raise IndexError(f"rows {first} to {last} of {len(self)}")
        parts = [
            shard[max(0, first - start) : last - start]
            for shard, start in zip(self._shards, self._starts[:-1].tolist(), strict=True)
            if start < last and first < start + len(shard)
        ]
        found = np.concatenate(parts) if parts else np.empty(0, self._row)
        return Rows(
            ids=unpack(found["ids"], self.k, id_bits(self.vocabulary)),
            logits=found["logits"].astype(np.float32),
            lse=found["lse"].copy(),
            lse_t=found["lse_t"].copy(),
            target=found["target"].copy(),
            temperature=self.temperature,
            vocabulary=self.vocabulary,
        )


def row_type(k: int, vocabulary: int) -> np.dtype[np.void]:
    """One token on disk: 284 bytes for k = 64 of 151,936 ids."""
    packed = -(-k * id_bits(vocabulary) // 8)
    return np.dtype(
        [
            ("ids", "u1", (packed,)),
            ("logits", "<f2", (k,)),
            ("lse", "<f4"),
            ("lse_t", "<f4"),
            ("target", "<f4"),
        ]
    )


def id_bits(vocabulary: int) -> int:
    """Bits that the largest id needs."""
    return max(1, (vocabulary - 1).bit_length())


def pack(ids: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """[n, ceil(k · bits / 8)] bytes of ids [n, k], each ``bits`` (at most 25) wide, lowest bit first."""
    n, k = ids.shape
    groups = -(-k // 8)
    whole = np.zeros((n, 8 * groups), np.uint32)
    whole[:, :k] = ids
    packed = np.zeros((n, groups, bits), np.uint8)
    for lane, byte, shift, count in _lanes(bits):
        value = whole[:, lane::8] << np.uint32(shift)
        for more in range(count):
            packed[:, :, byte + more] |= (value >> np.uint32(8 * more)).astype(np.uint8)
    return packed.reshape(n, groups * bits)[:, : -(-k * bits // 8)]


def unpack(packed: NDArray[np.uint8], k: int, bits: int) -> NDArray[np.int32]:
    """The ids [n, k] that `pack` took."""
    n = len(packed)
    groups = -(-k // 8)
    whole = np.zeros((n, groups * bits), np.uint8)
    whole[:, : packed.shape[1]] = packed
    by_group = whole.reshape(n, groups, bits)
    ids = np.empty((n, groups, 8), np.int32)
    for lane, byte, shift, count in _lanes(bits):
        value = np.zeros((n, groups), np.uint32)
        for more in range(count):
            value |= by_group[:, :, byte + more].astype(np.uint32) << np.uint32(8 * more)
        ids[:, :, lane] = (value >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
    return ids.reshape(n, 8 * groups)[:, :k]


def _lanes(bits: int) -> list[tuple[int, int, int, int]]:
    """Eight ids take ``bits`` bytes: (which, its first byte, its first bit there, bytes that it touches) of each."""
    return [(i, i * bits // 8, i * bits % 8, -(-(i * bits % 8 + bits) // 8)) for i in range(8)]


def _open(path: Path, row: np.dtype[np.void]) -> NDArray[np.void]:
    """A shard, memory-mapped."""
    try:
        shard: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path} is no whole shard: {error}", hint=_AGAIN) from error
    if shard.dtype != row or shard.ndim != 1:
        raise BadInput(f"{path} has rows of {shard.dtype}, not of {row}", hint=_AGAIN)
    return shard


def _names(about: Mapping[str, object], folder: Path) -> list[str]:
    names = about.get("shards")
    if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise BadInput(f"{folder / ABOUT} does not name its shards", hint=_AGAIN)
    return names


def _whole(about: Mapping[str, object], name: str, folder: Path) -> int:
    value = about.get(name)
    if not isinstance(value, int):
        raise BadInput(f"{folder / ABOUT} has no {name}", hint=_AGAIN)
    return value


_AGAIN = "run the same command again: what is whole is kept, the rest is made again"
