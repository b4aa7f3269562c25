"""A report as sections of words, drawings and tables, the same for a browser and for Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from edgepack.plan import UNSCORED
from edgepack.report import (
    Option,
    Release,
    Report,
    Subject,
    interval,
    memory_name,
    part_name,
    refusal,
    shown,
    text_name,
)
from edgepack.report.colors import PARTS
from edgepack.runtimes import llama_cpp
from edgepack.units import show

Mark = Literal["", "good", "bad", "warn", "soft", "p1", "p2", "p3", "p4", "p5", "p6"]


class Entry(NamedTuple):
    """One cell of a table."""

    words: str
    mark: Mark = ""
    exact: str = ""
    """More digits, or the reason, for those who hover."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    """The first cell of each names the row."""
    numeric: tuple[int, ...] = ()
    """Columns of figures."""
    folded: bool = False
    """Long, and not needed at first sight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    id: str
    title: str
    badge: Entry | None = None
    """The one word that a reader looks for first."""
    words: tuple[str, ...] = ()
    drawings: tuple[str, ...] = ()
    """Names of drawings (plots.py), shown where they were drawn."""
    tables: tuple[Table, ...] = ()


VERDICTS: dict[str, tuple[str, Mark]] = {
    "pass": ("pass", "good"),
    "warn": ("warning", "warn"),
    "fail": ("FAIL", "bad"),
    "note": ("note", "soft"),
    "not-comparable": ("not comparable", "soft"),
}
UNITS = "KiB, MiB and GiB are 1024, 1024² and 1024³ bytes; GB and GB/s are 10⁹."
HOW = (
    "exact: counted by the same arithmetic as the program's own; fitted: from a law with constants fitted to "
    "measurements, with the interval that left-out measurements showed; estimated: near, by how much is not known; "
    "calibrated: from this device's own runs; measured: read while it ran; given: from a profile or a catalog"
)


def comparison(report: Report) -> Section | None:
    """Several subjects side by side; None for one."""
    subjects = report.subjects
    if len(subjects) < 2:
        return None
    rows = tuple(
        (Entry(name), *entries)
        for name, entries in _compared_rows(subjects)
        if any(entry.words for entry in entries)
    )
    head = ("", *(one.letter for one in subjects))
    return Section(
        id="compared",
        title="Side by side",
        words=tuple(f"{one.letter}: {one.sentence}" for one in subjects),
        drawings=("compared",),
        tables=(Table(caption="What each is, takes and gives", head=head, rows=rows),),
    )


def sections(subject: Subject) -> Iterator[Section]:
    """What the subject has anything to say on, in the order in which people ask."""
    for found in (
        _summary(subject),
        _memory(subject),
        _check(subject),
        _candidates(subject),
        _pace(subject),
        _users(subject),
        _quality(subject),
        _diagnoses(subject),
        _numbers(subject),
    ):
        if found is not None:
            yield found


# ── side by side ─────────────────────────────────────────────────────────────────────────────────────


def _compared_rows(subjects: Sequence[Subject]) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    plans = [one.plan for one in subjects]
    yield "name", tuple(Entry(one.name) for one in subjects)
    yield "device", tuple(Entry(one.device) for one in subjects)
    yield "model", tuple(Entry("" if p is None else p.model.id) for p in plans)
    yield "scheme", tuple(Entry("" if p is None else p.scheme) for p in plans)
    yield "runtime", tuple(Entry("" if p is None else f"{p.runtime} {p.runtime_version}") for p in plans)
    yield (
        "context",
        tuple(
            Entry("" if p is None else f"{p.settings.context:,} tokens in {p.settings.slots} slot(s)")
            for p in plans
        ),
    )
    yield "KV cache", tuple(Entry("" if p is None else p.settings.kv_type) for p in plans)
    names = dict.fromkeys(number.name for one in subjects for number in one.numbers)
    for name in names:
        if name in _COMPARED:
            yield name, tuple(_figure(one, name) for one in subjects)
    yield (
        "bundle",
        tuple(Entry("" if one.release is None else show(one.release.bytes)) for one in subjects),
    )
    yield (
        "signature",
        tuple(
            Entry("" if one.release is None else f"{one.release.signature}{_as_told(one.release)}")
            for one in subjects
        ),
    )
    yield "checked on", tuple(Entry("" if one.check is None else one.check.machine) for one in subjects)
    yield "check", tuple(_checked(one) for one in subjects)


