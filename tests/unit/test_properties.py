"""What must hold of every estimate, plan and refusal, over real models of the catalog and real devices."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import settings as config
from hypothesis import strategies as st

from edgepack import catalog, degradation, memory, pipeline, plan, profile, schemes
from edgepack.errors import NothingFits, Unsupported
from edgepack.fit import NO_HELP, excess, fit
from edgepack.memory import MemoryEstimate
from edgepack.modelspec import ModelSpec
from edgepack.plan import Candidate, Plan, Request
from edgepack.profile import DeviceProfile, Session, budget
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings
from edgepack.units import MIB, Bytes

SPECS = tuple(model.spec() for model in catalog.models())
CANDIDATES = tuple(pipeline.candidates(None, None))
DEVICES = tuple(profile.load(name) for name in profile.names())
BY_BITS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
"""One family from wide to narrow; Q4_0 weighs less than Q4_K_M but is repacked into a second copy."""
CACHES = ("f16", "q8_0", "q5_0", "q4_0")
STEPS_DOWN = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")

specs = st.sampled_from(SPECS)
devices = st.sampled_from(DEVICES)
some_schemes = st.sampled_from((*BY_BITS, "Q4_0", "IQ4_XS"))
caches = st.sampled_from(CACHES)
ubatches = st.sampled_from((128, 512, 1024))
slot_counts = st.integers(1, 8)
modest = config(max_examples=60, deadline=None)


def estimate(
    spec: ModelSpec, device: DeviceProfile, scheme: str, settings: Settings, *, runtime: str = "llama.cpp"
) -> MemoryEstimate:
    try:
        return memory.estimate(
            spec, scheme, settings, backend=device.backend, arch=device.arch, runtime=runtime
        )
    except Unsupported:  # a cache type that the model's heads cannot have
        assume(False)
        raise


def settings(
    device: DeviceProfile, context: int, slots: int = 1, kv_type: str = "f16", ubatch: int = 512
) -> Settings:
    return llama_cpp.settings_for(device, context=context, slots=slots, kv_type=kv_type, ubatch=ubatch)


def ends(found: MemoryEstimate) -> tuple[int, int, int]:
    return found.low, found.total, found.high


def no_more(less: MemoryEstimate, more: MemoryEstimate) -> bool:
    return all(a <= b for a, b in zip(ends(less), ends(more), strict=True))


@given(specs, devices, some_schemes, caches, ubatches, slot_counts, st.data())
@modest
def test_more_context_never_takes_less(
    spec: ModelSpec, device: DeviceProfile, scheme: str, kv: str, ubatch: int, slots: int, data: st.DataObject
) -> None:
    contexts = data.draw(st.lists(st.integers(1, spec.context_train), min_size=2, max_size=2).map(sorted))
    short, long = (
        estimate(spec, device, scheme, settings(device, n * slots, slots, kv, ubatch)) for n in contexts
    )

    assert no_more(short, long)


@given(specs, devices, some_schemes, caches, ubatches, st.sampled_from((1, 2, 4)), st.integers(1, 8192))
@modest
def test_more_slots_of_the_same_context_never_take_less(
    spec: ModelSpec, device: DeviceProfile, scheme: str, kv: str, ubatch: int, slots: int, context: int
) -> None:
    """Twice as many: numbers that do not divide the micro-batch may have smaller buffers, and so may the same context
    cut into more slots, since the buffers follow the length of one slot."""
    few, many = (
        estimate(spec, device, scheme, settings(device, context * n, n, kv, ubatch))
        for n in (slots, 2 * slots)
    )

    assert no_more(few, many)


@given(
    specs, devices, caches, st.integers(1, 8192), st.lists(st.sampled_from(range(7)), min_size=2, max_size=2)
)
@modest
def test_fewer_bits_never_take_more_nor_keep_more(
    spec: ModelSpec, device: DeviceProfile, kv: str, context: int, at: list[int]
) -> None:
    wide, narrow = (BY_BITS[i] for i in sorted(at))
    more, less = (
        estimate(spec, device, scheme, settings(device, context, 1, kv)) for scheme in (wide, narrow)
    )
    kept_more, kept_less = (
        degradation.loss(
            spec.tensors, schemes.tensor_types(spec, scheme, imatrix=False),
            parameters=spec.parameters, imatrix=False, family=degradation.family_of(spec.name),
        )
        for scheme in (wide, narrow)
    )  # fmt: skip

    assert no_more(less, more)
    assert kept_less.retention <= kept_more.retention


@given(specs, devices, st.integers(1, 8192), slot_counts)
@modest
def test_a_narrower_cache_never_takes_more(
    spec: ModelSpec, device: DeviceProfile, context: int, slots: int
) -> None:
    sizes = [
        estimate(spec, device, "Q4_K_M", settings(device, context, slots, kv)).part("kv_cache")
        for kv in CACHES
    ]

    assert sizes == sorted(sizes, reverse=True)


@given(specs, devices, some_schemes, caches, ubatches, slot_counts, st.integers(1, 32768))
@modest
def test_parts_lie_in_their_intervals_and_add_up(
    spec: ModelSpec, device: DeviceProfile, scheme: str, kv: str, ubatch: int, slots: int, context: int
) -> None:
    found = estimate(spec, device, scheme, settings(device, context, slots, kv, ubatch))

    for part in found.parts:
        assert 0 < part.low <= part.bytes <= part.high, part.name
        assert part.provenance != "exact" or part.low == part.high
    assert found.low <= found.total <= found.high
    assert found.at("device") + found.at("host") == found.high
    names = {part.name for part in found.parts}
    assert sum(found.part(name) for name in names) == found.total
    assert found.part("weights") == schemes.weights_bytes(spec, scheme, imatrix=False)


def scaled(device: DeviceProfile, share: float, card_share: float) -> DeviceProfile:
    """The device with so much of its memory, and its card with so much of its own."""
    card = device.accelerator
    if card is not None and card.memory:
        card = replace(card, memory=Bytes(int(card.memory * card_share)))
    return replace(device, memory=Bytes(int(device.memory * share)), accelerator=card)


shares = st.floats(0.1, 1.1)
sessions = st.sampled_from(("headless", "desktop"))
requests = st.builds(
    lambda device, share, card, **fields: Request(profile=scaled(device, share, card), **fields),
    devices, shares, shares,
    session=sessions, slots=st.sampled_from((1, 4)), context=st.sampled_from((None, 2048, 8192)),
    kv_type=st.sampled_from((None, "f16", "q4_0")), scheme=st.sampled_from((None, "Q8_0", "Q4_K_M", "Q2_K")),
    goal=st.sampled_from(("quality", "latency", "context")), min_decode=st.sampled_from((0.0, None, 30.0)),
)  # fmt: skip
small_choices = st.lists(st.sampled_from(CANDIDATES), min_size=1, max_size=3, unique_by=lambda c: c.model.id)


@given(requests, small_choices)
@config(max_examples=50, deadline=None)
def test_whatever_is_chosen_fits_and_is_fast_enough(request: Request, models: list[Candidate]) -> None:
    try:
        chosen = pipeline.make_plan(request, models)
    except NothingFits:
        for outcome in plan.survey(request, models):
            assert not isinstance(outcome, Plan)
        return

    floor = plan.DEFAULT_MIN_DECODE if request.min_decode is None else request.min_decode
    assert excess(chosen.memory, budget(request.profile, request.session)) <= 0
    assert chosen.speed.decode_full_low >= floor
    assert chosen.settings.context == (request.context or chosen.settings.context)
    assert chosen.memory == estimate(
        next(c.spec for c in models if c.model == chosen.model),
        request.profile,
        chosen.scheme,
        chosen.settings,
        runtime=chosen.runtime,
    )


def applied(hint: str, session: Session, scheme: str, given: Settings) -> tuple[Session, str, Settings]:
    """What a refusal's hint says, done."""
    desktop, _, rest = hint.rpartition("leave out --desktop")
    assert desktop == ""
    if hint.startswith("leave out --desktop"):
        session = "headless"
    words = rest.removeprefix(" and ").split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options or session == "headless"
    assert set(options) <= {
        "--scheme",
        "--kv-type",
        "--context",
        "--ubatch",
        "--slots",
        "--min-tokens-per-second",
        "--runtime",
    }
    return (
        session,
        options.get("--scheme", scheme),
        replace(
            given,
            kv_type=options.get("--kv-type", given.kv_type),
            context=int(options.get("--context", given.context)),
            ubatch=int(options.get("--ubatch", given.ubatch)),
            slots=int(options.get("--slots", given.slots)),
        ),
    )


