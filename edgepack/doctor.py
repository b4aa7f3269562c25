"""Names cause and cure of a failed check and of what a server, a container, the kernel or an installer logged.

What it knows are the rows of faults.RULES. A report of `edgepack check`, the agent's facts, a bundle and an installer's
journal are first told as lines, so that the same rows read them.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgepack import bundle as bundles
from edgepack import serde, workspace
from edgepack.check import CheckReport, Facts, FailureFacts, Item, MachineFacts, MatchFact, PreflightFacts
from edgepack.devices import NotEnrolled
from edgepack.errors import BadInput, NotFound
from edgepack.faults import RULES, Certainty, Log, Rule, Section, Values
from edgepack.hostlogs import HostLogs
from edgepack.plan import Plan
from edgepack.runtimes import vllm, vllm_flags
from edgepack.screen import GAP, PLAIN, Screen, plain
from edgepack.units import MIB, show

Kind = Literal["log", "check", "facts", "bundle", "symptom", "host"]

SHOWN = 4
"""Diagnoses at most: further ones of one log were consequences of the first ones in every log we have."""
LIMIT = 4 * MIB
"""Bytes of a log that are read; of a longer one the last."""
PIPE = 106
"""Columns to which causes and cures are wrapped where there is no terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    rule: str
    certainty: Certainty
    seen: str
    """What the line says that it rests on; of a long line a part."""
    line: int | None
    """Its number from 1, in its section; None for what no log has said (an item of a check, an event, a symptom)."""
    cause: str
    cure: str
    source: str
    """Where the cause or the cure was found: an issue or a document."""
    follows: str | None
    """The rule of an earlier diagnosis that this one is a consequence of."""
    section: Section | None = None
    """Of a device: which of its logs the line is from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    name: str
    kind: Kind
    lines: int
    """Lines that were read."""
    diagnoses: tuple[Diagnosis, ...]
    """The root cause first, what follows from it after it."""
    notes: tuple[str, ...] = ()
    schema_version: int = 1


def diagnose(what: str | CheckReport | Facts) -> tuple[Diagnosis, ...]:
    """Causes and cures, the root first, at most SHOWN; empty for what shows no fault that is known."""
    if isinstance(what, str):
        return _of_lines(_plain(what))
    return _judged(Log(text="\n".join(_told(what)), numbered=False))


def examine(path: Path | None, text: str | None = None) -> Report:
    """What is wrong with a bundle on this machine, in a report of `edgepack check --json`, or in a log.

    ``path`` is a bundle, a JSON document or a log; with None it is ``text``. Raises NotFound, BadInput, and for a
    bundle what `inspect` raises.
    """
    if path is None:
        return _of_text("standard input", text or "")
    if not path.exists():
        raise NotFound(f"{path} does not exist", hint="check the path")
    if not path.is_file():
        raise BadInput(
            f"{path} is not a file", hint="name a bundle, a report of `edgepack check --json`, or a log"
        )
    with path.open("rb") as stream:
        start = stream.read(512)
        if start[257:262] == b"ustar":
            return _of_bundle(path)
        if b"\0" in start:
            raise BadInput(f"{path} is neither a bundle nor text")
        size = path.stat().st_size
        stream.seek(max(0, size - LIMIT))
        content = stream.read(LIMIT).decode("utf-8", "replace")
    notes = (f"only the last {show(LIMIT)} of {show(size)} were read",) if size > LIMIT else ()
    return _of_text(str(path), content, notes)


def examine_host(found: HostLogs) -> Report:
    """What is wrong with a device by its own logs. Pure. Raises NotEnrolled where nothing of edgepack's was found."""
    text, sections = "", []
    for section in _SECTIONS:
        sections.append((section, len(text)))
        text += plain(_plain(found.logs.get(section, "")))
    diagnoses = _judged(Log(text=text, numbered=True, sections=tuple(sections)))
    if not (found.enrolled or diagnoses or found.logs.get("service")):
        raise NotEnrolled(
            f"{found.name} is not enrolled, and nothing of edgepack has logged there",
            hint=f"edgepack flash --enroll --signers FILE {found.name}; what runs there in a container: "
            f"`ssh {found.name} docker logs NAME 2>&1 | edgepack doctor -`",
        )
    return Report(
        name=found.name,
        kind="host",
        lines=len(text.splitlines()),
        diagnoses=diagnoses,
        notes=tuple(map(plain, found.notes)),
    )


