"""A teacher and data to a student that a build takes: `edgepack distill`, and a stage of `build --distill`.

Each step keeps its result under a name made of all that it depends on, so the same command goes on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import edgepack.calibration as calibrations
from edgepack import heldout, modelcard, modelspec, quality, serde, students, workspace
from edgepack.artifact import Checkpoint
from edgepack.builders.distill import Recipe, examples, measure, prune, teacher, train
from edgepack.errors import BadInput, MissingTool, Unsupported
from edgepack.modelcard import Answers, Held, Origin, Report
from edgepack.modelspec import ModelSpec
from edgepack.progress import Progress
from edgepack.scoring.tasks import Tasks
from edgepack.students import Prune
from edgepack.units import Bytes

REPLAY_SHARE = 0.2

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors")
"""What distilling needs and decides the student's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a student is made, beside its teacher and what it starts from."""

    recipe: Recipe = field(default_factory=Recipe)
    data: tuple[Path, ...] = ()
    """Texts and conversations (calibration/formats.py); empty: the built-in text."""
    replay: tuple[Path, ...] = ()
    """Data that the start was made with, so that it is not forgotten."""
    replay_share: float = REPLAY_SHARE
    """Share of the examples that are drawn from ``replay``, where it has as many."""
    k: int = teacher.DEFAULT_K
    """Logits of the teacher that are kept of each token."""
    online: bool = False
    """Run the teacher beside the student and keep nothing: the whole vocabulary, for twice the work and memory."""
    tasks: Tasks | None = None
    """Questions whose right answers are counted of teacher, start and student."""
    accelerate: Path | None = None
    """Configuration for `accelerate launch`: several processes and machines."""
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A finished student in the cache."""

    path: Path
    """A Hugging Face folder with its card, report and curves."""
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What `make` would work on; exact, and nothing was trained or run for it."""

    parameters: int
    teacher_parameters: int
    examples: int
    targets: int
    """Tokens of responses: those that are learned."""
    steps: int
    """At most: training may stop early."""
    kept_bytes: Bytes | None
    """The teacher's logits on disk; None where nothing of it is kept."""


def expected(
    parent: Checkpoint, start: Checkpoint | Prune, options: Options, folder: Path, progress: Progress
) -> Expected:
    """The size of the job. Raises what `make` raises for data, tokenizers and sizes."""
    _require_checkpoint(parent)
    whole = modelspec.read(parent.path)
    config = serde.read_object(parent.path / "config.json")
    if isinstance(start, Prune):
        spec = modelspec.from_config(students.shrunk(config, start), name=students.label(start))
    else:
        _require_checkpoint(start)
        spec = modelspec.read(start.path)
    _require_smaller(parent, whole, spec)
    files = options.data or (calibrations.BUILTIN,)
    data = _prepared(parent, start, whole, files, options, folder, progress)
    new = examples.Examples.open(data.train)
    count, rows = len(new), new.response_tokens + examples.Examples.open(data.held_out).response_tokens
    if options.replay:
        old = _prepared(parent, start, whole, options.replay, options, folder, progress)
        more = examples.Examples.open(old.train)
        count += round(_replayed(count, len(more), options) * len(more))
        rows += more.response_tokens + examples.Examples.open(old.held_out).response_tokens
    each = teacher.row_type(options.k, min(whole.vocab, spec.vocab)).itemsize
    return Expected(
        parameters=spec.parameters,
        teacher_parameters=whole.parameters,
        examples=count,
        targets=new.response_tokens,
        steps=train.updates(options.recipe, count),
        kept_bytes=Bytes(rows * each) if _keeps(options) else None,
    )