_COMPARED = frozenset(
    {
        "budget",
        "budget of the host",
        "memory bandwidth",
        "memory in all",
        "card and host in all",
        "peak memory",
        "decode",
        "decode, context full",
        "decode, all slots together",
        "decode, measured",
        "decode, context full, measured",
        "prompt reading",
        "expected score",
        "kept of the unquantized model",
        "perplexity",
        "loss of perplexity",
        "KL to the parent",
        "same first choice as the parent",
        "right answers",
        "artifact file",
        "bits per weight",
    }
)


def _figure(subject: Subject, name: str) -> Entry:
    number = next((number for number in subject.numbers if number.name == name), None)
    if number is None:
        return Entry("")
    ends = interval(number)
    text = shown(number.value, number.unit) + (f", {ends}" if ends.startswith(("at", "up")) else f" {ends}")
    if name == "expected score":
        text = f"{text} ({number.source})"
    elif name == "peak memory" or name.endswith("measured"):
        text = f"{text.strip()} ({subject.elsewhere.strip()})" if subject.elsewhere else text
    return Entry(text.strip(), exact=f"{number.how}: {number.source}")


def _as_told(release: Release) -> str:
    """Whose words those on a bundle are, where it is not at hand itself."""
    return f", as {release.told_by} says" if release.told_by else ""


def _checked(subject: Subject) -> Entry:
    if subject.check is None:
        return Entry("not checked", "soft")
    failed, here = subject.check.verdict == "failed", subject.check.same_device
    where = "" if here else ", on another machine: speed not judged"
    return Entry(f"check {subject.check.verdict}{where}", "bad" if failed else "good" if here else "warn")


# ── one subject ──────────────────────────────────────────────────────────────────────────────────────


def _summary(subject: Subject) -> Section:
    words = [subject.sentence]
    if subject.check is not None:
        words.append(subject.check.sentence)
    rows: list[tuple[str, str]] = [("name", subject.name), ("from", ", ".join(subject.inputs))]
    plan, release, why = subject.plan, subject.release, subject.explanation
    if why is not None:
        words.append(f"Why this one: {why.why}.")
        rows.append(("what binds" if why.change else "largest part", why.binding))
        rows.append(
            (
                "what would change the choice",
                why.change or "nothing that was tried lets a better candidate in",
            )
        )
    if plan is not None:
        rows += [
            ("model", f"{plan.model.id}, {plan.model.parameters:,} parameters, {plan.model.license}"),
            ("revision", plan.model.revision or "not pinned: recorded when it is fetched"),
            ("runtime", f"{plan.runtime} {plan.runtime_version}"),
            ("KV cache", plan.settings.kv_type),
            ("power mode", f"{plan.power_mode}, {plan.session}"),
        ]
    if release is not None:
        rows += [
            (
                "bundle",
                f"{release.name}, {show(release.bytes)} in {release.files} files"
                f"{_as_told(release) or ', every byte verified'}",
            ),
            ("manifest", release.manifest_digest),
            ("signature", f"{release.signature_message}{_as_told(release)}"),
        ]
    tables = [_listed("Facts", rows)]
    if why is not None and why.against:
        tables.append(
            Table(
                caption="Why not the next ones",
                head=("runner-up", "why not"),
                rows=tuple(
                    (Entry(name), Entry(reason))
                    for name, _, reason in (text.partition(": ") for text in why.against)
                ),
            )
        )
    notes = tuple(f"Note: {text}" for text in subject.notes)
    return Section(
        id=f"summary-{subject.letter}",
        title="In short",
        badge=_badge(subject),
        words=(*words, *notes),
        tables=tuple(tables),
    )


