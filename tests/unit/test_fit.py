"""Fit: held against a budget, with the part that binds and a change that was tried."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as config
from hypothesis import strategies as st

from edgepack import profile
from edgepack.fit import Fit, excess, fit, longest, to_document
from edgepack.profile import DeviceProfile, budget
from edgepack.runtimes import llama_cpp
from edgepack.units import GIB, MIB, Bytes
from tests.shapes import spec

PI = profile.load("raspberry-pi-5-8gb")
JETSON = profile.load("jetson-orin")
LAPTOP = profile.load("laptop-gpu")

KEYS = {
    "model", "runtime", "scheme", "context", "slots", "kv_type", "parts", "total", "weights_bytes", "file_bytes",
    "bits_per_weight", "kv_cache_bytes", "compute_bytes", "output_bytes", "recurrent_state_bytes", "host_bytes",
    "device_bytes", "budget_bytes", "fits", "max_context", "binding", "hint", "schema_version",
}  # fmt: skip


def with_memory(device: DeviceProfile, free: int) -> DeviceProfile:
    """The device with so much memory that ``free`` bytes are left for the server."""
    return replace(device, memory=Bytes(device.memory + free - budget(device).device))


def try_it(
    name: str,
    scheme: str,
    device: DeviceProfile | None,
    *,
    context: int = 4096,
    slots: int = 1,
    kv_type: str = "f16",
) -> Fit:
    where = device or PI
    settings = llama_cpp.settings_for(where, context=context, slots=slots, kv_type=kv_type)
    return fit(spec(name), profile=device, scheme=scheme, settings=settings)


def test_a_small_model_fits_and_may_use_all_the_context_it_was_trained_for() -> None:
    result = try_it("qwen2.5-0.5b", "Q4_K_M", JETSON)

    assert result.fits
    assert result.max_context == 32768
    assert result.binding == "memory: weights"
    assert result.hint == ""


def test_without_a_device_nothing_is_judged() -> None:
    result = try_it("qwen2.5-0.5b", "Q4_K_M", None)

    assert (result.fits, result.max_context, result.budget, result.hint) == (None, None, None, "")


def test_a_card_of_its_own_has_two_budgets() -> None:
    assert LAPTOP.accelerator is not None
    card = replace(LAPTOP, accelerator=replace(LAPTOP.accelerator, memory=Bytes(2 * GIB)))
    result = try_it("qwen2.5-7b", "Q4_K_M", card)

    assert not result.fits
    assert result.binding == "device: weights"


@pytest.mark.parametrize(
    ("missing", "hint"),
    [
        (100 * MIB, "--kv-type q8_0"),
        (240 * MIB, "--kv-type q8_0 --ubatch 128"),
        (1300 * MIB, "use a smaller model: of this one no scheme down to Q2_K fits at any context"),
    ],
)
def test_the_hint_is_the_cheapest_change_that_fits(missing: int, hint: str) -> None:
    """At 16384 tokens an F16 cache takes 448 MiB, so 8 bits give back 210 MiB and a small batch some 60."""
    needed = try_it("qwen2.5-1.5b", "Q4_K_M", PI, context=16384).estimate.high

    result = try_it("qwen2.5-1.5b", "Q4_K_M", with_memory(PI, needed - missing), context=16384)

    assert not result.fits
    assert result.hint == hint


def test_heads_that_no_8_bit_cache_can_have_are_helped_by_scheme_and_context_alone() -> None:
    """Heads of 48, and q8_0 comes in blocks of 32."""
    least = try_it("odd-heads", "Q2_K", PI, context=512).estimate.high

    result = try_it("odd-heads", "F16", with_memory(PI, least), context=32768)

    assert result.hint == "--scheme Q5_K_M --context 256"


def test_slots_are_given_up_before_the_model() -> None:
    """Each takes 256 cells, however few tokens it is asked to hold: 448 MiB for these 64."""
    needed = try_it("qwen2.5-1.5b", "Q2_K", PI, context=64, slots=4, kv_type="q8_0").estimate.high

    result = try_it("qwen2.5-1.5b", "Q2_K", with_memory(PI, needed), context=64, slots=64, kv_type="q8_0")

    assert result.estimate.part("kv_cache") == 64 * 256 * 28 * 2 * 2 * 128 * 34 // 32
    assert result.hint == "--slots 4"


def test_with_fewer_slots_the_other_changes_are_tried_too() -> None:
    needed = try_it("qwen2.5-1.5b", "Q2_K", PI, context=64, slots=1, kv_type="q8_0").estimate.high

    result = try_it("qwen2.5-1.5b", "Q8_0", with_memory(PI, needed), context=64, slots=64)

    assert result.hint == "--scheme Q2_K --kv-type q8_0 --slots 1 --context 64"


def test_a_smaller_scheme_is_proposed_when_the_weights_are_too_much() -> None:
    needed = try_it("qwen2.5-7b", "Q4_K_M", PI, context=512).estimate.high

    result = try_it("qwen2.5-7b", "Q8_0", with_memory(PI, needed + MIB), context=512)

    assert result.hint == "--scheme Q4_K_M"


def test_a_desktop_is_asked_to_leave_first() -> None:
    settings = llama_cpp.settings_for(JETSON, context=4096)
    needed = try_it("qwen2.5-1.5b", "Q8_0", JETSON).estimate.high
    device = with_memory(JETSON, needed + MIB)

    result = fit(spec("qwen2.5-1.5b"), profile=device, session="desktop", scheme="Q8_0", settings=settings)

    assert not result.fits
    assert result.hint == "leave out --desktop"


def test_a_file_that_the_disk_cannot_hold_does_not_fit() -> None:
    small = replace(PI, disk=Bytes(GIB))

    result = try_it("qwen2.5-1.5b", "Q8_0", small)

    assert (result.fits, result.max_context) == (False, 0)
    assert result.binding == "disk: its file has 1.53 GiB, and 1.00 GiB of disk may be used"
    assert result.hint == "--scheme Q4_K_M"
    assert try_it("qwen2.5-1.5b", "Q4_K_M", small).fits


def test_memory_is_named_before_the_disk_and_the_hint_helps_with_both() -> None:
    needed = try_it("qwen2.5-1.5b", "Q4_K_M", PI).estimate
    small = replace(with_memory(PI, needed.high), disk=Bytes(needed.file_bytes - 1))

    result = try_it("qwen2.5-1.5b", "Q8_0", small)

    assert result.binding == "memory: weights"
    assert result.hint == "--scheme Q4_K_S"


def test_the_document_has_the_agreed_names() -> None:
    document = to_document(try_it("qwen2.5-1.5b", "q4_k_m", JETSON))

    assert set(document) >= KEYS
    parts = document["parts"]
    assert isinstance(parts, list)
    assert {"name", "bytes", "low", "high", "provenance"} <= set(parts[0])
    assert document["scheme"] == "Q4_K_M"
    assert json.loads(json.dumps(document)) == document
    total = document["total"]
    assert isinstance(total, dict)
    assert total["bytes"] == sum(part["bytes"] for part in parts)
    assert document["host_bytes"] + document["device_bytes"] == total["bytes"]


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_longest_is_the_last_multiple_that_fits(limit: int, edge: int) -> None:
    got = longest(limit, lambda n: n <= edge)

    assert got <= limit
    assert got == 0 or got <= edge
    if limit >= 256:
        assert got % 256 == 0
        assert got + 256 > limit or got + 256 > edge


@given(st.integers(700, 4000), st.integers(1, 4), st.sampled_from(["f16", "q8_0"]))
@config(max_examples=20, deadline=None)
def test_the_longest_context_fits_and_the_next_does_not(mib: int, slots: int, kv_type: str) -> None:
    device = with_memory(JETSON, mib * MIB)

    result = try_it("llama-3.2-1b", "Q4_0", device, slots=slots, kv_type=kv_type)

    limit = spec("llama-3.2-1b").context_train * slots
    assert result.max_context is not None
    assert result.budget is not None
    if result.max_context:
        assert try_it(
            "llama-3.2-1b", "Q4_0", device, context=result.max_context, slots=slots, kv_type=kv_type
        ).fits
    if result.max_context + 256 <= limit:
        beyond = try_it(
            "llama-3.2-1b", "Q4_0", device, context=result.max_context + 256, slots=slots, kv_type=kv_type
        )
        assert not beyond.fits
        assert excess(beyond.estimate, result.budget) > 0