@given(
    specs, devices, some_schemes, st.sampled_from(("f32", *CACHES)), st.sampled_from((64, 128, 512, 2048)),
    slot_counts, sessions, st.floats(0.2, 1.0), st.data(),
)  # fmt: skip
@config(max_examples=60, deadline=None)
def test_every_refusal_names_a_change_that_applied_fits(
    spec: ModelSpec, device: DeviceProfile, scheme: str, kv: str, ubatch: int, slots: int, session: Session,
    share: float, data: st.DataObject,
) -> None:  # fmt: skip
    asked = settings(device, data.draw(st.integers(1, spec.context_train)) * slots, slots, kv, ubatch)
    need = estimate(spec, device, scheme, asked)
    there_is = budget(device, session)
    card = device.accelerator
    if card is not None and card.memory:
        card = replace(
            card, memory=Bytes(max(1, int(card.memory + share * need.at("device") - there_is.device)))
        )
    host = need.high if there_is.unified else need.at("host")
    limit = there_is.device if there_is.unified else there_is.host
    tight = replace(device, memory=Bytes(max(1, int(device.memory + share * host - limit))), accelerator=card)
    refused = fit(spec, profile=tight, session=session, scheme=scheme, settings=asked)
    if refused.fits:
        assert refused.hint == ""
        return

    if refused.hint.startswith(NO_HELP):
        # Not even the least that these flags allow, at any scheme a hint may name, without a desktop.
        least = replace(
            asked,
            context=256,
            slots=1,
            ubatch=min(ubatch, 128),
            kv_type=kv if kv in CACHES[1:] else "q8_0",
        )
        for smaller in {*STEPS_DOWN, scheme}:
            assert not fit(spec, profile=tight, session="headless", scheme=smaller, settings=least).fits, (
                smaller
            )
        return
    where, which, changed = applied(refused.hint, session, scheme, asked)
    assert (where, which, changed) != (session, scheme, asked)
    assert fit(spec, profile=tight, session=where, scheme=which, settings=changed).fits


