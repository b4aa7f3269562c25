"""Estimates with 95 % intervals from windows of a text, which are the independent units; pure arithmetic."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from edgepack.evaluation import LEVEL, Estimate

_RESAMPLES = 1000
"""Of the bootstrap: the error of its ends is a tenth of the interval."""

Floats = NDArray[np.float64]


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
    count, each = values.shape
    order = values.argsort(axis=None)
    ordered, owner = values.ravel()[order], order // each

    def drawn(copies: NDArray[np.int64]) -> float:
        """The quantile when each window is there so many times."""
        return float(ordered[np.searchsorted(copies[owner].cumsum(), at * values.size)])

    every = [drawn(random.multinomial(count, np.full(count, 1 / count))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(every, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(value=drawn(np.ones(count, dtype=np.int64)), low=float(low), high=float(high))


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
