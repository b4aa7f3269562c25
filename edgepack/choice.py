"""Which plan: ranked by a goal, with the Pareto front, the reasons against the others, and what would change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from edgepack import runtimes, speed
from edgepack.errors import NothingFits
from edgepack.fit import WITHOUT_DESKTOP, Change, binding, fit
from edgepack.parts import Place
from edgepack.plan import UNSCORED, Candidate, Figures, Goal, Plan, Rejection, Request, label, survey
from edgepack.profile import PowerMode, budget
from edgepack.runtimes import Machine
from edgepack.units import MIB, show

WORTH = 0.9
"""For the goals latency and throughput: share of the best sure score that a candidate must have to count; without a
floor the smallest model of all would always win."""
NOISE = 0.01
"""Relative difference in score below which two candidates count as equal in quality: a panel's standard
error and the loss law's own error are both about a percent."""
RUNNERS_UP = 3
NEAR_MISSES = 4
"""Better candidates that did not fit and whose changes `explain` tries, nearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why this plan, in sentences."""

    why: str
    against: tuple[str, ...]
    """The best plan of each of the next models, and what it would give and cost."""
    binding: str
    """The part of memory, or the constraint, that keeps a better candidate out."""
    change: str
    """The cheapest change that lets a better candidate in, and what it costs; empty when none was found."""


def choose(outcomes: Sequence[Plan | Rejection], request: Request, candidates: Sequence[Candidate]) -> Plan:
    """The best plan, carrying the reasons against the others; raises NothingFits when there is none.

    Others that fit come first, best first; then what was kept by force; then what did not fit, nearest first.
    """
    found = [o for o in outcomes if isinstance(o, Plan)]
    fitting = rank([p for p in found if not p.forced], request.goal)
    plans = [*fitting, *rank([p for p in found if p.forced], request.goal)]
    rejections = [o for o in outcomes if isinstance(o, Rejection)]
    if not plans:
        raise _nothing_fits(rejections, request, candidates)
    best, front = plans[0], {id(p) for p in pareto(fitting)}
    top = max((_sure(p) for p in fitting if p.quality.panel == best.quality.panel), default=0.0)
    others = tuple(
        Rejection(
            model=p.model.id,
            scheme=p.scheme,
            kv_type=p.settings.kv_type,
            context=p.settings.context,
            reason=p.forced or _why_not(best, p, request.goal, top=top),
            runtime=p.runtime,
            figures=None if p.forced else figures(p, on_front=id(p) in front),
        )
        for p in plans[1:]
    )
    near = sorted(rejections, key=lambda r: (not (r.excess or r.slowness), r.excess, r.slowness))
    return replace(best, rejected=(*others, *near))


def rank(plans: Sequence[Plan], goal: Goal) -> list[Plan]:
    """Best first; candidates whose scores come from different panels are never mixed.

    Quality: the lower end of the score, and within its noise the faster. Latency and throughput: the faster for
    one user, or for all slots together, of those whose sure score is ``WORTH`` of the best one's; the others after
    them. Context: the longest, then quality.
    """
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        groups.setdefault(plan.quality.panel, []).append(plan)
    by_size = sorted(groups, key=lambda panel: (panel == UNSCORED, -len({p.model.id for p in groups[panel]})))
    return [plan for panel in by_size for plan in _ordered(groups[panel], goal)]


def pareto(plans: Sequence[Plan]) -> list[Plan]:
    """The plans that no other beats or equals in sure quality, decode speed and memory together, in order.

    Only plans of one panel are compared with each other; ties keep the first.
    """
    points = [(p.quality.low, p.speed.decode_full, -p.memory.high) for p in plans]
    kept: dict[str, list[int]] = {}
    for at in sorted(range(len(plans)), key=lambda at: points[at], reverse=True):
        front = kept.setdefault(plans[at].quality.panel, [])
        if not any(all(a >= b for a, b in zip(points[other], points[at], strict=True)) for other in front):
            front.append(at)
    return [plans[at] for at in sorted(at for front in kept.values() for at in front)]


def figures(plan: Plan, *, on_front: bool) -> Figures:
    """What the report and the Pareto table show of a plan."""
    return Figures(
        memory=plan.memory.total,
        memory_high=plan.memory.high,
        decode=plan.speed.decode_full,
        decode_low=plan.speed.decode_full_low,
        quality=plan.quality.score,
        quality_low=plan.quality.low,
        panel=plan.quality.panel,
        on_front=on_front,
    )


def explain(chosen: Plan, request: Request, candidates: Sequence[Candidate]) -> Explanation:
    """Why ``chosen``, why not the next models, what binds, and the cheapest change that would give a better one.

    Changes are tried, not guessed: each is a request of its own, surveyed for the near misses.
    """
    guessed = "" if chosen.model.prune is None else "; what it scores is a guess by size until it is made"
    return Explanation(
        why=f"{_why(chosen, request.goal)}{guessed}",
        against=tuple(_against(chosen)),
        binding=_binding(chosen),
        change=_change(chosen, request, candidates),
    )


