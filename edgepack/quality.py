"""What an artifact lost: perplexity, divergence from its parent and agreement with it on held-out text, with intervals.

Everything is measured on the artifact that ships, by the runtime that runs it. Windows of the text are the
independent units: tokens of one window share their context, so that an interval over tokens would be too narrow.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgepack import heldout, hub, scoring, workspace
from edgepack.errors import BadInput, QualityTooLow
from edgepack.heldout import Text
from edgepack.progress import Progress
from edgepack.scoring import Scorer, reference
from edgepack.scoring.reference import Cut, Reference, Scores

TOKENS = 8192
WINDOW = 256
LEAST_WINDOWS = 8
"""An interval from fewer says nothing."""

LEVEL = 0.95
_RESAMPLES = 1000
"""Of the bootstrap: the error of its ends is a tenth of the interval."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A measured value and where, for other text of this kind, it lies with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The text that was measured on."""

    name: str
    sha256: str
    tokens: int
    windows: int
    window: int
    """Tokens of one window; all but its first are predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """An artifact against its parent, token by token on the same text."""

    revision: str
    """Of the parent: sha256 over its files, or a commit."""
    runtime: str
    """That computed the parent's logits."""
    perplexity: Estimate
    log_ratio: Estimate
    """ln(perplexity of the artifact / of the parent), nats a token; paired, so far tighter than either."""
    kl: Estimate
    """Mean of KL(parent || artifact), nats a token."""
    kl_p99: Estimate
    """What 99 % of the tokens stay below."""
    same_top: Estimate
    """Share of tokens whose first choice is the parent's."""

    @property
    def ppl_loss(self) -> Estimate:
        """Perplexity over the parent's, less one."""
        ratio = self.log_ratio
        return Estimate(value=math.expm1(ratio.value), low=math.expm1(ratio.low), high=math.expm1(ratio.high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What was measured, and what it takes to measure it again."""

    artifact: str
    """sha256 of the file, or over the names and digests of the folder's files."""
    runtime: str
    text: Evaluated
    perplexity: Estimate
    parent: Distance | None
    """None when no parent was named."""
    seed: int
    """Of the bootstrap; nothing else is random."""
    level: float = LEVEL
    schema_version: Literal[1] = 1


def measure(
    artifact: Path,
    *,
    against: Path | None,
    text: Text,
    tokens: int = TOKENS,
    window: int = WINDOW,
    kv_type: str = "f16",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress,
) -> Quality:
    """Runs the artifact over held-out text, and compares it with its parent when there is one.

    ``artifact``: a .gguf file or the folder of any format. ``against``: the model that it was made from, a folder
    or a .gguf; what it says is computed once and kept in the cache. ``kv_type``: KV cache of a GGUF artifact.
    Raises BadInput for a text that is too short, a text that the artifact was calibrated on, and a parent with
    another vocabulary, and what `scoring.opened` raises.
    """
    digest = digest_of(artifact)
    cut = Cut(text=text, tokens=tokens, window=window)
    with scoring.opened(artifact, kv_type=kv_type, threads=threads) as scorer:
        pieces = _windows(scorer, cut)
        if against is None:
            nll = _likelihoods(scorer, pieces, progress)
            return _quality(digest, scorer, cut, nll, None, seed)
        revision = hub.content_revision(against, progress)
        known = _reference(against, revision, artifact, cut, threads, progress)
        _require_same_tokens(against, known, artifact, scorer, pieces)
        scores = reference.compare(scorer, known, progress)
        distance = distance_of(scores, known.nll, revision=revision, runtime=known.runtime, seed=seed)
        return _quality(digest, scorer, cut, scores.nll, distance, seed)


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
                f"{told} keeps the limit of {form.format(limit)}, but not surely: measure more --tokens"
            )
    return tuple(warnings)


def digest_of(artifact: Path) -> str:
    """sha256 of a file, or over the names and digests of a folder's files."""
    from edgepack.builders.quantizers import folder_sha256

    return workspace.sha256_file(artifact) if artifact.is_file() else folder_sha256(artifact)


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


def mean(values: Floats, *, least: float = -math.inf) -> Estimate:
    """Mean over [windows, tokens] with the t interval of the windows' means; ends below ``least`` cannot be."""
    means = values.mean(axis=1)
    center = float(means.mean())
    half = student_t(len(means) - 1) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return Estimate(value=center, low=max(least, center - half), high=center + half)


def exp(log: Estimate) -> Estimate:
    return Estimate(value=math.exp(log.value), low=math.exp(log.low), high=math.exp(log.high))


def share(hits: NDArray[np.bool_]) -> Estimate:
    """Share of true values in [windows, tokens]: Wilson's interval at the number of independent tokens.

    That number is the tokens over the design effect, the variance of the windows' shares relative to independent
    tokens' (Kish 1965); never more than the tokens. So it is no point where all agree.
    """
    value = float(hits.mean())
    independent = value * (1 - value) / hits.shape[1]
    effect = float(hits.mean(axis=1).var(ddof=1)) / independent if independent else 1.0
    return wilson(value, hits.size / max(1.0, effect))


def wilson(value: float, count: float) -> Estimate:
    """Interval of a share seen in ``count`` independent cases (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    center = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + (z / (2 * count)) ** 2)
    return Estimate(value=value, low=max(0.0, center - half), high=min(1.0, center + half))


def quantile(values: Floats, at: float, *, seed: int) -> Estimate:
    """A quantile over all tokens, with the percentile interval of a bootstrap over windows (Efron 1979)."""
    random = np.random.default_rng(seed)
    count = len(values)
    drawn = np.sort([np.quantile(values[random.integers(count, size=count)], at) for _ in range(_RESAMPLES)])
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(value=float(np.quantile(values, at)), low=float(low), high=float(high))


def student_t(freedom: int) -> float:
    """Two-sided quantile of Student's t at LEVEL, to 0.2 % from 5 degrees of freedom on.

    Expansion around the normal quantile (Abramowitz & Stegun 26.7.5).
    """
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


# ── the parent ──


def _reference(
    parent: Path, revision: str, artifact: Path, cut: Cut, threads: int | None, progress: Progress
) -> Reference:
    """The parent's reference, from the cache or made now."""
    name = reference.key(revision, scoring.version_for(parent, artifact), cut)
    known = reference.find(name)
    if known is not None:
        return known
    with _runnable(parent, artifact, progress) as model, scoring.opened(model, threads=threads) as scorer:
        return reference.make(name, scorer, _windows(scorer, cut), progress)


@contextmanager
def _runnable(parent: Path, artifact: Path, progress: Progress) -> Iterator[Path]:
    """The parent as what the artifact's runtime runs: for a GGUF, a checkpoint is converted for the time it takes.

    So a GGUF is compared by llama.cpp on both sides, and needs no torch.
    """
    if artifact.suffix != ".gguf" or parent.is_file():
        yield parent
        return
    from edgepack.builders import convert

    # llama.cpp rounds a matrix's inputs to the matrix's type: harmless in F16, while BF16 is off by 1e-5 nats.
    outtype: Literal["F16", "F32"] = "F16" if convert.stored_type(parent) == "F16" else "F32"
    workspace.cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace.cache_root(), prefix="parent-") as folder:
        yield convert.convert(parent, Path(folder) / "parent.gguf", outtype=outtype, progress=progress)


