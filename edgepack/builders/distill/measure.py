"""How near a student is to its teacher on held-out responses, and how much of the gap between them was closed.

Every token of the common vocabulary counts, cut out before the softmax: rows of padding are no outcomes. The teacher's
body runs once and its last hidden states are kept, so that beside a student there is only the teacher's head.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack import serde, workspace
from edgepack.builders import child
from edgepack.builders.distill.examples import Examples, embedding_rows
from edgepack.errors import BadInput, BuildFailed
from edgepack.evaluation import Estimate, Reading
from edgepack.progress import Progress
from edgepack.scoring import transformers as checkpoints
from edgepack.scoring.intervals import Floats, proportion, ratio, student_t

TOKENS = 16384
_LEAST = 2
"""Examples from which an interval can be had."""
_BATCH = 4096
"""Tokens that go through a model at once, padding included."""
_LOGITS = 1 << 24
"""Logits in memory at once, of each of two models: 64 MiB."""


def measure(
    models: Sequence[Path],
    teacher: Path,
    examples: Path,
    *,
    tokens: int = TOKENS,
    threads: int | None = None,
    progress: Progress,
) -> tuple[Reading, ...]:
    """The teacher's figures, and those of each model, on the same responses of ``examples`` (a folder of `Examples`).

    The first examples are taken, which are in a random order, until they have ``tokens`` responses. Models are computed
    in 32 bits; the teacher and one of them are in memory at a time. Raises BadInput for examples that are too few or
    not in the models' tokens, MissingTool, and BuildFailed for a model that does not load or compute.
    """
    known = Examples.open(examples)
    count = _first(known, tokens)
    vocabulary = min(_vocabulary(model) for model in (teacher, *models))
    highest = int(known.tokens[: known.starts[count]].max())
    if highest >= vocabulary:
        raise BadInput(
            f"{examples} has the token {highest}, and the models have {vocabulary} in common",
            hint="prepare the data with the tokenizer of these models",
        )
    with workspace.scratch("measure") as place:
        out = place / "readings.json"
        job = _Job(
            models=[str(model.resolve()) for model in models],
            teacher=str(teacher.resolve()),
            examples=str(examples.resolve()),
            count=count,
            vocabulary=vocabulary,
            threads=threads or len(os.sched_getaffinity(0)),
            out=str(out),
        )
        words = place / "job.json"
        words.write_text(json.dumps(asdict(job)), encoding="utf-8")
        child.run(
            __name__,
            [words],
            title="measuring the students",
            cwd=place,
            log=workspace.cache_root() / "measure.log",
            threads=job.threads,
            progress=progress,
        )
        return serde.load_json(_Readings, out).readings


def recovered(before: Reading, after: Reading, teacher: Reading) -> Estimate | None:
    """Share of the gap to the teacher, in nats a token, that training closed; all three of one measurement.

    1 is as good as the teacher, below 0 is worse than before. None where ``before`` is not surely worse than the
    teacher: there was no gap to close. The interval is Fieller's (1954), of paired examples.
    """
    theirs = np.array(teacher.by_example)
    gap, left = np.array(before.by_example) - theirs, np.array(after.by_example) - theirs
    wide, rest = float(gap.mean()), float(left.mean())
    doubt = student_t(len(gap) - 1) ** 2 / len(gap)
    (of_rest, both), (_, of_wide) = (doubt * np.cov(left, gap)).tolist()
    sure = wide**2 - of_wide
    if wide <= 0 or sure <= 0:
        return None
    # Shares x that are left for which rest - x * wide is within t standard errors of 0: between a quadratic's roots.
    middle = (rest * wide - both) / sure
    half = math.sqrt(max(0.0, middle**2 - (rest**2 - of_rest) / sure))
    return Estimate(value=1 - rest / wide, low=1 - middle - half, high=1 - middle + half)


def _first(known: Examples, tokens: int) -> int:
    """How many examples have that many responses, or all."""
    count = min(len(known), max(_LEAST, int(np.searchsorted(known.rows, tokens))))
    if count < _LEAST:
        raise BadInput(
            f"{known.folder} has {count} example, and an interval takes {_LEAST}",
            hint="hold out more documents",
        )
    return count


def _vocabulary(model: Path) -> int:
    rows = embedding_rows(model)
    if rows is None:
        raise BadInput(
            f"{model} has no config.json with a vocab_size", hint="a folder as Hugging Face models have it"
        )
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    models: Sequence[str]
    teacher: str
    examples: str
    count: int
    """Examples, from the first on."""
    vocabulary: int
    """Tokens that all models have."""
    threads: int
    out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Readings:
    readings: tuple[Reading, ...]


# ── the other process ──


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Examples of about the same length, padded at their end."""

    tokens: Any
    """[examples, length]"""
    there: Any
    """[examples, length]: 0 for padding."""
    before: Any
    """[examples, length]; True where the next token is a response."""
    targets: Any
    """[responses], example by example."""
    owners: NDArray[np.int64]
    """[responses]: number of the example."""


def _batches(known: Examples, count: int) -> list[_Batch]:
    import torch

    order = sorted(range(count), key=lambda at: len(known[at].tokens))
    groups: list[list[int]] = []
    for at in order:
        if not groups or (len(groups[-1]) + 1) * len(known[at].tokens) > _BATCH:
            groups.append([])
        groups[-1].append(at)
    found = []
    for group in groups:
        length = len(known[group[-1]].tokens)
        tokens = np.zeros((len(group), length), dtype=np.int64)
        there = np.zeros((len(group), length), dtype=np.int64)
        response = np.zeros((len(group), length + 1), dtype=np.bool_)
        for row, at in enumerate(group):
            size = len(known[at].tokens)
            tokens[row, :size] = known[at].tokens
            there[row, :size] = 1
            response[row, :size] = known[at].response
        found.append(
            _Batch(
                tokens=torch.from_numpy(tokens),
                there=torch.from_numpy(there),
                before=torch.from_numpy(response[:, 1:].copy()),
                targets=torch.from_numpy(tokens[response[:, :-1]]),
                owners=np.repeat(group, response.sum(axis=1)),
            )
        )
    return found


