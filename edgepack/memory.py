"""How much memory a server needs, in named parts that each say how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgepack.units import Bytes

Provenance = Literal["exact", "fitted", "measured"]
Place = Literal["device", "host"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    name: str
    """weights, host_copy, kv_cache, recurrent_state, compute, output, process."""
    bytes: Bytes
    low: Bytes
    high: Bytes
    provenance: Provenance
    place: Place
    note: str = ""
    """Where the formula or constant comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    parts: tuple[Part, ...]
    file_bytes: Bytes
    """Size of the whole artifact file."""
    file_provenance: Provenance
    bits_per_weight: float

    @property
    def total(self) -> int:
        return sum(p.bytes for p in self.parts)

    @property
    def low(self) -> int:
        return sum(p.low for p in self.parts)

    @property
    def high(self) -> int:
        return sum(p.high for p in self.parts)

    def at(self, place: Place) -> int:
        """Predicted high-water bytes in one place (upper ends of the intervals)."""
        return sum(p.high for p in self.parts if p.place == place)

    def part(self, name: str) -> int:
        return sum(p.bytes for p in self.parts if p.name == name)
