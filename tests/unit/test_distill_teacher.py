"""What is kept of a teacher: the bytes of its rows, and how examples are put into batches and shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.builders.distill import examples
from edgepack.builders.distill.examples import Examples
from edgepack.builders.distill.teacher import (
    DEFAULT_K,
    Identity,
    Outcomes,
    batches,
    id_bits,
    pack,
    ranges,
    row_type,
    unpack,
)


@settings(max_examples=200, deadline=None)
@given(
    vocabulary=st.integers(1, 1 << 25), k=st.integers(1, 130), n=st.integers(0, 4), seed=st.integers(0, 2**32)
)
def test_packed_ids_are_read_as_they_were(vocabulary: int, k: int, n: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, vocabulary, (n, k)).astype(np.int32)
    bits = id_bits(vocabulary)

    packed = pack(ids, bits)

    assert packed.shape == (n, -(-k * bits // 8))
    np.testing.assert_array_equal(unpack(packed, k, bits), ids)


def test_a_token_of_a_large_vocabulary_takes_less_than_400_bytes() -> None:
    """88 ids of 18 bits, 88 logits of 16, three floats of 32; all logits in 16 bits are 303,872."""
    assert row_type(DEFAULT_K, 151_936).itemsize == 88 * 18 // 8 + 88 * 2 + 3 * 4 == 386


def identity(k: int, temperature: float, vocabulary: int) -> Identity:
    return Identity(
        teacher="t", tokenizer="t", examples="e", k=k, temperature=temperature, vocabulary=vocabulary,
        precision="fp32", batch_tokens=64, shard_rows=64,
    )  # fmt: skip


@pytest.mark.parametrize(("vocabulary", "k"), [(7, 7), (300, 1), (300, 16), (5003, 8), (70_001, 16)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_outcomes_are_those_of_a_sort_and_the_tail_is_exact(
    vocabulary: int, k: int, temperature: float, threads: int
) -> None:
    logits = torch.randn(9, vocabulary + 5, generator=torch.Generator().manual_seed(k)) * 4
    targets = torch.arange(9) % vocabulary

    rows = Outcomes(identity(k, temperature, vocabulary), threads)(logits, targets)

    exact = logits[:, :vocabulary].double()
    exact -= exact.amax(1, keepdim=True)
    ids = torch.from_numpy(unpack(rows["ids"], k, id_bits(vocabulary))).long()
    kept = torch.from_numpy(rows["logits"].astype(np.float64))
    torch.testing.assert_close(kept, exact.topk(k, 1).values, rtol=2**-10, atol=2**-10)
    torch.testing.assert_close(kept, exact.gather(1, ids), rtol=2**-11, atol=1e-6)
    assert (kept.diff(dim=1) <= 0).all()
    assert [len(set(row.tolist())) for row in ids] == [k] * 9
    own = exact.log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(rows["target"].copy()).double(), own, rtol=1e-6, atol=1e-5)
    for name, t in (("lse", 1.0), ("lse_t", temperature)):
        lse = torch.from_numpy(rows[name].copy()).double()
        torch.testing.assert_close(lse, (exact / t).logsumexp(1), rtol=1e-3, atol=1e-3)
        tail = 1 - ((kept / t).logsumexp(1) - lse).exp()
        outside = (exact / t).softmax(1).scatter(1, ids, 0.0).sum(1)
        torch.testing.assert_close(tail, outside, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_is_seen_in_its_row_alone(value: float) -> None:
    logits = torch.randn(4, 50)
    logits[2, 17] = value

    rows = Outcomes(identity(8, 2.0, 50), 1)(logits, torch.zeros(4, dtype=torch.int64))

    assert np.isfinite(rows["lse"]).tolist() == [True, True, False, True]


def data(folder: Path, lengths: list[tuple[int, int]]) -> Examples:
    """Examples of (tokens, responses at the end)."""
    made = [([1] * n, [False] * (n - answered) + [True] * answered) for n, answered in lengths]
    return examples.write(made, folder / "examples")


def test_every_example_with_a_response_is_in_one_batch_with_others_of_its_length(tmp_path: Path) -> None:
    found = data(tmp_path, [(5, 1), (20, 4), (6, 2), (9, 0), (19, 3), (40, 1)])

    made = list(batches(found, 0, len(found), 40))

    assert [batch.examples for batch in made] == [(5,), (1, 4), (2, 0)]
    assert [batch.length for batch in made] == [40, 20, 6]


def test_shards_are_runs_of_examples_and_one_may_be_larger_than_it_should(tmp_path: Path) -> None:
    found = data(tmp_path, [(9, 4), (9, 4), (30, 25), (9, 0), (9, 4), (9, 4), (9, 4), (9, 0)])

    made = ranges(found, 8)

    assert made == [(0, 2), (2, 3), (3, 6), (6, 8)]
    assert sum(int(found.rows[last] - found.rows[first]) for first, last in made) == found.response_tokens
