"""How a student is taught: the job, its run in processes of their own, and the curves that it leaves.

The work itself is `engine`'s: transformers' Trainer in one process, or in many under `accelerate launch`. All that a
run needs to go on after any interruption is in ``Job.work``; the student appears at ``Job.out`` whole, at the end.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack import serde
from edgepack.builders import child
from edgepack.builders.distill import Recipe
from edgepack.builders.distill.examples import Examples
from edgepack.errors import BadInput, MissingTool
from edgepack.progress import Progress
from edgepack.workspace import sha256_file, write_text

FSDP = Path(__file__).with_name("fsdp.yaml")
"""A configuration of accelerate to start from: weights, gradients and updates are split over the processes."""

LOG = "log.jsonl"
JOB = "job.json"
VERSION = 1
"""Raised when the same job gives other weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Examples that are learned from, mixed with those of all other parts."""

    examples: Path
    teacher: Path | None = None
    """What a teacher says of their responses, kept; None: hard labels alone, or a teacher beside the student."""
    share: float = 1.0
    """Share of the examples, drawn once by the seed: 1 takes all, less replays some of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that the weights at ``out`` depend on; ``work`` and ``threads`` say where and how fast."""

    student: Path
    """A Hugging Face folder: where the student starts."""
    out: Path
    """Where the taught student appears, as such a folder."""
    work: Path
    """Checkpoints and the log; kept. Of several machines all must see it."""
    parts: tuple[Part, ...]
    held_out: tuple[Part, ...]
    recipe: Recipe
    online: Path | None = None
    """A teacher that runs beside the student; then the parts have none of their own."""
    layers: tuple[int, ...] | None = None
    """For matching hidden states: the teacher's layer, from 0, of each layer of the student; None: evenly from first to
    last."""
    threads: int = 1
    """Of all processes of a machine together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update of the weights: means over the tokens of responses that it saw, before it, in nats."""

    step: int
    """From 1."""
    loss: float
    ce: float
    divergence: float | None
    """None where hard labels alone are learned."""
    rate: float
    hidden: float | None = None
    """Relative squared distance of hidden states, where they are matched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the student makes of the held-out examples after ``step`` updates, by the same objective."""

    step: int
    loss: float
    ce: float
    divergence: float | None
    hidden: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    steps: tuple[Step, ...]
    checks: tuple[Check, ...]

    @property
    def best(self) -> Check | None:
        """The check with the lowest loss, the first of equal ones."""
        return min(self.checks, key=lambda check: check.loss, default=None)

    def out_of_patience(self, patience: int) -> bool:
        """Whether so many checks in a row were no better than the best before them; never with a patience of 0."""
        since = len(self.checks) - 1 - self.checks.index(self.best) if self.best is not None else 0
        return 0 < patience <= since


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    folder: Path
    curves: Curves
    steps: int
    """Updates that were made."""
    best: int
    """Updates after which the held-out loss was lowest: the weights at ``folder``."""
    stopped_early: bool


def train(job: Job, progress: Progress, *, accelerate: Path | None = None) -> Trained:
    """Teaches ``job.student``; run again after any interruption, it goes on and ends with the same weights.

    ``accelerate``: a configuration file for `accelerate launch`, for several processes or machines (`FSDP` is one to
    start from); None runs one process. Raises MissingTool without the libraries, BadInput for a work folder of another
    job and for data, teacher or recipe that do not go with the student, NoSpace, and BuildFailed for a loss that is no
    number; checkpoints are kept in all cases.
    """
    packages = ("torch", "transformers", "accelerate", *(("peft",) if job.recipe.lora else ()))
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingTool(f"{package} is not installed", hint="pip install 'edgepack[distill]'")
    _claim(job)
    if not job.out.exists():
        _run(job, progress, accelerate)
    curves = read(job.work / LOG)
    if not curves.checks:
        raise BadInput(
            f"{job.out} is there, and {job.work} knows nothing of its training",
            hint="choose another folder with -o",
        )
    steps = curves.checks[-1].step
    return Trained(
        folder=job.out,
        curves=curves,
        steps=steps,
        best=curves.best.step if curves.best is not None else steps,
        stopped_early=curves.out_of_patience(job.recipe.patience) and steps < _planned(job),
    )


def updates(recipe: Recipe, examples: int) -> int:
    """Steps of a recipe over so many examples."""
    return recipe.steps or math.ceil(recipe.epochs * examples / recipe.batch)


def _planned(job: Job) -> int:
    counts = (max(1, round(part.share * len(Examples.open(part.examples)))) for part in job.parts)
    return updates(job.recipe, sum(counts))


def read(log: Path) -> Curves:
    """The whole lines of a log: a process may have been killed while it wrote the last one."""
    steps: list[Step] = []
    checks: list[Check] = []
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.is_file() else []
    for line in lines:
        entry = json.loads(line)
        if "held_out" in entry:
            checks.append(serde.load(Check, {"step": entry["step"], **entry["held_out"]}, source=str(log)))
        else:
            steps.append(serde.load(Step, entry, source=str(log)))
    return Curves(steps=tuple(steps), checks=tuple(checks))


def _run(job: Job, progress: Progress, accelerate: Path | None) -> None:
    launcher: Sequence[str | Path] = ()
    if accelerate is not None:
        launcher = (
            sys.executable, "-m", "edgepack.builders.distill.launch", "--config_file", accelerate.resolve(),
        )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="edgepack-") as place:
        words = Path(place) / JOB
        words.write_text(serde.to_json(_absolute(job)), encoding="utf-8")
        child.run(
            "edgepack.builders.distill.engine",
            [words],
            title="training the student",
            cwd=Path(place),
            log=job.work / "train.log",
            threads=job.threads,
            progress=progress,
            launcher=launcher,
        )


def _absolute(job: Job) -> Job:
    """The job with paths that do not depend on where its process runs."""

    def parts(some: Sequence[Part]) -> tuple[Part, ...]:
        return tuple(
            replace(
                part,
                examples=part.examples.resolve(),
                teacher=part.teacher.resolve() if part.teacher else None,
            )
            for part in some
        )

    return replace(
        job,
        student=job.student.resolve(),
        out=job.out.resolve(),
        work=job.work.resolve(),
        parts=parts(job.parts),
        held_out=parts(job.held_out),
        online=job.online.resolve() if job.online else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Identity:
    """A job without its places and threads; two that are equal give equal weights."""

    student: str
    online: str | None
    parts: tuple[tuple[str, str | None, float], ...]
    held_out: tuple[tuple[str, str | None, float], ...]
    recipe: Recipe
    layers: tuple[int, ...] | None
    version: int = VERSION


def _claim(job: Job) -> None:
    """Notes in the work folder whose it is. Raises BadInput where it is another job's."""

    def parts(some: Sequence[Part]) -> tuple[tuple[str, str | None, float], ...]:
        return tuple(
            (_digest(part.examples), _digest(part.teacher) if part.teacher else None, part.share)
            for part in some
        )

    identity = serde.to_json(
        _Identity(
            student=_digest(job.student),
            online=_digest(job.online) if job.online else None,
            parts=parts(job.parts),
            held_out=parts(job.held_out),
            recipe=job.recipe,
            layers=job.layers,
        )
    )
    claim = job.work / JOB
    if not claim.is_file():
        write_text(claim, identity)
    elif claim.read_text(encoding="utf-8") != identity:
        raise BadInput(
            f"{job.work} holds the training of another student, data or recipe",
            hint="choose another folder for this one, or remove that one",
        )


def _digest(folder: Path) -> str:
    """Of what a folder holds: examples' own, about.json's of a teacher's rows, else of config.json and all weights."""
    about = folder / "about.json"
    if about.is_file():
        return str(serde.read_object(about).get("digest") or sha256_file(about))
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise BadInput(f"{folder} is no model and no set of examples: it has no {missing[0].name}")
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
