"""The Plan: model, scheme, runtime and KV-cache budget for one device, with the arithmetic behind it.

`survey` tries every candidate and yields a Plan or a Rejection for each; `choice.choose` ranks the plans.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from edgepack import allocation, degradation, memory, runtimes, schemes, serde, speed
from edgepack.degradation import Loss, Measure
from edgepack.errors import BadInput, Unsupported
from edgepack.fit import binding, excess, longest, oversize, started, tightest, too_large
from edgepack.memory import MemoryEstimate
from edgepack.modelspec import ModelSpec
from edgepack.profile import Budget, DeviceProfile, PowerMode, Session, budget
from edgepack.runtimes import Machine, Runtime, llama_cpp
from edgepack.settings import Settings
from edgepack.speed import Speed
from edgepack.students import Expected
from edgepack.units import MIB, Bytes, show

Goal = Literal["quality", "latency", "throughput", "context"]

DEFAULT_CONTEXT = 4096
"""Tokens a slot."""
UNSCORED = "none"
"""Stands for a panel where no score of a model is published: what its schemes keep of it is compared."""
FORCED = "forced: "
TO_BE_MADE = "to be made: "
DEFAULT_MIN_DECODE = 5.0
"""Tokens per second: about the pace at which people read; slower is refused unless asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What makes a student, beside the data and how it is taught."""

    teacher: str
    """Source of the teacher, as a ModelRef has it."""
    revision: str | None
    prune: str | None
    """What is kept of the teacher (`students.parse` reads it), `ModelRef.source` being the teacher; None: the student
    begins as `ModelRef.source`, a smaller model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which weights, exactly."""

    id: str
    """Catalog id, folder name or Hub id."""
    source: str
    """A path, the name of a built-in model, or a Hub repository id."""
    revision: str | None
    architecture: str
    parameters: int
    license: str
    commercial: bool = True
    teacher: str | None = None
    """The model it was distilled from, when the catalog says so, or is to be."""
    lesson: Lesson | None = None
    """How a build is to make it; None for a model that is there."""

    @property
    def prune(self) -> str | None:
        """What is to be kept of the teacher, where it is to be cut out of it."""
        return None if self.lesson is None else self.lesson.prune


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model the planner may choose, with what is published about its quality."""

    model: ModelRef
    spec: ModelSpec
    panels: Mapping[str, float]
    """Mean score per single-source panel; scores of different panels are never compared."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """How a panel's scores fall with a model's loss; as answers do where nothing is said."""
    lost: Expected | None = None
    """Of a student that is still to be made: what it is expected to lose against its teacher, whose scores ``panels``
    then has."""
    teacher: Candidate | None = None
    """Of a student that is still to be made: who will teach it."""

    def measure(self, panel: str) -> Measure:
        return self.measures.get(panel, "answers")

    def made(self, panel: str) -> Loss:
        """What is left of the scores in ``panels`` once the model is there: all of them where it is already."""
        if self.lost is None:
            return degradation.left(0.0, least=0.0, most=0.0, measure=self.measure(panel))
        nats = self.lost
        return degradation.left(nats.nats, least=nats.low, most=nats.high, measure=self.measure(panel))

    def score(self, panel: str) -> float:
        """Expected score before quantization; 100 stands for the whole model, or teacher, in a panel without it."""
        return self.panels.get(panel, 100.0) * self.made(panel).retention


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
    licenses: tuple[str, ...] = ()
    """Licences that are acceptable, in any case; empty: all that allow commercial use."""
    disk: Bytes | None = None
    """Bytes the artifact may take on the device; None: what the profile says is free."""
    force: bool = False
    """Keep candidates that do not fit or are too slow; their plans carry the refusal as a warning."""
    runtime: str | None = None
    """None: all that run on the device are weighed."""
    budgeted: bool = False
    """Whether a GGUF that fills the budget is considered too: calibration data to choose its types by will be there."""

    @property
    def room_on_disk(self) -> Bytes | None:
        """Bytes the artifact may take; None where nothing limits it."""
        return self.profile.disk if self.disk is None else self.disk

    @property
    def takes_gguf(self) -> bool:
        """Whether the artifact is a GGUF, as far as the question says it."""
        if self.scheme is not None:
            return schemes.is_gguf(self.scheme)
        return self.runtime in (None, llama_cpp.NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    score: float
    """Mean of the panel's benchmarks times what the scheme keeps; comparable only within `panel`.

    Of a student that is still to be made its teacher's mean, times what a scaling law expects to be left."""
    low: float
    high: float
    retention: float
    """What the scheme keeps of the unquantized model, 1.0 being all; fitted."""
    kept_low: float
    """Its lower end."""
    panel: str
    """Name of the single-source panel; UNSCORED when the model has no published score in any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a plan that was not chosen would take and give."""

    memory: int
    """Bytes, expected."""
    memory_high: int
    decode: float
    """Tokens per second with the context full."""
    decode_low: float
    quality: float
    quality_low: float
    panel: str
    on_front: bool
    """No other plan of its panel is at least as good in sure quality, speed and memory together."""


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
    oversize: int = 0
    """Bytes that its file has more than the disk may give it; 0 when the disk was not the reason."""
    reach: int = 0
    """The longest context that fits, and is fast enough where ``slowness`` is 0, when the one that was asked for is
    beyond the model."""
    hint: str = ""
    figures: Figures | None = None
    """Of a candidate that fits and was not chosen."""
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
    start_up: Mapping[str, int | float] = field(default_factory=dict)
    """What the runtime is told, or prints, about its memory when it starts."""
    warnings: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    schema_version: int = 1

    @property
    def forced(self) -> str:
        """Why it would have been refused without --force; empty when it would not."""
        return next((text for text in self.warnings if text.startswith(FORCED)), "")

    @property
    def name(self) -> str:
        """Model, scheme and profile, and a runtime that is not llama.cpp: names the bundle's file."""
        model = self.model.id.rsplit("/", 1)[-1].lower()
        runtime = "" if self.runtime == llama_cpp.NAME else f"{self.runtime}-"
        return f"{model}-{self.scheme.lower()}-{runtime}{self.profile.name}"

    @property
    def digest(self) -> str:
        """sha256 of the plan's JSON: the check's report names the plan by it."""
        return hashlib.sha256(serde.to_json(self).encode()).hexdigest()


