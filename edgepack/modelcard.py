"""What is told of a student: a report for programs, and a model card with its curves for people."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import edgepack.calibration as calibrations
from edgepack import bundle, serde
from edgepack.artifact import UNKNOWN
from edgepack.builders.distill import Recipe
from edgepack.bundle.render import environment, templates
from edgepack.drawing import Series, curves
from edgepack.evaluation import Accuracy, Estimate, Reading
from edgepack.scoring.intervals import exp

VERSION = 1
"""Raised when the same student is described or measured otherwise."""
NAME = bundle.STUDENT
"""In a student's folder: how it was made and what was measured."""
CURVES = "curves.svg"
STEPS = "curves.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Weights that went in."""

    source: str
    revision: str
    license: str
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What was measured on one set of examples that nothing was trained on."""

    name: str
    """"data" or "replay"."""
    teacher: Reading
    before: Reading
    """The start, untrained."""
    after: Reading
    recovered: Estimate | None
    """Share of the start's distance to its teacher, in nats, that training closed; None where there was none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Accuracy on the user's own questions."""

    teacher: Estimate
    before: Estimate
    after: Accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a student was made and how good it is; nothing of it depends on when, or on the place of a file."""

    name: str
    run: str
    """Names all inputs of the training."""
    parameters: int
    license: str
    """Of teacher and start together."""
    teacher: Origin
    start: Origin | None
    """None when it was cut out of the teacher."""
    prune: str | None
    """What was kept of the teacher (students.label)."""
    layers: tuple[int, ...] | None
    """The teacher's layers that were kept."""
    data: tuple[calibrations.Source, ...]
    replay: tuple[calibrations.Source, ...]
    replayed: float
    """Share of the replay's examples that were drawn."""
    examples: int
    tokens: int
    """Of the training examples, responses and prompts together."""
    targets: int
    """Tokens of responses: those that are learned."""
    recipe: Recipe
    precision: str
    """What matrices were multiplied in."""
    k: int | None
    """None when the teacher's whole vocabulary was used, or nothing of it."""
    bytes_per_token: float | None
    """Of the kept logits, on disk."""
    steps: int
    best: int
    """Steps after which the held-out loss was lowest: the weights are of then. The figures below are of the same
    held-out data, so they flatter a little where checks differ by little."""
    stopped_early: bool
    held_out: tuple[Held, ...]
    answers: Answers | None
    tools: Mapping[str, str]
    warnings: tuple[str, ...]
    schema_version: Literal[1] = 1


def write(report: Report, log: Path, folder: Path) -> None:
    """Writes the report, the curves and the model card beside the weights; ``log``: JSON lines of train.py."""
    (folder / NAME).write_text(serde.to_json(report), encoding="utf-8")
    shutil.copyfile(log, folder / STEPS)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    (folder / CURVES).write_text(_drawn(report, lines), encoding="utf-8")
    card = environment(templates() / "student").get_template("README.md.j2")
    (folder / "README.md").write_text(card.render(report=report, **_facts(report)), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def of(folder: Path) -> Report | None:
    """How a student was made; None for a folder that is none. Raises BadInput for a damaged report."""
    path = folder / NAME
    return serde.load_json(Report, path) if path.is_file() else None


_HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""How the Hub writes the identifier of a licence."""


def _facts(report: Report) -> dict[str, object]:
    """What the card's template is given beside the report."""
    license = report.license.lower()
    known = license != UNKNOWN and _HUB_LICENSE.fullmatch(license) is not None
    objective, recipe = report.recipe.objective, report.recipe
    kind = {"forward": "KL(teacher, student)", "reverse": "KL(student, teacher)", "js": "Jensen-Shannon"}
    terms = [f"{objective.alpha:g} · cross entropy"] if objective.alpha else []
    if objective.alpha < 1:
        heat = objective.temperature
        square = f" · {heat:g}²" if heat != 1 else ""
        terms.append(f"{1 - objective.alpha:g}{square} · {kind[objective.divergence]} at T = {heat:g}")
    if objective.hidden:
        terms.append(f"{objective.hidden:g} · distance of hidden states")
    how = "all weights"
    if recipe.lora is not None:
        how = f"LoRA of rank {recipe.lora.rank}, alpha {recipe.lora.alpha}, merged"
    return {
        "license": license if known else "other",
        "license_name": "" if known else re.sub(r"[^a-z0-9.+-]+", "-", license),
        "base_models": [
            origin.source
            for origin in (report.teacher, report.start)
            if origin is not None and "/" in origin.source
        ],
        "passes": report.steps * report.recipe.batch / report.examples,
        "loss": " + ".join(terms),
        "trained": f"{how}; AdamW, rate {recipe.rate:g}, weight decay {recipe.decay:g}, {report.precision}",
        "tools": ", ".join(f"{name} {version}" for name, version in sorted(report.tools.items())),
        "sources": _sources,
        "percent": lambda found: _shown(found, "{:.1%}"),
        "perplexity": lambda reading: _shown(exp(reading.nll), "{:.2f}"),
        "divergence": lambda reading: "-" if reading.kl is None else _shown(reading.kl, "{:.4f}"),
        "agreement": lambda reading: "-" if reading.same_top is None else _shown(reading.same_top, "{:.1%}"),
        "recovery": recovery,
    }


def recovery(held: Held) -> str:
    """How much of the way to the teacher was gone, in a sentence."""
    gap = held.before.nll.value - held.teacher.nll.value
    past = held.teacher.nll.value - held.after.nll.value
    if held.recovered is None:
        if gap < 0:
            return f"The start was better on these data than its teacher, by {-gap:.3f} nats a token: no gap to close."
        return f"The start was {gap:.3f} nats a token off its teacher, which is within the noise: no gap to close."
    if past > 0:
        return (
            f"The start was {gap:.3f} nats a token off its teacher and is {past:.3f} better than it now: the data "
            "have taught it more."
        )
    share = _shown(held.recovered, "{:.0%}")
    return f"Of the {gap:.3f} nats a token between the start and its teacher, training closed {share}."


def _sources(given: Sequence[calibrations.Source]) -> str:
    return ", ".join(f"{one.name} ({one.documents:,} documents, sha256 {one.sha256[:12]})" for one in given)


def _shown(found: Estimate, form: str) -> str:
    return f"{form.format(found.value)} [{form.format(found.low)}, {form.format(found.high)}]"


def _drawn(report: Report, lines: Sequence[Mapping[str, Any]]) -> str:
    """The loss of each step and of each held-out check."""
    training = tuple((float(line["step"]), float(line["loss"])) for line in lines if "loss" in line)
    checks = tuple(
        (float(line["step"]), float(line["held_out"]["loss"])) for line in lines if "held_out" in line
    )
    series = (
        Series(name="training", points=training, dashed=True),
        Series(name="held out", points=checks),
    )
    return curves(f"Loss of {report.name}", series, x="step", y="nats a token")