_SECTIONS: tuple[Section, ...] = ("service", "kernel", "journal")
"""In the order in which they are read: that a release was rolled back follows from what it logged."""


def answer(symptom: str) -> Report:
    """Cause and cure of a rule by its name, for what no log shows. Raises NotFound."""
    rule = next((rule for rule in RULES if rule.id == symptom), None)
    if rule is None:
        near = serde.did_you_mean(symptom, (rule.id for rule in RULES))
        raise NotFound(f"there is no symptom {symptom!r}{near}", hint="docs/troubleshooting.md lists them")
    one = Diagnosis(
        rule=rule.id,
        certainty="likely",
        seen=rule.symptom,
        line=None,
        cause=_generic(rule.cause),
        cure=_generic(rule.cure),
        source=rule.source,
        follows=None,
    )
    return Report(name=symptom, kind="symptom", lines=0, diagnoses=(one,))


def to_document(report: Report) -> dict[str, object]:
    """The report as JSON; ``diagnoses`` in the order in which they are shown."""
    document = serde.dump(report)
    if not isinstance(document, dict):
        raise TypeError("a dataclass dumps to an object")
    return document


def table(report: Report, screen: Screen = PLAIN) -> str:
    """The report for people."""
    texts = screen if screen.width is not None else Screen(width=PIPE)
    lines = screen.lines(report.notes, "warning")
    for one in report.diagnoses:
        rows = [
            (name.ljust(len("source")), plain(text))
            for name, text in (("cause", one.cause), ("cure", one.cure))
        ]
        lines += screen.line(f"{one.rule}  ({_how(one)})", "title")
        lines += screen.line(f"  {place(one)}{plain(one.seen)}")
        lines += texts.pairs(rows, least=0) + screen.pairs([("source", one.source)], least=0, gap=GAP) + [""]
    if not report.diagnoses:
        counts = report.kind == "log" or (report.kind == "host" and report.lines > 0)
        read = f" in {report.lines} lines" if counts else ""
        lines += screen.line(f"{report.name}: nothing wrong that is known{read}", "good")
    return "\n".join(lines).rstrip("\n") + "\n"


def place(one: Diagnosis) -> str:
    """Where the line of a diagnosis stands, before it."""
    words = [*([one.section] if one.section else []), *([f"line {one.line}"] if one.line else [])]
    return f"{', '.join(words)}: " if words else ""


def markdown() -> str:
    """The rules as docs/troubleshooting.md has them."""
    rows = [
        f"| `{rule.id}` | {_cell(rule.symptom)} | {_cell(_generic(rule.cause))} | {_cell(_generic(rule.cure))} "
        f"| [source]({rule.source}) |"
        for rule in RULES
    ]
    return "\n".join((_INTRODUCTION, *rows, ""))


_INTRODUCTION = """\
# When something goes wrong

`edgepack doctor` names cause and cure, with the numbers of what it has read:

* `edgepack doctor server.log` or `journalctl -u edgepack | edgepack doctor -`: a log of llama-server, vLLM,
  ONNX Runtime GenAI, transformers, edgepack's own server, docker, the journal or the kernel (`dmesg`);
* `edgepack doctor report.json`: what `edgepack check BUNDLE --json -o report.json` has written;
* `edgepack doctor out/demo.tar`: a bundle, and whether this machine would carry it;
* `edgepack doctor --on HOST`: a device, over ssh: why its last install or self-test failed, by its installer's journal,
  and what its service and its kernel have logged since the release that runs there was switched to;
* `edgepack doctor recipe.sh`: a `vllm serve` command or a program with `LLM(...)` of an older vLLM, each setting that
  is gone with what takes its place;
* `edgepack doctor --symptom NAME`: the row of a name.

The first diagnosis is the root; what follows from another says so. `likely` is said where the line is what the cause
leaves behind, and others could have. That nothing is known is no proof of health. This table is written by
`edgepack.doctor.markdown()` from the rules (edgepack/faults.py); *names* stand where a log's numbers go.

| rule | seen | cause | cure | |
| --- | --- | --- | --- | --- |"""


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _plain(text: str) -> str:
    """Text without what a terminal is told with it."""
    return _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n")