def survey(request: Request, candidates: Iterable[Candidate]) -> Iterator[Plan | Rejection]:
    """Every model, runtime, scheme and KV type on this device: a Plan where it fits, else why it does not."""
    room = budget(request.profile, request.session)
    mode = power_mode(request.profile, request.power_mode)
    machine = Machine.of(request.profile)
    models = list(candidates)
    panels = assign_panels(models)
    tried = [
        (runtime, scheme, kv_type)
        for runtime in _runtimes(request, machine)
        for scheme in _schemes(request, runtime)
        for kv_type in ((request.kv_type,) if request.kv_type else runtime.kv_types(machine))
    ]
    refused = {(r.NAME, scheme): r.refusal(scheme, machine) for r, scheme, _ in tried}
    for candidate in models:
        unwanted = _license_problem(request, candidate.model)
        if unwanted and (request.licenses or len(models) > 1):
            yield _reject(candidate, "any", "any", 0, unwanted, hint=_licenses(request, models))
            continue
        panel = panels[candidate.model.id]
        for runtime, scheme, kv_type in tried:
            no_kernel, against = refused[runtime.NAME, scheme], runtime.objection(machine)
            why_not = no_kernel or against
            try:
                if why_not is not None and not request.force:
                    raise Unsupported(why_not, hint="another --runtime or --scheme, or --force")
                if no_kernel is not None and request.scheme is None:
                    raise Unsupported(no_kernel, hint=f"--scheme {scheme} --force")
                found = _try(request, room, mode, candidate, panel, runtime, scheme, kv_type)
            except (Unsupported, BadInput) as error:
                if isinstance(error, BadInput) and len({r.NAME for r, _, _ in tried}) == 1:
                    raise
                context = request.context or _default_context(request, candidate.spec)
                found = _reject(candidate, scheme, kv_type, context, error.message, hint=error.hint or "")
            if isinstance(found, Rejection):
                yield found if runtime is llama_cpp else replace(found, runtime=runtime.NAME)
            else:
                forced = (f"{FORCED}{why_not}",) if why_not is not None else ()
                yield replace(found, warnings=(*found.warnings, *forced)) if forced else found


