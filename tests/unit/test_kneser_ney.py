"""The n-gram baseline is a probability distribution, and its discounts are those of Chen and Goodman."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from kneser_ney import Discounts, kneser_ney, modified_discounts

VOCABULARY = 12


def text() -> list[int]:
    """Two thousand tokens of 0 to 9, in which each depends on the one before; 10 and 11 never occur."""
    chance, tokens = random.Random(5), [0]
    for _ in range(2000):
        tokens.append(chance.choice([(tokens[-1] * 3 + 1) % 10, chance.randrange(10), tokens[-1] // 2]))
    return tokens


@pytest.mark.parametrize(
    ("history", "why"),
    [
        ([], "no history at all: unigrams"),
        ([3], "shorter than the model's reach"),
        ([4, 3, 0, 1], "as long as the model's reach"),
        ([9, 9, 9, 4, 3, 0, 1], "longer than the model's reach"),
        ([11, 10, 11, 10], "no token of it was ever seen"),
        ([10, 3], "only its last token was seen"),
    ],
)
def test_probabilities_sum_to_one(history: list[int], why: str) -> None:
    model = kneser_ney(text(), length=5, vocabulary=VOCABULARY)

    total = math.fsum(model.probability(history, token) for token in range(VOCABULARY))

    assert total == pytest.approx(1, abs=1e-12), why


def test_a_token_that_never_occurred_is_possible_and_rare() -> None:
    model = kneser_ney(text(), length=5, vocabulary=VOCABULARY)

    assert 0 < model.probability([4, 3], 11) < min(model.probability([], token) for token in range(10))


def test_three_modified_discounts_follow_from_the_counts_of_counts() -> None:
    seen = Counter({1: 4, 2: 2, 3: 1, 4: 1, 5: 7})

    discounts = modified_discounts(seen)

    assert discounts == Discounts(one=0.5, two=1.25, more=1.0)  # Y = 4 / (4 + 2 * 2) = 1/2
    assert [discounts.of(count) for count in (1, 2, 3, 9)] == [0.5, 1.25, 1.0, 1.0]


def test_a_tiny_text_has_one_discount() -> None:
    assert modified_discounts(Counter({1: 1, 2: 2})) == Discounts(one=0.2, two=0.2, more=0.2)


def test_bigrams_worked_out_by_hand() -> None:
    model = kneser_ney([0, 1, 0, 1, 0, 2], length=2, vocabulary=4)

    # bigrams 01 twice, 10 twice, 02 once: D = 1 / (1 + 2 * 2). Each token has one different token before it,
    # so unigrams have D = 1/2 and p(1) = (1 - 1/2) / 3 + (3 * 1/2) / 3 * 1/4.
    unigram = 0.5 / 3 + 0.5 / 4
    assert model.probability([], 1) == pytest.approx(unigram)
    assert model.probability([0], 1) == pytest.approx((2 - 0.2) / 3 + (0.2 * 2) / 3 * unigram)
    assert model.probability([0], 3) == pytest.approx((0.2 * 2) / 3 * 0.5 / 4)
    assert model.probability([3], 1) == pytest.approx(unigram)


def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities() -> None:
    model = kneser_ney(text(), length=3, vocabulary=VOCABULARY)

    perplexity = model.perplexity([4, 3, 0])

    assert perplexity == pytest.approx((model.probability([4], 3) * model.probability([4, 3], 0)) ** -0.5)


def test_longer_histories_help_where_the_text_has_structure() -> None:
    tokens = text()

    perplexities = [
        kneser_ney(tokens[:1600], length=length, vocabulary=VOCABULARY).perplexity(tokens[1600:])
        for length in (1, 2)
    ]

    assert perplexities[1] < 0.8 * perplexities[0]
