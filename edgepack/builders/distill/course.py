"""The order in which examples are learned from, and the tensors of a batch of them.

The order is a function of seed and position alone: whoever goes on at a step sees what it would have seen, and a step's
examples are the same however they are split over processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgepack.builders.distill.examples import Examples
from edgepack.builders.distill.learner import IGNORED, Source
from edgepack.builders.distill.teacher import Kept, Rows
from edgepack.builders.distill.train import Part
from edgepack.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An example with its teacher's rows."""

    tokens: NDArray[np.int32]
    response: NDArray[np.bool_]
    rows: Rows | None


class Pool:
    """The examples of all parts."""

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        """Raises BadInput for no part or one that holds nothing, and for rows that are not of their examples."""
        if not parts:
            raise BadInput("there are no examples to train on, or none are held out")
        self.examples = [Examples.open(part.examples) for part in parts]
        self.kept = [Kept.open(part.teacher) if part.teacher else None for part in parts]
        for part, examples, kept in zip(parts, self.examples, self.kept, strict=True):
            if not 0 < part.share <= 1:
                raise BadInput(
                    f"a share of {part.share:g} of {part.examples} cannot be drawn", hint="0 < share <= 1"
                )
            if examples.response_tokens == 0:
                raise BadInput(f"{part.examples} has no token of a response: there is nothing to learn from")
            if kept is not None:
                _belong(kept, examples, part)
        drawn = [
            _drawn(number, len(examples), part.share, seed)
            for number, (part, examples) in enumerate(zip(parts, self.examples, strict=True))
        ]
        self.members: NDArray[np.int64] = np.concatenate(drawn)
        """[m, 2]: part and example."""
        self.lengths: NDArray[np.int64] = np.array(
            [self.examples[part].starts[at + 1] - self.examples[part].starts[at] for part, at in self.members]
        )

    def __len__(self) -> int:
        return len(self.members)

    def item(self, member: int, *, rows: bool = True) -> Item:
        """A member, with its teacher's rows where there are any and ``rows`` says so."""
        part, at = self.members[member]
        example = self.examples[part][int(at)]
        kept = self.kept[part] if rows else None
        last = example.first_row + int(np.count_nonzero(example.response))
        return Item(
            tokens=example.tokens,
            response=example.response,
            rows=None if kept is None else kept.rows(example.first_row, last),
        )

    @property
    def source(self) -> Source | None:
        """What the teacher's rows were made with; None without any. Raises BadInput where they differ, or some lack."""
        known = [kept for kept in self.kept if kept is not None]
        if not known:
            return None
        made = {(kept.k, kept.temperature, kept.vocabulary) for kept in known}
        if len(known) < len(self.kept) or len(made) > 1:
            raise BadInput(
                "some parts have other rows of a teacher than others, or none",
                hint="keep the teacher's rows of all parts with the same k, temperature and vocabulary",
            )
        return Source(temperature=known[0].temperature, vocabulary=known[0].vocabulary)

    def largest(self) -> int:
        """The largest token id of all parts."""
        return max(int(examples.tokens.max()) for examples in self.examples)


class Course(torch.utils.data.Dataset):  # type: ignore[misc]  # torch is not typed here
    """``steps`` batches of a pool, one after the other: each pass goes through all of it in an order of its own."""

    def __init__(self, pool: Pool, *, batch: int, steps: int, seed: int, rows: bool) -> None:
        self.pool, self.batch, self.steps, self.seed, self.rows = pool, batch, steps, seed, rows
        self._step = -1
        self._members: Sequence[int] = ()
        self._pass = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.batch * self.steps

    def __getitem__(self, at: int) -> Item:
        step, place = divmod(at, self.batch)
        if step != self._step:
            self._step, self._members = step, self._of(step)
        return self.pool.item(self._members[place], rows=self.rows)

    def _of(self, step: int) -> Sequence[int]:
        """The members of a step, the longest first: what is held at once is then of nearly equal length."""
        members = [self._at(step * self.batch + place) for place in range(self.batch)]
        return sorted(members, key=lambda member: -int(self.pool.lengths[member]))

    def _at(self, position: int) -> int:
        turn, place = divmod(position, len(self.pool))
        if turn != self._pass:
            self._pass = turn
            self._order = np.random.default_rng((self.seed, turn)).permutation(len(self.pool))
        return int(self._order[place])


class Exam(torch.utils.data.Dataset):  # type: ignore[misc]  # torch is not typed here
    """A pool once, and as many examples without a target as make it a multiple of ``multiple``."""

    def __init__(self, pool: Pool, multiple: int) -> None:
        self.pool = pool
        self.order = sorted(range(len(pool)), key=lambda member: -int(pool.lengths[member]))
        self.count = -(-len(pool) // multiple) * multiple

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> Item:
        if at < len(self.order):
            return self.pool.item(self.order[at])
        shortest = self.pool.item(self.order[-1])
        rows = shortest.rows
        return Item(
            tokens=shortest.tokens,
            response=np.zeros_like(shortest.response),
            rows=None if rows is None else _none_of(rows),
        )


def collate(items: Sequence[Item]) -> Mapping[str, Tensor]:
    """What a Learner is called with: ids and labels, padded on the right, and the rows of all items in their order."""
    longest = max(len(item.tokens) for item in items)
    ids = np.zeros((len(items), longest), np.int64)
    labels = np.full((len(items), longest), IGNORED, np.int64)
    for at, item in enumerate(items):
        ids[at, : len(item.tokens)] = item.tokens
        labels[at, : len(item.tokens)][item.response] = item.tokens[item.response]
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    rows = [item.rows for item in items if item.rows is not None]
    if rows:
        for name in ("ids", "logits", "lse", "lse_t"):
            batch[name] = torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))
    return batch


def _belong(kept: Kept, examples: Examples, part: Part) -> None:
    if kept.about.identity.examples != examples.digest or len(kept) != examples.response_tokens:
        raise BadInput(
            f"{part.teacher} holds what a teacher says of other examples than {part.examples}",
            hint="keep the teacher's rows of these examples",
        )


def _drawn(part: int, count: int, share: float, seed: int) -> NDArray[np.int64]:
    """[share · count, 2], at least one, in the examples' order."""
    order = np.random.default_rng((seed, part, count)).permutation(count)
    taken = np.sort(order[: max(1, round(share * count))])
    return np.stack([np.full(len(taken), part, np.int64), taken.astype(np.int64)], axis=1)


def _none_of(rows: Rows) -> Rows:
    return Rows(
        ids=rows.ids[:0],
        logits=rows.logits[:0],
        lse=rows.lse[:0],
        lse_t=rows.lse_t[:0],
        target=rows.target[:0],
        temperature=rows.temperature,
        vocabulary=rows.vocabulary,
    )