def make(
    parent: Checkpoint,
    start: Checkpoint | Prune,
    options: Options,
    folder: Path,
    progress: Progress,
    *,
    name: str,
) -> Student:
    """The student of ``parent`` that starts from smaller weights or from what is kept of its own, below ``folder``.

    ``name``: of the model, for its card. Raises MissingTool with the extra to install, Unsupported for a teacher that
    is no checkpoint or cannot be cut, BadInput for data without responses, tokenizers that do not match, a student that
    is not smaller and a loss that is no number, NoSpace, and BuildFailed with the process's words.
    """
    tools = _installed(options.recipe)
    _require_checkpoint(parent)
    whole = modelspec.read(parent.path)
    data = _prepared(parent, start, whole, options.data or (calibrations.BUILTIN,), options, folder, progress)
    if not options.data:
        progress.step("distilling on the built-in text; give your own data with --data FILE")
    old = (
        _prepared(parent, start, whole, options.replay, options, folder, progress) if options.replay else None
    )
    for warning in data.warnings:
        progress.step(f"warning: {warning}")
    begun = _begun(parent, start, data, options, folder, progress)
    spec = modelspec.read(begun.path)
    _require_smaller(parent, whole, spec)
    parts, checks = _parts(parent, whole, spec, data, old, options, folder, progress)
    run = _digest(parent, begun, parts, checks, options, tools)
    done = folder / "students" / _named(run, name)
    if not (done / modelcard.NAME).is_file():
        job = train.Job(
            student=begun.path,
            out=folder / "trained" / run,
            work=folder / "runs" / run,
            parts=parts,
            held_out=checks,
            recipe=options.recipe,
            online=parent.path if options.online else None,
            layers=begun.layers,
            threads=options.threads,
        )
        trained = train.train(job, progress, accelerate=options.accelerate)
        report = Report(
            name=name,
            parameters=spec.parameters,
            teacher=_origin(parent, whole),
            start=None if isinstance(start, Prune) else _origin(start, spec),
            prune=students.label(start) if isinstance(start, Prune) else None,
            layers=begun.layers,
            data=data.sources,
            replay=() if old is None else old.sources,
            replayed=0.0 if old is None else parts[-1].share,
            examples=len(examples.Examples.open(data.train)),
            tokens=len(examples.Examples.open(data.train).tokens),
            targets=examples.Examples.open(data.train).response_tokens,
            recipe=options.recipe,
            k=options.k if _keeps(options) else None,
            bytes_per_token=_kept_size(parts),
            steps=trained.steps,
            stopped_early=trained.stopped_early,
            held_out=_readings(parent, begun.path, trained.folder, data, old, options, progress),
            answers=_answers(parent, begun.path, trained.folder, options, progress),
            tools=tools,
            warnings=data.warnings,
        )
        if not done.exists():  # another machine of the same training may have been faster
            with workspace.whole_dir(done) as partial:
                shutil.copytree(trained.folder, partial, dirs_exist_ok=True)
                modelcard.write(report, job.work / train.LOG, partial)
    return Student(path=done, report=serde.load_json(Report, done / modelcard.NAME))


def publish(made: Student, out: Path, progress: Progress) -> Path:
    """A copy of the student at ``out``, whole. Raises BadInput when something else is there, NoSpace."""
    if out.exists():
        if out.is_dir() and quality.digest_of(out) == quality.digest_of(made.path):
            return out
        raise BadInput(
            f"{out} is there already and is not overwritten", hint="choose another -o, or remove it"
        )
    size = sum(file.stat().st_size for file in made.path.iterdir())
    workspace.require_space(out.parent, size)
    with progress.bar(f"writing {out.name}", None), workspace.whole_dir(out) as partial:
        shutil.copytree(made.path, partial, dirs_exist_ok=True)
    return out


# ── before training ──


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """Where training starts."""

    path: Path
    digest: str
    layers: tuple[int, ...] | None


def _installed(recipe: Recipe) -> Mapping[str, str]:
    """Version of each package. Raises MissingTool when one is not installed."""
    found = {}
    for package in (*PACKAGES, *(("peft",) if recipe.lora is not None else ())):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingTool(
                f"{package} is not installed", hint="pip install 'edgepack[distill]' (torch first: README)"
            ) from error
    return found


def _require_checkpoint(parent: Checkpoint) -> None:
    if not (parent.path / "config.json").is_file():
        raise Unsupported(
            f"{parent.source} is no Hugging Face folder, and a teacher must say more than a GGUF's server does",
            hint="give the checkpoint that it was made from",
        )


def _prepared(
    parent: Checkpoint,
    start: Checkpoint | Prune,
    whole: ModelSpec,
    files: Sequence[Path],
    options: Options,
    folder: Path,
    progress: Progress,
) -> examples.Prepared:
    """The data as the teacher's tokens, no longer than either model reads."""
    recipe = options.recipe
    length = min(recipe.length, whole.context_train)
    if isinstance(start, Checkpoint):
        examples.same_tokens(parent.path, start.path)
        length = min(length, modelspec.read(start.path).context_train)
    there = [file for file in files if file.is_file()]  # what is not is named by `prepare`
    inputs = (
        parent.revision,
        length,
        recipe.held_out,
        recipe.seed,
        [workspace.sha256_file(f) for f in there],
    )
    return examples.prepare(
        parent.path,
        files,
        length=length,
        held_out=recipe.held_out,
        seed=recipe.seed,
        folder=folder / "examples" / _named(*inputs),
        progress=progress,
    )


def _begun(
    parent: Checkpoint,
    start: Checkpoint | Prune,
    data: examples.Prepared,
    options: Options,
    folder: Path,
    progress: Progress,
) -> _Begun:
    if isinstance(start, Checkpoint):
        _require_checkpoint(start)
        return _Begun(path=start.path, digest=start.revision, layers=None)
    inputs = (parent.revision, students.label(start), examples.Examples.open(data.train).digest)
    out = folder / "starts" / _named(*inputs, options.threads)
    told = out.with_suffix(".json")
    if not told.is_file():
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed between the two
        cut = prune.prune(parent.path, start, data.train, out, threads=options.threads, progress=progress)
        workspace.write_text(told, serde.to_json(cut))
    return _Begun(path=out, digest=out.name, layers=serde.load_json(prune.Report, told).layers)


