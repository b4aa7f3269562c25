"""Estimates with 95 % intervals from windows of a text, which are the independent units; pure arithmetic."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack.evaluation import LEVEL, Estimate

_RESAMPLES = 1000
"""Of the bootstrap: the error of its ends is a tenth of the interval."""

Floats = NDArray[np.float64]


def mean(values: Floats, *, least: float = -math.inf) -> Estimate:
    """Mean over [windows, tokens] with the t interval of the windows' means; ends below ``least`` cannot be."""
    return ratio(values.sum(axis=1), np.full(len(values), values.shape[1]), least=least)


def ratio(above: Floats, below: Floats | NDArray[np.int64], *, least: float = -math.inf) -> Estimate:
    """Sum over sum of units of unequal size, such as nats over tokens: ``above`` and ``below`` are [units].

    The t interval of the linearized ratio (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    value = float(above.sum() / below.sum())
    half = student_t(len(above) - 1) * _deviation(above, below, value)
    return Estimate(value=value, low=max(least, value - half), high=value + half)


def exp(log: Estimate) -> Estimate:
    return Estimate(value=math.exp(log.value), low=math.exp(log.low), high=math.exp(log.high))


def share(hits: NDArray[np.bool_]) -> Estimate:
    """Share of true values in [windows, tokens], with the interval of `proportion`."""
    return proportion(hits.sum(axis=1), np.full(len(hits), hits.shape[1]))


def proportion(hits: NDArray[np.int64], of: NDArray[np.int64]) -> Estimate:
    """Share of ``hits`` in ``of``, both tokens [units]: Wilson's interval at the number of independent tokens.

    That number is the tokens over the design effect, the variance of the units' shares relative to independent
    tokens' (Kish 1965); never more than the tokens. So it is no point where all agree.
    """
    total = int(of.sum())
    value = float(hits.sum()) / total
    independent = value * (1 - value) / total
    effect = _deviation(hits, of, value) ** 2 / independent if independent else 1.0
    return wilson(value, total / max(1.0, effect))


def _deviation(above: NDArray[Any], below: NDArray[Any], value: float) -> float:
    """Standard error of the ratio ``value`` of two sums."""
    apart = above - value * below
    count = len(apart)
    return math.sqrt(count / (count - 1) * float((apart**2).sum())) / float(below.sum())


def wilson(value: float, count: float) -> Estimate:
    """Interval of a share seen in ``count`` independent cases (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    center = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + (z / (2 * count)) ** 2)
    return Estimate(value=value, low=max(0.0, center - half), high=min(1.0, center + half))


def quantile(values: Floats, at: float, *, seed: int) -> Estimate:
    """A quantile over all tokens, with the percentile interval of a bootstrap over windows (Efron 1979)."""
    random = np.random.default_rng(seed)
    count, each = values.shape
    order = values.argsort(axis=None)
    ordered, owner = values.ravel()[order], order // each

    def drawn(copies: NDArray[np.int64]) -> float:
        """The quantile when each window is there so many times."""
        return float(ordered[np.searchsorted(copies[owner].cumsum(), at * values.size)])

    every = [drawn(random.multinomial(count, np.full(count, 1 / count))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(every, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(value=drawn(np.ones(count, dtype=np.int64)), low=float(low), high=float(high))


_FEW = (12.7062, 4.3027, 3.1824, 2.7764)
"""Student's t at LEVEL for 1 to 4 degrees of freedom, where the expansion is off (Abramowitz & Stegun, table 26.10)."""


def student_t(freedom: int) -> float:
    """Two-sided quantile of Student's t at LEVEL, to 0.2 %.

    Expansion around the normal quantile (Abramowitz & Stegun 26.7.5).
    """
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
