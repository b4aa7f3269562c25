"""Sampling keeps exactly the tokens that a plain reference keeps, and chooses among them by their probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.server.engines import Sampling
from edgepack.server.sampling import Chooser, candidates, likeliest, log_probabilities

LOGITS = np.array([0.5, 3.0, -1.0, 2.0, 2.0, -4.0, 1.0], dtype=np.float32)


def reference(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Token to probability, written as plainly as can be."""
    top = max(logits)
    weights = {i: math.exp((x - top) / sampling.temperature) for i, x in enumerate(logits)}
    if sampling.min_p > 0:
        weights = {i: w for i, w in weights.items() if w >= sampling.min_p}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))
    if sampling.top_k > 0:
        ranked = ranked[: sampling.top_k]
    if sampling.top_p < 1:
        total, kept = math.fsum(weights[i] for i in ranked), list[int]()
        for i in ranked:
            kept.append(i)
            if math.fsum(weights[j] for j in kept) >= sampling.top_p * total * (1 - 1e-12):
                break
        ranked = kept
    total = math.fsum(weights[i] for i in ranked)
    return {i: weights[i] / total for i in ranked}


@given(
    logits=st.lists(st.integers(-64, 64), min_size=1, max_size=40),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.0, 0.1, 0.33, 0.5, 0.9, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.07, 0.5, 1.0]),
)
def test_what_may_follow_is_what_the_reference_says(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Logits in eighths, many of them equal."""
    values = [x / 8 for x in logits]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    wanted = reference(values, sampling)

    ids, shares = candidates(np.array(values, dtype=np.float32), sampling)

    found = dict(zip(ids.tolist(), shares.tolist(), strict=True))
    assert set(found) == set(wanted)
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), {0, 1, 2, 3, 4, 5, 6}),
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=2), {1, 3}),  # of the two that are equal the lower id
        (Sampling(top_p=0.0), {1}),
        (Sampling(top_p=0.5), {1}),  # 0.51
        (Sampling(top_p=0.6), {1, 3}),  # and 0.19
        (Sampling(min_p=math.exp(-1.0) - 1e-6), {1, 3, 4}),
        (Sampling(temperature=0.1, min_p=0.01), {1}),
        (Sampling(top_k=3, top_p=0.6), {1, 3}),  # the three kept have 0.58, 0.21 and 0.21 of what they hold
    ],
)
def test_filters_by_hand(sampling: Sampling, kept: set[int]) -> None:
    ids, shares = candidates(LOGITS, sampling)

    assert set(ids.tolist()) == kept
    assert shares.sum() == pytest.approx(1)


def test_a_nucleus_wider_than_the_head_that_is_sorted_first() -> None:
    """5000 tokens of nearly equal probability: nine tenths of them are needed, not the 256 that are tried first."""
    logits = np.linspace(0, 1e-3, 5000, dtype=np.float32)
    sampling = Sampling(top_p=0.9)

    ids, _ = candidates(logits, sampling)

    assert set(ids.tolist()) == set(reference(logits.tolist(), sampling))
    assert len(ids) == pytest.approx(4500, abs=2)


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first() -> None:
    logits = np.array([1.0, 7.0, 7.0], dtype=np.float32)

    chosen = {Chooser(Sampling(temperature=0, seed=seed)).choose(logits) for seed in range(20)}

    assert chosen == {1}


def test_a_barred_token_is_never_chosen() -> None:
    chooser = Chooser(Sampling(temperature=2.0, seed=1))

    chosen = {chooser.choose(LOGITS, barred=(1, 3)) for _ in range(300)}

    assert chosen == {0, 2, 4, 5, 6}
    assert Chooser(Sampling(temperature=0)).choose(LOGITS, barred=(1,)) == 3
    assert LOGITS[1] == 3.0, "the model's own logits stay as they are"


def test_a_negative_seed_is_a_seed() -> None:
    logits = np.zeros(50, np.float32)

    first, again = (Chooser(Sampling(seed=-1)).choose(logits) for _ in range(2))

    assert first == again


def test_the_same_seed_chooses_the_same_and_another_differs() -> None:
    def answer(seed: int | None) -> list[int]:
        chooser = Chooser(Sampling(seed=seed))
        return [chooser.choose(LOGITS) for _ in range(64)]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert answer(None) != answer(None)


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    """Chi-squared over 7 tokens, 20,000 draws of one seed; 22.5 is its 99.9 % point at 6 degrees of freedom."""
    chooser, draws = Chooser(Sampling(seed=3)), 20_000
    _, shares = candidates(LOGITS, Sampling())

    counts = np.bincount([chooser.choose(LOGITS) for _ in range(draws)], minlength=7)

    assert float(((counts - draws * shares) ** 2 / (draws * shares)).sum()) < 22.5


def test_log_probabilities_are_of_the_raw_logits_and_add_up_to_one() -> None:
    logs = log_probabilities(LOGITS)

    assert np.exp(logs).sum() == pytest.approx(1)
    assert logs[1] - logs[3] == pytest.approx(1)
    assert likeliest(logs, 3) == ((1, logs[1]), (3, logs[3]), (4, logs[4]))
    assert log_probabilities(np.array([1e4, -1e4], dtype=np.float32)).tolist() == [0.0, -2e4]


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_no_token(worst: float) -> None:
    logits = LOGITS.copy()
    logits[2] = worst

    with pytest.raises(ValueError, match="largest logit"):
        Chooser(Sampling()).choose(logits)


def test_a_token_that_the_model_rules_out_is_not_chosen() -> None:
    logits = np.array([-math.inf, 0.0, -math.inf], dtype=np.float32)

    ids, _ = candidates(logits, Sampling(top_k=2))

    assert ids.tolist() == [1]