# ── ranking ──────────────────────────────────────────────────────────────────────────────────────────


def _ordered(plans: Sequence[Plan], goal: Goal) -> list[Plan]:
    floor = WORTH * max(p.quality.low for p in plans)
    match goal:
        case "latency":
            return _by(plans, lambda p: (p.quality.low >= floor, p.speed.decode_full_low))
        case "throughput":
            return _by(plans, lambda p: (p.quality.low >= floor, p.speed.decode_all_low))
        case "context":
            return _by(plans, lambda p: (p.settings.context, p.quality.low))
        case "quality":
            return _by_sure_score(plans)


def _by(plans: Sequence[Plan], key: Callable[[Plan], tuple[float, float]]) -> list[Plan]:
    return sorted(plans, key=key, reverse=True)


def _by_sure_score(plans: Sequence[Plan]) -> list[Plan]:
    """Again and again the fastest of those within the noise of the best that is left; of llama.cpp's where there are
    any, for speed alone brings no Python onto a device."""
    left = _by(plans, lambda p: (_sure(p), p.speed.decode_full))
    ordered: list[Plan] = []
    while left:
        floor = _sure(left[0]) * (1.0 - NOISE)
        equal = next((at for at, p in enumerate(left) if _sure(p) < floor), len(left))
        best = max(
            range(equal),
            key=lambda at: (_is_plain(left[at].runtime), left[at].speed.decode_full, _sure(left[at])),
        )
        ordered.append(left.pop(best))
    return ordered


def _sure(plan: Plan) -> float:
    return _discounted(plan.quality.low, plan.runtime)


def _discounted(low: float, runtime: str) -> float:
    """The score that counts for quality. What another runtime than llama.cpp keeps of a model is known less well, and
    it needs a Python on the device: it is taken where it is better by more than the noise of both."""
    return low * (1.0 if _is_plain(runtime) else 1.0 - NOISE)


def _is_plain(runtime: str) -> bool:
    """Whether a runtime needs no Python on the device."""
    return runtime == runtimes.llama_cpp.NAME


def _why_not(best: Plan, other: Plan, goal: Goal, *, top: float) -> str:
    """``top``: the highest score that counts among those that fit, whose noise decides what is equal."""
    if other.quality.panel != best.quality.panel:
        return f"no score in {best.quality.panel}; scores of different sources are not compared"
    quality = f"scores at least {other.quality.low:.1f} against {best.quality.low:.1f}"
    pace = f"decodes {other.speed.decode_full:.1f} tok/s against {best.speed.decode_full:.1f} with a full context"
    match goal:
        case "latency" if other.speed.decode_full_low > best.speed.decode_full_low:
            return f"{quality}, too little of the best sure score to count"
        case "latency":
            return pace
        case "throughput" if other.speed.decode_all_low > best.speed.decode_all_low:
            return f"{quality}, too little of the best sure score to count"
        case "throughput":
            return f"{other.speed.decode_all:.1f} tok/s in all slots together against {best.speed.decode_all:.1f}"
        case "context" if other.settings.context != best.settings.context:
            return f"holds {other.settings.context} tokens against {best.settings.context}"
        case "quality" if (
            _is_plain(best.runtime)
            and not _is_plain(other.runtime)
            and (_sure(other) >= top * (1.0 - NOISE) or other.quality.low > best.quality.low)
        ):
            return f"{quality}, no more than the noise of two runtimes"
        case "quality" if _sure(other) >= top * (1.0 - NOISE):
            return f"{quality}, within the noise, and {pace}"
        case "quality" if _sure(other) >= _sure(best) * (1.0 - NOISE):
            return f"{quality}, more than the noise below the best that fits"
        case _:
            return quality


# ── explaining ───────────────────────────────────────────────────────────────────────────────────────


def _why(chosen: Plan, goal: Goal) -> str:
    others = [
        (r.figures.quality_low, r.runtime)
        for r in chosen.rejected
        if r.figures is not None and r.figures.panel == chosen.quality.panel
    ]
    panel = chosen.quality.panel
    size = f"of {len(others) + 1} that fit" + ("" if panel == UNSCORED else f" and are scored in {panel}")
    match goal:
        case "latency":
            return f"the fastest for one user {size}, at {WORTH:.0%} or more of the best sure score"
        case "throughput":
            return (
                f"the most tokens in all slots together {size}, at {WORTH:.0%} or more of the best sure score"
            )
        case "context":
            return f"the longest context {size}, then the best sure score"
        case "quality":
            scores = [_sure(chosen), *(_discounted(low, runtime) for low, runtime in others)]
            names = [chosen.runtime, *(runtime for _, runtime in others)]
            equal = sum(
                score >= max(scores) * (1.0 - NOISE) and _is_plain(name) == _is_plain(chosen.runtime)
                for score, name in zip(scores, names, strict=True)
            )
            low = f"{chosen.quality.low:.1f}"
            if equal == 1:
                best = "what surely keeps most" if panel == UNSCORED else "the best score one can be sure of"
                return f"{best}, {low}, {size}"
            does = "keeps" if panel == UNSCORED else "scores"
            return f"surely {does} {low}, {size}: the fastest of {equal} within {NOISE:.0%} of the best"


