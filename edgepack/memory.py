"""How much memory a server needs, in named parts that each say how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgepack import schemes
from edgepack.modelspec import ModelSpec
from edgepack.profile import Arch, Backend
from edgepack.runtimes import llama_cpp
from edgepack.schemes import Provenance
from edgepack.settings import Settings
from edgepack.units import Bytes

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


ACCELERATOR_SPREAD = 0.03
"""Compute buffers on an accelerator are computed as exactly as on a CPU, but only one published log of a
CUDA device could be compared (Qwen3-1.7B on a Jetson Orin, equal to the last digit)."""


def estimate(
    spec: ModelSpec,
    scheme: str,
    settings: Settings,
    *,
    backend: Backend,
    imatrix: bool = False,
    arch: Arch = "x86_64",
) -> MemoryEstimate:
    """What llama-server takes with these weights and settings, part by part.

    Places are kept apart even where accelerator and CPU share one memory. The driver's context on an
    accelerator is no part: the profile's reserve holds it. ``arch``: the CPU's, which decides what is
    repacked. Raises Unsupported for a scheme or KV type the model cannot have.
    """
    file_bytes, file_provenance = schemes.file_bytes(spec, scheme, imatrix=imatrix)
    return MemoryEstimate(
        parts=(
            *_weights(spec, scheme, settings, backend=backend, imatrix=imatrix, arch=arch),
            *_context(spec, settings, backend=backend),
            _process(spec, settings),
        ),
        file_bytes=file_bytes,
        file_provenance=file_provenance,
        bits_per_weight=schemes.bits_per_weight(spec, scheme, imatrix=imatrix),
    )


def _exact(name: str, count: int, place: Place, note: str) -> Part:
    size = Bytes(count)
    return Part(name=name, bytes=size, low=size, high=size, provenance="exact", place=place, note=note)


def _fitted(name: str, count: int, around: tuple[Bytes, Bytes], place: Place, note: str) -> Part:
    size, (low, high) = Bytes(count), around
    return Part(name=name, bytes=size, low=low, high=high, provenance="fitted", place=place, note=note)


def _weights(
    spec: ModelSpec, scheme: str, settings: Settings, *, backend: Backend, imatrix: bool, arch: Arch
) -> list[Part]:
    total = schemes.loaded_bytes(spec, scheme, imatrix=imatrix)
    embedding, per_layer = schemes.lookup_bytes(spec, scheme, imatrix=imatrix)
    if backend != "cpu" and settings.gpu_layers > 0:
        lookup = "rows are looked up on the CPU (llama-model.cpp, input layer)"
        if spec.tied:
            reason = f"token_embd again, beside its use as output: {lookup}"
            return [
                _exact("weights", total - per_layer, "device", "all tensors"),
                *(
                    [_exact("weights", per_layer, "host", f"per_layer_token_embd: {lookup}")]
                    if per_layer
                    else []
                ),
                _exact("host_copy", embedding, "host", reason),
            ]
        return [
            _exact("weights", total - embedding, "device", "all tensors but token_embd"),
            _exact("weights", embedding, "host", f"token_embd: {lookup}"),
        ]
    parts = [_exact("weights", total, "host", "all tensors")]
    if settings.repack:
        pairs = zip(spec.tensors, schemes.tensor_types(spec, scheme, imatrix=imatrix), strict=True)
        # A tied embedding whose type is repacked is loaded twice, as it is for look-ups and repacked as the
        # output: 0.5B with a Q4_0 embedding on x86-64 logged 73 + 265 MiB of buffers for 265 MiB of tensors.
        mapped = settings.load_mode != "none"
        again = sum(
            schemes.tensor_bytes(kind, t.shape)
            for t, kind in pairs
            if llama_cpp.repacked(kind, t.shape, arch)
            and (spec.tied if t.name == "token_embd.weight" else mapped)
        )
        if again:
            reason = "repacked beside the mapped file" if mapped else "token_embd repacked as the output"
            parts.append(_exact("host_copy", again, "host", f"{reason} (ggml-cpu/repack.cpp)"))
    return parts


def _context(spec: ModelSpec, settings: Settings, *, backend: Backend) -> list[Part]:
    offloaded = backend != "cpu" and settings.gpu_layers > 0
    device: Place = "device" if offloaded else "host"
    parts = [_exact("kv_cache", llama_cpp.kv_bytes(spec, settings), device, "src/llama-kv-cache.cpp")]
    state = llama_cpp.recurrent_bytes(spec, settings)
    if state:
        parts.append(_exact("recurrent_state", state, device, "src/llama-memory-recurrent.cpp"))
    room = llama_cpp.compute(spec, settings, backend)
    note = "ggml's own placement, repeated (ggml-alloc.c)"
    if spec.architecture not in llama_cpp.EXACT_GRAPHS:
        note = f"a plain decoder of these sizes; the graph of {spec.architecture} is not modelled"
        parts.append(_compute(spec, settings, room.device, device, note))
        if offloaded:
            parts.append(_compute(spec, settings, room.host, "host", note))
    elif offloaded:
        spread = round(room.device * ACCELERATOR_SPREAD)
        around = (Bytes(room.device - spread), Bytes(room.device + spread))
        parts.append(_fitted("compute", room.device, around, "device", note))
        parts.append(_exact("compute", room.host, "host", "inputs handed to the accelerator"))
    else:
        parts.append(_exact("compute", room.device, "host", note))
    logits = llama_cpp.output_bytes(spec, settings.slots)
    return [*parts, _exact("output", logits, "host", "logits, one row per slot")]


def _compute(spec: ModelSpec, settings: Settings, count: int, place: Place, note: str) -> Part:
    """A compute buffer, exact or as far as the graph is known."""
    around = llama_cpp.compute_range(spec, settings, count)
    return (
        _exact("compute", count, place, note)
        if around is None
        else _fitted("compute", count, around, place, note)
    )


def _process(spec: ModelSpec, settings: Settings) -> Part:
    expected, low, high = llama_cpp.process_bytes(spec, settings)
    return Part(
        name="process",
        bytes=expected,
        low=low,
        high=high,
        provenance="fitted",
        place="host",
        note="code, tokenizer tables and scratch of llama-server, fitted on measured runs",
    )
