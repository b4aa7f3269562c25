"""Does it fit? The estimate held against a device's budget, and the cheapest change when it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from edgepack import allocation, memory, runtimes, schemes
from edgepack.errors import Unsupported
from edgepack.memory import MemoryEstimate
from edgepack.modelspec import ModelSpec
from edgepack.parts import Place, Provenance
from edgepack.profile import Backend, Budget, DeviceProfile, Session, budget
from edgepack.runtimes import Machine, llama_cpp
from edgepack.settings import Settings
from edgepack.units import show

_STEP = 256
_SMALL_UBATCH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a user may give up so that it fits; None leaves a thing as it is."""

    headless: bool = False
    kv_type: str | None = None
    ubatch: int | None = None
    scheme: str | None = None
    slots: int | None = None
    context: int | None = None

    @property
    def words(self) -> str:
        """As options of the command line."""
        options = [
            f"--{name} {value}"
            for name, value in (
                ("scheme", self.scheme),
                ("kv-type", self.kv_type),
                ("ubatch", self.ubatch),
                ("slots", self.slots),
                ("context", self.context),
            )
            if value is not None
        ]
        return " and ".join(
            [*([WITHOUT_DESKTOP] if self.headless else []), *([" ".join(options)] if options else [])]
        )


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
    """The pool with least room, and the part that takes most of it: "memory: weights"; or "context: "
    or "disk: " and why, where memory is not the reason."""
    hint: str
    """The cheapest change that makes it fit, in words; empty when it does, or nothing is judged."""
    change: Change | None = None
    """The same as a value; None when none was found or is needed."""
    runtime: str = llama_cpp.NAME
    runtime_version: str = llama_cpp.VERSION
    start_up: Mapping[str, int | float] = field(default_factory=dict)
    """What the runtime is told, or prints, about its memory when it starts."""


def fit(
    spec: ModelSpec,
    *,
    profile: DeviceProfile | None,
    session: Session = "headless",
    scheme: str,
    settings: Settings,
    imatrix: bool = False,
    runtime: str = llama_cpp.NAME,
) -> Fit:
    """Holds the upper end of the estimate against what a server may use on this device, and the file against its disk.

    Without a profile the estimate is for a CPU, or for an accelerator with memory of its own when
    ``settings.gpu_layers`` says so. Raises Unsupported for a scheme or KV type the model cannot have, and for a
    scheme that ``runtime`` does not run on this device.
    """
    if schemes.is_budget(scheme):
        spec, scheme = _filled(spec, profile, session, scheme, settings)
    case = _Case(spec, profile, session, schemes.canonical(scheme), settings, imatrix, runtime)
    refused = case.refusal()
    if refused is not None:
        raise Unsupported(refused, hint=_instead(case))
    estimate = case.estimate()
    start_up = started(
        spec, settings, estimate, profile=profile, backend=case.machine.backend, runtime=runtime
    )
    version = runtimes.version(runtimes.named(runtime), profile, case.machine.backend)
    if case.room is None:
        return Fit(
            model=spec.name,
            scheme=case.scheme,
            settings=settings,
            estimate=estimate,
            budget=None,
            fits=None,
            max_context=None,
            binding=_binding(case, estimate),
            hint="",
            runtime=runtime,
            runtime_version=version,
            start_up=start_up,
        )
    beyond = settings.context > case.limit
    fits = case.fits() and not beyond
    max_context = case.max_context()
    change = None if fits else Change(context=max_context) if beyond and max_context else _cheapest(case)
    return Fit(
        model=spec.name,
        scheme=case.scheme,
        settings=settings,
        estimate=estimate,
        budget=case.room,
        fits=fits,
        max_context=max_context,
        binding=f"context: the model was trained for {case.limit} tokens"
        if beyond
        else _binding(case, estimate),
        hint="" if fits else change.words if change else _no_help(case),
        change=change,
        runtime=runtime,
        runtime_version=version,
        start_up=start_up,
    )