def _badge(subject: Subject) -> Entry | None:
    """What a check found; else whether the plan was forced."""
    if subject.check is not None:
        return _checked(subject)
    forced = subject.plan is not None and refusal(subject.plan)
    return Entry(forced, "bad") if forced else None


def _memory(subject: Subject) -> Section | None:
    if not subject.pools:
        if not subject.parts_measured:
            return None
        return Section(id=f"memory-{subject.letter}", title="Memory", tables=(_parts_measured(subject),))
    words = []
    for pool in subject.pools:
        terms = " ".join(f"{'−' if v < 0 else '+'} {show(abs(v))} {n}" for n, v in pool.arithmetic if v)
        left = pool.budget - pool.high
        room = f"{show(left)} are left" if left >= 0 else f"{show(-left)} too much"
        where = {"memory": "Memory", "card": "The card", "host": "The host"}[pool.name]
        words.append(
            f"{where}: {show(pool.expected)} expected, {show(pool.low)} to {show(pool.high)}, of a budget of "
            f"{show(pool.budget)}{' = ' + terms.lstrip('+ ') if terms else ''}; with the upper end {room}."
        )
    if subject.peak is not None:
        words.append(
            f"Measured{subject.elsewhere}: {show(subject.peak)} at the highest, by "
            f"{subject.peak_source.removesuffix(f',{subject.elsewhere}')}; the bar's hatched end is what "
            "the server does not itemize (its code, tables and scratch). Logs round, llama.cpp's to 0.01 MiB and "
            "vLLM's to 0.01 GiB: the check says which differences are within that."
        )
    words.append(
        "In the picture the bracket is the interval of the sum, the red line the budget, and a black stroke the "
        "measured peak. “host” is the processor's side and “device” the accelerator's; on some boards they share one "
        "memory."
    )
    return Section(
        id=f"memory-{subject.letter}",
        title="Memory map",
        words=tuple(words),
        drawings=(f"memory-{subject.letter}",),
        tables=(_parts(subject),),
    )


def _parts(subject: Subject) -> Table:
    found = {one.name: one for one in subject.parts_measured}
    planned = [piece for pool in subject.pools for piece in pool.pieces]
    sums = {name: sum(piece.bytes for piece in planned if piece.name == name) for name in found}
    times = Counter(part_name(piece.name, piece.place) for piece in planned)
    rows = []
    for piece in planned:
        one, name = found.get(piece.name), part_name(piece.name, piece.place)
        whole = one is not None and sums[piece.name] == piece.bytes == one.predicted
        ends = "" if piece.low == piece.high else f"{show(piece.low)} to {show(piece.high)}"
        rows.append(
            (
                Entry(
                    f"{name} ({piece.note})" if times[name] > 1 and piece.note else name,
                    PARTS.get(piece.name, "p5"),
                    f"{piece.name}: {piece.note}",
                ),
                Entry(piece.place),
                Entry(show(piece.bytes), exact=f"{piece.bytes:,} bytes"),
                Entry(ends),
                Entry(piece.provenance),
                *_held(piece.bytes, one.measured if one is not None and whole else None),
            )
        )
    head = ("part", "place", "predicted", "interval", "how sure", "measured", "difference")
    width = 7 if any(row[5].words for row in rows) else 5
    return Table(
        caption="Parts of the memory map",
        head=head[:width],
        rows=tuple(row[:width] for row in rows),
        numeric=(2, 3, 5, 6),
    )