def _against(chosen: Plan) -> Iterator[str]:
    seen = {chosen.model.id}
    for other in chosen.rejected:
        if other.figures is None or other.model in seen:
            continue
        seen.add(other.model)
        pace = other.figures.decode - chosen.speed.decode_full
        memory = other.figures.memory - chosen.memory.total
        yield (
            f"{other.candidate}: {other.reason}; {pace:+.1f} tok/s, "
            f"{'-' if memory < 0 else '+'}{show(abs(memory))} of memory"
        )
        if len(seen) > RUNNERS_UP:
            return


def _binding(chosen: Plan) -> str:
    tightest = binding(chosen.memory, chosen.budget)
    pool, limit = (
        (chosen.memory.high, chosen.budget.device)
        if chosen.budget.unified or tightest.startswith("device")
        else (chosen.memory.at("host"), chosen.budget.host)
    )
    if not chosen.budget.unified and tightest.startswith("device"):
        pool = chosen.memory.at("device")
    return f"{tightest}: up to {show(pool)} of {show(limit)} taken, {show(limit - pool)} left"


def _change(chosen: Plan, request: Request, candidates: Sequence[Candidate]) -> str:
    at_hand = {_combination(chosen): chosen.speed.decode_full_low} | {
        (r.model, r.runtime, r.scheme, r.kv_type, r.context): r.figures.decode_low
        for r in chosen.rejected
        if r.figures is not None
    }
    models = _worth_trying(chosen, candidates)
    for words, changed in _changes(request, chosen):
        outcomes = [
            o
            for o in survey(changed, models)
            if isinstance(o, Plan)
            and not o.forced
            and o.quality.panel == chosen.quality.panel
            and o.speed.decode_full_low > at_hand.get(_combination(o), 0.0) * (1 + NOISE)
        ]
        found = rank([chosen, *outcomes], request.goal)[0]
        if found is not chosen and (
            request.goal != "quality" or found.quality.low > chosen.quality.low * (1 + NOISE)
        ):
            return (
                f"{words} would allow {label(found)}: scores at least {found.quality.low:.1f} "
                f"({found.quality.low - chosen.quality.low:+.1f}), decodes {found.speed.decode_full:.1f} tok/s with a "
                f"full context ({found.speed.decode_full - chosen.speed.decode_full:+.1f})"
            )
    return ""


def _combination(plan: Plan) -> tuple[str, str, str, str, int]:
    return plan.model.id, plan.runtime, plan.scheme, plan.settings.kv_type, plan.settings.context


