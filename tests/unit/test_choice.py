"""Choosing: the order of plans, the front that nothing beats, hard constraints, and explanations that hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import choice, cli, pipeline, plan, profile
from edgepack.errors import NothingFits
from edgepack.plan import Candidate, Plan, Request
from edgepack.units import GIB, MIB, Bytes
from tests.plans import example_plan

NANO = profile.load("jetson-orin")


@cache
def models() -> tuple[Candidate, ...]:
    return tuple(pipeline.candidates(None, None))


def fitting(request: Request) -> list[Plan]:
    return [o for o in plan.survey(request, models()) if isinstance(o, Plan)]


def standing(quality: float, pace: float, memory: int) -> Plan:
    """A plan of which only what the front compares is of interest."""
    base = example_plan("jetson-orin-nano-8gb")
    part = replace(base.memory.parts[0], bytes=Bytes(memory), low=Bytes(memory), high=Bytes(memory))
    return replace(
        base,
        memory=replace(base.memory, parts=(part,)),
        speed=replace(base.speed, decode_full=pace),
        quality=replace(base.quality, low=quality),
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats_and_covers_the_rest(points: list[tuple[int, int, int]]) -> None:
    plans = [standing(*point) for point in points]

    front = choice.pareto(plans)

    def figures(p: Plan) -> tuple[float, float, int]:
        return p.quality.low, p.speed.decode_full, -p.memory.high

    kept = [figures(p) for p in front]
    assert len(set(kept)) == len(kept)
    for one in kept:
        assert not any(o != one and all(a >= b for a, b in zip(o, one, strict=True)) for o in kept)
    for other in plans:
        assert any(all(a >= b for a, b in zip(one, figures(other), strict=True)) for one in kept)


@pytest.mark.parametrize(
    ("better", "faster", "first"),
    [
        (1.000, 3.0, "llama.cpp"),  # as good and faster
        (1.019, 3.0, "llama.cpp"),  # within the noise of both
        (1.021, 3.0, "vllm"),
        (1.021, 0.5, "vllm"),  # surely better, though slower
    ],
)
def test_another_runtime_is_taken_where_it_is_better_by_the_noise_of_both(
    better: float, faster: float, first: str
) -> None:
    plain = standing(50.0, 10.0, GIB)
    other = replace(standing(50.0 * better, 10.0 * faster, GIB), runtime="vllm")

    for plans in ([plain, other], [other, plain]):
        chosen = choice.choose(plans, Request(profile=NANO), [])

        assert chosen.runtime == first
        (against,) = chosen.rejected
        said = (
            "no more than the noise of two runtimes"
            if first == "llama.cpp"
            else "scores at least 50.0 against"
        )
        assert said in against.reason


def test_among_other_runtimes_the_faster_of_equals_is_taken() -> None:
    plans = [
        replace(standing(60.0, 10.0, GIB), runtime="vllm"),
        replace(standing(59.8, 20.0, GIB), runtime="transformers"),
        standing(50.0, 90.0, GIB),
    ]

    ranked = choice.rank(plans, "quality")

    assert [p.runtime for p in ranked] == ["transformers", "vllm", "llama.cpp"]


def test_what_was_not_chosen_comes_best_first_then_nearest_first() -> None:
    chosen = pipeline.make_plan(Request(profile=NANO), models())

    fits = [r.figures is not None for r in chosen.rejected]
    excess = [r.excess for r in chosen.rejected if r.excess]

    assert fits == sorted(fits, reverse=True)
    assert excess == sorted(excess)
    assert any(r.figures is not None and r.figures.on_front for r in chosen.rejected)


def test_a_licence_is_a_hard_constraint() -> None:
    chosen = pipeline.make_plan(Request(profile=NANO, licenses=("mit",)), models())

    assert chosen.model.license == "MIT"
    others = {r.model: r.reason for r in chosen.rejected if r.scheme == "any"}
    assert others["qwen3-8b"] == "its licence is Apache-2.0"


def test_without_a_wish_only_models_for_commercial_use_are_chosen() -> None:
    chosen = pipeline.make_plan(Request(profile=NANO), models())

    assert any(not c.model.commercial for c in models())
    assert chosen.model.commercial
    assert any("forbids commercial use" in r.reason for r in chosen.rejected)


def test_a_model_named_for_research_is_planned_with_a_warning() -> None:
    chosen = pipeline.make_plan(Request(profile=NANO), [pipeline.named("qwen2.5-3b-instruct")])

    assert any("forbids commercial use" in text for text in chosen.warnings)


def test_the_file_must_fit_on_the_disk() -> None:
    room = Bytes(1 * GIB)

    chosen = pipeline.make_plan(Request(profile=NANO, disk=room), models())

    assert chosen.memory.file_bytes <= room
    assert any("of disk may be used" in r.reason for r in chosen.rejected)


def test_forcing_past_the_disk_keeps_the_reason() -> None:
    request = Request(profile=NANO, disk=Bytes(MIB), force=True, scheme="Q4_0")

    chosen = pipeline.make_plan(request, [pipeline.named("qwen2.5-0.5b-instruct")])

    assert any(text.startswith("forced: its file has") for text in chosen.warnings)


@pytest.mark.parametrize("name", profile.names())
def test_speed_is_not_bought_with_most_of_the_quality(name: str) -> None:
    device = profile.load(name)

    best = pipeline.make_plan(Request(profile=device), models())
    fast = pipeline.make_plan(Request(profile=device, goal="latency"), models())

    assert fast.speed.decode_full_low >= best.speed.decode_full_low
    assert fast.quality.low >= choice.WORTH * best.quality.low


@pytest.mark.parametrize(
    ("name", "goal"), [*((name, "quality") for name in profile.names()), ("jetson-orin", "context")]
)
def test_nothing_within_the_noise_is_faster_than_what_was_chosen(name: str, goal: plan.Goal) -> None:
    request = Request(profile=profile.load(name), goal=goal)

    chosen = pipeline.make_plan(request, models())

    equal = [r for r in chosen.rejected if r.figures is not None and "within the noise" in r.reason]
    assert all(r.figures.decode <= chosen.speed.decode_full for r in equal if r.figures is not None)
    why = choice.explain(chosen, request, [c for c in models() if c.model == chosen.model]).why
    told = re.search(r"the fastest of (\d+) within", why)
    assert (int(told[1]) if told else 1) == (1 + len(equal) if goal == "quality" else 1)


def test_the_longest_context_is_one_that_is_still_fast_enough() -> None:
    model = [pipeline.named("qwen2.5-1.5b-instruct")]
    request = Request(
        profile=profile.load("rk3588"), goal="context", scheme="Q8_0", kv_type="f16", runtime="llama.cpp"
    )

    chosen = pipeline.make_plan(request, model)

    context = chosen.settings.context
    assert 4096 < context < 32768, "neither the default nor all that the model was trained for"
    assert chosen.speed.decode_full_low >= plan.DEFAULT_MIN_DECODE
    with pytest.raises(NothingFits, match="nothing is fast enough"):
        pipeline.make_plan(replace(request, context=context + 512), model)
    assert pipeline.make_plan(replace(request, min_decode=0.0), model).settings.context == 32768


def test_throughput_makes_most_of_all_slots_together() -> None:
    request = Request(profile=profile.load("consumer-8gb"), goal="throughput", slots=8, min_decode=0.0)

    chosen = pipeline.make_plan(request, models())

    rivals = [p for p in fitting(request) if p.quality.panel == chosen.quality.panel]
    floor = choice.WORTH * max(p.quality.low for p in rivals)
    assert chosen.quality.low >= floor
    assert chosen.speed.decode_all_low == max(
        p.speed.decode_all_low for p in rivals if p.quality.low >= floor
    )
    assert chosen.speed.decode_all > chosen.speed.decode_full


CHANGE = re.compile(
    r"--(kv-type|ubatch|slots|context|min-tokens-per-second|power-mode) (\S+)(?: --context \d+)? would allow "
    r"(\S+) (\S+) kv (\S+) ctx (\d+):"
)


@pytest.mark.parametrize("goal", ["quality", "latency", "throughput", "context"])
@pytest.mark.parametrize("name", ["jetson-orin", "raspberry-pi-5-8gb", "consumer-8gb"])
def test_the_change_that_an_explanation_names_is_true_when_applied(name: str, goal: plan.Goal) -> None:
    """Applied, it lets in a plan that the goal itself ranks above the chosen one."""
    slots = 4 if goal == "throughput" else 1
    context = None if goal == "context" else 8192 * slots
    request = Request(profile=profile.load(name), context=context, slots=slots, goal=goal)
    chosen = pipeline.make_plan(request, models())

    change = choice.explain(chosen, request, models()).change

    if not change:
        return
    words = CHANGE.match(change)
    assert words is not None, change
    option, value, *which = words.groups()
    changed = {
        "kv-type": lambda: replace(request, kv_type=value),
        "ubatch": lambda: replace(request, ubatch=int(value)),
        "slots": lambda: replace(request, slots=int(value), context=int(which[-1])),
        "context": lambda: replace(request, context=int(value)),
        "min-tokens-per-second": lambda: replace(request, min_decode=float(value)),
        "power-mode": lambda: replace(request, power_mode=value),
    }[option]()
    found = [
        p for p in fitting(changed)
        if [p.model.id, p.scheme, p.settings.kv_type, str(p.settings.context)] == which
    ]  # fmt: skip
    assert len(found) == 1
    assert choice.rank([chosen, *found], goal)[0] is found[0]


def test_a_context_half_as_long_lets_a_better_model_in_where_memory_is_tight() -> None:
    request = Request(
        profile=profile.load("jetson-orin-nano-4gb"), context=16384, scheme="Q4_K_M", kv_type="f16"
    )
    chosen = pipeline.make_plan(request, models())

    change = choice.explain(chosen, request, models()).change

    assert CHANGE.match(change), change


def test_fewer_slots_of_the_same_length_are_proposed_before_shorter_ones() -> None:
    """Four slots of 4096 tokens leave an Orin Nano of 8 GB no room for 8 bits of a model that two do."""
    request = Request(
        profile=profile.load("jetson-orin-nano-8gb"), context=16384, slots=4, kv_type="f16", scheme="Q8_0",
        min_decode=0.0,
    )  # fmt: skip
    two = [pipeline.named(name) for name in ("qwen3-1.7b", "qwen3-4b")]
    chosen = pipeline.make_plan(request, two)
    assert chosen.model.id == "qwen3-1.7b"

    change = choice.explain(chosen, request, two).change

    assert re.match(
        r"--slots (1|2) --context (4096|8192) would allow qwen3-4b Q8_0 kv f16 ctx \2:", change
    ), change

    request = Request(profile=profile.load("jetson-agx-orin-32gb"), goal="latency")
    chosen = pipeline.make_plan(request, models())

    change = choice.explain(chosen, request, models()).change

    assert change.startswith("--power-mode "), change


def test_a_refusal_for_speed_names_a_power_mode_that_is_fast_enough() -> None:
    request = Request(profile=profile.load("jetson-agx-orin-32gb"), scheme="F16")
    model = [pipeline.named("llama-3.1-8b-instruct")]
    with pytest.raises(NothingFits, match="nothing is fast enough") as caught:
        pipeline.make_plan(request, model)

    mode = re.match(r"--power-mode (\S+) \(decodes .*\); or --min-tokens-per-second ", str(caught.value.hint))

    assert mode is not None
    pipeline.make_plan(replace(request, power_mode=mode[1]), model)


def test_what_is_forced_comes_after_what_fits() -> None:
    plain = pipeline.make_plan(Request(profile=NANO), models())

    forced = pipeline.make_plan(Request(profile=NANO, force=True), models())

    assert (forced.model, forced.scheme, forced.settings) == (plain.model, plain.scheme, plain.settings)
    assert not forced.forced
    kept = [r for r in forced.rejected if r.reason.startswith(plan.FORCED)]
    assert kept
    assert all(r.figures is None for r in kept)


def test_a_cache_type_that_one_of_two_runtimes_lacks_leaves_the_other() -> None:
    request = Request(profile=profile.load("consumer-8gb"), scheme="gptq-int4-g128", kv_type="fp8")

    chosen = pipeline.make_plan(request, [pipeline.named("qwen2.5-1.5b-instruct")])

    assert chosen.runtime == "vllm"
    assert any(r.runtime == "transformers" and "fp8" in r.reason for r in chosen.rejected)


def test_an_explanation_tries_only_cache_types_that_the_runtime_has() -> None:
    request = Request(profile=profile.load("consumer-8gb"), runtime="vllm", kv_type="bf16")
    chosen = pipeline.make_plan(request, models())

    assert choice.explain(chosen, request, models()).why


def test_a_refusal_for_the_disk_names_the_disk_and_a_size_that_does() -> None:
    with pytest.raises(NothingFits, match="no file is small enough") as caught:
        pipeline.make_plan(Request(profile=NANO, disk=Bytes(MIB)), models())

    size = re.fullmatch(r"--disk (\d+)MiB", str(caught.value.hint))
    assert size is not None
    pipeline.make_plan(Request(profile=NANO, disk=Bytes(int(size[1]) * MIB)), models())


def test_beyond_training_the_nearest_is_the_model_that_holds_most() -> None:
    with pytest.raises(NothingFits, match="trained on") as caught:
        pipeline.make_plan(Request(profile=NANO, context=10**6, min_decode=0.0), models())

    longest = re.fullmatch(r"--context (\d+)", str(caught.value.hint))
    assert longest is not None
    pipeline.make_plan(Request(profile=NANO, context=int(longest[1]), min_decode=0.0), models())


@pytest.mark.parametrize("name", ["qwen2.5-7b-instruct", "qwen2.5-1.5b-instruct"])
def test_beyond_training_the_hint_applied_is_a_plan(name: str) -> None:
    """Of the larger one nothing is fast enough at any context: its hint lowers the floor too."""
    request = Request(profile=profile.load("raspberry-pi-5-8gb"), context=131072)
    model = [pipeline.named(name)]
    with pytest.raises(NothingFits, match="trained on") as caught:
        pipeline.make_plan(request, model)

    hint = re.fullmatch(r"--context (\d+)(?: --min-tokens-per-second ([\d.]+))?", str(caught.value.hint))

    assert hint is not None, caught.value.hint
    assert (hint[2] is not None) == (name == "qwen2.5-7b-instruct")
    floor = float(hint[2]) if hint[2] else None
    pipeline.make_plan(replace(request, context=int(hint[1]), min_decode=floor), model)


@pytest.mark.parametrize("name", ["jetson-orin", "rtx-3060-12gb"])
def test_many_slots_are_not_promised_what_one_measured_slot_does(name: str) -> None:
    """The lower end pays the compute term of the class for every slot, own constants or not."""
    device = profile.load(name)
    request = Request(profile=device, slots=16, context=16 * 1024, min_decode=0.0, scheme="Q4_K_M")
    model = [pipeline.named("qwen3-1.7b")]

    own = pipeline.make_plan(request, model).speed
    classed = pipeline.make_plan(
        replace(
            request,
            profile=replace(
                device, speed=None, power_modes=tuple(replace(m, speed=None) for m in device.power_modes)
            ),
        ),
        model,
    ).speed

    assert own.decode_all_low < own.decode_all
    assert own.decode_all_low < 1.5 * classed.decode_all_low


def test_an_explanation_compares_with_the_next_three_models() -> None:
    request = Request(profile=NANO)
    chosen = pipeline.make_plan(request, models())

    explained = choice.explain(chosen, request, models())

    named = [text.split()[0] for text in explained.against]
    assert len(set(named)) == 3
    assert chosen.model.id not in named
    assert "left" in explained.binding
    assert f"{chosen.quality.low:.1f}" in explained.why


def test_a_refusal_for_a_licence_nobody_has_says_so() -> None:
    with pytest.raises(NothingFits, match="licence"):
        pipeline.make_plan(Request(profile=NANO, licenses=("none-such",)), models())


def test_the_command_line_shows_the_front_and_the_explanation() -> None:
    shown = CliRunner().invoke(cli.cli, ["plan", "--profile", "jetson-orin", "--pareto", "--explain"])
    document = json.loads(
        CliRunner().invoke(cli.cli, ["plan", "--profile", "jetson-orin", "--explain", "--json"]).stdout
    )

    assert shown.exit_code == 0
    assert re.search(r"^candidate +qwen3_instruct, surely", shown.stdout, re.M)
    assert re.search(r"^binding +memory: weights", shown.stdout, re.M)
    assert set(document["explanation"]) == {"why", "against", "binding", "change"}