def _windows(scorer: Scorer, cut: Cut) -> list[list[int]]:
    """Windows of the text in the model's own tokens. Raises BadInput when the text is too short for an interval."""
    size = min(cut.window, scorer.facts.context)
    tokens = scorer.tokenize(cut.text.content)
    found = heldout.windows(tokens, count=cut.tokens // size, size=size, bos=scorer.facts.bos)
    if len(found) < LEAST_WINDOWS:
        raise BadInput(
            f"{len(found)} windows of {size} tokens are too few for an interval: {cut.text.name} has {len(tokens)} "
            f"tokens, and --tokens is {cut.tokens}",
            hint=f"at least {LEAST_WINDOWS} windows: a longer --text, more --tokens, or a smaller --window",
        )
    return found


def _require_same_tokens(
    parent: Path, known: Reference, artifact: Path, scorer: Scorer, pieces: list[list[int]]
) -> None:
    width = known.codes.shape[2]
    if width != scorer.facts.vocabulary:
        raise BadInput(
            f"{artifact.name} has a vocabulary of {scorer.facts.vocabulary}, {parent.name} one of {width}",
            hint="compare it with the model that it was made from",
        )
    if pieces != known.windows.tolist():
        raise BadInput(
            f"{artifact.name} and {parent.name} cut the text into different tokens",
            hint="compare it with the model that it was made from, or with the tokenizer of this version of it",
        )


def _likelihoods(scorer: Scorer, pieces: Sequence[Sequence[int]], progress: Progress) -> Floats:
    found = np.empty((len(pieces), len(pieces[0]) - 1))
    with progress.bar("scoring the artifact", len(pieces)) as advance:
        for at, piece in enumerate(pieces):
            logits = scorer.logits(piece[:-1])
            found[at] = reference.likelihood(logits, np.asarray(piece[1:], dtype=np.int32))
            advance(1)
    return found


def _quality(
    digest: str, scorer: Scorer, cut: Cut, nll: Floats, distance: Distance | None, seed: int
) -> Quality:
    windows, predicted = nll.shape
    return Quality(
        artifact=digest,
        runtime=scorer.facts.runtime,
        text=Evaluated(
            name=cut.text.name,
            sha256=cut.text.sha256,
            tokens=windows * (predicted + 1),
            windows=windows,
            window=predicted + 1,
        ),
        perplexity=exp(mean(nll)),
        parent=distance,
        seed=seed,
    )
