"""Documents and values as text for people: plain columns, a memory bar, no color needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from edgepack import serde
from edgepack.choice import Explanation
from edgepack.plan import UNSCORED, ModelRef, Plan, beginning, label
from edgepack.profile import DeviceProfile, Session, budget
from edgepack.screen import PLAIN, Screen, Style, plain
from edgepack.units import show

if TYPE_CHECKING:
    from edgepack.bundle import Inspected


def fit(document: Mapping[str, Any], screen: Screen = PLAIN) -> str:
    """The answer, the parts, and what would change it."""
    total = document["total"]
    lines = [
        f"{document['model']}  {document['scheme']}  {document['runtime']}",
        f"context {document['context']} in {document['slots']} slot(s), KV cache {document['kv_type']}",
        "",
        *_parts(document["parts"]),
        f"{'total':<18}{show(total['bytes']):>12}  {_interval(total)}",
        f"{'file':<18}{show(document['file_bytes']):>12}  {document['bits_per_weight']:.2f} bits per weight",
    ]
    if document["start_up"]:
        told = ", ".join(f"{name} {value}" for name, value in document["start_up"].items())
        lines.append(f"{document['runtime']} starts with {told}")
    if document.get("exact") is not None:
        lines += ["", "llama.cpp itself says:"]
        asked = {
            n.removesuffix("_bytes"): v for n, v in document["exact"].items() if isinstance(v, int) and v
        }
        lines += [f"{name:<18}{show(value):>12}" for name, value in asked.items()]
    if document["budget_bytes"] is not None:
        verdict = "fits" if document["fits"] else "does NOT fit"
        answer = f"{verdict}; largest context {document['max_context']} tokens"
        more = [] if document["fits"] else [f"binding: {document['binding']}", f"hint: {document['hint']}"]
        return _text(
            [
                *screen.line(lines[0], "title"),
                *screen.lines(lines[1:]),
                "",
                *_pools(
                    document["parts"], document["budget_bytes"], document["budget_host_bytes"], screen=screen
                ),
                *screen.line(answer, "good" if document["fits"] else "bad"),
                *screen.lines(more),
            ]
        )
    return _text([*screen.line(lines[0], "title"), *screen.lines(lines[1:])])


def quantized(document: Mapping[str, Any]) -> str:
    """Where the artifact is, what it weighs, on what it was calibrated, and what it lost."""
    record = document["record"]
    if record is None:
        weight = show(document["predicted_tensor_bytes"])
        return _text(
            [
                f"{document['path']} would hold {weight} of weights ({document['provenance']}); nothing was made"
            ]
        )
    weights, rest = record["tensor_bytes"], record["bytes"] - record["tensor_bytes"]
    lines = [
        document["path"],
        f"{record['scheme']} by {record['tool']}",
        f"weights {show(weights)} as predicted, {show(rest)} of header, tokenizer and configuration; "
        f"sha256 {record['sha256'][:16]}",
    ]
    calibrated = record["calibration"]
    if calibrated is not None:
        names = ", ".join(source["name"] for source in calibrated["sources"])
        drawn = calibrated["sampling"]
        lines.append(
            f"calibrated on {drawn['windows']} windows of {drawn['length']} tokens at most of {names}, "
            f"seed {drawn['seed']}"
        )
    if record["quality"] is None:
        lines.append("quality: not measured")
    else:
        lines += quality_lines(record["quality"])
    return _text(lines + [f"warning: {text}" for text in document["warnings"]])


def distilled(document: Mapping[str, Any]) -> str:
    """Where the student is, what it came from, and how much of the way to its teacher it went."""
    if document["report"] is None:
        return _text(_expected_student(document["path"], document["expected"]))
    report = document["report"]
    origin = f"what is kept of it ({report['prune']})" if report["prune"] else report["start"]["source"]
    lines = [
        document["path"],
        f"{report['parameters']:,} parameters, taught by {report['teacher']['source']} "
        f"({report['teacher']['parameters']:,}) from {origin}",
        f"{report['steps']} steps of {report['recipe']['batch']} examples of {report['examples']:,}"
        + (", stopped early" if report["stopped_early"] else ""),
    ]
    for held, told in zip(report["held_out"], document["recovery"], strict=True):
        names = {"data": "held-out data", "replay": "held-out data of before"}
        lines += [
            "",
            f"{names[held['name']]:<24}{'perplexity':>24}{'KL to teacher':>28}{'same first choice':>26}",
        ]
        for who in ("teacher", "before", "after"):
            reading = held[who]
            nll = {end: math.exp(reading["nll"][end]) for end in ("value", "low", "high")}
            cells = [_estimated(nll, "{:.2f}")]
            cells += [
                "-" if reading[name] is None else _estimated(reading[name], form)
                for name, form in (("kl", "{:.4f}"), ("same_top", "{:.1%}"))
            ]
            lines.append(f"  {who:<22}{cells[0]:>24}{cells[1]:>28}{cells[2]:>26}")
        lines.append(f"  {told}")
    if report["answers"] is not None:
        answers = report["answers"]
        told = ", ".join(f"{who} {_estimated(answers[who], '{:.1%}')}" for who in ("teacher", "before"))
        after = _estimated(answers["after"]["accuracy"], "{:.1%}")
        lines += ["", f"right answers of {answers['after']['items']}: {told}, after {after}"]
    return _text(lines + [f"warning: {text}" for text in report["warnings"]])


def _expected_student(path: str, expected: Mapping[str, Any]) -> list[str]:
    kept = expected["kept_bytes"]
    if kept is not None:
        teacher = f"the teacher's logits would take {show(kept)} of disk (exact)"
    else:
        teacher = "the teacher would run beside it" if expected["online"] else "no teacher would be asked"
    return [
        f"{path} would hold {expected['parameters']:,} parameters of {expected['teacher_parameters']:,}",
        f"{expected['steps']} steps of {expected['batch']} examples of {expected['examples']:,}, which have "
        f"{expected['targets']:,} tokens of responses",
        teacher,
        *(f"warning: {text}" for text in expected["warnings"]),
        "nothing was made",
    ]


def _estimated(found: Mapping[str, float], form: str) -> str:
    return f"{form.format(found['value'])} [{form.format(found['low'])}, {form.format(found['high'])}]"


def plan(chosen: Plan, explanation: Explanation | None, screen: Screen = PLAIN) -> str:
    """The choice in one sentence, its memory map, its speed, and what was not chosen; with an explanation, why."""
    settings, pace = chosen.settings, chosen.speed
    parts: list[dict[str, Any]] = [
        {"name": p.name, "bytes": p.bytes, "low": p.low, "high": p.high, "provenance": p.provenance,
         "place": p.place}
        for p in chosen.memory.parts
    ]  # fmt: skip
    title = (
        f"{chosen.profile.title}: {chosen.model.id} at {chosen.scheme} on {chosen.runtime} "
        f"{chosen.runtime_version}"
    )
    memory = [
        f"context {settings.context} in {settings.slots} slot(s), KV cache {settings.kv_type}, "
        f"power mode {chosen.power_mode}, {chosen.session}",
        "",
        *_parts(parts),
        f"{'total' if chosen.budget.unified else 'card and host':<18}{show(chosen.memory.total):>12}  "
        f"{_interval({'low': chosen.memory.low, 'high': chosen.memory.high})}",
        "",
    ]
    told = [
        f"budget {chosen.budget.equation('device')}",
        f"decode {pace.decode:.1f} tok/s [{pace.decode_low:.1f}, {pace.decode_high:.1f}] ({pace.provenance}), "
        f"{pace.decode_full:.1f} with a full context, at least {pace.decode_full_low:.1f}",
        f"prompt {pace.prefill:.0f} tok/s [{pace.prefill_low:.0f}, {pace.prefill_high:.0f}] (fitted), "
        f"first token after {pace.first_token:.2f} s, up to {pace.first_token_high:.2f}, for {pace.prompt} tokens",
        f"quality {_score(chosen)}",
        f"revision {chosen.model.revision or 'not pinned yet: recorded when fetched'}; "
        f"licence {chosen.model.license}" + _descent(chosen.model),
    ]
    if settings.slots > 1:
        told.append(
            f"throughput {pace.decode_all:.1f} tok/s, at least {pace.decode_all_low:.1f} (fitted), of all "
            f"{settings.slots} slots together, every one full"
        )
    host = None if chosen.budget.unified else chosen.budget.host
    lines = [
        *screen.line(title, "title"),
        *screen.lines(memory),
        *_pools(parts, chosen.budget.device, host, screen=screen),
        *screen.lines(told),
        *screen.lines((f"warning: {text}" for text in chosen.warnings), "warning"),
    ]
    others, heading = chosen.rejected, f"not chosen ({len(chosen.rejected)}):"
    if explanation is not None:
        change = explanation.change or "none that was tried lets a better candidate in"
        lines += ["", *screen.line(f"why      {explanation.why}")]
        lines += screen.lines(f"not      {reason}" for reason in explanation.against)
        lines += screen.lines((f"binding  {explanation.binding}", f"change   {change}"))
    else:
        others, heading = others[:3], "runners-up (--explain shows all):"
    if explanation is not None or others:
        lines += ["", heading, *screen.pairs([(r.candidate, r.reason) for r in others], least=52)]
    return _text(lines)


def _score(chosen: Plan) -> str:
    quality, unmade = chosen.quality, chosen.model.prune is not None
    how = "fitted, by a scaling law: the student is still to be made" if unmade else "fitted"
    score = f"{quality.score:.1f} [{quality.low:.1f}, {quality.high:.1f}]"
    if quality.panel != "none":
        return f"{score} in {quality.panel} ({how})"
    return (
        f"{score} % of its teacher ({how})"
        if unmade
        else f"keeps {quality.retention:.1%} of the unquantized model ({how})"
    )


def _descent(model: ModelRef) -> str:
    if model.lesson is not None:
        return f"; to be {beginning(model)}"
    return f"; distilled by its makers from {model.teacher}" if model.teacher else ""


def pareto(chosen: Plan, screen: Screen = PLAIN) -> str:
    """The plans of the chosen one's panel that no other equals in sure quality, speed and memory together."""
    quality = chosen.quality
    rows = [
        (label(chosen), quality.low, quality.score, chosen.speed.decode_full, chosen.memory.high, "chosen")
    ]
    rows += [
        (r.candidate, r.figures.quality_low, r.figures.quality, r.figures.decode, r.figures.memory_high, "")
        for r in chosen.rejected
        if r.figures is not None and r.figures.on_front and r.figures.panel == quality.panel
    ]
    rows.sort(key=lambda row: -row[1])
    header = (
        "candidate",
        "kept, surely" if quality.panel == UNSCORED else f"{quality.panel}, surely",
        "expected",
        "tok/s, full",
        "memory, up to" if chosen.budget.unified else "card and host, up to",
        "",
    )
    cells = [
        (c, f"{low:.1f}", f"{score:.1f}", f"{pace:.1f}", show(memory), mark)
        for c, low, score, pace, memory, mark in rows
    ]
    return _text(["", *screen.columns([header, *cells], below=(1, 2))])