def _of_text(name: str, content: str, notes: tuple[str, ...] = ()) -> Report:
    found = _document(content, name)
    if found is not None:
        kind: Kind = "check" if found.items else "facts"
        log = Log(text="\n".join(_lines_of(found)), numbered=False)
        return Report(
            name=name, kind=kind, lines=len(log.text.splitlines()), diagnoses=_judged(log), notes=notes
        )
    text = _plain(content)
    return Report(name=name, kind="log", lines=len(text.splitlines()), diagnoses=_of_lines(text), notes=notes)


def _of_lines(text: str) -> tuple[Diagnosis, ...]:
    """What a log shows, and then what a command or program of an older vLLM asks for."""
    log, version = Log(text=text, numbered=True), _vllm_version(text)
    return (*_judged(log), *(_old_setting(one, log, version) for one in vllm_flags.outdated(text, version)))


_NAMED = re.compile(r"(?:LLM engine \(v|vLLM API server version |vllm-openai:v|\bvllm==)(\d+\.\d+\.\d+)")
"""As logs, images and requirements name the version that runs."""


def _vllm_version(text: str) -> str:
    """The vLLM that the text names, where its flags are known; else the newest."""
    named = (found[1] for found in _NAMED.finditer(text))
    return next((version for version in named if vllm_flags.is_known(version)), vllm.VERSION)


