"""What an artifact lost: perplexity, divergence from its parent and agreement with it on held-out text, with intervals.

Everything is measured on the artifact that ships, by the runtime that runs it. Windows of the text are the
independent units: tokens of one window share their context, so that an interval over tokens would be too narrow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepack import heldout, hub, record, runtimes, scoring, serde, workspace
from edgepack.errors import BadInput, QualityTooLow
from edgepack.evaluation import Distance, Evaluated, Quality
from edgepack.heldout import Text
from edgepack.progress import Progress
from edgepack.scoring import Model, reference
from edgepack.scoring import tasks as questions
from edgepack.scoring.intervals import Floats, exp, mean, quantile, share
from edgepack.scoring.reference import Cut, Reference, Scores
from edgepack.scoring.tasks import Tasks

TOKENS = 4096
WINDOW = 256
_VERSION = 1
"""Raised when the same inputs are measured otherwise, so that old figures are not taken for new ones."""
LEAST_WINDOWS = 8
"""An interval from fewer says nothing."""


def measure(
    artifact: Path,
    *,
    against: Path | None,
    text: Text,
    fingerprints: Sequence[str] = (),
    tasks: Tasks | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    kv_type: str = "f16",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress,
) -> Quality:
    """Runs the artifact over held-out text, and compares it with its parent when there is one.

    ``artifact``: a .gguf file or the folder of any format. ``against``: the model that it was made from, a folder
    or a .gguf; what it says is computed once and kept in the cache, and so is the result. ``fingerprints``: of the
    text that the artifact was calibrated on (heldout.fingerprints). ``kv_type``: KV cache of a GGUF artifact.
    Rows of padding that only one of the two has are left out on both sides. Raises BadInput for a text that is too
    short, a text that the artifact was calibrated on, and a parent with another vocabulary, and what `scoring.opened`
    raises.
    """
    heldout.require_held_out(text, fingerprints)
    asked = _Asked(
        artifact=artifact,
        digest=digest_of(artifact),
        parent=against,
        revision="" if against is None else hub.content_revision(against, progress),
        cut=Cut(text=text, tokens=tokens, window=window),
        tasks=tasks,
        kv_type=kv_type,
        threads=threads,
        seed=seed,
    )
    kept = workspace.cache_root() / "measured" / f"{asked.name}.json"
    if not kept.is_file():
        workspace.write_text(kept, serde.to_json(_measured(asked, progress)))
    return serde.load_json(Quality, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What `measure` is to be given of an artifact."""

    path: Path
    kv_type: str
    fingerprints: tuple[str, ...]


@contextmanager
def subject(named: Path, progress: Progress) -> Iterator[Subject]:
    """An artifact, or the weights of a bundle, unpacked for the time it takes and run with the plan's KV cache.

    Raises NotFound, NoSpace, Untrusted for a bundle that is not what it must be, BadInput for a damaged record.
    """
    if not (named.is_file() and named.suffix == ".tar"):
        yield Subject(path=named, kv_type="f16", fingerprints=_calibrated_on(named))
        return
    from edgepack import bundle
    from edgepack.device import agent
    from edgepack.plan import Plan

    progress.step(f"verifying {named.name}")
    found, _ = bundle.verified(named, None)
    with workspace.scratch("quality") as place:
        with bundle.translated(named):
            plan = serde.load(Plan, agent.read_document(found, "plan.json"), source="plan.json")
        artifact = runtimes.named(plan.runtime).ARTIFACT
        wanted = [file for file in found["files"] if file["path"].startswith((artifact, f"{artifact}/"))]
        size = sum(file["size"] for file in wanted)
        workspace.require_space(place, size)
        with bundle.translated(named), progress.bar("unpacking", size) as advance:
            for file in wanted:
                agent.extract(found, file["path"], str(place), advance)
        yield Subject(path=place / artifact, kv_type=plan.settings.kv_type, fingerprints=())