def inspect(found: Inspected, screen: Screen = PLAIN) -> str:
    """What a verified bundle says about itself; where a screen has no room for whole digests, their beginning."""
    state: Style = "good" if found.signature.state == "verified" else "warning"
    lines = [
        *screen.line(plain(found.name), "title"),
        *screen.line(f"manifest   {found.manifest_digest}"),
        *screen.line(f"signature  {found.signature.message}", state),
        *screen.line(f"bytes      {found.bytes} ({show(found.bytes)}), every one verified"),
        "",
    ]
    notes = sorted((plain(name), plain(value)) for name, value in found.annotations.items())
    if screen.width is None:
        lines += [f"{f.path:<24}{f.bytes:>14}  {f.digest}" for f in found.files]
        lines += ["", *(f"{name:<44}{value}" for name, value in notes)]
    else:
        wide = max(len(f.path) for f in found.files) + len("sha256:") + 64 + 16
        digests = [f.digest if wide <= screen.width else f"{f.digest[:19]}…" for f in found.files]
        rows = [(f.path, f"{f.bytes:>12}", digest) for f, digest in zip(found.files, digests, strict=True)]
        lines += screen.columns([("file", f"{'bytes':>12}", "digest"), *rows])
        lines += _predicted(found.annotations, screen)
        lines += ["", *screen.columns([("annotation", "value"), *notes])]
    if found.quality is not None:
        lines += ["", *screen.lines(quality_lines(cast(Mapping[str, Any], serde.dump(found.quality))))]
    return _text(lines)


