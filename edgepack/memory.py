"""How much memory a server needs, in named parts that each say how sure they are."""

from __future__ import annotations

from dataclasses import dataclass

from edgepack import runtimes, schemes
from edgepack.modelspec import ModelSpec
from edgepack.parts import Part as Part
from edgepack.parts import Place as Place
from edgepack.parts import Provenance
from edgepack.profile import Arch, Backend
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings
from edgepack.units import Bytes


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


def estimate(
    spec: ModelSpec,
    scheme: str,
    settings: Settings,
    *,
    backend: Backend,
    imatrix: bool = False,
    arch: Arch = "x86_64",
    runtime: str = llama_cpp.NAME,
) -> MemoryEstimate:
    """What ``runtime`` takes with these weights and settings, part by part.

    Places are kept apart even where accelerator and CPU share one memory. The driver's context on an
    accelerator is no part: the profile's reserve holds it. ``arch``: the CPU's. Raises Unsupported for a scheme or
    KV type the model cannot have; whether the runtime runs the scheme on a device is `Runtime.refusal`.
    """
    file_bytes, file_provenance = schemes.file_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    return MemoryEstimate(
        parts=runtimes.named(runtime).parts(
            spec, scheme, settings, backend=backend, arch=arch, imatrix=imatrix
        ),
        file_bytes=file_bytes,
        file_provenance=file_provenance,
        bits_per_weight=schemes.bits_per_weight(spec, scheme, imatrix=imatrix, backend=backend),
    )
