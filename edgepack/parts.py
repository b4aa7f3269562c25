"""One named part of what a server takes, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgepack.units import Bytes

Place = Literal["device", "host"]
Provenance = Literal["exact", "fitted", "measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    name: str
    """weights, host_copy, kv_cache, recurrent_state, rope_cache, compute, output, graphs, process."""
    bytes: Bytes
    low: Bytes
    high: Bytes
    provenance: Provenance
    place: Place
    note: str = ""
    """Where the formula or constant comes from."""


def exact(name: str, count: int, place: Place, note: str) -> Part:
    size = Bytes(count)
    return Part(name=name, bytes=size, low=size, high=size, provenance="exact", place=place, note=note)


def fitted(name: str, count: int, around: tuple[int, int], place: Place, note: str) -> Part:
    """A part known to lie between the two ends of ``around``."""
    low, high = around
    return Part(
        name=name,
        bytes=Bytes(count),
        low=Bytes(low),
        high=Bytes(high),
        provenance="fitted",
        place=place,
        note=note,
    )
