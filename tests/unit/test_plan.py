"""The planner: what it chooses always fits, and what it refuses comes with a change that would."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import catalog, choice, modelspec, pipeline, plan, profile, serde
from edgepack.errors import BadInput, NothingFits
from edgepack.fit import excess
from edgepack.plan import Candidate, Plan, Rejection, Request
from edgepack.units import GIB, Bytes, show

NANO = profile.load("jetson-orin")


@cache
def models() -> tuple[Candidate, ...]:
    return tuple(pipeline.candidates(None, None))


@cache
def one(name: str) -> Candidate:
    return pipeline.named(name)


@pytest.mark.parametrize("name", profile.names())
def test_what_is_chosen_fits_with_the_upper_end_of_its_estimate(name: str) -> None:
    device = profile.load(name)

    chosen = pipeline.make_plan(Request(profile=device), models())

    assert excess(chosen.memory, chosen.budget) <= 0
    assert chosen.speed.decode_full_low >= plan.DEFAULT_MIN_DECODE
    assert chosen.quality.panel != "none"


@pytest.mark.parametrize("name", profile.names())
def test_plans_survive_json(name: str) -> None:
    chosen = pipeline.make_plan(Request(profile=profile.load(name)), models())

    again = serde.load(Plan, serde.dump(chosen), source="test")

    assert again == chosen
    assert again.digest == chosen.digest


@settings(max_examples=40, deadline=None)
@given(
    memory=st.integers(min_value=1 * GIB, max_value=12 * GIB),
    context=st.sampled_from([512, 2048, 8192, 32768]),
    slots=st.sampled_from([1, 2, 4]),
)
def test_every_outcome_is_a_plan_that_fits_or_a_reason(memory: int, context: int, slots: int) -> None:
    device = replace(NANO, memory=Bytes(memory))
    request = Request(profile=device, context=context, slots=slots, scheme="Q4_K_M", min_decode=0.0)

    outcomes = list(plan.survey(request, models()))

    for outcome in outcomes:
        match outcome:
            case Plan():
                assert excess(outcome.memory, outcome.budget) <= 0
                assert sum(p.bytes for p in outcome.memory.parts) == outcome.memory.total
            case Rejection():
                assert outcome.reason


@settings(max_examples=25, deadline=None)
@given(memory=st.integers(min_value=2 * GIB, max_value=6 * GIB))
def test_more_memory_never_lowers_the_quality_chosen(memory: int) -> None:
    def best(size: int) -> float:
        try:
            request = Request(profile=replace(NANO, memory=Bytes(size)), min_decode=0.0)
            return pipeline.make_plan(request, models()).quality.low
        except NothingFits:
            return -1.0

    assert best(memory + GIB) >= best(memory) * (1.0 - choice.NOISE)


def test_a_refusal_names_the_arithmetic_and_a_change_that_fits() -> None:
    tight = replace(NANO, memory=Bytes(int(2.9 * GIB)))
    candidate = one("qwen2.5-1.5b-instruct")
    request = Request(profile=tight, scheme="Q8_0", kv_type="f16", context=32768, min_decode=0.0)

    with pytest.raises(NothingFits) as caught:
        pipeline.make_plan(request, [candidate])

    assert re.search(
        r"needs .* more than the .* there is; most goes to memory: weights", caught.value.message
    )
    assert " memory the system reports - " in caught.value.message
    freed = re.search(r"free (\d+) MiB", str(caught.value.hint))
    assert freed is not None
    assert str(caught.value.hint).startswith("--")
    roomier = replace(tight, memory=Bytes(tight.memory + int(freed.group(1)) * 2**20))
    pipeline.make_plan(replace(request, profile=roomier), [candidate])


def test_a_refusal_for_the_hosts_memory_shows_the_hosts_arithmetic() -> None:
    card = replace(profile.load("rtx-4060-8gb"), memory=Bytes(4 * GIB))

    with pytest.raises(NothingFits) as caught:
        pipeline.make_plan(Request(profile=card, runtime="vllm"), [one("qwen2.5-1.5b-instruct")])

    left = re.search(r"more than the (.*) there is; most goes to host: ", caught.value.message)
    assert left is not None
    assert f"budget {left.group(1)} = 4.00 GiB memory the system reports - " in caught.value.message


def test_the_hint_of_a_refusal_applied_is_a_plan() -> None:
    tight = replace(NANO, memory=Bytes(int(2.9 * GIB)))
    request = Request(profile=tight, scheme="Q8_0", kv_type="f16", context=8192, min_decode=0.0)
    candidate = one("qwen2.5-1.5b-instruct")
    with pytest.raises(NothingFits) as caught:
        pipeline.make_plan(request, [candidate])

    words = str(caught.value.hint).split(" (")[0].split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    changed = replace(
        request,
        scheme=given.get("--scheme", request.scheme),
        kv_type=given.get("--kv-type", request.kv_type),
        context=int(given.get("--context", "8192")),
        ubatch=int(given.get("--ubatch", request.ubatch)),
    )

    pipeline.make_plan(changed, [candidate])


def test_too_slow_names_the_fastest_and_the_floor_it_reaches() -> None:
    request = Request(profile=profile.load("raspberry-pi-5-8gb"), min_decode=1000.0)

    with pytest.raises(NothingFits) as caught:
        pipeline.make_plan(request, models())

    floor = float(str(caught.value.hint).split()[-1])
    assert "135m" in caught.value.message
    pipeline.make_plan(replace(request, min_decode=floor), models())


def test_a_kv_type_that_a_model_cannot_have_is_one_rejection_among_others() -> None:
    """Heads of 80 cannot hold q8_0 blocks of 32; f16 still fits."""
    config = {"model_type": "llama", "hidden_size": 1280, "num_hidden_layers": 4, "num_attention_heads": 16,
              "num_key_value_heads": 16, "intermediate_size": 4096, "vocab_size": 32000,
              "max_position_embeddings": 4096}  # fmt: skip
    odd = replace(one("qwen2.5-0.5b-instruct"), spec=modelspec.from_config(config, name="odd"), panels={})

    chosen = pipeline.make_plan(Request(profile=NANO, runtime="llama.cpp"), [odd])

    assert chosen.settings.kv_type == "f16"
    assert any("q8_0" in r.reason for r in chosen.rejected)


def test_force_keeps_the_reason_in_the_plan() -> None:
    tight = replace(NANO, memory=Bytes(2 * GIB + 300 * 2**20))

    chosen = pipeline.make_plan(
        Request(profile=tight, scheme="F16", force=True, kv_type="f16"), [one("qwen2.5-7b-instruct")]
    )

    assert any(text.startswith("forced: needs") for text in chosen.warnings)


def test_force_finds_a_runtime_for_a_scheme_that_none_runs_here() -> None:
    request = Request(profile=profile.load("raspberry-pi-5-8gb"), scheme="fp8", force=True)

    chosen = pipeline.make_plan(request, [one("qwen2.5-0.5b-instruct")])

    assert chosen.scheme == "fp8"
    assert chosen.forced.startswith(f"forced: {chosen.runtime} is known to run fp8 on cuda, not on cpu")
    assert {r.runtime for r in chosen.rejected} | {chosen.runtime} == {"vllm", "transformers"}


def test_two_bits_of_a_large_model_do_not_beat_five_of_a_small_one() -> None:
    """By nominal score 4B at Q2_K wins on a Pi; its loss is too uncertain to ship."""
    chosen = pipeline.make_plan(Request(profile=profile.load("raspberry-pi-5-8gb")), models())

    assert chosen.scheme != "Q2_K"


def test_within_the_noise_of_quality_the_faster_wins() -> None:
    orin = Request(profile=profile.load("jetson-agx-orin-64gb"))
    chosen = pipeline.make_plan(orin, models())
    same_model = [
        o for o in plan.survey(orin, models())
        if isinstance(o, Plan) and o.model == chosen.model and o.quality.low > chosen.quality.low
    ]  # fmt: skip

    assert same_model
    assert all(other.speed.decode_full < chosen.speed.decode_full for other in same_model)


def test_the_goal_context_finds_the_longest_that_fits() -> None:
    tight = replace(NANO, memory=Bytes(int(4.2 * GIB)))
    request = Request(profile=tight, goal="context", scheme="Q8_0", kv_type="f16", min_decode=0.0)

    chosen = pipeline.make_plan(request, [one("qwen2.5-1.5b-instruct")])

    longer = replace(request, context=chosen.settings.context + 256)
    assert 0 < chosen.settings.context < 32768
    with pytest.raises(NothingFits):
        pipeline.make_plan(longer, [one("qwen2.5-1.5b-instruct")])


def test_scores_of_different_sources_are_never_mixed() -> None:
    panels = plan.assign_panels(models())

    ranked = choice.rank(
        [o for o in plan.survey(Request(profile=NANO), models()) if isinstance(o, Plan)], "quality"
    )

    order = [p.quality.panel for p in ranked]
    assert len(set(panels.values())) > 1
    assert [panel for i, panel in enumerate(order) if i == 0 or order[i - 1] != panel] == list(
        dict.fromkeys(order)
    )


def test_a_context_beyond_training_is_refused() -> None:
    with pytest.raises(NothingFits, match="trained on"):
        pipeline.make_plan(Request(profile=NANO, context=10**6), [one("qwen2.5-0.5b-instruct")])


def test_an_unknown_power_mode_lists_the_known_ones() -> None:
    with pytest.raises(BadInput) as caught:
        pipeline.make_plan(Request(profile=NANO, power_mode="turbo"), models())

    assert "MAXN_SUPER" in str(caught.value.hint)


def test_a_teacher_offers_its_students() -> None:
    teacher = next(m.teacher for m in catalog.models() if m.teacher)

    students = pipeline.candidates(None, teacher)

    assert all(catalog.find(s.model.id) is not None for s in students)
    assert {s.model.teacher for s in students} >= {teacher}


def test_one_allocation_is_of_what_the_accelerator_holds() -> None:
    """The embedding of a model that is not tied lies with the host."""
    request = Request(profile=NANO, scheme="Q4_K_M", kv_type="f16", context=4096)
    model = one("qwen2.5-7b-instruct")

    chosen = pipeline.make_plan(request, [model])

    weights = next(p for p in chosen.memory.parts if (p.name, p.place) == ("weights", "device"))
    assert weights.bytes < chosen.memory.part("weights")
    assert any(f"one allocation of {show(weights.bytes)};" in text for text in chosen.warnings)
