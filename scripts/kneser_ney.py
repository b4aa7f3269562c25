"""An interpolated Kneser-Ney n-gram model with modified discounts, which the demo model must beat.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3
and 4.1: https://dash.harvard.edu/handle/1/25104739. The names below are those of that report.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

Gram = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Discounts:
    """What is taken from the count of an n-gram that was seen once, twice, and three times or more."""

    one: float
    two: float
    more: float

    def of(self, count: int) -> float:
        return self.one if count == 1 else self.two if count == 2 else self.more


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What is known about the tokens that follow one history."""

    total: int
    """c(h): the sum of the counts of all that follows."""
    backoff: float
    """gamma(h): the probability that the discounts leave to the shorter history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The n-grams of one length."""

    counts: dict[Gram, int]
    """At the highest order how often an n-gram occurs, below it how many different tokens precede it."""
    discounts: Discounts
    contexts: dict[Gram, Context]


@dataclass(frozen=True, slots=True, kw_only=True)
class KneserNey:
    orders: tuple[Order, ...]
    """Unigrams first."""
    vocabulary: int

    def probability(self, history: Sequence[int], token: int) -> float:
        """Probability of `token` after `history`, of which the last `len(orders) - 1` tokens count."""
        result = 1 / self.vocabulary
        for length, order in enumerate(self.orders[: len(history) + 1]):
            recent = tuple(history[len(history) - length :])
            context = order.contexts.get(recent)
            if context is None:
                return result
            count = order.counts.get((*recent, token), 0)
            kept = count - order.discounts.of(count) if count else 0.0
            result = kept / context.total + context.backoff * result
        return result

    def perplexity(self, tokens: Sequence[int]) -> float:
        """Perplexity per token of all `tokens` but the first, which is only history."""
        reach = len(self.orders) - 1
        bits = math.fsum(
            -math.log2(self.probability(tokens[max(0, at - reach) : at], tokens[at]))
            for at in range(1, len(tokens))
        )
        return float(2 ** (bits / (len(tokens) - 1)))


def kneser_ney(tokens: Sequence[int], *, length: int, vocabulary: int) -> KneserNey:
    """The model of n-grams up to `length` of one stream of token numbers below `vocabulary`."""
    counts: dict[Gram, int] = dict(Counter(zip(*(tokens[skip:] for skip in range(length)), strict=False)))
    orders = [order_of(counts)]
    for _ in range(length - 1):
        counts = dict(Counter(gram[1:] for gram in counts))
        orders.append(order_of(counts))
    return KneserNey(orders=tuple(reversed(orders)), vocabulary=vocabulary)


def order_of(counts: dict[Gram, int]) -> Order:
    discounts = modified_discounts(Counter(counts.values()))
    totals: defaultdict[Gram, int] = defaultdict(int)
    taken: defaultdict[Gram, float] = defaultdict(float)
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        taken[gram[:-1]] += discounts.of(count)
    return Order(
        counts=counts,
        discounts=discounts,
        contexts={
            history: Context(total=total, backoff=taken[history] / total) for history, total in totals.items()
        },
    )


def modified_discounts(seen: Counter[int]) -> Discounts:
    """Equation 26 of the report, from the number `seen[n]` of n-grams that were counted n times.

    A text too small to have n-grams with each of the counts 1 to 4 gets the single discount of equation 20,
    and one without n-grams that were counted once or twice gets 1/2.
    """
    n1, n2, n3, n4 = (seen[count] for count in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    if not (n1 and n2 and n3 and n4):
        return Discounts(one=y, two=y, more=y)
    return Discounts(one=1 - 2 * y * n2 / n1, two=2 - 3 * y * n3 / n2, more=3 - 4 * y * n4 / n3)