def started(
    spec: ModelSpec,
    settings: Settings,
    estimate: MemoryEstimate,
    *,
    profile: DeviceProfile | None,
    backend: Backend,
    runtime: str,
) -> Mapping[str, int | float]:
    """What the runtime is told, or prints, about its memory when it starts so.

    Counted against all that the accelerator reports are the upper end of what this plan takes of it and the driver's
    context.
    """
    context = profile.reserves.accelerator_context if profile else 0
    own = profile.accelerator.memory if profile and profile.accelerator else None
    known = runtimes.named(runtime)
    return known.start_up(
        spec,
        settings,
        backend=backend,
        needed=estimate.at("device" if backend != "cpu" else "host") + context,
        total=None if profile is None else int(own or profile.memory),
        version=runtimes.version(known, profile, backend),
    )


def _filled(
    spec: ModelSpec, profile: DeviceProfile | None, session: Session, scheme: str, settings: Settings
) -> tuple[ModelSpec, str]:
    machine = Machine.of(profile) if profile else Machine(backend="cuda" if settings.gpu_layers else "cpu")
    room = budget(profile, session) if profile else None
    place = allocation.Place(
        settings=settings, backend=machine.backend, arch=machine.arch, unified=room is None or room.unified
    )
    return allocation.planned(spec, scheme, place, room=room, disk=profile.disk if profile else None)


def excess(estimate: MemoryEstimate, room: Budget) -> int:
    """Bytes by which the upper end of the estimate exceeds the budget; negative when there is room.

    One pool when CPU and accelerator share their memory; else the worse of the two.
    """
    need, limit = tightest(estimate, room)
    return need - limit


def oversize(estimate: MemoryEstimate, disk: int | None) -> int:
    """Bytes that the artifact's file has more than ``disk`` bytes; 0 when it fits, or nothing limits it."""
    return 0 if disk is None else max(0, estimate.file_bytes - disk)


def too_large(estimate: MemoryEstimate, over: int) -> str:
    """Why a file that is ``over`` bytes too large is refused."""
    return f"its file has {show(estimate.file_bytes)}, and {show(estimate.file_bytes - over)} of disk may be used"


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


class PartDocument(TypedDict):
    """One part of the memory; bytes, and the ends of their interval."""

    name: str
    bytes: int
    low: int
    high: int
    provenance: Provenance
    place: Place
    note: str


class TotalDocument(TypedDict):
    bytes: int
    low: int
    high: int


class ExactDocument(TypedDict):
    """What llama.cpp itself says, with --exact."""

    weights_bytes: int
    file_bytes: int | None
    kv_cache_bytes: int
    recurrent_state_bytes: int
    compute_bytes: int
    output_bytes: int
    provenance: Provenance
    note: str


class FitDocument(TypedDict):
    """The answer of `edgepack fit`: the parts, the whole, and how it lies to a device's budget."""

    schema_version: Literal[1]
    model: str
    runtime: str
    runtime_version: str
    start_up: dict[str, int | float]
    """What the runtime is told, or prints, about its memory when it starts."""
    scheme: str
    context: int
    """Tokens in all slots together."""
    slots: int
    kv_type: str
    ubatch: int
    parts: list[PartDocument]
    total: TotalDocument
    weights_bytes: int
    file_bytes: int
    file_provenance: Provenance
    bits_per_weight: float
    kv_cache_bytes: int
    compute_bytes: int
    output_bytes: int
    recurrent_state_bytes: int
    host_bytes: int
    device_bytes: int
    budget_bytes: int | None
    """What a server may use of the accelerator's memory, or of the memory that all share; null without a profile."""
    budget_host_bytes: int | None
    fits: bool | None
    """Whether the upper ends fit the memory, and the file the disk; null where no device was named."""
    max_context: int | None
    """Largest that fits and the model was trained for; else 0."""
    binding: str
    """The pool with least room, and the part that takes most of it; or "context: " or "disk: " and why."""
    hint: str
    """The cheapest change that makes it fit; empty when it does."""
    exact: ExactDocument | None