def refuse(
    measured: Quality, *, max_kl: float | None = None, max_ppl_loss: float | None = None, heavier: str | None
) -> tuple[str, ...]:
    """Warnings for limits that the measured value keeps though its interval reaches beyond them.

    ``max_kl`` in nats a token, ``max_ppl_loss`` as a share of the parent's perplexity. Raises QualityTooLow when a
    measured value is above its limit, with the scheme ``heavier`` in its hint. The value decides and not an end of
    its interval: the upper end would refuse artifacts for the shortness of the text, the lower let bad ones pass.
    """
    if measured.parent is None:
        raise BadInput("a limit on quality needs a parent to compare with", hint="--against PARENT")
    limits = (
        ("KL to the parent", measured.parent.kl, max_kl, "{:.4g} nats"),
        ("loss of perplexity", measured.parent.ppl_loss, max_ppl_loss, "{:.2%}"),
    )
    warnings = []
    for name, found, limit, form in limits:
        if limit is None:
            continue
        told = f"{name} {form.format(found.value)} [{form.format(found.low)}, {form.format(found.high)}]"
        if found.value > limit:
            hint = (
                f"take --scheme {heavier}, or allow more"
                if heavier
                else "nothing heavier is known; allow more"
            )
            raise QualityTooLow(f"{told} is above the limit of {form.format(limit)}", hint=hint)
        if found.high > limit:
            warnings.append(
                f"{told} keeps the limit of {form.format(limit)}, but not surely: measure on more tokens"
            )
    return tuple(warnings)


def digest_of(artifact: Path) -> str:
    """sha256 of a file, or over the names and digests of a folder's files."""
    from edgepack.builders.quantizers import folder_sha256

    return workspace.sha256_file(artifact) if artifact.is_file() else folder_sha256(artifact)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One measurement."""

    artifact: Path
    digest: str
    parent: Path | None
    revision: str
    cut: Cut
    tasks: Tasks | None
    kv_type: str
    threads: int | None
    seed: int

    @property
    def name(self) -> str:
        """Different for every input that changes the figures; threads change only in what order sums are added."""
        tasks = None if self.tasks is None else (self.tasks.name, self.tasks.sha256)
        runtime = scoring.version_of(self.artifact)
        cut = (self.cut.text.name, self.cut.text.sha256, self.cut.tokens, self.cut.window)
        versions = (_VERSION, reference.VERSION, questions.VERSION)
        inputs = (self.digest, self.revision, runtime, self.kv_type, *cut, tasks, self.seed, *versions)
        return hashlib.sha256(repr(inputs).encode()).hexdigest()[:24]


def _measured(asked: _Asked, progress: Progress) -> Quality:
    """The parent first, so that the memory needed is that of one model at a time."""
    tasks, known, theirs, distance = asked.tasks, None, None, None
    if asked.parent is not None:
        known, theirs = _references(asked, asked.parent, progress)
    with _opened(asked) as scorer:
        pieces = _windows(scorer, asked.cut)
        if known is not None:
            cut = _Cuts(windows=known.windows.tolist(), vocabulary=known.codes.shape[2], tokens=known.tokens)
            known = reference.within(known, _common(asked, cut, _cuts(scorer, pieces)))
        right = () if tasks is None else questions.answer(tasks, scorer, progress, title="the artifact")
        if known is None:
            nll = _likelihoods(scorer, pieces, progress)
        else:
            scores = reference.compare(scorer, known, progress)
            nll = scores.nll
            distance = distance_of(
                scores, known.nll, revision=asked.revision, runtime=known.runtime, seed=asked.seed
            )
        windows, predicted = nll.shape
        return Quality(
            artifact=asked.digest,
            runtime=scorer.facts.runtime,
            text=Evaluated(
                name=asked.cut.text.name,
                sha256=asked.cut.text.sha256,
                tokens=windows * (predicted + 1),
                windows=windows,
                window=predicted + 1,
            ),
            perplexity=exp(mean(nll)),
            parent=distance,
            tasks=None if tasks is None else questions.accuracy(tasks, right, theirs),
            seed=asked.seed,
        )


# ── numbers: pure ──


def distance_of(scores: Scores, parent_nll: Floats, *, revision: str, runtime: str, seed: int) -> Distance:
    """The figures of an artifact against its parent; scores and ``parent_nll`` are [windows, tokens - 1]."""
    return Distance(
        revision=revision,
        runtime=runtime,
        perplexity=exp(mean(parent_nll)),
        log_ratio=mean(scores.nll - parent_nll),
        kl=mean(scores.kl, least=0.0),
        kl_p99=quantile(scores.kl, 0.99, seed=seed),
        same_top=share(scores.agrees),
    )


def _calibrated_on(artifact: Path) -> tuple[str, ...]:
    known = record.of(artifact) if artifact.exists() else None
    return known.calibration.fingerprints if known is not None and known.calibration is not None else ()


# ── the parent ──


def _references(asked: _Asked, parent: Path, progress: Progress) -> tuple[Reference, tuple[bool, ...] | None]:
    """The parent's logits and answers, from the cache or made now; it is loaded at most once."""
    tasks, runtime = asked.tasks, scoring.version_for(parent, asked.artifact)
    name = reference.key(asked.revision, runtime, asked.cut)
    items = None if tasks is None else questions.key(asked.revision, runtime, tasks)
    known, theirs = reference.find(name), None if items is None else questions.recall(items)
    if known is not None and (items is None or theirs is not None):
        return known, theirs
    with _opened(asked) as scorer:  # what cannot be compared is found out before the parent is scored
        ours = _cuts(scorer, _windows(scorer, asked.cut))
    with (
        _runnable(parent, asked.artifact, progress) as model,
        scoring.opened(model, threads=asked.threads) as scorer,
    ):
        own = _windows(scorer, asked.cut)
        _common(asked, _cuts(scorer, own), ours)
        if tasks is not None and items is not None and theirs is None:
            theirs = questions.answer(tasks, scorer, progress, title="the parent")
            questions.remember(items, theirs)
        return known or reference.make(name, scorer, own, progress), theirs


