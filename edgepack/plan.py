"""The Plan: model, scheme, runtime and KV-cache budget for one device, with the arithmetic behind it.

`survey` tries every candidate and yields a Plan or a Rejection for each; `choose` ranks the plans.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from edgepack import degradation, memory, runtimes, schemes, serde, speed
from edgepack.errors import BadInput, NothingFits, Unsupported
from edgepack.fit import binding, excess, fit, longest, tightest
from edgepack.memory import MemoryEstimate
from edgepack.modelspec import ModelSpec
from edgepack.profile import Budget, DeviceProfile, PowerMode, Session, budget
from edgepack.runtimes import Machine, Runtime, llama_cpp
from edgepack.settings import Settings
from edgepack.speed import Speed
from edgepack.units import MIB, show

Goal = Literal["quality", "latency", "context"]

KEPT = 0.97
"""For the goal latency: what a scheme must surely keep of its unquantized model."""
DEFAULT_CONTEXT = 4096
DEFAULT_MIN_DECODE = 5.0
"""Tokens per second: about the pace at which people read; slower is refused unless asked for."""
NOISE = 0.01
"""Relative difference in score below which two candidates count as equal in quality: a panel's standard
error and the loss law's own error are both about a percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which weights, exactly."""

    id: str
    """Catalog id, folder name or Hub id."""
    source: str
    """A path, "demo", or a Hub repository id."""
    revision: str | None
    architecture: str
    parameters: int
    license: str
    commercial: bool = True
    teacher: str | None = None
    """The model it was distilled from, when the catalog says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model the planner may choose, with what is published about its quality."""

    model: ModelRef
    spec: ModelSpec
    panels: Mapping[str, float]
    """Mean score per single-source panel; scores of different panels are never compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asks for; None leaves the choice to the planner."""

    profile: DeviceProfile
    session: Session = "headless"
    power_mode: str | None = None
    context: int | None = None
    """Tokens in all slots together."""
    slots: int = 1
    kv_type: str | None = None
    scheme: str | None = None
    ubatch: int = 512
    imatrix: bool = False
    min_decode: float | None = None
    """Tokens per second that the lower end of the prediction must reach with the context full."""
    goal: Goal = "quality"
    force: bool = False
    """Keep candidates that do not fit or are too slow; their plans carry the refusal as a warning."""
    runtime: str | None = None
    """None: llama.cpp, or the runtimes that run the scheme asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    score: float
    """Mean of the panel's benchmarks times what the scheme keeps; comparable only within `panel`."""
    low: float
    high: float
    retention: float
    """What the scheme keeps of the unquantized model, 1.0 being all; fitted."""
    kept_low: float
    """Its lower end."""
    panel: str
    """Name of the single-source panel; "none" when the model has no published score in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    model: str
    scheme: str
    kv_type: str
    context: int
    reason: str
    excess: int = 0
    """Bytes over the budget; 0 when memory was not the reason."""
    slowness: float = 0.0
    """How many times too slow, above 1; 0 when speed was not the reason."""
    hint: str = ""
    runtime: str = llama_cpp.NAME

    @property
    def candidate(self) -> str:
        where = "" if self.runtime == llama_cpp.NAME else f" on {self.runtime}"
        return f"{self.model} {self.scheme} kv {self.kv_type} ctx {self.context}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    profile: DeviceProfile
    session: Session
    power_mode: str
    budget: Budget
    model: ModelRef
    scheme: str
    imatrix: bool
    runtime: str
    runtime_version: str
    settings: Settings
    memory: MemoryEstimate
    speed: Speed
    quality: Quality
    warnings: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    schema_version: int = 1

    @property
    def name(self) -> str:
        """Model, scheme and profile: names the bundle's file."""
        model = self.model.id.rsplit("/", 1)[-1].lower()
        return f"{model}-{self.scheme.lower()}-{self.profile.name}"

    @property
    def digest(self) -> str:
        """sha256 of the plan's JSON: the check's report names the plan by it."""
        return hashlib.sha256(serde.to_json(self).encode()).hexdigest()


