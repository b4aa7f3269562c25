"""What an engineer hands on: device and choice, memory, speed, quality and checks as one value, each number with its
source.

`documents` reads, this module puts together, `render` writes HTML, Markdown, JSON and SVG. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgepack import bundle as bundles
from edgepack import check
from edgepack.check import CheckReport, Item
from edgepack.choice import Explanation
from edgepack.doctor import Diagnosis
from edgepack.errors import BadInput
from edgepack.evaluation import Quality
from edgepack.memory import Part
from edgepack.modelspec import ModelSpec
from edgepack.plan import UNSCORED, Plan, Rejection
from edgepack.report.documents import (
    Bundled,
    Checked,
    Described,
    Document,
    Examined,
    Measured,
    Planned,
)
from edgepack.report.sweep import Cell, Pace, sweep
from edgepack.units import show

How = Literal["exact", "fitted", "estimated", "calibrated", "measured", "given"]
"""``given``: what a profile, a catalog or an option says; ``estimated``: near, by how much is not known."""
Unit = Literal["bytes", "tok/s", "s", "score", "ratio", "nats", "perplexity", "tokens", "GB/s", "bits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One figure, how sure it is, and where it comes from."""

    name: str
    value: float
    unit: Unit
    low: float | None
    high: float | None
    how: How
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One part of the memory map."""

    name: str
    place: str
    bytes: int
    low: int
    high: int
    provenance: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One memory: what is predicted to lie in it, and what may."""

    name: str
    budget: int
    pieces: tuple[Piece, ...]
    arithmetic: tuple[tuple[str, int], ...]
    """Signed terms that add up to the budget; empty where the plan does not tell them."""

    @property
    def expected(self) -> int:
        return sum(piece.bytes for piece in self.pieces)

    @property
    def low(self) -> int:
        return sum(piece.low for piece in self.pieces)

    @property
    def high(self) -> int:
        return sum(piece.high for piece in self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPart:
    """One part as the server itself reported it."""

    name: str
    predicted: int
    measured: int
    provenance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One candidate of the survey."""

    model: str
    scheme: str
    runtime: str
    kv_type: str
    context: int
    verdict: Literal["chosen", "fits", "refused"]
    reason: str
    hint: str
    memory: int | None
    memory_high: int | None
    decode: float | None
    decode_low: float | None
    quality: float | None
    quality_low: float | None
    panel: str | None
    on_front: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPace:
    tokens: int
    decode: float
    same_device: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A bundle's own facts."""

    name: str
    manifest_digest: str
    bytes: int
    signature: str
    signature_message: str
    files: int
    told_by: str
    """The document whose words these are; empty where this report verified the bundle itself, every byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A check, row by row."""

    verdict: str
    sentence: str
    same_device: bool
    emulated: str | None
    machine: str
    items: tuple[Item, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One plan, bundle or check, and all that is known of it."""

    letter: str
    """A, B, C …: names it in comparisons."""
    name: str
    title: str
    device: str
    sentence: str
    inputs: tuple[str, ...]
    plan: Plan | None
    """Without the candidates, which ``options`` has."""
    explanation: Explanation | None
    """None too for a plan that was forced, which no reason speaks for."""
    release: Release | None
    pools: tuple[Pool, ...]
    parts_measured: tuple[MeasuredPart, ...]
    peak: int | None
    """Measured, of the whole server; None when it was not, cannot be read, or is an emulator's."""
    peak_source: str
    """Names another machine than the planned device where it was read on one."""
    options: tuple[Option, ...]
    pace: tuple[Pace, ...]
    pace_exact: bool
    """Whether each point is the planner's law at that context; else only the plan's own two points are known."""
    pace_measured: tuple[MeasuredPace, ...]
    cells: tuple[Cell, ...]
    quality: Quality | None
    quality_own: bool
    """Whether it is known to be of this subject's very weights: it came in the bundle, or names its file's digest."""
    check: Verdict | None
    diagnoses: tuple[Diagnosis, ...]
    numbers: tuple[Number, ...]
    notes: tuple[str, ...]

    @property
    def elsewhere(self) -> str:
        """Follows what a check measured on another machine; empty on the planned device, and without a check."""
        return "" if self.check is None or self.check.same_device else " on another machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One subject, or several to compare."""

    title: str
    tool: str
    subjects: tuple[Subject, ...]
    kind: Literal["report"] = "report"
    schema_version: Literal[1] = 1


Shapes = Callable[[Plan], ModelSpec | None]
"""The shapes of a plan's model, where they are known."""


def report_of(documents: Sequence[Document], *, shapes: Shapes, tool: str) -> Report:
    """The report on these documents, in their order; those of one plan or bundle become one subject.

    A check belongs to the plan whose digest it names, an inspection to the bundle of its digest, a quality to the
    bundle whose weights it measured, and to the only subject where nothing says otherwise. ``shapes`` lets the plan's
    own arithmetic be repeated at other contexts. ``tool``: name and version of edgepack. Raises BadInput for no
    document.
    """
    if not documents:
        raise BadInput("a report needs something to report on", hint="name a plan, a bundle or a check")
    groups: list[_Group] = []
    for document in sorted(documents, key=_rank):
        _joined(groups, document)
    letters = [chr(ord("A") + at % 26) * (1 + at // 26) for at in range(len(groups))]
    subjects = tuple(_subject(group, letter, shapes) for group, letter in zip(groups, letters, strict=True))
    return Report(title=_title(subjects), tool=tool, subjects=subjects)


def _title(subjects: Sequence[Subject]) -> str:
    if len(subjects) == 1:
        return subjects[0].title
    kinds = {
        "bundles": any(one.release is not None for one in subjects),
        "plans": any(one.release is None and one.plan is not None for one in subjects),
        "checks": any(one.release is None and one.plan is None and one.check is not None for one in subjects),
    }
    told = " and ".join(kind for kind, there in kinds.items() if there) or "documents"
    return f"{len(subjects)} {told} side by side"


# ── which documents belong together ──────────────────────────────────────────────────────────────────


@dataclass(slots=True, kw_only=True)
class _Group:
    plan: Plan | None = None
    plans: tuple[str, ...] = ()
    """Digests: of the plan itself, then of the one that gave a bundle its reasons."""
    explanation: Explanation | None = None
    inspected: bundles.Inspected | None = None
    told_by: str = ""
    check: CheckReport | None = None
    checked: str = ""
    """Path of the check."""
    quality: Quality | None = None
    quality_own: bool = False
    diagnoses: tuple[Diagnosis, ...] = ()
    paths: tuple[str, ...] = ()


def _rank(document: Document) -> int:
    """Bundles and plans first, whatever the order on the command line, so that what belongs to them finds them; what
    is known of a bundle before its checks, for each of them has it."""
    order: tuple[type, ...] = (Bundled, Planned, Described, Measured, Checked, Examined)
    return order.index(type(document))


def _joined(groups: list[_Group], document: Document) -> None:
    match document:
        case Bundled():
            groups.append(
                _Group(plan=document.plan, plans=(document.plan.digest,), inspected=document.inspected,
                       quality=document.inspected.quality, quality_own=document.inspected.quality is not None,
                       paths=(document.inspected.path,))
            )  # fmt: skip
        case Planned():
            _add_plan(groups, document)
        case Described():
            _add_description(groups, document)
        case Checked():
            _add_check(groups, document)
        case Measured():
            _add_quality(groups, document)
        case Examined():
            group = _which(groups, lambda g: document.report.name in g.paths, alone=True)
            group.diagnoses = document.report.diagnoses
            group.paths = (*group.paths, document.path)


def _add_plan(groups: list[_Group], document: Planned) -> None:
    """A plan beside the bundle that it became gives it its reasons, not its figures; other plans stand apart."""
    digest = document.plan.digest
    group = _which(groups, lambda g: digest in g.plans or _became(document.plan, g))
    if group.plan is None:
        group.plan = document.plan
    elif not group.plan.rejected:
        group.plan = replace(group.plan, rejected=document.plan.rejected)
    group.plans = tuple(dict.fromkeys((*group.plans, digest)))
    if len(group.plan.rejected) == len(
        document.plan.rejected
    ):  # reasons of the same choice, not of a wider one
        group.explanation = group.explanation or document.explanation
    group.paths = (*group.paths, document.path)


def _became(plan: Plan, group: _Group) -> bool:
    """Whether this is a bundle that may be built from the plan, and that no other plan has claimed."""
    bundled = group.inspected is not None and group.plan is not None and len(group.plans) == 1
    return bundled and group.plan is not None and _identity(group.plan) == _identity(plan)


def _add_description(groups: list[_Group], document: Described) -> None:
    """Says nothing new of a bundle that is at hand itself."""
    found = document.inspected
    group = _which(groups, lambda g: _digest(g) == found.manifest_digest)
    group.paths = (*group.paths, document.path)
    if group.inspected is None:
        group.inspected, group.told_by = found, document.path
        group.quality, group.quality_own = found.quality, found.quality is not None


def _add_check(groups: list[_Group], document: Checked) -> None:
    """Each check of a plan or bundle is a subject of its own, with the same plan and bundle."""
    named, bundle = document.report.plan, document.report.facts.bundle.manifest_digest
    group = _which(groups, lambda g: named in g.plans or _digest(g) == bundle)
    if group.check is not None:
        common = tuple(path for path in group.paths if path != group.checked)
        group = replace(group, diagnoses=(), paths=common)
        groups.append(group)
    group.check, group.checked = document.report, document.path
    group.paths = (*group.paths, document.path)


def _add_quality(groups: list[_Group], document: Measured) -> None:
    """To the bundle of the very weights; else to the only subject, if it has no other quality and no other GGUF."""
    found = document.quality
    group = next((group for group in groups if _holds(group, found.artifact)), None)
    own = group is not None
    if group is None and len(groups) == 1 and groups[0].quality is None and not _is_gguf(groups[0]):
        group = groups[0]
    if group is None:
        group = _Group()
        groups.append(group)
    group.quality, group.quality_own = found, own
    group.paths = (*group.paths, document.path)


def _which(groups: list[_Group], belongs: Callable[[_Group], bool], *, alone: bool = False) -> _Group:
    """The group that a document belongs to; the only one with ``alone``; else a new one."""
    found = next((group for group in groups if belongs(group)), None)
    if found is None and alone and len(groups) == 1:
        found = groups[0]
    if found is None:
        found = _Group()
        groups.append(found)
    return found


def _identity(plan: Plan) -> object:
    """A plan without what a build adds to it: the revision that was fetched, and counts from the weights at hand."""
    return (
        plan.profile,
        plan.session,
        plan.power_mode,
        plan.model.id,
        plan.scheme,
        plan.imatrix,
        plan.runtime,
        plan.runtime_version,
        plan.settings,
    )


def _digest(group: _Group) -> str:
    return "" if group.inspected is None else group.inspected.manifest_digest


def _holds(group: _Group, artifact: str) -> bool:
    """Whether the weights with this digest are the bundle's: one of its files, or what its own quality measured."""
    if group.inspected is None:
        return False
    own = group.inspected.quality
    return (own is not None and own.artifact == artifact) or any(
        file.digest.removeprefix("sha256:") == artifact for file in group.inspected.files
    )


def _is_gguf(group: _Group) -> bool:
    """Whether the weights are one file, whose digest a quality of it names; that of a folder is no file's."""
    return group.inspected is not None and any(file.path.endswith(".gguf") for file in group.inspected.files)


# ── one subject ──────────────────────────────────────────────────────────────────────────────────────


def _subject(group: _Group, letter: str, shapes: Shapes) -> Subject:
    plan, report = group.plan, group.check
    spec = None if plan is None else shapes(plan)
    swept = None if plan is None or spec is None else sweep(plan, spec)
    peak, source = _peak(plan, report)
    notes = list(plan.warnings) if plan is not None else []
    if plan is not None and swept is None:
        notes.append(
            "other contexts and numbers of users are not shown: the shapes of this model are not at hand, or do not "
            "give this plan's figures (name it with --model)"
        )
    if report is not None and plan is None:
        notes.append("the plan that this check judges is not among the inputs: name its bundle or plan too")
    return Subject(
        letter=letter,
        name=_name(group),
        title=_name(group) if plan is None else f"{plan.model.id} {plan.scheme} on {plan.profile.title}",
        device=plan.profile.title if plan is not None else "",
        sentence=_sentence(group),
        inputs=tuple(dict.fromkeys(group.paths)),
        plan=None if plan is None else replace(plan, rejected=()),
        explanation=None if plan is not None and plan.forced else group.explanation,
        release=_release(group),
        pools=() if plan is None else tuple(_pools(plan)),
        parts_measured=() if report is None else tuple(_measured_parts(report)),
        peak=peak,
        peak_source=source,
        options=() if plan is None else tuple(_options(plan)),
        pace=_two_points(plan) if swept is None else swept.pace,
        pace_exact=swept is not None,
        pace_measured=() if report is None else tuple(_measured_paces(report)),
        cells=() if swept is None else swept.cells,
        quality=group.quality,
        quality_own=group.quality_own,
        check=None if report is None else _verdict(report),
        diagnoses=group.diagnoses,
        numbers=tuple(_numbers(group, peak, source)),
        notes=tuple(notes),
    )


def _name(group: _Group) -> str:
    if group.plan is not None:
        return group.plan.name
    if group.inspected is not None:
        return group.inspected.name
    if group.check is not None:
        return group.check.facts.bundle.name
    return group.paths[0]


def _sentence(group: _Group) -> str:
    plan = group.plan
    if plan is None:
        if group.check is not None:
            return f"A check of {group.check.facts.bundle.name}: {group.check.verdict}."
        return f"{_name(group)}."
    settings, pace = plan.settings, plan.speed
    each = settings.context // settings.slots
    users = f"one user with {each:,} tokens of context"
    if settings.slots > 1:
        users = f"{settings.slots} users at once, {each:,} tokens of context each"
    speed, least, how = pace.decode_full, pace.decode_full_low, "with a full context"
    if settings.slots > 1:
        speed, least, how = pace.decode_all, pace.decode_all_low, "together with full contexts"
    told = f"{speed:,.1f} tokens a second {how}, at least {least:,.1f}"
    taken = max(_pools(plan), key=lambda pool: pool.high / max(pool.budget, 1))
    what = f"{plan.profile.title}: {plan.model.id} at {plan.scheme} on {plan.runtime}"
    if plan.forced:
        return (
            f"{what} {refusal(plan)}. Forced, it is meant to serve {users}, may take up to {show(taken.high)} with a "
            f"budget of {show(taken.budget)}, and would write {told}."
        )
    return (
        f"{what} is planned to serve {users}, to take at most {show(taken.high)} of the {show(taken.budget)} there "
        f"are, and to write {told}."
    )


def refusal(plan: Plan) -> str:
    """What is wrong with a plan that was forced, as the verb of a sentence; empty for one that was not."""
    if not plan.forced:
        return ""
    over = any(pool.high > pool.budget for pool in _pools(plan))
    return "does NOT fit" if over else "would be refused without --force"


def _release(group: _Group) -> Release | None:
    found = group.inspected
    if found is None:
        return None
    return Release(
        name=found.name,
        manifest_digest=found.manifest_digest,
        bytes=found.bytes,
        signature=found.signature.state,
        signature_message=found.signature.message,
        files=len(found.files),
        told_by=group.told_by,
    )


def _pools(plan: Plan) -> Iterator[Pool]:
    parts, room = plan.memory.parts, plan.budget
    if room.unified:
        yield Pool(name="memory", budget=room.device, pieces=_pieces(parts), arithmetic=room.arithmetic)
        return
    card = tuple(part for part in parts if part.place == "device")
    host = tuple(part for part in parts if part.place == "host")
    yield Pool(name="card", budget=room.device, pieces=_pieces(card), arithmetic=room.arithmetic)
    yield Pool(name="host", budget=room.host, pieces=_pieces(host), arithmetic=room.host_arithmetic)


def _pieces(parts: Sequence[Part]) -> tuple[Piece, ...]:
    return tuple(
        Piece(name=p.name, place=p.place, bytes=p.bytes, low=p.low, high=p.high, provenance=p.provenance, note=p.note)
        for p in parts
        if p.high
    )  # fmt: skip


def _measured_parts(report: CheckReport) -> Iterator[MeasuredPart]:
    for one in report.residuals:
        yield MeasuredPart(
            name=one.part, predicted=one.predicted, measured=one.measured, provenance=one.provenance
        )


def _peak(plan: Plan | None, report: CheckReport | None) -> tuple[int | None, str]:
    """Peak bytes and their source; none of an emulator, which is in the process and the larger part of it."""
    if plan is None or report is None or report.facts.memory is None or report.facts.failure is not None:
        return None, ""
    if report.emulated is not None:
        return None, ""
    peak, source = check.peak_of(plan, report.facts.memory, report.facts)
    return peak, source if report.same_device else f"{source}, on another machine"


def _options(plan: Plan) -> Iterator[Option]:
    yield Option(
        model=plan.model.id,
        scheme=plan.scheme,
        runtime=plan.runtime,
        kv_type=plan.settings.kv_type,
        context=plan.settings.context,
        verdict="refused" if plan.forced else "chosen",
        reason=plan.forced,
        hint="",
        memory=plan.memory.total,
        memory_high=plan.memory.high,
        decode=plan.speed.decode_full,
        decode_low=plan.speed.decode_full_low,
        quality=plan.quality.score,
        quality_low=plan.quality.low,
        panel=plan.quality.panel,
        on_front=False,
    )
    yield from (_other(one) for one in plan.rejected)


def _other(one: Rejection) -> Option:
    figures = one.figures
    return Option(
        model=one.model,
        scheme=one.scheme,
        runtime=one.runtime,
        kv_type=one.kv_type,
        context=one.context,
        verdict="refused" if figures is None else "fits",
        reason=one.reason,
        hint=one.hint,
        memory=None if figures is None else figures.memory,
        memory_high=None if figures is None else figures.memory_high,
        decode=None if figures is None else figures.decode,
        decode_low=None if figures is None else figures.decode_low,
        quality=None if figures is None else figures.quality,
        quality_low=None if figures is None else figures.quality_low,
        panel=None if figures is None else figures.panel,
        on_front=figures is not None and figures.on_front,
    )


def _two_points(plan: Plan | None) -> tuple[Pace, ...]:
    """What the plan itself says: with the context empty, and with it full."""
    if plan is None:
        return ()
    pace, full = plan.speed, plan.settings.context // plan.settings.slots
    return (
        Pace(tokens=0, decode=pace.decode, decode_low=pace.decode_low),
        Pace(tokens=full, decode=pace.decode_full, decode_low=pace.decode_full_low),
    )


def _measured_paces(report: CheckReport) -> Iterator[MeasuredPace]:
    if report.emulated is not None:  # an emulator's speed says nothing of the device's
        return
    speed, fill = report.facts.speed, report.facts.fill
    if speed is not None and speed.decode_per_second is not None:
        yield MeasuredPace(
            tokens=speed.prompt_tokens, decode=speed.decode_per_second, same_device=report.same_device
        )
    if fill is not None and fill.decode_per_second is not None and fill.held_tokens:
        yield MeasuredPace(
            tokens=max(fill.held_tokens), decode=fill.decode_per_second, same_device=report.same_device
        )


def _verdict(report: CheckReport) -> Verdict:
    machine = report.facts.machine
    failed = [
        f"{item.name} ({item.message or item.measured})" for item in report.items if item.status == "fail"
    ]
    warned = [item.name for item in report.items if item.status == "warn"]
    where = "the planned device" if report.same_device else "another machine than the planned device"
    if report.emulated is not None:
        where = f"an emulation ({report.emulated})"
    told = f"failed: {'; '.join(failed)}" if failed else report.verdict
    also = f"; warnings on {', '.join(warned)}" if warned else ""
    return Verdict(
        verdict=report.verdict,
        sentence=f"On {where} the check {told}{also}.",
        same_device=report.same_device,
        emulated=report.emulated,
        machine=f"{machine.cpu or machine.arch}, {machine.cores} cores, "
        + (show(machine.memory_total) if machine.memory_total is not None else "memory unknown"),
        items=report.items,
        notes=report.notes,
    )


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────


def _number(
    name: str, value: float, unit: Unit, how: How, source: str, around: tuple[float, float] | None = None
) -> Number:
    low, high = around or (None, None)
    return Number(name=name, value=value, unit=unit, low=low, high=high, how=how, source=source)


def _numbers(group: _Group, peak: int | None, source: str) -> Iterator[Number]:
    if group.plan is not None:
        yield from _planned_numbers(group.plan)
    if group.check is not None:
        yield from _checked_numbers(group.check)
    if peak is not None:
        yield _number("peak memory", peak, "bytes", "measured", f"check: {source}")
    if group.quality is not None:
        yield from _quality_numbers(group.quality)


def _planned_numbers(plan: Plan) -> Iterator[Number]:
    profile = f"profile {plan.profile.name}"
    for name, value in plan.budget.arithmetic:
        yield _number(f"budget: {name}", value, "bytes", "given", profile)
    yield _number("budget", plan.budget.device, "bytes", "given", f"{profile}: the sum of its terms")
    if not plan.budget.unified:
        yield _number("budget of the host", plan.budget.host, "bytes", "given", profile)
    bandwidth = plan.profile.mode(plan.power_mode).bandwidth_gbs
    yield _number("memory bandwidth", bandwidth, "GB/s", "given", f"{profile}, power mode {plan.power_mode}")
    for part in plan.memory.parts:
        if part.high:
            name, ends = f"{part.name} ({part.place})", (part.low, part.high)
            yield _number(name, part.bytes, "bytes", part.provenance, part.note, ends)
    total = (plan.memory.low, plan.memory.high)
    sure: How = "exact" if total[0] == total[1] else "fitted"
    yield _number(
        f"{memory_name(plan)} in all", plan.memory.total, "bytes", sure, "the sum of the parts", total
    )
    size: How = "estimated" if plan.memory.file_provenance == "fitted" else plan.memory.file_provenance
    yield _number("artifact file", plan.memory.file_bytes, "bytes", size, plan.scheme)
    yield _number("bits per weight", plan.memory.bits_per_weight, "bits", size, plan.scheme)
    pace = plan.speed
    law = "docs/arithmetic.md, speed"
    yield _number("decode", pace.decode, "tok/s", pace.provenance, law, (pace.decode_low, pace.decode_high))
    for name, speed, low in (
        ("decode, context full", pace.decode_full, pace.decode_full_low),
        ("decode, all slots together", pace.decode_all, pace.decode_all_low),
    ):
        yield Number(
            name=name, value=speed, unit="tok/s", low=low, high=None, how=pace.provenance, source=law
        )
    yield _number(
        "prompt reading", pace.prefill, "tok/s", "fitted", law, (pace.prefill_low, pace.prefill_high)
    )
    yield Number(
        name=f"first token after {pace.prompt} tokens",
        value=pace.first_token,
        unit="s",
        low=None,
        high=pace.first_token_high,
        how="fitted",
        source=law,
    )
    quality = plan.quality
    if quality.panel != UNSCORED:
        source, around = f"panel {quality.panel}", (quality.low, quality.high)
        yield _number("expected score", quality.score, "score", "fitted", source, around)
    yield Number(
        name="kept of the unquantized model",
        value=quality.retention,
        unit="ratio",
        low=quality.kept_low,
        high=None,
        how="fitted",
        source="docs/quantizing.md",
    )


def _checked_numbers(report: CheckReport) -> Iterator[Number]:
    where = "check, on the planned device" if report.same_device else "check, on another machine"
    if report.emulated is not None:
        where = f"check, under {report.emulated}"
    for one in report.residuals:
        yield _number(f"{one.part}, as the server reports it", one.measured, "bytes", "measured", where)
    if report.emulated is not None:
        return
    speed, fill = report.facts.speed, report.facts.fill
    for name, value in (
        ("decode, measured", None if speed is None else speed.decode_per_second),
        ("prompt reading, measured", None if speed is None else speed.prefill_per_second),
        ("decode, context full, measured", None if fill is None else fill.decode_per_second),
    ):
        if value is not None:
            yield _number(name, value, "tok/s", "measured", where)


def _quality_numbers(found: Quality) -> Iterator[Number]:
    where = (
        f"{found.text.tokens:,} tokens of {text_name(found)} on {found.runtime}, {found.level:.0%} interval"
    )
    own = found.perplexity
    yield _number("perplexity", own.value, "perplexity", "measured", where, (own.low, own.high))
    if found.parent is not None:
        theirs, kl, p99 = found.parent.perplexity, found.parent.kl, found.parent.kl_p99
        loss, same = found.parent.ppl_loss, found.parent.same_top
        yield _number(
            "perplexity of the parent",
            theirs.value,
            "perplexity",
            "measured",
            where,
            (theirs.low, theirs.high),
        )
        yield _number("loss of perplexity", loss.value, "ratio", "measured", where, (loss.low, loss.high))
        yield _number("KL to the parent", kl.value, "nats", "measured", where, (kl.low, kl.high))
        yield _number("KL that 99 % stay below", p99.value, "nats", "measured", where, (p99.low, p99.high))
        yield _number(
            "same first choice as the parent", same.value, "ratio", "measured", where, (same.low, same.high)
        )
    if found.tasks is not None:
        right = found.tasks.accuracy
        where = f"{found.tasks.items} items of {found.tasks.name}"
        yield _number("right answers", right.value, "ratio", "measured", where, (right.low, right.high))
        if found.tasks.parent is not None:
            right = found.tasks.parent
            yield _number(
                "right answers of the parent",
                right.value,
                "ratio",
                "measured",
                where,
                (right.low, right.high),
            )


def text_name(found: Quality) -> str:
    """What a quality was measured on, as part of a sentence."""
    return "the built-in text" if found.text.name == "built-in" else found.text.name


def memory_name(plan: Plan) -> str:
    """What the sum of all parts is of: with a card it is of two memories, and of neither's budget."""
    return "memory" if plan.budget.unified else "card and host"


def part_name(name: str, place: str = "host") -> str:
    """A part of memory (`edgepack.parts.Part.name`) for people; a name that is not known stays as it is."""
    if name == "host_copy" and place == "device":
        return "second copy of weights"
    return _PARTS.get(name, name)


_PARTS = {
    "host_copy": "copy for the CPU",
    "kv_cache": "KV cache",
    "recurrent_state": "recurrent state",
    "rope_cache": "rotary tables",
    "compute": "compute buffers",
    "output": "logits",
    "graphs": "CUDA graphs",
    "workspace": "workspace of libraries",
    "process": "the process itself",
}


def shown(number: float, unit: Unit) -> str:
    """A value with its unit, for people: GiB are 1024³ bytes, GB/s 10⁹ bytes a second."""
    match unit:
        case "bytes":
            return show(round(number))
        case "ratio":
            return f"{number:.2%}"
        case "tok/s" | "GB/s":
            return f"{number:,.1f} {unit}" if number < 1000 else f"{number:,.0f} {unit}"
        case "s":
            return f"{number:.2f} s"
        case "nats":
            return f"{number:.4g} nats"
        case "tokens":
            return f"{number:,.0f}"
        case "bits":
            return f"{number:.2f} bits"
        case "score":
            return f"{number:.1f}"
        case "perplexity":
            return f"{number:.3f}"


def interval(number: Number) -> str:
    """Its ends; empty for a number without any, or whose ends are itself."""
    if number.low is None and number.high is None:
        return ""
    if number.low == number.value == number.high:
        return ""
    if number.high is None and number.low is not None:
        return f"at least {shown(number.low, number.unit)}"
    if number.low is None and number.high is not None:
        return f"up to {shown(number.high, number.unit)}"
    low, high = shown(number.low or 0.0, number.unit), shown(number.high or 0.0, number.unit)
    if low.rpartition(" ")[2] == high.rpartition(" ")[2]:
        low = low.rpartition(" ")[0] or low  # the unit once
    return f"[{low}, {high}]"