def _held(predicted: int, measured: int | None) -> tuple[Entry, Entry]:
    if measured is None:
        return Entry(""), Entry("")
    difference = measured - predicted
    sign = "+" if difference > 0 else "−" if difference < 0 else "±"
    return (
        Entry(show(measured), exact=f"{measured:,} bytes"),
        Entry(f"{sign}{show(abs(difference))}", exact=f"{difference:+,} bytes"),
    )


def _parts_measured(subject: Subject) -> Table:
    return Table(
        caption="Parts as the server reported them",
        head=("part", "predicted", "measured", "difference", "how sure"),
        rows=tuple(
            (
                Entry(part_name(one.name), exact=one.name),
                Entry(show(one.predicted), exact=f"{one.predicted:,} bytes"),
                *_held(one.predicted, one.measured),
                Entry(one.provenance),
            )
            for one in subject.parts_measured
        ),
        numeric=(1, 2, 3),
    )


def _check(subject: Subject) -> Section | None:
    check = subject.check
    if check is None:
        return None
    rows = tuple(
        (
            Entry(item.name),
            Entry(*VERDICTS[item.status]),
            Entry(item.expected),
            Entry(item.measured),
            Entry(item.message),
        )
        for item in check.items
    )
    words = [check.sentence, f"Run on {check.machine}."]
    if not check.same_device:
        words.append(
            "Parts and answers are the server's own doing and were judged. Speed was not; a peak memory that misses "
            "is only warned about."
        )
    return Section(
        id=f"check-{subject.letter}",
        title="Check",
        words=(*words, *check.notes),
        tables=(
            Table(
                caption="Each promise of the plan, and what was measured",
                head=("promise", "verdict", "expected", "measured", "remark"),
                rows=rows,
            ),
        ),
    )


def _candidates(subject: Subject) -> Section | None:
    if len(subject.options) < 2 or subject.plan is None:
        return None
    panel, memory = subject.plan.quality.panel, memory_name(subject.plan)
    fitting = [one for one in subject.options if one.verdict != "refused"]
    refused = [one for one in subject.options if one.verdict == "refused"]
    in_sight = [one for one in fitting if one.verdict == "chosen" or (one.on_front and one.panel == panel)]
    in_sight.sort(key=lambda one: (one.verdict != "chosen", -(one.quality_low or 0)))
    rest = [one for one in fitting if one not in in_sight]
    tables = []
    if in_sight:
        tables.append(
            _options(
                "The choice, and the candidates that none beats in quality, speed and memory",
                in_sight,
                memory,
            )
        )
    if rest:
        tables.append(_options(f"{len(rest)} more that fit", rest, memory, folded=True))
    if refused:
        tables.append(
            Table(
                caption=f"{len(refused)} that were refused, and why",
                head=("candidate", "runtime", "KV", "context", "why", "what would help"),
                rows=tuple(
                    (
                        Entry(f"{one.model} {one.scheme}"),
                        Entry(one.runtime),
                        Entry(one.kv_type),
                        Entry(f"{one.context:,}" if one.context else ""),
                        Entry(one.reason),
                        Entry(one.hint),
                    )
                    for one in refused
                ),
                numeric=(3,),
                folded=True,
            )
        )
    return Section(
        id=f"candidates-{subject.letter}",
        title="Candidates",
        words=(_weighed(subject.options, panel),),
        drawings=(f"candidates-{subject.letter}",),
        tables=tuple(tables),
    )


