"""Models without a runtime, so that what is made of logits can be tested alone, and a quality as if measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgepack.evaluation import Distance, Estimate, Evaluated, Quality
from edgepack.scoring import Facts


class Drawn:
    """Letters are tokens; the logits after a token depend on it and its place only. ``noise`` moves them.

    Models of different ``vocabulary`` agree on the logits that they both have, when there is no noise.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 97,
        tokens: int = 97,
        seed: int = 1,
        noise: float = 0.0,
        context: int = 64,
    ) -> None:
        self.facts = Facts(
            runtime="drawn", vocabulary=vocabulary, tokens=tokens, context=context, bos=None, ends=(0,)
        )
        self.asked = 0
        self._seed, self._noise = seed, noise

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) % 97 for letter in text]

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens)

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        self.asked += 1
        rows = []
        for place, token in enumerate(tokens):
            random = np.random.default_rng((self._seed, place, token))
            row = 4 * random.standard_normal(self.facts.vocabulary)
            rows.append(row + self._noise * random.standard_normal(self.facts.vocabulary))
        return np.asarray(rows[first:], dtype=np.float32)


class Scripted(Drawn):
    """Knows some texts by heart: the next letter of each is likelier than any other by ``margin`` nats."""

    def __init__(self, *texts: str, margin: float = 20.0) -> None:
        super().__init__(vocabulary=128, tokens=128, context=200)
        self._texts, self._margin = texts, margin

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        said = self.text(tokens)
        found = np.zeros((len(tokens), self.facts.vocabulary), dtype=np.float32)
        for at in range(len(tokens)):
            for known in self._texts:
                if known.startswith(said[: at + 1]) and len(known) > at + 1:
                    found[at, ord(known[at + 1])] = self._margin
        return found[first:]


def measured(
    *, kl: tuple[float, float, float], ratio: tuple[float, float, float] = (0.01, 0.005, 0.015)
) -> Quality:
    """The quality of an artifact with this divergence and ln(perplexity ratio): value, low, high."""
    return Quality(
        artifact="a" * 64,
        runtime="llama.cpp",
        text=Evaluated(name="built-in", sha256="b" * 64, tokens=8192, windows=32, window=256),
        perplexity=Estimate(value=12.0, low=11.0, high=13.0),
        parent=Distance(
            revision="sha256:c",
            runtime="llama.cpp",
            perplexity=Estimate(value=11.9, low=10.9, high=12.9),
            log_ratio=Estimate(value=ratio[0], low=ratio[1], high=ratio[2]),
            kl=Estimate(value=kl[0], low=kl[1], high=kl[2]),
            kl_p99=Estimate(value=0.3, low=0.25, high=0.35),
            same_top=Estimate(value=0.95, low=0.94, high=0.96),
        ),
        tasks=None,
        seed=0,
    )