def _opened(asked: _Asked) -> AbstractContextManager[Model]:
    return scoring.opened(asked.artifact, kv_type=asked.kv_type, threads=asked.threads)


@contextmanager
def _runnable(parent: Path, artifact: Path, progress: Progress) -> Iterator[Path]:
    """The parent as what the artifact's runtime runs: for a GGUF, a checkpoint is converted for the time it takes.

    So a GGUF is compared by llama.cpp on both sides, and needs no torch.
    """
    if artifact.suffix != ".gguf" or parent.is_file():
        yield parent
        return
    from edgepack.builders import convert

    # llama.cpp rounds a matrix's inputs to the matrix's type: F16 is off by 1e-7 nats from F32, BF16 by 5e-6, and a
    # BF16 checkpoint's weights are the same in F16 but for those below 6e-5, which are off by 3e-8 at most.
    with workspace.scratch("parent") as folder:
        yield convert.convert(parent, folder / "parent.gguf", outtype="F16", progress=progress)


def _windows(scorer: Model, cut: Cut) -> list[list[int]]:
    """Windows of the text in the model's own tokens. Raises BadInput when the text is too short for an interval."""
    size = min(cut.window, scorer.facts.context)
    tokens = scorer.tokenize(cut.text.content)
    found = heldout.windows(tokens, count=cut.tokens // size, size=size, bos=scorer.facts.bos)
    if len(found) < LEAST_WINDOWS:
        raise BadInput(
            f"{len(found)} windows of {size} tokens are too few for an interval: {cut.text.name} has {len(tokens)} "
            f"tokens, and {cut.tokens} are to be measured",
            hint=f"at least {LEAST_WINDOWS} windows: a longer text, more tokens, or smaller windows",
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cuts:
    """A text in a model's tokens, and how many of these the model has."""

    windows: list[list[int]]
    vocabulary: int
    """Rows of logits."""
    tokens: int
    """Those that are no padding."""


def _cuts(scorer: Model, windows: list[list[int]]) -> _Cuts:
    return _Cuts(windows=windows, vocabulary=scorer.facts.vocabulary, tokens=scorer.facts.tokens)


def _common(asked: _Asked, theirs: _Cuts, ours: _Cuts) -> int:
    """Logits that the parent and the artifact both have, which are of the same tokens.

    Sizes of one family differ by padding: Qwen2.5 has 152,064 rows from 7B on and 151,936 below, for the same 151,665
    tokens. Raises BadInput when there is more to it.
    """
    names = f"{asked.artifact.name} and {asked.parent}"
    if theirs.windows != ours.windows:
        raise BadInput(
            f"{names} cut the text into different tokens",
            hint="compare it with the model that it was made from, or with the tokenizer of this version of it",
        )
    common = min(theirs.vocabulary, ours.vocabulary)
    if theirs.vocabulary != ours.vocabulary and max(theirs.tokens, ours.tokens) > common:
        raise BadInput(
            f"{names} have vocabularies of {ours.vocabulary} and {theirs.vocabulary}, and it is not padding that one "
            f"has more: there are tokens up to {max(theirs.tokens, ours.tokens) - 1}",
            hint="compare it with the model that it was made from",
        )
    return common


def _likelihoods(scorer: Model, pieces: Sequence[Sequence[int]], progress: Progress) -> Floats:
    found = np.empty((len(pieces), len(pieces[0]) - 1))
    with progress.bar("scoring the artifact", len(pieces)) as advance:
        for at, piece in enumerate(pieces):
            logits = scorer.logits(piece[:-1])
            found[at] = reference.likelihood(logits, np.asarray(piece[1:], dtype=np.int32))
            advance(1)
    return found
