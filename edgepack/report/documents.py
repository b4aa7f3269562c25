"""What a report is made from: bundles and edgepack's own JSON documents, each known by its shape and read strictly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack import bundle as bundles
from edgepack import serde
from edgepack.check import CheckReport
from edgepack.choice import Explanation
from edgepack.doctor import Report as Doctor
from edgepack.errors import BadInput, NotFound
from edgepack.evaluation import Quality
from edgepack.plan import Plan

KINDS = "a bundle, or the JSON that edgepack plan, check, inspect, quality or doctor writes"
DEEPEST = 64
"""Levels of nesting; edgepack's own documents have less than ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan, with its reasons where `plan --explain` wrote them."""

    path: str
    plan: Plan
    explanation: Explanation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What the JSON of `inspect` says of a bundle that is not at hand."""

    path: str
    inspected: bundles.Inspected


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundled:
    """A bundle, every byte of it verified, and the plan in it."""

    inspected: bundles.Inspected
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    path: str
    report: CheckReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    path: str
    quality: Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    path: str
    report: Doctor


Document = Planned | Bundled | Described | Checked | Measured | Examined


def read(path: Path, *, allowed_signers: Path | None = None) -> Document:
    """A bundle or JSON document.

    Raises NotFound, BadInput that names the file and what is wrong with it, and for a bundle what `inspect` raises.
    """
    if not path.exists():
        raise NotFound(f"{path} does not exist", hint="check the path")
    if not path.is_file():
        raise BadInput(f"{path} is not a file", hint=f"name {KINDS}")
    with path.open("rb") as stream:
        start = stream.read(512)
    if start[257:262] == b"ustar":
        return _bundle(path, allowed_signers)
    if not start.lstrip().startswith(b"{"):
        raise BadInput(f"{path} is neither a bundle nor a JSON document", hint=f"name {KINDS}")
    document = serde.read_object(path)
    _require_usable(str(path), document)
    return _document(str(path), document)


def _bundle(path: Path, allowed_signers: Path | None) -> Bundled:
    from edgepack.device import agent  # here, since only bundles need it and its imports take 30 ms

    found, signature = bundles.verified(path, allowed_signers)
    inspected = bundles.described(path, found, signature)
    _require_usable(str(path), serde.dump(inspected))
    with bundles.translated(path):
        document = agent.read_document(found, "plan.json")
    _require_usable(f"{path}: plan.json", document)
    return Bundled(inspected=inspected, plan=_plan(f"{path}: plan.json", document))


def _require_usable(source: str, document: object) -> None:
    """Raises BadInput for numbers that cannot be counted or drawn, text that cannot be written, deep nesting."""
    level: list[object] = [document]
    for _ in range(DEEPEST):
        below: list[object] = []
        for value in level:
            match value:
                case dict():
                    below += [*value.keys(), *value.values()]
                case list():
                    below += value
                case str() if _SURROGATE.search(value):
                    raise BadInput(f"{source} has half a character (a lone surrogate)", hint=f"name {KINDS}")
                case int() | float() if abs(value) > 2**63:
                    raise BadInput(
                        f"{source} has a number beyond ±2^63, which nothing measures", hint=f"name {KINDS}"
                    )
        level = below
    if level:
        raise BadInput(f"{source} is nested deeper than {DEEPEST} levels", hint=f"name {KINDS}")


_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _plan(source: str, document: object) -> Plan:
    """A plan that can be reckoned with. Raises BadInput."""
    plan = serde.load(Plan, document, source=source)
    settings, modes = plan.settings, [mode.name for mode in plan.profile.power_modes]
    if not 1 <= settings.slots <= settings.context:
        raise BadInput(f"{source}: {settings.context} tokens in {settings.slots} slots are no settings")
    if plan.power_mode not in modes:
        raise BadInput(
            f"{source}: {plan.profile.name} has no power mode {plan.power_mode!r}",
            hint=f"it has: {', '.join(modes)}",
        )
    if min(plan.speed.decode, plan.speed.decode_full, *(part.low + 1 for part in plan.memory.parts)) <= 0:
        raise BadInput(f"{source}: a speed or a part of memory is below zero")
    return plan


_SHAPES: Sequence[tuple[str, frozenset[str]]] = (
    ("check", frozenset({"items", "residuals", "facts"})),
    ("inspect", frozenset({"manifest_digest", "annotations", "files"})),
    ("plan", frozenset({"profile", "budget", "memory", "settings"})),
    ("doctor", frozenset({"diagnoses", "kind"})),
    ("quality", frozenset({"perplexity", "artifact", "text"})),
)
"""The fields that only this kind of document has."""


def _document(path: str, document: dict[str, object]) -> Document:
    kind = next((kind for kind, has in _SHAPES if has <= document.keys()), None)
    match kind:
        case "check":
            return Checked(path=path, report=_checked(path, document))
        case "inspect":
            return Described(path=path, inspected=serde.load(bundles.Inspected, document, source=path))
        case "plan":
            return _planned(path, document)
        case "doctor":
            return Examined(path=path, report=serde.load(Doctor, document, source=path))
        case "quality":
            return Measured(path=path, quality=serde.load(Quality, document, source=path))
        case _:
            has = ", ".join(sorted(document)[:6]) or "no fields"
            raise BadInput(f"{path} is no document of edgepack's that a report shows (it has {has})",
                           hint=f"name {KINDS}")  # fmt: skip


def _planned(path: str, document: dict[str, object]) -> Planned:
    why = document.pop("explanation", None)
    return Planned(
        path=path,
        plan=_plan(path, document),
        explanation=None if why is None else serde.load(Explanation, why, source=f"{path}: explanation"),
    )


def _checked(path: str, document: dict[str, object]) -> CheckReport:
    """The report without what `check.to_document` works out beside it: the verdict, and each part's difference."""
    document.pop("passed", None)
    document.pop("verdict", None)
    residuals = document["residuals"]
    if isinstance(residuals, list) and all(isinstance(one, dict) for one in residuals):
        derived = {"bytes", "relative"}
        document["residuals"] = [
            {name: value for name, value in one.items() if name not in derived} for one in residuals
        ]
    return serde.load(CheckReport, document, source=path)