def schemas(found: Iterable[tuple[str, str, Sequence[str]]], screen: Screen = PLAIN) -> str:
    """Name, title and writers of each document."""
    rows = [("name", "document", "written by")]
    return _text(screen.columns([*rows, *((name, title, ", ".join(by)) for name, title, by in found)]))


_DIGITS = 19
"""Of a number of bytes that is believed."""


def _predicted(notes: Mapping[str, str], screen: Screen) -> list[str]:
    """A bar of what the bundle was planned to take, against the most that it may take; for bundles that say it."""
    names = (("weights", "weights"), ("kv_cache", "kv"), ("compute", "compute"), ("process", "total"))
    told = {name: notes.get(f"org.edgepack.{key}-bytes", "") for name, key in names}
    most = notes.get("org.edgepack.required-memory-bytes", "")
    if not all(value.isdecimal() and len(value) < _DIGITS for value in (*told.values(), most)):
        return []
    sizes = {name: int(value) for name, value in told.items()}
    sizes["process"] -= sizes["weights"] + sizes["kv_cache"] + sizes["compute"]
    told_so = f"predicted {show(int(told['process']))} of memory, up to {show(int(most))}"
    parts = list(sizes.items())
    return ["", *screen.bar(parts, int(most), told_so), *screen.legend(parts)]


