"""Does it fit? The estimate held against a device's budget, and the cheapest change when it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edgepack import memory, schemes
from edgepack.errors import Unsupported
from edgepack.memory import MemoryEstimate
from edgepack.modelspec import ModelSpec
from edgepack.profile import Backend, Budget, DeviceProfile, Session, budget
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings

_STEP = 256
_SMALL_UBATCH = 128
_STEPS_DOWN = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q3_K_S", "Q2_K")
"""Schemes a hint may propose: none of them needs an importance matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A model, a scheme and settings against one device."""

    model: str
    scheme: str
    settings: Settings
    estimate: MemoryEstimate
    budget: Budget | None
    """None when no device was named; then nothing is judged."""
    fits: bool | None
    max_context: int | None
    """Largest multiple of 256 tokens, all slots together, that fits and the model was trained for; else 0."""
    binding: str
    """The pool with least room, and the part that takes most of it: "memory: weights"."""
    hint: str
    """The cheapest change that makes it fit; empty when it does, or nothing is judged."""


def fit(
    spec: ModelSpec,
    *,
    profile: DeviceProfile | None,
    session: Session = "headless",
    scheme: str,
    settings: Settings,
    imatrix: bool = False,
) -> Fit:
    """Holds the upper end of the estimate against what a server may use on this device.

    Without a profile the estimate is for a CPU, or for an accelerator with memory of its own when
    ``settings.gpu_layers`` says so. Raises Unsupported for a scheme or KV type the model cannot have.
    """
    case = _Case(spec, profile, session, schemes.canonical(scheme), settings, imatrix)
    estimate = case.estimate()
    if case.room is None:
        return Fit(
            model=spec.name,
            scheme=case.scheme,
            settings=settings,
            estimate=estimate,
            budget=None,
            fits=None,
            max_context=None,
            binding=f"memory: {_largest(estimate)}",
            hint="",
        )
    fits = case.fits()
    return Fit(
        model=spec.name,
        scheme=case.scheme,
        settings=settings,
        estimate=estimate,
        budget=case.room,
        fits=fits,
        max_context=case.max_context(),
        binding=binding(estimate, case.room),
        hint="" if fits else _hint(case),
    )


def excess(estimate: MemoryEstimate, room: Budget) -> int:
    """Bytes by which the upper end of the estimate exceeds the budget; negative when there is room.

    One pool when CPU and accelerator share their memory; else the worse of the two.
    """
    need, limit = tightest(estimate, room)
    return need - limit


def tightest(estimate: MemoryEstimate, room: Budget) -> tuple[int, int]:
    """Upper end of the need and the limit of the pool that has least room, in bytes."""
    if room.unified:
        return estimate.high, room.device
    device, host = estimate.at("device"), estimate.at("host")
    return (device, room.device) if device - room.device >= host - room.host else (host, room.host)


def longest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest multiple of 256 up to ``limit`` for which ``fits``; 0 when there is none.

    A limit below 256 is tried itself. ``fits`` must not become true again once it is false.
    """
    if limit < _STEP:
        return limit if limit > 0 and fits(limit) else 0
    low, high = 0, limit // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * _STEP):
            low = middle
        else:
            high = middle - 1
    return low * _STEP


def to_document(result: Fit) -> dict[str, object]:
    """The JSON document of ``edgepack fit``; bytes are whole numbers."""
    estimate, settings, room = result.estimate, result.settings, result.budget
    return {
        "schema_version": 1,
        "model": result.model,
        "runtime": llama_cpp.NAME,
        "runtime_version": llama_cpp.VERSION,
        "scheme": result.scheme,
        "context": settings.context,
        "slots": settings.slots,
        "kv_type": settings.kv_type,
        "ubatch": settings.ubatch,
        "parts": [
            {
                "name": part.name,
                "bytes": int(part.bytes),
                "low": int(part.low),
                "high": int(part.high),
                "provenance": part.provenance,
                "place": part.place,
                "note": part.note,
            }
            for part in estimate.parts
        ],
        "total": {"bytes": estimate.total, "low": estimate.low, "high": estimate.high},
        "weights_bytes": estimate.part("weights"),
        "file_bytes": int(estimate.file_bytes),
        "file_provenance": estimate.file_provenance,
        "bits_per_weight": estimate.bits_per_weight,
        "kv_cache_bytes": estimate.part("kv_cache"),
        "compute_bytes": estimate.part("compute"),
        "output_bytes": estimate.part("output"),
        "recurrent_state_bytes": estimate.part("recurrent_state"),
        "host_bytes": sum(int(p.bytes) for p in estimate.parts if p.place == "host"),
        "device_bytes": sum(int(p.bytes) for p in estimate.parts if p.place == "device"),
        "budget_bytes": None if room is None else int(room.device),
        "budget_host_bytes": None if room is None else int(room.host),
        "fits": result.fits,
        "max_context": result.max_context,
        "binding": result.binding,
        "hint": result.hint,
    }