def _weighed(options: Sequence[Option], panel: str) -> str:
    """How many candidates there are of each kind, and what the drawing's marks say of them."""
    fitting = [one for one in options if one.verdict != "refused"]
    first = [one for one in fitting if one.panel == panel]
    weighed = f"{len(options):,} were weighed, {len(fitting)} fit"
    if not fitting:
        return f"{weighed}."
    front = sum(one.on_front for one in first)
    others = len(fitting) - len(first)
    scored, apart, best, unit = (
        f"{len(first)} have scores in {panel}",
        "have other scores or none, which are not compared",
        "the best score",
        "A score is the mean of a panel of benchmarks, and panels do not compare.",
    )
    if panel == UNSCORED:
        scored, apart, best, unit = (
            f"{len(first)} have no published score and count by what they keep for sure",
            "have scores, which are not compared",
            "what keeps most for sure",
            "A score of 100 is all of the unquantized model.",
        )
    more = f" {others} more {apart}." if others else ""
    return (
        f"{weighed}; {scored}, of which {front} beside the choice are on the Pareto front: none beats them in sure "
        f"quality, speed and memory together.{more} Diamond: the choice; filled: on the front; hollow: beaten. The "
        f"line is {best} for that memory, or for that speed. {unit}"
    )


def _options(caption: str, options: Sequence[Option], memory: str, *, folded: bool = False) -> Table:
    def cells(one: Option) -> tuple[Entry, ...]:
        mark: Mark = "good" if one.verdict == "chosen" else ""
        return (
            Entry(f"{one.model} {one.scheme}", mark),
            Entry(one.runtime),
            Entry(one.kv_type),
            Entry(f"{one.quality_low or 0:.1f}", exact=_expected(one)),
            Entry(show(one.memory_high or 0), exact=f"{one.memory_high or 0:,} bytes"),
            Entry(f"{one.decode or 0:.1f}"),
            Entry(f"{one.decode_low or 0:.1f}"),
            Entry("chosen" if one.verdict == "chosen" else one.reason),
        )

    head = (
        "candidate", "runtime", "KV", "score, at least", f"{memory}, at most", "tok/s, full", "at least",
        "why not",
    )  # fmt: skip
    return Table(
        caption=caption,
        head=head,
        rows=tuple(cells(one) for one in options),
        numeric=(3, 4, 5, 6),
        folded=folded,
    )


def _expected(one: Option) -> str:
    kept = one.panel == UNSCORED
    return f"expected {one.quality or 0:.1f} {'of 100 kept' if kept else f'in {one.panel}'}"


def _pace(subject: Subject) -> Section | None:
    if not subject.pace:
        return None
    how = (
        "Each point is the planner's law at that context: powers of two and the planned one, up to what fits the "
        "budget and what the model was trained for. edgepack fit says the largest context to the token."
        if subject.pace_exact
        else "The ends are the plan's; between them the time of a token rises in a line with the KV cache it reads."
    )
    rows = tuple(
        (Entry(f"{one.tokens:,}"), Entry(f"{one.decode:.1f}"), Entry(f"{one.decode_low:.1f}"))
        for one in subject.pace
    )
    measured = tuple(
        f"Measured{'' if one.same_device else ' on another machine'}: {one.decode:,.1f} tok/s with {one.tokens:,} "
        "tokens."
        for one in subject.pace_measured
    )
    return Section(
        id=f"pace-{subject.letter}",
        title="Speed over context",
        words=(how, *measured),
        drawings=(f"pace-{subject.letter}",),
        tables=(
            Table(
                caption="Decode speed of one user",
                head=("tokens in the context", "tok/s expected", "tok/s at least"),
                rows=rows,
                numeric=(0, 1, 2),
            ),
        ),
    )