def quality(name: str, document: Mapping[str, Any]) -> str:
    """What was measured of an artifact."""
    return _text([f"{name} on {document['runtime']}", "", *quality_lines(document)])


def quality_lines(document: Mapping[str, Any]) -> list[str]:
    """The figures of a measured quality, one a line, each with its interval."""

    def told(title: str, found: Mapping[str, float], form: str, rest: str = "") -> str:
        ends = f"[{form.format(found['low'])}, {form.format(found['high'])}]"
        return f"{title:<18}{form.format(found['value'])} {ends}{rest}"

    text, parent, tasks = document["text"], document["parent"], document["tasks"]
    lines = [told("perplexity", document["perplexity"], "{:.3f}")]
    if parent is not None:
        loss = {end: math.expm1(value) for end, value in parent["log_ratio"].items()}
        lines += [
            told("of the parent", parent["perplexity"], "{:.3f}"),
            told("loss", loss, "{:+.2%}", " of perplexity, on the same tokens"),
            told("KL to the parent", parent["kl"], "{:.4g}", " nats a token"),
            told("99 % stay below", parent["kl_p99"], "{:.4g}"),
            told("same first choice", parent["same_top"], "{:.1%}"),
        ]
    if tasks is not None:
        lines.append(
            told("accuracy", tasks["accuracy"], "{:.1%}", f" of {tasks['items']} items in {tasks['name']}")
        )
        if tasks["parent"] is not None:
            flips = f", {tasks['lost']} lost and {tasks['gained']} gained"
            lines.append(told("of the parent", tasks["parent"], "{:.1%}", flips))
    lines.append(
        f"{'measured on':<18}{text['tokens']} tokens of {text['name']} in {text['windows']} windows of "
        f"{text['window']}; {document['level']:.0%} intervals"
    )
    return lines


def profiles(everything: Iterable[DeviceProfile], screen: Screen = PLAIN) -> str:
    """One line per profile."""
    rows = [("profile", "also", "memory", "budget", "GB/s", "mode", "architecture")]
    for p in everything:
        row = profile_row(p)
        rows.append(
            (p.name, ", ".join(p.aliases), show(row["memory_bytes"]), show(row["budget_bytes"]),
             f"{row['bandwidth_gbs']:g}", row["power_mode"], p.arch if p.deployable else f"{p.arch}, planning only")
        )  # fmt: skip
    return _text(screen.columns(rows, below=(1, 6)))


