"""Sizes are read and shown without mixing GiB and GB."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.errors import BadInput
from edgepack.units import GIB, parse_bytes, show


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2 * GIB), ("2 GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("17", 17), ("8kb", 8000), (42, 42)],
)
def test_sizes_are_read_with_their_unit(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gigs", "1e9", "0x10"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_bytes(text)

    assert "GiB" in str(caught.value.hint)


@given(st.integers(min_value=0, max_value=2**50))
def test_what_is_shown_reads_back_within_its_printed_digits(count: int) -> None:
    shown = parse_bytes(show(count))

    assert abs(shown - count) <= max(count * 0.05, 0.005 * GIB if count >= GIB else 0.06 * 2**20)


@given(st.integers(min_value=1, max_value=2**50))
def test_a_negative_count_is_the_positive_one_with_a_sign(count: int) -> None:
    assert show(-count) == "-" + show(count)