def _old_setting(one: vllm_flags.Setting, log: Log, version: str) -> Diagnosis:
    line, seen = log.line_at(one.at)
    return Diagnosis(
        rule="vllm-old-setting",
        certainty="sure",
        seen=seen,
        line=line,
        cause=f"vLLM {version} does not take {one.name}: {one.why}",
        cure=f"write `{' '.join(one.becomes)}`" if one.becomes else one.instead,
        source=f"https://github.com/vllm-project/vllm/blob/v{version}/vllm/engine/arg_utils.py",
        follows=None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """What of a check, or of the agent's facts, the rules read."""

    items: tuple[Item, ...]
    match: tuple[MatchFact, ...]
    preflight: PreflightFacts | None
    failure: FailureFacts | None
    no_card: bool = False
    """The plan computes on a card, and none answers."""


def _document(content: str, name: str) -> _Measured | None:
    """A report or the agent's facts; None for any other text. Raises BadInput for one that is damaged."""
    if not content.lstrip().startswith("{"):
        return None
    try:
        data = json.loads(content)
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    facts = data.get("facts", data)
    if not isinstance(facts, dict) or not {"match", "preflight", "failure"} <= facts.keys():
        return None
    read = {name: data.get(name, []) for name in ("items",)}
    read |= {name: facts[name] for name in ("match", "preflight", "failure")}
    return serde.load(_Measured, read, source=name, hint="docs/troubleshooting.md says what doctor reads")


def _told(what: CheckReport | Facts) -> Iterator[str]:
    facts = what.facts if isinstance(what, CheckReport) else what
    items = what.items if isinstance(what, CheckReport) else ()
    measured = _Measured(items=items, match=facts.match, preflight=facts.preflight, failure=facts.failure)
    return _lines_of(measured)


def _lines_of(measured: _Measured) -> Iterator[str]:
    """One line for each thing that is not as it should be, in words that only these lines begin with.

    Of a check that passed only slowness is told: it warns about much that is no fault.
    """
    failed = measured.failure is not None or any(item.status == "fail" for item in measured.items)
    if failed or not measured.items:
        if measured.preflight is not None:
            yield from _short_of(measured.preflight)
        for row in measured.match:
            if row.status == "fail":
                yield f"machine: {row.fact}: expected {row.expected}, measured {row.measured}"
    if measured.no_card:
        yield "machine: accelerator: the plan computes on an NVIDIA card, and none answers here"
    if measured.failure is not None:
        yield f"check: {measured.failure.kind} during {measured.failure.stage}: {measured.failure.message}"
    for item in measured.items:
        slow = item.name in ("decode", "second turn", "paging")
        if item.status == "fail" or (item.status == "warn" and (failed or slow)):
            told = (
                f"check: item {item.name}: {item.status}: expected {item.expected}, measured {item.measured}"
            )
            yield f"{told}: {item.message}" if item.message else told


def _short_of(preflight: PreflightFacts) -> Iterator[str]:
    free = preflight.memory_available
    if free is not None and free < preflight.memory_needed:
        yield f"machine: {preflight.memory_needed} bytes of memory are needed and {free} are available"
    if preflight.disk_free < preflight.disk_needed:
        yield f"machine: {preflight.disk_needed} bytes of disk are needed and {preflight.disk_free} are free"


def _of_bundle(path: Path) -> Report:
    """What of this machine would not carry the bundle; nothing is written or started."""
    from edgepack.device import agent  # here, since only bundles need it and its imports take 30 ms

    found, _ = bundles.verified(path, None)
    with bundles.translated(path):
        document = agent.read_document(found, "plan.json")
        plan = serde.load(Plan, document, source="plan.json")
        machine = agent.machine_facts()
        rows = agent.match_device(document["profile"], machine)
        needs = agent.preflight(found, document, str(workspace.cache_root()), None)
    here = serde.load(MachineFacts, machine, source="this machine")
    own_card = plan.profile.backend == "cuda" and not plan.budget.unified
    measured = _Measured(
        items=(),
        match=tuple(serde.load(MatchFact, row, source="this machine") for row in rows),
        preflight=serde.load(PreflightFacts, needs, source="this machine"),
        failure=None,
        no_card=own_card and plan.profile.arch == platform.machine() and not here.gpus,
    )
    log = Log(text="\n".join(_lines_of(measured)), numbered=False)
    return Report(name=str(path), kind="bundle", lines=len(log.text.splitlines()), diagnoses=_judged(log))


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────


def _judged(log: Log) -> tuple[Diagnosis, ...]:
    """Clients' mistakes last, what is sure before what is likely, by place in the log; roots before consequences."""
    found = {rule.id: one for rule in RULES if (one := _tried(rule, log)) is not None}
    follows = {
        other: rule.id
        for rule in reversed(RULES)
        if rule.id in found
        for other in rule.explains
        if other in found
    }
    order: list[str] = []
    for root in sorted(
        (name for name in found if name not in follows),
        key=lambda name: (_RULE[name].client, _RULE[name].certainty != "sure", found[name][0]),
    ):
        order += _with_consequences(root, follows)
    return tuple(_diagnosis(_RULE[name], found[name], follows.get(name)) for name in order[:SHOWN])


def _with_consequences(root: str, follows: Mapping[str, str]) -> list[str]:
    direct = [name for name, cause in follows.items() if cause == root]
    return [root] + [name for one in direct for name in _with_consequences(one, follows)]


_RULE: Mapping[str, Rule] = {rule.id: rule for rule in RULES}
_Found = tuple[int, Section | None, int | None, str, Values]
"""Position in the log, its section, number and text of the line, values for the texts."""


def _tried(rule: Rule, log: Log) -> _Found | None:
    """The first line on which a rule holds."""
    held: list[_Found] = []
    for pattern in rule.patterns:
        for found in pattern.finditer(log.text):
            values = rule.values(found, log)
            section, _, end = log.section_at(found.start())
            gone_on = (
                rule.recovered is not None and rule.recovered.search(log.text, found.end(), end) is not None
            )
            if values is not None and not gone_on:
                held.append((found.start(), section, *log.line_at(found.start()), values))
                break
    return min(held, key=lambda one: one[0], default=None)


def _diagnosis(rule: Rule, found: _Found, follows: str | None) -> Diagnosis:
    _, section, line, seen, values = found
    return Diagnosis(
        rule=rule.id,
        certainty=rule.certainty,
        seen=seen,
        line=line,
        cause=rule.cause.format_map(_Known(values)),
        cure=rule.cure.format_map(_Known(values)),
        source=rule.source,
        follows=follows,
        section=section,
    )


def _how(one: Diagnosis) -> str:
    return one.certainty if one.follows is None else f"{one.certainty}, follows from {one.follows}"


class _Known(dict[str, str]):
    """What a log says; what it may leave out is left out."""

    def __missing__(self, name: str) -> str:
        if name.startswith("_"):
            return ""
        raise KeyError(name)


class _Names(dict[str, str]):
    """Names in italics; what a log may leave out is left out."""

    def __missing__(self, name: str) -> str:
        return "" if name.startswith("_") else f"*{name}*"


def _generic(text: str) -> str:
    """A text with names where a log's numbers would stand."""
    return text.format_map(_Names())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
