"""What was measured of an artifact, as a value: figures with intervals, and what it takes to measure them again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.95
"""Of every interval."""


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
class Reading:
    """A model on the held-out responses that it was distilled for, beside its teacher."""

    model: str
    """Name of its folder."""
    tokens: int
    """Responses that were predicted."""
    nll: Estimate
    """Negative log-likelihood of the data's own tokens, nats a token."""
    kl: Estimate | None
    """Mean of KL(teacher || model), nats a token; None for the teacher itself."""
    same_top: Estimate | None
    """Share of tokens whose first choice is the teacher's."""
    by_example: tuple[float, ...]
    """Nats of each example's responses together, so that models are compared example by example."""

    @property
    def perplexity(self) -> Estimate:
        return Estimate(
            value=math.exp(self.nll.value), low=math.exp(self.nll.low), high=math.exp(self.nll.high)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How many items were answered right, and what became of the parent's answers."""

    name: str
    sha256: str
    items: int
    right: int
    accuracy: Estimate
    """Wilson's interval; items count as independent."""
    parent: Estimate | None
    lost: int | None
    """Items that the parent answers right and the artifact does not."""
    gained: int | None
    """The other way round."""


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
    tasks: Accuracy | None
    seed: int
    """Of the bootstrap; nothing else is random."""
    level: float = LEVEL
    schema_version: Literal[1] = 1
