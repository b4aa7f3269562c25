"""A teacher and data to a student that a build takes: `edgepack distill`, and a stage of `build --distill`.

Each step keeps its result under a name made of all that it depends on, so the same command goes on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import edgepack.calibration as calibrations
from edgepack import __version__, heldout, modelcard, modelspec, quality, serde, students, workspace
from edgepack.artifact import Checkpoint, joint_license
from edgepack.builders import safetensors
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
    batch: int
    """Examples of a step."""
    kept_bytes: Bytes | None
    """The teacher's logits on disk; None where nothing of it is kept."""
    online: bool
    """Whether the teacher runs beside the student."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What `edgepack distill` says of a student that it made, or would make."""

    path: Path
    report: Report | None = None
    """None where nothing was made."""
    expected: Expected | None = None
    """With --dry-run."""
    recovery: tuple[str, ...] = ()
    """How much of the way to the teacher was gone, a sentence for each held-out set of the report."""
    schema_version: Literal[1] = 1


def expected(
    parent: Checkpoint, start: Checkpoint | Prune, options: Options, folder: Path, progress: Progress
) -> Expected:
    """The size of the job. Raises what `make` raises for data, tokenizers and sizes."""
    _require_checkpoint(parent)
    whole = modelspec.read(parent.path)
    config = serde.read_object(parent.path / "config.json")
    start = _exactly(parent, start)
    if isinstance(start, Prune):
        spec = modelspec.from_config(students.shrunk(config, start), name=students.label(start))
    else:
        _require_checkpoint(start)
        spec = modelspec.read(start.path)
    _require_smaller(parent, whole, spec)
    files = options.data or (calibrations.BUILTIN,)
    data = _prepared(parent, start, whole, files, options, folder, progress)
    new = examples.Examples.open(data.train)
    count, targets = len(new), new.response_tokens
    rows = targets + examples.Examples.open(data.held_out).response_tokens
    if options.replay:
        old = _prepared(parent, start, whole, options.replay, options, folder, progress)
        more = examples.Examples.open(old.train)
        share = _replayed(count, len(more), options)
        count, targets = count + round(share * len(more)), targets + round(share * more.response_tokens)
        rows += more.response_tokens + examples.Examples.open(old.held_out).response_tokens
    known = min(teacher.known_ids(parent.path), spec.vocab)
    each = teacher.row_type(min(options.k, known), known).itemsize
    return Expected(
        parameters=spec.parameters,
        teacher_parameters=whole.parameters,
        examples=count,
        targets=targets,
        steps=train.updates(options.recipe, count),
        batch=options.recipe.batch,
        kept_bytes=Bytes(rows * each) if _keeps(options) else None,
        online=options.online,
        warnings=data.warnings,
    )


def make(
    parent: Checkpoint,
    start: Checkpoint | Prune,
    options: Options,
    folder: Path,
    progress: Progress,
    *,
    name: str,
    place: Path | None = None,
) -> Student:
    """The student of ``parent`` that starts from smaller weights or from what is kept of its own, below ``folder``.

    ``name``: of the model, for its card. ``place``: where it is to be published, so that another one there is found out
    before the training. Raises MissingTool with the extra to install, Unsupported for a teacher that is no checkpoint
    or cannot be cut, BadInput for data without responses, tokenizers that do not match, a student that is not smaller
    and a loss that is no number, NoSpace, and BuildFailed with the process's words.
    """
    tools = _installed(options.recipe)
    for model in (parent, *((start,) if isinstance(start, Checkpoint) else ())):
        _require_checkpoint(model)
        safetensors.checkpoint(
            model.path
        )  # a file that is cut off is found before the teacher has read everything
    start = _exactly(parent, start)
    if not options.data:
        progress.step("distilling on the built-in text; give your own data with --data FILE")
    with _alone(folder / "preparing.lock", options, progress):
        ready = _ready(parent, start, options, folder, progress)
    run = _digest(parent, ready, options, tools)
    done = folder / "students" / _named(run, name, modelcard.VERSION, measure.TOKENS)
    with _alone(folder / "runs" / f"{run}.lock", options, progress):
        if not (done / modelcard.NAME).is_file():
            _require_free(place, run)
            _make(parent, start, ready, options, folder, progress, run=run, done=done, name=name, tools=tools)
    return Student(path=done, report=serde.load_json(Report, done / modelcard.NAME))