def survey(request: Request, candidates: Iterable[Candidate]) -> Iterator[Plan | Rejection]:
    """Every model, runtime, scheme and KV type on this device: a Plan where it fits, else why it does not."""
    room = budget(request.profile, request.session)
    mode = _power_mode(request)
    machine = Machine.of(request.profile)
    models = list(candidates)
    panels = assign_panels(models)
    tried = [
        (runtime, scheme, kv_type)
        for runtime in _runtimes(request, machine)
        for scheme in ((request.scheme,) if request.scheme else runtime.SCHEMES)
        for kv_type in ((request.kv_type,) if request.kv_type else runtime.kv_types(machine))
    ]
    refused = {(r.NAME, scheme): r.refusal(scheme, machine) for r, scheme, _ in tried}
    for candidate in models:
        panel = panels[candidate.model.id]
        for runtime, scheme, kv_type in tried:
            why_not = refused[runtime.NAME, scheme]
            try:
                if why_not is not None and not request.force:
                    raise Unsupported(why_not, hint="another --runtime or --scheme, or --force")
                found = _try(request, room, mode, candidate, panel, runtime, scheme, kv_type)
            except Unsupported as error:
                context = request.context or _default_context(request, candidate.spec)
                found = _reject(candidate, scheme, kv_type, context, error.message, hint=error.hint or "")
            if isinstance(found, Rejection):
                yield found if runtime is llama_cpp else replace(found, runtime=runtime.NAME)
            else:
                forced = (f"forced: {why_not}",) if why_not is not None else ()
                yield replace(found, warnings=(*found.warnings, *forced)) if forced else found


def _runtimes(request: Request, machine: Machine) -> tuple[Runtime, ...]:
    """The runtime asked for; else those that run the scheme asked for; else the one that bundles are built for."""
    if request.runtime is not None:
        return (runtimes.named(request.runtime),)
    if request.scheme is not None and not schemes.is_gguf(request.scheme):
        return runtimes.reading(request.scheme, machine)
    return (llama_cpp,)


def _default_context(request: Request, spec: ModelSpec) -> int:
    return min(DEFAULT_CONTEXT, spec.context_train) * request.slots


def _reject(
    candidate: Candidate, scheme: str, kv_type: str, context: int, reason: str, *, excess: int = 0,
    slowness: float = 0.0, hint: str = "",
) -> Rejection:  # fmt: skip
    return Rejection(
        model=candidate.model.id, scheme=scheme, kv_type=kv_type, context=context, reason=reason, excess=excess,
        slowness=slowness, hint=hint,
    )  # fmt: skip


def choose(outcomes: Sequence[Plan | Rejection], request: Request, candidates: Sequence[Candidate]) -> Plan:
    """The best plan, carrying the reasons against the others; raises NothingFits when there is none."""
    goal = request.goal
    plans = rank([o for o in outcomes if isinstance(o, Plan)], goal)
    rejections = tuple(o for o in outcomes if isinstance(o, Rejection))
    if not plans:
        raise _nothing_fits(rejections, request, candidates)
    best = plans[0]
    others = tuple(
        Rejection(
            model=p.model.id,
            scheme=p.scheme,
            kv_type=p.settings.kv_type,
            context=p.settings.context,
            reason=_why_not(best, p, goal),
            runtime=p.runtime,
        )
        for p in plans[1:]
    )
    return replace(best, rejected=others + rejections)


def rank(plans: Sequence[Plan], goal: Goal) -> list[Plan]:
    """Best first; candidates whose scores come from different panels are never mixed.

    Quality: the lower end of the score, and within its noise the faster. Latency: the faster among schemes
    that surely keep ``KEPT`` of their model. Context: the longest, then quality.
    """
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        groups.setdefault(plan.quality.panel, []).append(plan)
    by_size = sorted(groups, key=lambda panel: (panel == "none", -len({p.model.id for p in groups[panel]})))
    return [plan for panel in by_size for plan in _ordered(groups[panel], goal)]


