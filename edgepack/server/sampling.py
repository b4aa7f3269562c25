"""Choosing the next token from a model's logits: temperature, then min-p, top-k and top-p, in vLLM's order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .engines import Sampling

Floats = NDArray[np.floating]

_HEAD = 256
"""Likeliest tokens that are tried first: to sort a whole vocabulary may take longer than a small model's step."""
_ROUNDING = 1e-12
"""By how much of it a sum may miss the share that top-p asks for: two equal halves are a half each."""


class Chooser:
    """The choices of one answer: the same seed makes the same choices from the same logits."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # numpy takes no negative seed.
        self._random = np.random.default_rng(None if sampling.seed is None else sampling.seed % 2**64)

    def choose(self, logits: Floats, barred: Sequence[int] = ()) -> int:
        """A token id; none of ``barred``. ``logits``: [vocabulary]. Raises ValueError when they are not numbers."""
        if barred:
            logits = logits.copy()
            logits[list(barred)] = -np.inf
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise ValueError(f"the model's largest logit is {logits[best]}")
        if self._sampling.temperature == 0:
            return best
        ids, shares = candidates(logits, self._sampling)
        cumulative = shares.cumsum()
        at = int(cumulative.searchsorted(self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(at, len(ids) - 1)])


def candidates(logits: Floats, sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that may follow and their probabilities, which add up to 1.

    The filters work on probabilities after temperature: min-p keeps tokens with at least that share of the likeliest
    one's, top-k the k likeliest of these, top-p the fewest of these whose sum reaches it. Of equals the lower id is
    taken first. Ids are sorted by probability where top-k or top-p sort them, by id otherwise.
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    scaled /= sampling.temperature
    weights = np.exp(scaled, out=scaled)
    ids = np.flatnonzero(weights >= sampling.min_p if sampling.min_p > 0 else weights > 0)
    weights = weights[ids]
    if 0 < sampling.top_k < len(ids):
        kept = _largest(weights, sampling.top_k)
        ids, weights = ids[kept], weights[kept]
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def log_probabilities(logits: Floats) -> NDArray[np.float64]:
    """Natural logarithms of the softmax of ``logits``, [vocabulary]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def likeliest(logs: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    """The ``count`` likeliest tokens with their log probabilities, the likeliest first."""
    return tuple((int(i), float(logs[i])) for i in _largest(logs, count))


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Places of the ``count`` largest values, largest first; of equals the first."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: count - len(above)]
    places = np.concatenate([above, equal])
    places.sort()
    return places[np.argsort(-values[places], kind="stable")]


def _nucleus(weights: NDArray[np.float64], share: float) -> NDArray[np.intp]:
    """Places of the fewest largest weights whose sum reaches ``share`` of all; at least one."""
    wanted = share * weights.sum() * (1 - _ROUNDING)
    count = min(_HEAD, len(weights))
    while True:
        places = _largest(weights, count)
        sums = weights[places].cumsum()
        if sums[-1] >= wanted or count == len(weights):
            return places[: int(sums.searchsorted(wanted, side="left")) + 1]
        count = min(8 * count, len(weights))