def _worth_trying(chosen: Plan, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The chosen model, and those of the same panel that scored as much or more unquantized and were refused for
    memory or speed, nearest first."""
    by_id = {c.model.id: c for c in candidates}
    names = dict.fromkeys(r.model for r in chosen.rejected if r.excess or r.slowness)
    panel = chosen.quality.panel
    whole = chosen.quality.score / chosen.quality.retention
    near = [
        by_id[name]
        for name in names
        if name in by_id
        and name != chosen.model.id
        and (panel == UNSCORED or (panel in by_id[name].panels and by_id[name].score(panel) >= whole))
    ]
    return [by_id[chosen.model.id], *near[:NEAR_MISSES]]


def _changes(request: Request, chosen: Plan) -> Iterator[tuple[str, Request]]:
    """From free to dear: what a user may give up."""
    if request.session == "desktop":
        yield "leaving out --desktop", replace(request, session="headless")
    yield from _faster(request)
    machine = Machine.of(request.profile)
    lighter = request.kv_type and runtimes.named(chosen.runtime).lighter_kv(request.kv_type, machine)
    if lighter:
        yield f"--kv-type {lighter}", replace(request, kv_type=lighter)
    if request.ubatch > 128:
        yield "--ubatch 128", replace(request, ubatch=128)
    context = chosen.settings.context
    for fewer in dict.fromkeys((request.slots // 2, 1)):
        if 0 < fewer < request.slots and request.goal != "context":
            kept = context // request.slots * fewer
            yield f"--slots {fewer} --context {kept}", replace(request, slots=fewer, context=kept)
    for shorter in (context // 2, context // 4):
        if shorter >= 512 * request.slots and request.goal != "context":
            yield f"--context {shorter}", replace(request, context=shorter)
    floor = chosen.speed.decode_full_low
    for slower in (floor / 1.5, floor / 3):
        if request.min_decode is None or slower < request.min_decode:
            yield f"--min-tokens-per-second {slower:.1f}", replace(request, min_decode=round(slower, 1))


def _faster(request: Request) -> Iterator[tuple[str, Request]]:
    """Power modes that read or compute faster than the present one, the slowest first."""

    def pace(mode: PowerMode) -> tuple[float, float]:
        machine = speed.machine(request.profile, mode)
        return machine.bandwidth, machine.fp32

    bandwidth, fp32 = pace(request.profile.mode(request.power_mode))
    for mode in sorted(request.profile.power_modes, key=pace):
        if pace(mode)[0] > bandwidth or pace(mode)[1] > fp32:
            yield f"--power-mode {mode.name}", replace(request, power_mode=mode.name)


def _nothing_fits(
    rejections: Sequence[Rejection], request: Request, candidates: Sequence[Candidate]
) -> NothingFits:
    """The refusal: the nearest candidate, its arithmetic, and the cheapest change that was tried and fits."""
    if not rejections:
        return NothingFits("there is no model to choose from", hint="name one with --model")
    slow = [r for r in rejections if r.slowness and not r.reach]
    large = [r for r in rejections if r.excess]
    if slow:
        nearest = min(slow, key=lambda r: r.slowness)
        return NothingFits(
            f"nothing is fast enough; nearest is {nearest.candidate}: {nearest.reason}",
            hint=f"{_faster_mode(nearest, request, candidates)}{nearest.hint}",
        )
    too_big = [r for r in rejections if r.oversize]
    if too_big:
        nearest = min(too_big, key=lambda r: r.oversize)
        return NothingFits(
            f"no file is small enough; nearest is {nearest.candidate}: {nearest.reason}", hint=nearest.hint
        )
    if not large:
        nearest = max(rejections, key=lambda r: (r.reach > 0, -r.slowness, r.reach))
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
        spec, profile=replace(request.profile, disk=request.room_on_disk), session=request.session,
        scheme=nearest.scheme, settings=settings, imatrix=request.imatrix, runtime=nearest.runtime,
    )  # fmt: skip
    tight: Place = "host" if tried.binding.startswith("host") else "device"
    free = f"free {-(-nearest.excess // MIB)} MiB on the device, or --force"
    on = ""
    if tried.change is not None and request.runtime is None and nearest.runtime != runtimes.llama_cpp.NAME:
        on = f"{' and' if tried.hint == WITHOUT_DESKTOP else ''} --runtime {nearest.runtime}"
    helps = f"{tried.hint}{on}{_price(tried.change, nearest, request, candidates)}"
    return NothingFits(
        f"nothing fits; nearest is {nearest.candidate}: {nearest.reason}"
        f"\n  budget {budget(request.profile, request.session).equation(tight)}",
        hint=f"{helps}; or {free}",
    )


def _faster_mode(nearest: Rejection, request: Request, candidates: Sequence[Candidate]) -> str:
    """The least power mode in which the nearest model is fast enough, and how fast; empty where there is none."""
    model = [c for c in candidates if c.model.id == nearest.model]
    for words, changed in _faster(request):
        plans = rank([o for o in survey(changed, model) if isinstance(o, Plan)], request.goal)
        if plans:
            return f"{words} (decodes {plans[0].speed.decode_full:.1f} tok/s with a full context); or "
    return ""


def _price(
    change: Change | None, nearest: Rejection, request: Request, candidates: Sequence[Candidate]
) -> str:
    """What the nearest candidate gives once changed: its speed and what is kept; or that it is then too slow."""
    if change is None:
        return ""
    grows = request.goal == "context" and request.context is None  # then to what fits, and slower
    changed = replace(
        request,
        session="headless" if change.headless else request.session,
        runtime=nearest.runtime,
        scheme=change.scheme or nearest.scheme,
        kv_type=change.kv_type or nearest.kv_type,
        ubatch=change.ubatch or request.ubatch,
        slots=change.slots or request.slots,
        context=change.context or (None if grows else nearest.context),
    )
    found = next(iter(survey(changed, [c for c in candidates if c.model.id == nearest.model])), None)
    match found:
        case Plan():
            return (
                f" (decodes {found.speed.decode_full:.1f} tok/s with a full context, surely keeps "
                f"{found.quality.kept_low:.1%} of the model)"
            )
        case Rejection(slowness=slowness) if slowness:
            return f" {found.hint}"
        case Rejection():
            return f" (and then: {found.reason})"
        case _:
            return ""
