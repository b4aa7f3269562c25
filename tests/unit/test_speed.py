"""The speed law: slower with more bytes, layers and context, and its interval holds its middle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack import profile, speed

PI = profile.load("raspberry-pi-5-8gb")
GIB = 2**30


@given(
    read=st.integers(min_value=10**6, max_value=2 * 10**10),
    layers=st.integers(min_value=1, max_value=120),
    kv=st.integers(min_value=0, max_value=10**10),
)
def test_the_interval_holds_the_middle_and_a_full_context_is_slower(read: int, layers: int, kv: int) -> None:
    found = speed.estimate(PI, PI.mode(), read_bytes=read, layers=layers, kv_bytes=kv)

    assert found.decode_low < found.decode < found.decode_high
    assert found.decode_full <= found.decode
    assert found.decode_full_low <= found.decode_low


@given(
    read=st.integers(min_value=10**6, max_value=10**10), more=st.integers(min_value=10**5, max_value=10**9)
)
def test_more_bytes_are_never_faster(read: int, more: int) -> None:
    one = speed.estimate(PI, PI.mode(), read_bytes=read, layers=28, kv_bytes=0)
    two = speed.estimate(PI, PI.mode(), read_bytes=read + more, layers=28, kv_bytes=0)

    assert two.decode < one.decode


@pytest.mark.parametrize(
    ("model_bytes", "layers", "published"),
    [(2.02e9, 28, 4.88), (4.92e9, 32, 2.17), (1.17e9, 22, 9.0)],
    ids=["Llama-3.2-3B Q4_K_M", "Llama-3.1-8B Q4_K_M", "TinyLlama-1.1B Q8_0"],
)
def test_published_runs_on_a_pi_lie_inside_the_interval(
    model_bytes: float, layers: int, published: float
) -> None:
    """geerlingguy/ai-benchmarks@bdf9441 and others, as cited in profiles/raspberry-pi-5-8gb.yaml."""
    found = speed.estimate(PI, PI.mode(), read_bytes=int(model_bytes), layers=layers, kv_bytes=0)

    assert found.decode_low <= published <= found.decode_high


def test_a_power_mode_with_less_bandwidth_is_slower() -> None:
    nano = profile.load("jetson-orin")

    slow = speed.estimate(nano, nano.mode("15W"), read_bytes=2 * GIB, layers=28, kv_bytes=0)
    fast = speed.estimate(nano, nano.mode("25W"), read_bytes=2 * GIB, layers=28, kv_bytes=0)

    assert slow.decode < fast.decode


def test_an_untied_embedding_is_not_read() -> None:
    assert speed.read_per_token(1000, 300, tied=False) == 700
    assert speed.read_per_token(1000, 300, tied=True) == 1000