class _Model:
    """A checkpoint in two halves: the body that makes hidden states of tokens, and what makes logits of these.

    The second half is the model's own code with the body taken out, so softcaps and scales of logits are those that it
    has, and only rows that are asked for go through the head.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        from transformers.modeling_outputs import MoeModelOutputWithPast

        class Given(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
            """Stands where the body was."""

            states: torch.Tensor

            def forward(self, *_: object, **__: object) -> Any:
                return MoeModelOutputWithPast(last_hidden_state=self.states)

        self._whole = checkpoints.load(path, threads=threads)
        self._body = self._whole.base_model
        self._given = Given()
        setattr(self._whole, self._whole.base_model_prefix, self._given)
        self._device = self._whole.device
        self.name = path.name

    def states(self, batch: _Batch) -> Any:
        """Hidden states [responses, hidden] from which the responses of a batch are predicted."""
        import torch

        with torch.inference_mode():
            found = self._body(
                input_ids=batch.tokens.to(self._device),
                attention_mask=batch.there.to(self._device),
                use_cache=False,
            ).last_hidden_state
            return found[batch.before.to(self._device)].cpu()

    def drop_body(self) -> None:
        """Frees all but the head."""
        self._body = None

    def log_odds(self, states: Any, vocabulary: int) -> Any:
        """Log probabilities [n, vocabulary] among the first tokens. Raises BuildFailed when one is not finite."""
        import torch

        with torch.inference_mode():
            self._given.states = states[None].to(self._device)
            unused = torch.zeros((1, len(states)), dtype=torch.long, device=self._device)
            logits = self._whole(input_ids=unused, use_cache=False).logits[0, :, :vocabulary]
            found = torch.log_softmax(logits.float(), dim=-1)
            if not torch.isfinite(found).all():
                raise BuildFailed(
                    f"{self.name} gave logits that are not finite",
                    hint="the model is damaged, or its training did not converge",
                )
            return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """Of one model, by example: [examples] each."""

    nll: Floats
    kl: Floats
    agrees: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @classmethod
    def nothing(cls, count: int) -> _Sums:
        return cls(
            nll=np.zeros(count),
            kl=np.zeros(count),
            agrees=np.zeros(count, dtype=np.int64),
            tokens=np.zeros(count, dtype=np.int64),
        )


def _score(
    model: _Model, teacher: _Model, batches: Sequence[tuple[_Batch, Any]], job: _Job, done: Iterator[int]
) -> _Sums:
    """``batches``: with the teacher's states of each."""
    sums = _Sums.nothing(job.count)
    rows = max(1, _LOGITS // job.vocabulary)
    for batch, kept in batches:
        own = kept if model is teacher else model.states(batch)
        for at in range(0, len(own), rows):
            piece = slice(at, at + rows)
            ours = model.log_odds(own[piece], job.vocabulary)
            owners, targets = batch.owners[piece], batch.targets[piece].to(ours.device)
            np.add.at(sums.nll, owners, -ours.gather(1, targets[:, None])[:, 0].double().cpu().numpy())
            np.add.at(sums.tokens, owners, 1)
            if model is teacher:
                continue
            theirs = teacher.log_odds(kept[piece], job.vocabulary)
            apart = (theirs.exp() * (theirs - ours)).sum(1).clamp_min(0)
            np.add.at(sums.kl, owners, apart.double().cpu().numpy())
            np.add.at(sums.agrees, owners, (ours.argmax(1) == theirs.argmax(1)).cpu().numpy())
        next(done)
    return sums


def _reading(model: str, sums: _Sums, *, teacher: bool) -> Reading:
    there = sums.tokens > 0
    tokens = sums.tokens[there]
    return Reading(
        model=model,
        tokens=int(tokens.sum()),
        nll=ratio(sums.nll[there], tokens, least=0.0),
        kl=None if teacher else ratio(sums.kl[there], tokens, least=0.0),
        same_top=None if teacher else proportion(sums.agrees[there], tokens),
        by_example=tuple(sums.nll[there].tolist()),
    )


def _main(place: str) -> None:
    job = _Job(**json.loads(Path(place).read_text(encoding="utf-8")))
    batches = _batches(Examples.open(Path(job.examples)), job.count)
    done = _counting(len(batches) * (2 + len(job.models)))
    teacher = _Model(Path(job.teacher), job.threads)
    kept = []
    for batch in batches:
        kept.append((batch, teacher.states(batch)))
        next(done)
    teacher.drop_body()
    readings = [_reading(teacher.name, _score(teacher, teacher, kept, job, done), teacher=True)]
    for model in job.models:
        student = _Model(Path(model), job.threads)
        readings.append(_reading(student.name, _score(student, teacher, kept, job, done), teacher=False))
        del student
    Path(job.out).write_text(serde.to_json(_Readings(readings=tuple(readings))), encoding="utf-8")


def _counting(total: int) -> Iterator[int]:
    """Tells the parent of another step each time it is asked."""
    for done in range(1, total + 1):
        child.report(done, total)
        yield done


if __name__ == "__main__":
    child.main(_main, sys.argv[1:])