@dataclass(frozen=True, slots=True)
class _Case:
    """What can be changed when it does not fit."""

    spec: ModelSpec
    profile: DeviceProfile | None
    session: Session
    scheme: str
    settings: Settings
    imatrix: bool

    @property
    def room(self) -> Budget | None:
        return budget(self.profile, self.session) if self.profile else None

    def estimate(self) -> MemoryEstimate:
        profile = self.profile
        if profile is None:
            backend: Backend = "cuda" if self.settings.gpu_layers else "cpu"
            return memory.estimate(
                self.spec,
                self.scheme,
                self.settings,
                backend=backend,
                imatrix=self.imatrix,
            )
        return memory.estimate(
            self.spec,
            self.scheme,
            self.settings,
            backend=profile.backend,
            imatrix=self.imatrix,
            arch=profile.arch,
        )

    def fits(self) -> bool:
        return self.room is not None and excess(self.estimate(), self.room) <= 0

    def with_context(self, context: int) -> _Case:
        return replace(self, settings=replace(self.settings, context=context))

    def max_context(self) -> int:
        limit = self.spec.context_train * self.settings.slots
        return longest(limit, lambda context: self.with_context(context).fits())


def _hint(case: _Case) -> str:
    """The first change that fits, from free to dear; they are tried, not guessed."""
    for words, changed in _changes(case):
        try:
            if changed.fits():
                return words
        except Unsupported:
            continue
    return "no scheme of this model fits at any context; use a smaller model"


def _changes(case: _Case) -> Iterator[tuple[str, _Case]]:
    settings = case.settings
    if case.session == "desktop":
        yield "leave out --desktop (run the device without one)", replace(case, session="headless")
    light = case
    if settings.kv_type in ("f32", "f16", "bf16"):
        light = replace(light, settings=replace(light.settings, kv_type="q8_0"))
        yield "--kv-type q8_0", light
    if settings.ubatch > _SMALL_UBATCH:
        yield f"--ubatch {_SMALL_UBATCH}", _ubatch(case)
        if light is not case:
            yield f"--kv-type q8_0 --ubatch {_SMALL_UBATCH}", _ubatch(light)
    half = settings.context // 2
    context = _shorter(case)
    if context >= half:
        yield f"--context {context}", case.with_context(context)
    smaller = _smaller(case)
    for scheme in smaller:
        yield f"--scheme {scheme}", replace(case, scheme=scheme)
    if context:
        yield f"--context {context}", case.with_context(context)
    for scheme in smaller:
        least = replace(light, scheme=scheme)
        context = _shorter(least)
        if context:
            kv = " --kv-type q8_0" if light is not case else ""
            yield f"--scheme {scheme}{kv} --context {context}", least.with_context(context)


def _ubatch(case: _Case) -> _Case:
    return replace(case, settings=replace(case.settings, ubatch=_SMALL_UBATCH))


def _shorter(case: _Case) -> int:
    """The longest context that fits below the one asked for; 0 when there is none or it cannot be told."""
    try:
        return min(case.max_context(), case.settings.context)
    except Unsupported:
        return 0


def _smaller(case: _Case) -> list[str]:
    """Schemes of this model that weigh less than the present one, heaviest first."""
    if case.spec.gguf_types is not None and case.spec.gguf_scheme not in ("F32", "F16", "BF16"):
        return []

    def weight(scheme: str) -> int:
        return schemes.weights_bytes(case.spec, scheme, imatrix=case.imatrix)

    return sorted((s for s in _STEPS_DOWN if weight(s) < weight(case.scheme)), key=weight, reverse=True)


def binding(estimate: MemoryEstimate, room: Budget) -> str:
    """The pool with least room, and the part that takes most of it: "memory: weights"."""
    if room.unified:
        return f"memory: {_largest(estimate)}"
    device, host = estimate.at("device") - room.device, estimate.at("host") - room.host
    return (
        f"device: {_largest(estimate, 'device')}" if device >= host else f"host: {_largest(estimate, 'host')}"
    )


def _largest(estimate: MemoryEstimate, place: memory.Place | None = None) -> str:
    parts = [part for part in estimate.parts if place is None or part.place == place]
    return max(parts, key=lambda part: part.high).name