def _users(subject: Subject) -> Section | None:
    if not subject.cells:
        return None
    contexts = sorted({cell.context for cell in subject.cells})
    padded = subject.plan is not None and subject.plan.runtime == llama_cpp.NAME
    rounded = f" Tokens are rounded up to blocks of {llama_cpp.CELL_PAD} tokens." if padded else ""
    by_place = {(cell.users, cell.context): cell for cell in subject.cells}
    rows = []
    for users in sorted({cell.users for cell in subject.cells}):
        row = [Entry(f"{users}")]
        for context in contexts:
            cell = by_place.get((users, context))
            if cell is None:
                row.append(Entry("–", "soft", "the runtime does not take it"))
                continue
            row.append(
                Entry(
                    f"{'✓' if cell.fits else '✗'} {show(cell.kv_cache)}",
                    "good" if cell.fits else "bad",
                    f"{'fits' if cell.fits else 'does not fit'}: {cell.kv_cache:,} bytes of KV cache, "
                    f"{cell.total:,} in all by the upper ends",
                )
            )
        rows.append(tuple(row))
    return Section(
        id=f"users-{subject.letter}",
        title="KV budget: users × context",
        words=(
            "Bytes of the KV cache for so many users with so many tokens each. ✓: the whole server then fits the "
            f"budget by the upper ends of its parts; ✗: it does not. The same arithmetic as the plan's.{rounded}",
        ),
        tables=(
            Table(
                caption="KV cache by users and tokens of each",
                head=("users", *(f"{context:,}" for context in contexts)),
                rows=tuple(rows),
                numeric=tuple(range(1, len(contexts) + 1)),
            ),
        ),
    )


def _quality(subject: Subject) -> Section | None:
    found = subject.quality
    if found is None:
        return None
    names = (
        "perplexity",
        "perplexity of the parent",
        "loss of perplexity",
        "KL to the parent",
        "KL that 99 % stay below",
        "same first choice as the parent",
        "right answers",
        "right answers of the parent",
    )
    numbers = {number.name: number for number in subject.numbers}
    rows = tuple(
        (Entry(name), Entry(shown(numbers[name].value, numbers[name].unit)), Entry(interval(numbers[name])))
        for name in names
        if name in numbers
    )
    against = "against its parent" if found.parent is not None else "without a parent to compare with"
    text = found.text
    whose = f"Weights with the digest {found.artifact[:12]}"
    if subject.quality_own:
        whose = "The very weights of this artifact"
    elif subject.plan is not None or subject.release is not None:
        whose += ", which nothing here ties to this one"
    return Section(
        id=f"quality-{subject.letter}",
        title="Quality of the artifact",
        words=(
            f"{whose}, measured {against} on {text.tokens:,} tokens of {text_name(found)} in {text.windows} windows of "
            f"{text.window}, with {found.runtime}.",
        ),
        tables=(
            Table(
                caption="What the artifact lost",
                head=("figure", "value", f"{found.level:.0%} interval"),
                rows=rows,
                numeric=(1, 2),
            ),
        ),
    )


def _diagnoses(subject: Subject) -> Section | None:
    if not subject.diagnoses:
        return None
    return Section(
        id=f"doctor-{subject.letter}",
        title="What edgepack doctor says",
        tables=(
            Table(
                caption="Causes, the root first",
                head=("rule", "how sure", "seen", "cause", "cure"),
                rows=tuple(
                    (
                        Entry(one.rule),
                        Entry(one.certainty),
                        Entry(f"{one.section}: {one.seen}" if one.section else one.seen),
                        Entry(one.cause),
                        Entry(one.cure),
                    )
                    for one in subject.diagnoses
                ),
            ),
        ),
    )


def _numbers(subject: Subject) -> Section | None:
    if not subject.numbers:
        return None
    rows = tuple(
        (
            Entry(one.name),
            Entry(shown(one.value, one.unit), exact=f"{one.value:,.0f} bytes" if one.unit == "bytes" else ""),
            Entry(interval(one)),
            Entry(one.how),
            Entry(one.source),
        )
        for one in subject.numbers
    )
    return Section(
        id=f"numbers-{subject.letter}",
        title="Where each number comes from",
        words=(f"{HOW}.",),
        tables=(
            Table(
                caption="Every number, how sure it is, and its source",
                head=("number", "value", "interval", "how", "source"),
                rows=rows,
                numeric=(1, 2),
                folded=True,
            ),
        ),
    )


def _listed(caption: str, rows: Sequence[tuple[str, str]]) -> Table:
    return Table(
        caption=caption,
        head=("", ""),
        rows=tuple((Entry(name), Entry(words)) for name, words in rows),
    )