def _runtimes(request: Request, machine: Machine) -> tuple[Runtime, ...]:
    """The runtime asked for; else those that run the scheme asked for, or any of their own schemes.

    Under --force those that read the scheme on any machine.
    """
    if request.runtime is not None:
        return (runtimes.named(request.runtime),)
    if request.scheme is not None and not schemes.is_gguf(request.scheme):
        scheme = request.scheme
        forced = tuple(r for r in runtimes.RUNTIMES if r.reads(scheme)) if request.force else ()
        return forced or runtimes.reading(scheme, machine)
    if request.scheme is not None:
        return (llama_cpp,)
    able = (r for r in runtimes.RUNTIMES if r.objection(machine) is None)
    return tuple(r for r in able if any(r.refusal(s, machine) is None for s in r.SCHEMES))


def _schemes(request: Request, runtime: Runtime) -> tuple[str, ...]:
    if request.scheme is not None:
        return (request.scheme,)
    return (*runtime.SCHEMES, *((schemes.BUDGET,) if request.budgeted and runtime is llama_cpp else ()))


def _license_problem(request: Request, model: ModelRef) -> str:
    if not request.licenses:
        return "" if model.commercial else f"{model.license} forbids commercial use"
    wanted = {name.lower() for name in request.licenses}
    return "" if model.license.lower() in wanted else f"its licence is {model.license}"


def _licenses(request: Request, models: Sequence[Candidate]) -> str:
    there = ", ".join(sorted({c.model.license for c in models}))
    return f"--license ID; there are {there}" if request.licenses else "name it with --model"


def _default_context(request: Request, spec: ModelSpec) -> int:
    return min(DEFAULT_CONTEXT, spec.context_train) * request.slots


def _reject(
    candidate: Candidate, scheme: str, kv_type: str, context: int, reason: str, *, excess: int = 0,
    slowness: float = 0.0, oversize: int = 0, reach: int = 0, hint: str = "",
) -> Rejection:  # fmt: skip
    return Rejection(
        model=candidate.model.id, scheme=scheme, kv_type=kv_type, context=context, reason=reason, excess=excess,
        slowness=slowness, oversize=oversize, reach=reach, hint=hint,
    )  # fmt: skip