def _make(
    parent: Checkpoint,
    start: Checkpoint | Prune,
    ready: _Ready,
    options: Options,
    folder: Path,
    progress: Progress,
    *,
    run: str,
    done: Path,
    name: str,
    tools: Mapping[str, str],
) -> None:
    """Trains, measures and describes the student into ``done``."""
    job = train.Job(
        student=ready.begun.path,
        out=folder / "trained" / run,
        work=folder / "runs" / run,
        parts=ready.parts,
        held_out=ready.checks,
        recipe=options.recipe,
        online=parent.path if options.online else None,
        layers=ready.begun.layers,
        threads=options.threads,
    )
    first = ready.parts[0].teacher
    kept = None if first is None else teacher.Kept.open(first)
    trained = train.train(job, progress, accelerate=options.accelerate)
    learned = [(examples.Examples.open(part.examples), part.share) for part in ready.parts]
    license_name = parent.license
    if isinstance(start, Checkpoint):
        license_name = joint_license(parent.license, start.license)
    warnings = list(ready.data.warnings)
    if trained.best == 0:
        warnings.append(
            "no step of the training made the held-out loss lower: the weights are those of the start"
        )
    report = Report(
        name=name,
        run=run,
        parameters=ready.spec.parameters,
        license=license_name,
        teacher=_origin(parent, ready.whole),
        start=None if isinstance(start, Prune) else _origin(start, ready.spec),
        prune=students.label(start) if isinstance(start, Prune) else None,
        layers=ready.begun.layers,
        data=ready.data.sources,
        replay=() if ready.old is None else ready.old.sources,
        replayed=0.0 if ready.old is None else ready.parts[-1].share,
        examples=round(sum(share * len(known) for known, share in learned)),
        tokens=round(sum(share * len(known.tokens) for known, share in learned)),
        targets=round(sum(share * known.response_tokens for known, share in learned)),
        recipe=options.recipe,
        precision=teacher.computed(options.recipe.precision),
        k=None if kept is None else kept.k,
        bytes_per_token=None if kept is None else kept.bytes_per_token,
        steps=trained.steps,
        best=trained.best,
        stopped_early=trained.stopped_early,
        held_out=_readings(parent, ready, trained.folder, options, progress),
        answers=_answers(parent, ready.begun.path, trained.folder, options, progress),
        tools={"edgepack": __version__, **tools},
        warnings=tuple(warnings),
    )
    try:
        with workspace.whole_dir(done) as partial:
            workspace.copy_files(trained.folder, partial, link=True)
            modelcard.write(report, job.work / train.LOG, partial)
    except OSError:
        if not (done / modelcard.NAME).is_file():  # another machine of the same training was faster
            raise
    if options.accelerate is None:  # other machines may still read them
        for checkpoint in job.work.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _require_free(place: Path | None, run: str) -> None:
    """Raises BadInput where another student lies."""
    there = None if place is None else modelcard.of(place)
    if there is not None and there.run != run:
        raise BadInput(
            f"{place} is another student, and is not overwritten", hint="choose another -o, or remove it"
        )


@contextmanager
def _alone(lock: Path, options: Options, progress: Progress) -> Iterator[None]:
    """One process of this machine at a time; those of several machines belong together."""
    if options.accelerate is not None:
        yield
        return
    with workspace.locked(lock, lambda: progress.step("waiting for another edgepack that works on the same")):
        yield


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
        workspace.copy_files(made.path, partial)
    return out


# ── before training ──


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """Where training starts."""

    path: Path
    digest: str
    layers: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """All that training reads."""

    whole: ModelSpec
    """The teacher."""
    spec: ModelSpec
    """The student."""
    begun: _Begun
    data: examples.Prepared
    old: examples.Prepared | None
    parts: tuple[train.Part, ...]
    checks: tuple[train.Part, ...]


