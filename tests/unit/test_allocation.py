"""Filling a byte budget: never beyond it, nearly to its end, and with the types that the device is fast with."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import allocation, degradation, fit, memory, pipeline, plan, profile, schemes
from edgepack.allocation import Item, Limits, Option, Place
from edgepack.errors import BadInput, Unsupported
from edgepack.ggufheader import BLOCKS
from edgepack.modelspec import Recipe, Tensor
from edgepack.plan import Plan, Rejection, Request
from edgepack.profile import Arch, Backend
from edgepack.runtimes import llama_cpp
from edgepack.units import GIB, MIB, Bytes
from tests import shapes

NANO = profile.load("jetson-orin-nano-8gb")

options = st.builds(
    lambda file, extra, loss: Option(kind="Q4_K", file=32 * file, memory=32 * (file + extra), loss=loss),
    st.integers(1, 60),
    st.sampled_from([0, 0, 0, 5]),
    st.floats(0, 10),
)
items = st.lists(options, min_size=1, max_size=4).map(
    lambda found: tuple(sorted(found, key=lambda o: (o.memory, o.file)))
)
problems = st.lists(items, min_size=1, max_size=4)


def best(problem: list[Item], limits: Limits) -> float | None:
    """The least loss, by trying everything."""
    losses = [allocation.lost(chosen) for chosen in product(*problem) if limits.hold(chosen)]
    return min(losses, default=None)


@given(problem=problems, room=st.integers(1, 300))
def test_the_greedy_walk_stays_within_the_budget_and_is_never_better_than_the_best(
    problem: list[Item], room: int
) -> None:
    limits = Limits(file=None, memory=32 * room)
    least = best(problem, limits)

    chosen = allocation.greedy(problem, limits)

    if least is None:
        assert [o.memory for o in chosen] == [item[0].memory for item in problem], "the smallest of each"
    else:
        assert limits.hold(chosen)
        assert allocation.lost(chosen) >= least - 1e-9


def test_the_greedy_walk_takes_the_steps_that_save_most_a_byte() -> None:
    steep = tuple(Option(kind=k, file=n, memory=n, loss=x) for k, n, x in (("A", 32, 9.0), ("B", 64, 1.0)))
    flat = tuple(Option(kind=k, file=n, memory=n, loss=x) for k, n, x in (("A", 32, 2.0), ("B", 64, 1.0)))

    chosen = allocation.greedy([flat, steep], Limits(file=None, memory=96))

    assert [o.kind for o in chosen] == ["A", "B"]


@given(
    name=st.sampled_from(sorted(shapes.CONFIGS)),
    scheme=st.sampled_from(["Q8_0", "Q4_K_M", "Q4_0", "Q6_K"]),
    backend=st.sampled_from(["cpu", "cuda", "vulkan"]),
    arch=st.sampled_from(["x86_64", "aarch64"]),
    load_mode=st.sampled_from(["none", "mmap"]),
)
def test_what_tensors_take_one_by_one_is_what_the_plan_says_of_all(
    name: str, scheme: str, backend: Backend, arch: Arch, load_mode: str
) -> None:
    spec = shapes.spec(name)
    base = llama_cpp.cpu_settings(context=512)
    offloaded = backend != "cpu"
    how = replace(base, load_mode=load_mode, repack=not offloaded, gpu_layers=99 if offloaded else 0)
    types = schemes.tensor_types(spec, scheme, imatrix=False)

    held = [
        llama_cpp.held(spec, tensor, kind, how, backend=backend, arch=arch)
        for tensor, kind in zip(spec.tensors, types, strict=True)
    ]

    parts = memory.estimate(spec, scheme, how, backend=backend, arch=arch).parts
    weights = [part for part in parts if part.name in llama_cpp.WEIGHTS]
    assert sum(device for device, _ in held) == sum(p.bytes for p in weights if p.place == "device")
    assert sum(host for _, host in held) == sum(p.bytes for p in weights if p.place == "host")


@settings(max_examples=30)
@given(
    size=st.integers(int(2.5 * GIB), 12 * GIB),
    model=st.sampled_from(["qwen2.5-1.5b-instruct", "llama-3.1-8b-instruct", "qwen3-4b"]),
    device=st.sampled_from(["jetson-orin-nano-8gb", "raspberry-pi-5-8gb", "intel-n100"]),
    slots=st.sampled_from([1, 4]),
)
def test_a_plan_fills_the_memory_that_is_left_and_never_more(
    size: int, model: str, device: str, slots: int
) -> None:
    there = replace(profile.load(device), memory=Bytes(size), disk=None)
    asked = Request(profile=there, scheme="gguf-budget", slots=slots, context=2048, min_decode=0.0)

    for found in plan.survey(asked, [pipeline.named(model)]):
        if isinstance(found, Rejection):
            assert found.excess > 0
            continue
        left = found.budget.device - found.memory.high
        assert left >= 0
        everything_is_best = found.memory.bits_per_weight > 8.4
        weights = sum(p.high for p in found.memory.parts if p.name in llama_cpp.WEIGHTS)
        assert everything_is_best or left <= 0.005 * (weights + left) + 2  # sizes are whole bytes
        assert found.memory.file_bytes <= int(found.scheme.rpartition("-")[2])


def test_a_card_with_memory_of_its_own_is_filled_by_what_lies_on_it() -> None:
    there = replace(profile.load("rtx-4060-8gb"), disk=None)
    asked = Request(profile=there, scheme="gguf-budget", min_decode=0.0, kv_type="f16")

    found = next(iter(plan.survey(asked, [pipeline.named("qwen2.5-14b-instruct")])))

    assert isinstance(found, Plan)
    weights = [p for p in found.memory.parts if p.name == "weights"]
    assert [p.place for p in weights] == ["device", "host"], (
        "the embedding of an untied model stays on the host"
    )
    assert 0 <= found.budget.device - found.memory.at("device") <= 0.005 * weights[0].high
    assert weights[0].provenance == "fitted", "a build decides"


def test_a_size_may_be_named_instead_and_is_the_largest_file() -> None:
    asked = Request(profile=NANO, scheme=schemes.canonical("GGUF-Budget-3GiB"), min_decode=0.0, kv_type="f16")

    found = next(iter(plan.survey(asked, [pipeline.named("qwen3-4b")])))

    assert isinstance(found, Plan)
    assert found.scheme == "gguf-budget-3221225472"
    assert 0.995 * 3 * GIB <= found.memory.file_bytes <= 3 * GIB


def test_disk_bounds_the_file_too() -> None:
    asked = Request(profile=NANO, scheme="gguf-budget", disk=Bytes(2 * GIB), min_decode=0.0, kv_type="f16")

    found = next(iter(plan.survey(asked, [pipeline.named("qwen3-4b")])))

    assert isinstance(found, Plan)
    assert 0.995 * 2 * GIB <= found.memory.file_bytes <= 2 * GIB


def test_without_calibration_data_it_is_not_considered_and_with_them_it_is_chosen_where_it_keeps_more() -> (
    None
):
    models = [pipeline.named("llama-3.1-8b-instruct")]
    without = pipeline.make_plan(Request(profile=NANO, imatrix=True), models)

    given_data = pipeline.make_plan(Request(profile=NANO, imatrix=True, budgeted=True), models)

    considered = {without.scheme, *(r.scheme for r in without.rejected)}
    assert not any(schemes.is_budget(s) for s in considered)
    assert schemes.is_budget(given_data.scheme)
    assert given_data.quality.low > without.quality.low * 1.01


def test_a_budget_is_the_users_to_name_or_the_devices() -> None:
    spec = shapes.spec("qwen2.5-1.5b")
    how = llama_cpp.cpu_settings(context=512)

    with pytest.raises(Unsupported, match="no device is named"):
        fit.fit(spec, profile=None, scheme="gguf-budget", settings=how)
    with pytest.raises(BadInput, match="is not a number"):
        schemes.canonical("gguf-budget-much")

    named = fit.fit(spec, profile=None, scheme="gguf-budget-900MiB", settings=how)

    assert 0.995 * 900 * MIB <= named.estimate.file_bytes <= 900 * MIB


def test_only_what_edgepack_converts_can_be_measured() -> None:
    asked = Request(profile=NANO, scheme="gguf-budget")

    found = next(iter(plan.survey(asked, [pipeline.named("gemma-2-2b-it")])))

    assert isinstance(found, Rejection)
    assert "is made from a Hugging Face folder" in found.reason


def test_types_are_those_that_kernels_are_fast_with_and_rows_allow() -> None:
    long, short = (
        Tensor(name="blk.0.ffn_up.weight", shape=(512, 8)),
        Tensor(name="blk.0.ffn_up.weight", shape=(96, 8)),
    )
    table = Tensor(name="token_embd.weight", shape=(512, 8))
    odd = Tensor(name="blk.0.ffn_up.weight", shape=(40, 8))

    assert "IQ3_S" in allocation.kinds(long, "cuda")
    assert "IQ3_S" not in allocation.kinds(long, "cpu")
    assert {BLOCKS[kind][1] for kind in allocation.kinds(short, "cuda")} == {32}
    assert allocation.kinds(odd, "cpu") == ("F16",)
    assert not any(schemes.requires_importances(kind) for kind in allocation.kinds(table, "cuda"))


def test_every_type_on_offer_has_a_known_rounding_error() -> None:
    offered = {
        k
        for backend in ("cpu", "cuda", "vulkan", "metal")
        for family in llama_cpp.fast_types(backend)
        for k in family
    }

    assert offered <= degradation.ROUNDING_ERROR.keys()


def test_the_types_are_not_known_before_they_are_decided_and_exact_once_they_are_measured() -> None:
    spec = replace(shapes.spec("qwen2.5-1.5b"), header_bytes=Bytes(1024))
    place = Place(settings=llama_cpp.cpu_settings(context=512), backend="cpu", arch="x86_64", unified=True)

    with pytest.raises(Unsupported, match="not decided yet"):
        schemes.tensor_types(spec, "gguf-budget", imatrix=True)

    guessed, name = allocation.planned(spec, "gguf-budget-900MiB", place, room=None)
    assert guessed.recipe is not None
    measured = replace(guessed, recipe=Recipe(types=guessed.recipe.types, measured=True))
    assert schemes.file_bytes(guessed, name, imatrix=True)[1] == "fitted"
    assert schemes.file_bytes(measured, name, imatrix=True)[1] == "exact"
    assert (
        schemes.file_bytes(measured, name, imatrix=True)[0]
        == schemes.file_bytes(guessed, name, imatrix=True)[0]
    )


def test_a_recipe_does_not_change_other_schemes() -> None:
    spec = shapes.spec("qwen2.5-1.5b")
    place = Place(settings=llama_cpp.cpu_settings(context=512), backend="cpu", arch="x86_64", unified=True)

    with_recipe, _ = allocation.planned(spec, "gguf-budget-900MiB", place, room=None)

    for scheme in ("Q4_K_M", "Q8_0"):
        assert schemes.tensor_types(with_recipe, scheme, imatrix=False) == schemes.tensor_types(
            spec, scheme, imatrix=False
        )


def test_a_provisional_plan_never_promises_less_than_it_may_take() -> None:
    asked = Request(profile=NANO, scheme="gguf-budget", min_decode=0.0, kv_type="f16")

    found = next(iter(plan.survey(asked, [pipeline.named("llama-3.1-8b-instruct")])))

    assert isinstance(found, Plan)
    weights = next(p for p in found.memory.parts if p.name == "weights")
    place = Place(settings=found.settings, backend="cuda", arch=NANO.arch, unified=True)
    copies = sum(p.bytes for p in found.memory.parts if p.name in llama_cpp.WEIGHTS) - weights.bytes
    assert weights.high + copies == allocation.memory_left(found.memory.parts, found.budget, place)