def refusal(request: Request, models: list[Candidate]) -> NothingFits:
    try:
        pipeline.make_plan(request, models)
    except NothingFits as refused:
        return refused
    assume(False)
    raise AssertionError


@given(requests, small_choices)
@config(max_examples=30, deadline=None)
def test_when_nothing_fits_the_change_that_is_named_makes_a_plan(
    request: Request, models: list[Candidate]
) -> None:
    """Memory, and a pace where the change is too slow for the one that was asked for."""
    refused = refusal(request, models)
    assume("fast enough" not in refused.message)
    assume(refused.hint != "a smaller model or scheme")
    first, *rest = re.sub(r" \(.*?\)", "", str(refused.hint)).split("; ")
    pace = re.search(r" --min-tokens-per-second ([\d.]+)", first)
    if pace:
        request = replace(request, min_decode=float(pace.group(1)))
    runtime = re.search(r" --runtime (\S+)", first)
    if runtime:
        request = replace(request, runtime=runtime.group(1))

    if not str(refused.hint).startswith(NO_HELP):
        asked = settings(request.profile, request.context or 4096, request.slots, request.kv_type or "f16")
        session, scheme, changed = applied(first, request.session, request.scheme or "", asked)
        context = changed.context if changed != asked and "--context" in first else request.context
        pipeline.make_plan(
            replace(
                request, session=session, scheme=scheme or None, context=context,
                kv_type=changed.kv_type if "--kv-type" in first else request.kv_type,
                ubatch=changed.ubatch if "--ubatch" in first else request.ubatch, slots=changed.slots,
            ),
            models,
        )  # fmt: skip
    if not rest:
        return
    freed = re.search(r"free (\d+) MiB on the device", rest[-1])
    assert freed is not None
    request = replace(request, min_decode=0.0)
    more = int(freed.group(1)) * MIB
    device, card = request.profile, request.profile.accelerator
    if card is not None and card.memory:
        card = replace(card, memory=Bytes(card.memory + more))
    roomier = replace(device, memory=Bytes(device.memory + more), accelerator=card)
    pipeline.make_plan(replace(request, profile=roomier), models)


@given(devices, st.sampled_from(CANDIDATES), st.sampled_from((None, "Q8_0", "Q4_K_M")), st.floats(5.0, 500.0))
@config(max_examples=40, deadline=None)
def test_when_nothing_is_fast_enough_the_pace_that_is_named_makes_a_plan(
    device: DeviceProfile, model: Candidate, scheme: str | None, pace: float
) -> None:
    request = Request(profile=device, scheme=scheme, context=2048, min_decode=pace)
    refused = refusal(request, [model])
    assume("fast enough" in refused.message)
    named = re.fullmatch(
        r"(?:--power-mode (\S+) \(decodes [\d.]+ tok/s with a full context\); or )?--min-tokens-per-second ([\d.]+)",
        str(refused.hint),
    )

    assert named is not None
    mode, floor = named.group(1), float(named.group(2))
    assert floor <= pace
    pipeline.make_plan(replace(request, min_decode=floor), [model])
    if mode is not None:
        pipeline.make_plan(replace(request, power_mode=mode), [model])


@pytest.mark.parametrize("device", [d for d in DEVICES if d.deployable], ids=lambda d: d.name)
def test_the_catalog_on_every_device_gives_a_plan_that_fits_or_says_what_is_missing(
    device: DeviceProfile,
) -> None:
    try:
        chosen = pipeline.make_plan(Request(profile=device), list(CANDIDATES))
    except NothingFits as refused:
        assert refused.hint
        return

    assert excess(chosen.memory, budget(device)) <= 0