def assign_panels(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Model id -> the panel its quality is read from: as few panels as cover the models, widest first."""
    assigned: dict[str, str] = {}
    left = list(candidates)
    while left:
        names = sorted({panel for c in left for panel in c.panels})
        widest = max(names, key=lambda panel: sum(panel in c.panels for c in left), default=UNSCORED)
        for candidate in left:
            if widest in candidate.panels or widest == UNSCORED:
                assigned[candidate.model.id] = widest
        left = [c for c in left if c.model.id not in assigned]
    return assigned


def label(plan: Plan) -> str:
    """Model, scheme, KV type and context in one short line."""
    return f"{plan.model.id} {plan.scheme} kv {plan.settings.kv_type} ctx {plan.settings.context}"


def beginning(model: ModelRef) -> str:
    """How a student that is to be made begins."""
    if model.prune is None:
        return f"taught by {model.teacher}"
    return f"cut out of {model.teacher} ({model.prune}) and taught"


def with_spec(plan: Plan, spec: ModelSpec, model: ModelRef) -> Plan:
    """The same plan with its memory counted again from the weights at hand, exact down to the header.

    A student that was to be made is there now, and no warning says otherwise.
    """
    estimate = _memory(
        plan.profile, spec, plan.scheme, plan.settings, imatrix=plan.imatrix, runtime=plan.runtime
    )
    device = plan.profile
    start_up = started(
        spec, plan.settings, estimate, profile=device, backend=device.backend, runtime=plan.runtime
    )
    warnings = tuple(text for text in plan.warnings if not text.startswith(TO_BE_MADE))
    return replace(plan, model=model, memory=estimate, start_up=start_up, warnings=warnings)


def power_mode(device: DeviceProfile, name: str | None) -> PowerMode:
    """The named power mode of a device, or its default one. Raises BadInput for a name it does not have."""
    try:
        return device.mode(name)
    except KeyError as error:
        known = ", ".join(m.name for m in device.power_modes)
        raise BadInput(f"{device.name} has no power mode {name!r}", hint=f"it has: {known}") from error


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
    if schemes.is_budget(scheme):
        request, candidate, scheme = _filled(request, room, candidate, runtime, scheme, kv_type)
    spec = candidate.spec
    context = request.context or _default_context(request, spec)
    limit = spec.context_train * request.slots
    if schemes.requires_imatrix(spec, scheme) and not request.imatrix:
        reason = f"{scheme} is unusable without an importance matrix"
        return _reject(
            candidate, scheme, kv_type, context, reason, hint="build --calibration FILE computes one"
        )

    def settings(tokens: int) -> Settings:
        return runtime.settings_for(
            request.profile, context=tokens, slots=request.slots, kv_type=kv_type, ubatch=request.ubatch
        )

    def needs(tokens: int) -> MemoryEstimate:
        return _memory(
            request.profile, spec, scheme, settings(tokens), imatrix=request.imatrix, runtime=runtime.NAME
        )

    def pace(tokens: int) -> speed.Speed:
        return speed.estimate(
            request.profile,
            mode,
            speed.work(spec, scheme, imatrix=request.imatrix, backend=request.profile.backend),
            kv_bytes=needs(tokens).part("kv_cache") // request.slots,
            slots=request.slots,
            prompt=min(speed.PROMPT, tokens // request.slots),
            runtime=runtime.NAME,
        )

    def fits(tokens: int) -> bool:
        return excess(needs(tokens), room) <= 0

    floor = DEFAULT_MIN_DECODE if request.min_decode is None else request.min_decode

    def quick(tokens: int) -> bool:
        return fits(tokens) and pace(tokens).decode_full_low >= floor

    if context > limit:
        fitting = longest(limit, quick) or longest(limit, fits)
        slots = f" times {request.slots} slots" if request.slots > 1 else ""
        reason = (
            f"context {context} is beyond the {spec.context_train} tokens the model was trained on{slots}"
        )
        if not fitting:
            return _reject(candidate, scheme, kv_type, context, reason, hint="a smaller model or scheme")
        there = pace(fitting).decode_full_low
        slowness = 0.0 if there >= floor else floor / there
        hint = f"--context {fitting}{f' {_slower(there)}' if slowness else ''}"
        return _reject(
            candidate, scheme, kv_type, context, reason, reach=fitting, slowness=slowness, hint=hint
        )

    if request.goal == "context" and request.context is None:
        context = longest(limit, quick) or longest(limit, fits) or context
    estimate = needs(context)
    need, there_is = tightest(estimate, room)
    warnings = list(_warnings(request, candidate.model, runtime, estimate))
    if need > there_is:
        reason = (
            f"needs {show(need)}, {show(need - there_is)} more than the {show(there_is)} there is; "
            f"most goes to {binding(estimate, room)}"
        )
        if not request.force:
            return _reject(candidate, scheme, kv_type, context, reason, excess=need - there_is)
        warnings.append(f"{FORCED}{reason}")
    over = oversize(estimate, request.room_on_disk)
    if over:
        reason = too_large(estimate, over)
        if not request.force:
            hint = f"--disk {-(-estimate.file_bytes // MIB)}MiB"
            return _reject(candidate, scheme, kv_type, context, reason, oversize=over, hint=hint)
        warnings.append(f"{FORCED}{reason}")
    speeds = pace(context)
    if speeds.decode_full_low < floor:
        default = "" if request.min_decode is not None else " (the default)"
        reason = (
            f"decodes {speeds.decode_full:.1f} tok/s with a full context, perhaps only {speeds.decode_full_low:.1f}, "
            f"and {floor:g} are asked for{default}"
        )
        if not request.force:
            slowness = floor / speeds.decode_full_low
            hint = _slower(speeds.decode_full_low)
            return _reject(candidate, scheme, kv_type, context, reason, slowness=slowness, hint=hint)
        warnings.append(f"{FORCED}{reason}")
    return Plan(
        profile=request.profile,
        session=request.session,
        power_mode=mode.name,
        budget=room,
        model=candidate.model,
        scheme=scheme,
        imatrix=request.imatrix,
        runtime=runtime.NAME,
        runtime_version=runtime.source(request.profile.backend).version or runtime.VERSION,
        settings=settings(context),
        memory=estimate,
        speed=speeds,
        quality=_quality(candidate, panel, scheme, kv_type, imatrix=request.imatrix),
        start_up=started(
            spec,
            settings(context),
            estimate,
            profile=request.profile,
            backend=request.profile.backend,
            runtime=runtime.NAME,
        ),
        warnings=tuple(warnings),
    )


def _slower(pace: float) -> str:
    """The floor that lets this many tokens per second in."""
    return f"--min-tokens-per-second {math.floor(pace * 10) / 10:g}"


def _filled(
    request: Request, room: Budget, candidate: Candidate, runtime: Runtime, scheme: str, kv_type: str
) -> tuple[Request, Candidate, str]:
    """The model with types that fill what this context leaves, and the scheme's name with the size of the file.

    Such types are always chosen with an importance matrix.
    """
    limit = candidate.spec.context_train * request.slots
    context = min(request.context or _default_context(request, candidate.spec), limit)
    place = allocation.Place(
        settings=runtime.settings_for(
            request.profile, context=context, slots=request.slots, kv_type=kv_type, ubatch=request.ubatch
        ),
        backend=request.profile.backend,
        arch=request.profile.arch,
        unified=room.unified,
    )
    spec, name = allocation.planned(candidate.spec, scheme, place, room=room, disk=request.room_on_disk)
    return replace(request, imatrix=True), replace(candidate, spec=spec), name


def _quality(candidate: Candidate, panel: str, scheme: str, kv_type: str, *, imatrix: bool) -> Quality:
    """What is left of the model's score after its making, where it is still to be made, the scheme and the KV cache."""
    family = degradation.family_of(candidate.model.id)
    weights = degradation.of_scheme(
        candidate.spec, scheme, imatrix=imatrix, family=family, measure=candidate.measure(panel)
    )
    cache = degradation.cache_loss(kv_type)
    score, made = candidate.panels.get(panel, 100.0), candidate.made(panel)
    kept, low, high = (
        weights.retention * cache.retention,
        weights.low * cache.low,
        weights.high * cache.high,
    )
    return Quality(
        score=score * made.retention * kept,
        low=score * made.low * low,
        high=score * made.high * high,
        retention=kept,
        kept_low=low,
        panel=panel,
    )


def _warnings(request: Request, model: ModelRef, runtime: Runtime, estimate: MemoryEstimate) -> Iterator[str]:
    if not model.commercial:
        yield f"{model.license} forbids commercial use of {model.id}"
    if model.lesson is not None:
        yield f"{TO_BE_MADE}{model.id} is {beginning(model)} by the build"
    if model.lesson is not None and model.prune is None:
        yield f"the score of {model.id} is what {model.source} has before it is taught"
    if model.prune is not None:
        yield (
            f"the score of {model.id} is what a scaling law expects of {model.parameters:,} parameters: nothing of it "
            "was measured, and too short a teaching leaves less"
        )
    if request.profile.uncertain:
        yield f"{request.profile.name}: estimated, not read from a device: {', '.join(request.profile.uncertain)}"
    for image in request.profile.software.images:
        if image.runtime == runtime.NAME and image.digest == "unknown":
            yield f"image {image.reference}: digest unknown, pin it with --image-digest"
        if image.runtime == runtime.NAME and image.version is not None:
            yield f"image {image.reference} holds {image.version}: the figures are for {runtime.VERSION}"
    caution = runtime.caution(Machine.of(request.profile))
    if caution:
        yield caution
    limit = request.profile.accelerator.largest_allocation if request.profile.accelerator else None
    weights = sum(part.bytes for part in estimate.parts if (part.name, part.place) == ("weights", "device"))
    if limit is not None and weights > limit and runtime is llama_cpp:
        yield (
            f"the weights load as one allocation of {show(weights)}; requests above {show(limit)} have failed on some "
            "software releases of this device: run edgepack check on it"
        )