def to_document(result: Fit) -> FitDocument:
    """The JSON document of ``edgepack fit``; bytes are whole numbers."""
    estimate, settings, room = result.estimate, result.settings, result.budget
    return {
        "schema_version": 1,
        "model": result.model,
        "runtime": result.runtime,
        "runtime_version": result.runtime_version,
        "start_up": dict(result.start_up),
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
        "exact": None,
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
    runtime: str

    @property
    def machine(self) -> Machine:
        if self.profile is None:
            return Machine(backend="cuda" if self.settings.gpu_layers else "cpu")
        return Machine.of(self.profile)

    def refusal(self) -> str | None:
        runtime = runtimes.named(self.runtime)
        return runtime.refusal(self.scheme, self.machine) or runtime.objection(self.machine)

    @property
    def room(self) -> Budget | None:
        return budget(self.profile, self.session) if self.profile else None

    def estimate(self) -> MemoryEstimate:
        machine = self.machine
        return memory.estimate(
            self.spec,
            self.scheme,
            self.settings,
            backend=machine.backend,
            imatrix=self.imatrix,
            arch=machine.arch,
            runtime=self.runtime,
        )

    @property
    def disk(self) -> int | None:
        return self.profile.disk if self.profile else None

    def fits(self) -> bool:
        if self.room is None:
            return False
        estimate = self.estimate()
        return excess(estimate, self.room) <= 0 and not oversize(estimate, self.disk)

    @property
    def limit(self) -> int:
        """Tokens in all slots together that the model was trained for."""
        return self.spec.context_train * self.settings.slots

    def restarted(
        self, *, context: int | None = None, slots: int | None = None, ubatch: int | None = None
    ) -> _Case:
        """With the batches that the runtime itself would be started with; None leaves a thing as it is."""
        settings = replace(
            self.settings, context=context or self.settings.context, slots=slots or self.settings.slots
        )
        told = runtimes.named(self.runtime).settings_for(
            self.profile, context=settings.context, slots=settings.slots, kv_type=settings.kv_type,
            ubatch=ubatch or settings.ubatch,
        )  # fmt: skip
        return replace(self, settings=replace(settings, ubatch=told.ubatch, batch=told.batch))

    def max_context(self) -> int:
        return longest(self.limit, lambda context: self.restarted(context=context).fits())


WITHOUT_DESKTOP = "leave out --desktop"
NO_HELP = "use a smaller model"
"""How the hint begins where no change was found."""


def _no_help(case: _Case) -> str:
    """What was tried: schemes that want calibration are smaller still, and are not proposed."""
    tried = _smaller(case)
    if not tried:
        return f"{NO_HELP}: {case.scheme} of this one fits at no context"
    return f"{NO_HELP}: of this one no scheme down to {tried[-1]} fits at any context"


def _cheapest(case: _Case) -> Change | None:
    """The first change that fits and the model was trained for, from free to dear; they are tried, not guessed."""
    for change in _changes(case):
        try:
            changed = _changed(case, change)
            if changed.settings.context <= changed.limit and changed.fits():
                return change
        except Unsupported:
            continue
    return None


def _changed(case: _Case, change: Change) -> _Case:
    settings = case.settings
    if change.kv_type is not None:
        settings = replace(settings, kv_type=change.kv_type)
    result = replace(
        case,
        session="headless" if change.headless else case.session,
        scheme=change.scheme or case.scheme,
        settings=settings,
    )
    if (change.context, change.slots, change.ubatch) == (None, None, None):
        return result
    return result.restarted(context=change.context, slots=change.slots, ubatch=change.ubatch)


def _changes(case: _Case) -> Iterator[Change]:
    """Those that keep the slots, then those with half as many, a quarter and so on, which llama.cpp's cells count."""
    if case.session == "desktop":
        yield Change(headless=True)
    yield from _in_session(case, _within)
    yield from _in_session(case, _fewer)


def _in_session(case: _Case, changes: Callable[[_Case], Iterator[Change]]) -> Iterator[Change]:
    """The same changes with the desktop, where there is one, and then without."""
    yield from changes(case)
    if case.session == "desktop":
        for change in changes(replace(case, session="headless")):
            yield replace(change, headless=True)


def _fewer(case: _Case) -> Iterator[Change]:
    """Fewer slots alone, then with the other changes."""
    halved = [case.settings.slots >> n for n in range(1, case.settings.slots.bit_length())]
    yield from (Change(slots=slots) for slots in halved)
    for slots in halved:
        for change in _within(case.restarted(slots=slots)):
            yield replace(change, slots=slots)


def _within(case: _Case) -> Iterator[Change]:
    """Changes of settings, then of the scheme, then of all at once."""
    lighter = _lighter(case)
    light = [lighter] if lighter is not None else []
    small = [_SMALL_UBATCH] if case.settings.ubatch > _SMALL_UBATCH and _bounded(case) else []
    yield from (Change(kv_type=kv) for kv in light)
    yield from (Change(ubatch=ubatch) for ubatch in small)
    yield from (Change(kv_type=kv, ubatch=ubatch) for kv in light for ubatch in small)
    context = _shorter(case)
    if context and context >= case.settings.context // 2:
        yield Change(context=context)
    smaller = _smaller(case)
    yield from (Change(scheme=scheme) for scheme in smaller)
    if context:
        yield Change(context=context)
    for ubatch in (None, *small):
        for scheme in (None, *smaller):
            least = Change(scheme=scheme, kv_type=lighter, ubatch=ubatch)
            context = _shorter(_changed(case, least))
            if context:
                yield replace(least, context=context)


def _lighter(case: _Case) -> str | None:
    """A KV type that takes less and that heads of this size can have."""
    lighter = runtimes.named(case.runtime).lighter_kv(case.settings.kv_type, case.machine)
    try:
        _changed(case, Change(kv_type=lighter)).estimate()
    except Unsupported:
        return None
    return lighter


def _bounded(case: _Case) -> bool:
    """Whether --ubatch changes anything: not where the whole prompt goes through at once."""
    return case.restarted(ubatch=_SMALL_UBATCH).settings != case.settings


def _shorter(case: _Case) -> int:
    """The longest context up to the one asked for that fits; 0 when there is none or it cannot be told."""

    def fits(context: int) -> bool:
        return case.restarted(context=context).fits()

    most = min(case.limit, case.settings.context)
    try:
        return most if fits(most) else longest(most, fits)
    except Unsupported:
        return 0


def _smaller(case: _Case) -> list[str]:
    """Schemes of this model that weigh less than the present one and run here, heaviest first."""
    if case.spec.gguf_types is not None and case.spec.gguf_scheme not in ("F32", "F16", "BF16"):
        return []
    backend = case.machine.backend

    def weight(scheme: str) -> int:
        return schemes.weights_bytes(case.spec, scheme, imatrix=case.imatrix, backend=backend)

    there = [s for s in runtimes.named(case.runtime).STEPS_DOWN if _possible(case, s)]
    return sorted((s for s in there if weight(s) < weight(case.scheme)), key=weight, reverse=True)


def _possible(case: _Case, scheme: str) -> bool:
    """Whether the model can be stored so and the runtime runs it here."""
    try:
        schemes.tensor_types(case.spec, scheme, imatrix=case.imatrix, backend=case.machine.backend)
    except Unsupported:
        return False
    return replace(case, scheme=scheme).refusal() is None


def _instead(case: _Case) -> str:
    """What to name instead of a scheme that the runtime does not run here."""
    for scheme in runtimes.named(case.runtime).SCHEMES:
        if _possible(case, scheme):
            return f"{case.runtime} runs here, for instance, --scheme {scheme}"
    able = [
        r.NAME
        for r in runtimes.RUNTIMES
        if r.refusal(case.scheme, case.machine) is None and r.objection(case.machine) is None
    ]
    return f"runs here with --runtime {able[0]}" if able else f"--runtime {llama_cpp.NAME} --scheme Q4_K_M"


def binding(estimate: MemoryEstimate, room: Budget) -> str:
    """The pool with least room, and the part that takes most of it: "memory: weights"."""
    if room.unified:
        return f"memory: {_largest(estimate)}"
    device, host = estimate.at("device") - room.device, estimate.at("host") - room.host
    return (
        f"device: {_largest(estimate, 'device')}" if device >= host else f"host: {_largest(estimate, 'host')}"
    )


def _binding(case: _Case, estimate: MemoryEstimate) -> str:
    """The disk, where only the file is too large."""
    if case.room is None:
        return f"memory: {_largest(estimate)}"
    over = oversize(estimate, case.disk)
    if over and excess(estimate, case.room) <= 0:
        return f"disk: {too_large(estimate, over)}"
    return binding(estimate, case.room)


def _largest(estimate: MemoryEstimate, place: Place | None = None) -> str:
    parts = [part for part in estimate.parts if place is None or part.place == place]
    return max(parts, key=lambda part: part.high).name