def _ready(
    parent: Checkpoint, start: Checkpoint | Prune, options: Options, folder: Path, progress: Progress
) -> _Ready:
    whole = modelspec.read(parent.path)
    data = _prepared(parent, start, whole, options.data or (calibrations.BUILTIN,), options, folder, progress)
    old = (
        _prepared(parent, start, whole, options.replay, options, folder, progress) if options.replay else None
    )
    for warning in (*data.warnings, *(old.warnings if old is not None else ())):
        progress.step(f"warning: {warning}")
    begun = _begun(parent, start, data, options, folder, progress)
    spec = modelspec.read(begun.path)
    _require_smaller(parent, whole, spec)
    parts, checks = _parts(parent, whole, spec, data, old, options, folder, progress)
    return _Ready(whole=whole, spec=spec, begun=begun, data=data, old=old, parts=parts, checks=checks)


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


def _require_checkpoint(model: Checkpoint) -> None:
    if not (model.path / "config.json").is_file():
        raise Unsupported(
            f"{model.source} is no Hugging Face folder: neither teacher nor student can be a GGUF",
            hint="give the checkpoint that it was made from",
        )
    if "quantization_config" in serde.read_object(model.path / "config.json"):
        raise Unsupported(
            f"{model.source} is quantized already: what it says is not the model's own",
            hint="give the checkpoint that it was made from",
        )


def _exactly(parent: Checkpoint, start: Checkpoint | Prune) -> Checkpoint | Prune:
    """With the sizes that there will be: they stay multiples of what kernels like."""
    if isinstance(start, Checkpoint):
        return start
    return students.sizes(serde.read_object(parent.path / "config.json"), start)


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
        return _Begun(path=start.path, digest=start.revision, layers=None)
    inputs = (parent.revision, students.label(start), examples.Examples.open(data.train).digest)
    out = folder / "starts" / _named(*inputs, options.threads, prune.VERSION)
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


def _digest(parent: Checkpoint, ready: _Ready, options: Options, tools: Mapping[str, str]) -> str:
    """Different for every input that changes the student, and for no other."""
    sets = [
        (examples.Examples.open(part.examples).digest, part.teacher and part.teacher.name, part.share)
        for part in (*ready.parts, *ready.checks)
    ]
    tasks = None if options.tasks is None else options.tasks.sha256
    recipe, precision = serde.to_json(options.recipe), teacher.computed(options.recipe.precision)
    return _named(
        parent.revision, ready.begun.digest, sets, recipe, precision, options.online, tasks, _launch(options),
        options.threads, sorted(tools.items()), train.VERSION,
    )  # fmt: skip


_OWN_TO_A_MACHINE = ("machine_rank:", "main_process_ip:", "main_process_port:")


def _launch(options: Options) -> str | None:
    """The configuration of accelerate, less what is another on each machine of one training."""
    if options.accelerate is None:
        return None
    lines = options.accelerate.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(_OWN_TO_A_MACHINE))


def _named(*inputs: object) -> str:
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def _origin(checkpoint: Checkpoint, spec: ModelSpec) -> Origin:
    """Of a folder here only the name is told: its place says nothing to others."""
    local = Path(checkpoint.source).exists()
    return Origin(
        source=checkpoint.path.name if local else checkpoint.source,
        revision=checkpoint.revision,
        license=checkpoint.license,
        parameters=spec.parameters,
    )


# ── after training ──


def _readings(
    parent: Checkpoint, ready: _Ready, trained: Path, options: Options, progress: Progress
) -> tuple[Held, ...]:
    sets = [("data", ready.data.held_out)]
    if ready.old is not None:
        sets.append(("replay", ready.old.held_out))
    found = []
    for name, place in sets:
        master, before, after = measure.measure(
            [ready.begun.path, trained], parent.path, place, threads=options.threads, progress=progress
        )
        found.append(
            Held(
                name=name,
                teacher=replace(master, model="teacher", by_example=()),
                before=replace(before, model="start", by_example=()),
                after=replace(after, model="student", by_example=()),
                recovered=measure.recovered(before, after, master),
            )
        )
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