def _require_smaller(parent: Checkpoint, whole: ModelSpec, spec: ModelSpec) -> None:
    if spec.parameters >= whole.parameters:
        raise BadInput(
            f"the student has {spec.parameters:,} parameters and its teacher {parent.source} has "
            f"{whole.parameters:,}: nothing would become smaller",
            hint="a smaller --student, or --prune layers=0.5; were the two exchanged?",
        )


def _keeps(options: Options) -> bool:
    """Whether the teacher's words are kept on disk."""
    return not options.online and options.recipe.objective.alpha < 1


def _parts(
    parent: Checkpoint,
    whole: ModelSpec,
    spec: ModelSpec,
    data: examples.Prepared,
    old: examples.Prepared | None,
    options: Options,
    folder: Path,
    progress: Progress,
) -> tuple[tuple[train.Part, ...], tuple[train.Part, ...]]:
    """What is trained on, and what the held-out loss is taken on."""

    def part(place: Path, share: float = 1.0) -> train.Part:
        if not _keeps(options):
            return train.Part(examples=place, teacher=None, share=share)
        kept = teacher.keep(
            parent,
            place,
            folder / "teacher",
            k=options.k,
            temperature=options.recipe.objective.temperature,
            vocabulary=min(whole.vocab, spec.vocab),
            precision=options.recipe.precision,
            threads=options.threads,
            progress=progress,
        )
        return train.Part(examples=place, teacher=kept, share=share)

    if old is None:
        return (part(data.train),), (part(data.held_out),)
    new, there = (len(examples.Examples.open(place)) for place in (data.train, old.train))
    share = _replayed(new, there, options)
    return (part(data.train), part(old.train, share)), (part(data.held_out), part(old.held_out))


def _replayed(new: int, old: int, options: Options) -> float:
    """Share of the old examples that, mixed with all the new ones, are ``replay_share`` of the whole."""
    return min(1.0, options.replay_share / (1.0 - options.replay_share) * new / old)


def _digest(
    parent: Checkpoint,
    begun: _Begun,
    parts: Sequence[train.Part],
    checks: Sequence[train.Part],
    options: Options,
    tools: Mapping[str, str],
) -> str:
    """Different for every input that changes the student or its report."""
    sets = [
        (examples.Examples.open(part.examples).digest, part.teacher and part.teacher.name, part.share)
        for part in (*parts, *checks)
    ]
    launch = None if options.accelerate is None else workspace.sha256_file(options.accelerate)
    tasks = None if options.tasks is None else options.tasks.sha256
    return _named(
        parent.revision, begun.digest, sets, serde.to_json(options.recipe), options.online, tasks, launch,
        options.threads, sorted(tools.items()), train.VERSION,
    )  # fmt: skip


def _named(*inputs: object) -> str:
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def _origin(checkpoint: Checkpoint, spec: ModelSpec) -> Origin:
    return Origin(
        source=checkpoint.source,
        revision=checkpoint.revision,
        license=checkpoint.license,
        parameters=spec.parameters,
    )


def _kept_size(parts: Sequence[train.Part]) -> float | None:
    first = parts[0].teacher
    return None if first is None else teacher.Kept.open(first).bytes_per_token


# ── after training ──


def _readings(
    parent: Checkpoint,
    begun: Path,
    trained: Path,
    data: examples.Prepared,
    old: examples.Prepared | None,
    options: Options,
    progress: Progress,
) -> tuple[Held, ...]:
    sets = [("data", data.held_out)] + ([("replay", old.held_out)] if old is not None else [])
    found = []
    for name, place in sets:
        master, before, after = measure.measure(
            [begun, trained], parent.path, place, threads=options.threads, progress=progress
        )
        share = measure.recovered(before, after, master)
        told = {
            "teacher": replace(master, model="teacher", by_example=()),
            "before": replace(before, model="start", by_example=()),
            "after": replace(after, model="student", by_example=()),
        }
        found.append(Held(name=name, **told, recovered=share))
    return tuple(found)


def _answers(
    parent: Checkpoint, begun: Path, trained: Path, options: Options, progress: Progress
) -> Answers | None:
    if options.tasks is None:
        return None
    text = heldout.read()
    first, last = (
        quality.measure(
            model,
            against=parent.path,
            text=text,
            tasks=options.tasks,
            threads=options.threads,
            progress=progress,
        ).tasks
        for model in (begun, trained)
    )
    if first is None or last is None or last.parent is None:
        raise AssertionError("questions were asked")
    return Answers(teacher=last.parent, before=first.accuracy, after=last)