def assign_panels(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Model id -> the panel its quality is read from: as few panels as cover the models, widest first."""
    assigned: dict[str, str] = {}
    left = list(candidates)
    while left:
        names = sorted({panel for c in left for panel in c.panels})
        widest = max(names, key=lambda panel: sum(panel in c.panels for c in left), default="none")
        for candidate in left:
            if widest in candidate.panels or widest == "none":
                assigned[candidate.model.id] = widest
        left = [c for c in left if c.model.id not in assigned]
    return assigned


def label(plan: Plan) -> str:
    """Model, scheme, KV type and context in one short line."""
    return f"{plan.model.id} {plan.scheme} kv {plan.settings.kv_type} ctx {plan.settings.context}"


def with_spec(plan: Plan, spec: ModelSpec, model: ModelRef) -> Plan:
    """The same plan with its memory counted again from the weights at hand, exact down to the header."""
    estimate = _memory(
        plan.profile, spec, plan.scheme, plan.settings, imatrix=plan.imatrix, runtime=plan.runtime
    )
    return replace(plan, model=model, memory=estimate)


def _ordered(plans: Sequence[Plan], goal: Goal) -> list[Plan]:
    left = list(plans)
    ordered: list[Plan] = []
    while left:
        if goal == "latency":
            best = max(left, key=lambda p: (p.quality.kept_low >= KEPT, p.speed.decode_full_low))
        elif goal == "context":
            best = max(left, key=lambda p: (p.settings.context, p.quality.low))
        else:
            top = max(p.quality.low for p in left)
            equal = [p for p in left if p.quality.low >= top * (1.0 - NOISE)]
            best = max(equal, key=lambda p: (p.speed.decode_full, p.quality.low))
        ordered.append(best)
        left.remove(best)
    return ordered


def _power_mode(request: Request) -> PowerMode:
    try:
        return request.profile.mode(request.power_mode)
    except KeyError as error:
        known = ", ".join(m.name for m in request.profile.power_modes)
        raise BadInput(
            f"{request.profile.name} has no power mode {request.power_mode!r}", hint=f"it has: {known}"
        ) from error


def _memory(
    profile: DeviceProfile, spec: ModelSpec, scheme: str, settings: Settings, *, imatrix: bool, runtime: str
) -> MemoryEstimate:
    return memory.estimate(
        spec,
        scheme,
        settings,
        backend=profile.backend,
        imatrix=imatrix,
        arch=profile.arch,
        runtime=runtime,
    )


def _try(
    request: Request,
    room: Budget,
    mode: PowerMode,
    candidate: Candidate,
    panel: str,
    runtime: Runtime,
    scheme: str,
    kv_type: str,
) -> Plan | Rejection:
    spec = candidate.spec
    context = request.context or _default_context(request, spec)
    limit = spec.context_train * request.slots
    if schemes.requires_imatrix(spec, scheme) and not request.imatrix:
        reason = f"{scheme} is unusable without an importance matrix"
        return _reject(candidate, scheme, kv_type, context, reason, hint="give one with --imatrix")
    if context > limit:
        slots = f" times {request.slots} slots" if request.slots > 1 else ""
        reason = (
            f"context {context} is beyond the {spec.context_train} tokens the model was trained on{slots}"
        )
        return _reject(candidate, scheme, kv_type, context, reason, hint=f"--context {limit}")

    def settings(tokens: int) -> Settings:
        return runtime.settings_for(
            request.profile, context=tokens, slots=request.slots, kv_type=kv_type, ubatch=request.ubatch
        )

    def needs(tokens: int) -> MemoryEstimate:
        return _memory(
            request.profile, spec, scheme, settings(tokens), imatrix=request.imatrix, runtime=runtime.NAME
        )

    if request.goal == "context" and request.context is None:
        context = longest(limit, lambda n: excess(needs(n), room) <= 0) or context
    estimate = needs(context)
    need, there_is = tightest(estimate, room)
    warnings = list(_warnings(request, candidate.model, spec, runtime, scheme))
    if need > there_is:
        reason = (
            f"needs {show(need)}, {show(need - there_is)} more than the {show(there_is)} there is; "
            f"most goes to {binding(estimate, room)}"
        )
        if not request.force:
            return _reject(candidate, scheme, kv_type, context, reason, excess=need - there_is)
        warnings.append(f"forced: {reason}")
    pace = _speed(request.profile, mode, spec, scheme, estimate, imatrix=request.imatrix, slots=request.slots)
    floor = DEFAULT_MIN_DECODE if request.min_decode is None else request.min_decode
    if pace.decode_full_low < floor:
        default = "" if request.min_decode is not None else " (the default)"
        reason = (
            f"decodes {pace.decode_full:.1f} tok/s with a full context, perhaps only {pace.decode_full_low:.1f}, and "
            f"{floor:g} are asked for{default}"
        )
        if not request.force:
            slowness = floor / pace.decode_full_low
            hint = f"--min-tokens-per-second {math.floor(pace.decode_full_low * 10) / 10:g}"
            return _reject(candidate, scheme, kv_type, context, reason, slowness=slowness, hint=hint)
        warnings.append(f"forced: {reason}")
    return Plan(
        profile=request.profile,
        session=request.session,
        power_mode=mode.name,
        budget=room,
        model=candidate.model,
        scheme=scheme,
        imatrix=request.imatrix,
        runtime=runtime.NAME,
        runtime_version=runtime.VERSION,
        settings=settings(context),
        memory=estimate,
        speed=pace,
        quality=_quality(candidate, panel, scheme, imatrix=request.imatrix),
        warnings=tuple(warnings),
    )


def _speed(
    profile: DeviceProfile,
    mode: PowerMode,
    spec: ModelSpec,
    scheme: str,
    estimate: MemoryEstimate,
    *,
    imatrix: bool,
    slots: int,
) -> Speed:
    backend = profile.backend
    embedding, per_layer = schemes.lookup_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    weights = schemes.weights_bytes(spec, scheme, imatrix=imatrix, backend=backend) - per_layer
    return speed.estimate(
        profile,
        mode,
        read_bytes=speed.read_per_token(weights, embedding, tied=schemes.reads_table(spec, scheme)),
        layers=spec.layers,
        kv_bytes=estimate.part("kv_cache") // slots,
    )


@lru_cache(maxsize=4096)
def _loss(spec: ModelSpec, scheme: str, imatrix: bool) -> degradation.Loss:
    types = schemes.tensor_types(spec, scheme, imatrix=imatrix)
    return degradation.loss(spec.tensors, types, parameters=spec.parameters, imatrix=imatrix)


def _quality(candidate: Candidate, panel: str, scheme: str, *, imatrix: bool) -> Quality:
    spec = candidate.spec
    kept = _loss(spec, scheme, imatrix)
    score = candidate.panels.get(panel, 100.0)
    return Quality(
        score=score * kept.retention,
        low=score * kept.low,
        high=score * kept.high,
        retention=kept.retention,
        kept_low=kept.low,
        panel=panel,
    )


def _warnings(
    request: Request, model: ModelRef, spec: ModelSpec, runtime: Runtime, scheme: str
) -> Iterator[str]:
    if not model.commercial:
        yield f"{model.license} forbids commercial use of {model.id}"
    if request.profile.uncertain:
        yield f"{request.profile.name}: estimated, not read from a device: {', '.join(request.profile.uncertain)}"
    for image in request.profile.software.images:
        if image.runtime == runtime.NAME and image.digest == "unknown":
            yield f"image {image.reference}: digest unknown, pin it with --image-digest"
    if not runtime.BUILT:
        yield (
            f"no bundle is built for {runtime.NAME} yet, and the speed of this plan is that of llama.cpp for as many "
            f"bytes: nothing was measured for {runtime.NAME} here"
        )
    limit = request.profile.accelerator.largest_allocation if request.profile.accelerator else None
    weights = schemes.weights_bytes(spec, scheme, imatrix=request.imatrix)
    if limit is not None and weights > limit and runtime is llama_cpp:
        yield (
            f"the weights load as one allocation of {show(weights)}; requests above {show(limit)} have failed on some "
            "software releases of this device: run edgepack check on it"
        )


def _why_not(best: Plan, other: Plan, goal: Goal) -> str:
    if other.quality.panel != best.quality.panel:
        return f"no score in {best.quality.panel}; scores of different sources are not compared"
    quality = f"scores at least {other.quality.low:.1f} against {best.quality.low:.1f}"
    pace = f"decodes {other.speed.decode_full:.1f} tok/s against {best.speed.decode_full:.1f} with a full context"
    if goal == "latency":
        return pace
    if goal == "context" and other.settings.context != best.settings.context:
        return f"holds {other.settings.context} tokens against {best.settings.context}"
    if other.quality.low >= best.quality.low * (1.0 - NOISE):
        return f"{quality}, within the noise, and {pace}"
    return quality


def _nothing_fits(
    rejections: Sequence[Rejection], request: Request, candidates: Sequence[Candidate]
) -> NothingFits:
    """The refusal: the nearest candidate, its arithmetic, and the cheapest change that was tried and fits."""
    if not rejections:
        return NothingFits("there is no model to choose from", hint="name one with --model")
    slow = [r for r in rejections if r.slowness]
    large = [r for r in rejections if r.excess]
    if slow:
        nearest = min(slow, key=lambda r: r.slowness)
        return NothingFits(
            f"nothing is fast enough; nearest is {nearest.candidate}: {nearest.reason}", hint=nearest.hint
        )
    if not large:
        nearest = rejections[0]
        return NothingFits(
            f"nothing fits; nearest is {nearest.candidate}: {nearest.reason}", hint=nearest.hint
        )
    nearest = min(large, key=lambda r: r.excess)
    spec = next(c.spec for c in candidates if c.model.id == nearest.model)
    settings = runtimes.named(nearest.runtime).settings_for(
        request.profile,
        context=nearest.context,
        slots=request.slots,
        kv_type=nearest.kv_type,
        ubatch=request.ubatch,
    )
    tried = fit(
        spec, profile=request.profile, session=request.session, scheme=nearest.scheme, settings=settings,
        imatrix=request.imatrix, runtime=nearest.runtime,
    )  # fmt: skip
    terms = " ".join(
        f"{'-' if value < 0 else '+'} {show(abs(value))} {name}"
        for name, value in budget(request.profile, request.session).arithmetic
    )
    return NothingFits(
        f"nothing fits; nearest is {nearest.candidate}: {nearest.reason}\n  budget = {terms.lstrip('+ ')}",
        hint=f"{tried.hint}; or free {-(-nearest.excess // MIB)} MiB on the device, or --force",
    )