class ProfileRow(TypedDict):
    name: str
    aliases: list[str]
    title: str
    arch: str
    memory_bytes: int
    """Of the accelerator where it has its own, else what the system reports."""
    budget_bytes: int
    """What a server may use of it, headless."""
    bandwidth_gbs: float
    power_mode: str
    """The default one, whose bandwidth it is."""
    deployable: bool
    """Whether bundles can be built for it; else it is for planning only."""


class ProfilesDocument(TypedDict):
    """The built-in profiles."""

    schema_version: Literal[1]
    profiles: list[ProfileRow]


def profile_row(found: DeviceProfile) -> ProfileRow:
    """A profile's summary, as in `profiles list --json`."""
    mode = found.mode()
    own = found.accelerator.memory if found.accelerator else None
    return {
        "name": found.name,
        "aliases": list(found.aliases),
        "title": found.title,
        "arch": found.arch,
        "memory_bytes": int(own if own is not None else found.memory),
        "budget_bytes": int(budget(found).device),
        "bandwidth_gbs": mode.bandwidth_gbs,
        "power_mode": mode.name,
        "deployable": found.deployable,
    }


def profile(found: DeviceProfile, screen: Screen = PLAIN) -> str:
    """Everything about one profile, with the budget's arithmetic."""
    lines = [
        found.title,
        f"name       {found.name}" + (f" (also {', '.join(found.aliases)})" if found.aliases else ""),
    ]
    lines += [
        f"arch       {found.arch}, {found.cpu_cores} cores",
        f"memory     {show(found.memory)} reported by the system, {'shared' if found.unified else 'separate'}",
    ]
    if found.accelerator:
        own = found.accelerator.memory
        lines.append(
            f"accelerator {found.accelerator.name}, {found.accelerator.backend}"
            + (f" {found.accelerator.compute_capability}" if found.accelerator.compute_capability else "")
            + (f", {show(own)} of its own" if own else "")
        )
    for mode in found.power_modes:
        default = " (default)" if mode.name == found.default_mode else ""
        tflops = f", {mode.fp16_tflops:g} TFLOPS FP16" if mode.fp16_tflops else ""
        lines.append(f"mode       {mode.name}: {mode.bandwidth_gbs:g} GB/s{tflops}{default}")
    sessions: tuple[Session, ...] = ("headless", "desktop")
    for session in sessions:
        lines.append(f"budget     {session}: {budget(found, session).equation('device')}")
    for image in found.software.images:
        lines.append(
            f"image      {image.reference} ({image.digest if image.digest != 'unknown' else 'digest unknown'})"
        )
    if found.uncertain:
        lines.append(f"estimated  {', '.join(found.uncertain)}")
    return _text([*screen.line(lines[0], "title"), *screen.lines(lines[1:])])


def _pools(
    parts: Sequence[Mapping[str, Any]], device: int, host: int | None, *, screen: Screen = PLAIN
) -> list[str]:
    """A bar for the shared memory, or one each for the card's and the system's; on a screen, what its signs are."""
    if host is None or host == device:
        pools = [(list(parts), device, "")]
    else:
        pools = [
            ([p for p in parts if p["place"] == place], limit, f"{place}: ")
            for place, limit in (("device", device), ("host", host))
        ]
    lines = []
    for own, limit, name in pools:
        told = f"{name}up to {show(sum(p['high'] for p in own))} of {show(limit)}"
        lines += screen.bar([(p["name"], p["bytes"]) for p in own], limit, told)
    return lines + screen.legend([(p["name"], p["bytes"]) for p in parts])


def _parts(parts: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"{p['name']:<18}{show(p['bytes']):>12}  {p['place']:<7} {p['provenance']:<8} {_interval(p)}"
        for p in parts
        if p["high"]
    ]


def _interval(value: Mapping[str, int]) -> str:
    if value["low"] == value["high"]:
        return ""
    return f"[{show(value['low'])}, {show(value['high'])}]"


def _text(lines: Iterable[str]) -> str:
    return "\n".join(line.rstrip() for line in lines) + "\n"
