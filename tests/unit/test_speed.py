"""The speed law: slower with more bytes, layers and context, its interval holds its middle, and its classes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack import catalog, profile, speed
from edgepack.profile import Accelerator, DeviceProfile, PowerMode, SpeedConstants
from edgepack.speed import Speed, Work
from tests import shapes

PI = profile.load("raspberry-pi-5-8gb")
NANO = profile.load("jetson-orin")
CARD = profile.load("rtx-4060-8gb")
GIB = 2**30
LLAMA = Work(read=2 * GIB, weights=3_212_749_824, layers=28)


def estimate(
    device: DeviceProfile,
    work: Work = LLAMA,
    *,
    mode: str | None = None,
    kv: int = 0,
    runtime: str = "llama.cpp",
) -> Speed:
    return speed.estimate(device, device.mode(mode), work, kv_bytes=kv, runtime=runtime)


def uncalibrated(device: DeviceProfile) -> DeviceProfile:
    modes = tuple(replace(mode, speed=None) for mode in device.power_modes)
    return replace(device, power_modes=modes, speed=None)


@pytest.mark.parametrize("device", [PI, uncalibrated(PI), NANO, CARD], ids=lambda d: d.name)
@given(
    read=st.integers(min_value=10**6, max_value=2 * 10**10),
    layers=st.integers(min_value=1, max_value=120),
    kv=st.integers(min_value=0, max_value=10**10),
)
def test_the_interval_holds_the_middle_and_a_full_context_is_slower(
    device: DeviceProfile, read: int, layers: int, kv: int
) -> None:
    found = estimate(device, Work(read=read, weights=read * 2, layers=layers), kv=kv)

    assert found.decode_low < found.decode < found.decode_high
    assert found.decode_full <= found.decode
    assert found.decode_full_low <= found.decode_low
    assert found.prefill_low < found.prefill < found.prefill_high
    assert found.first_token < found.first_token_high


@given(
    read=st.integers(min_value=10**6, max_value=10**10), more=st.integers(min_value=10**5, max_value=10**9)
)
def test_more_bytes_are_never_faster(read: int, more: int) -> None:
    one = estimate(CARD, Work(read=read, weights=read, layers=28))
    two = estimate(CARD, Work(read=read + more, weights=read, layers=28))

    assert two.decode < one.decode


def test_every_mode_of_every_profile_has_a_speed() -> None:
    for name in profile.names():
        device = profile.load(name)
        for mode in device.power_modes:
            found = speed.estimate(device, mode, LLAMA, kv_bytes=GIB // 2)

            assert 1.0 < found.decode_low < found.decode < 400.0, f"{name} {mode.name}"


@pytest.mark.parametrize("name", ["jetson-orin", "jetson-agx-orin-64gb", "jetson-agx-orin-32gb"])
def test_a_power_mode_with_lower_clocks_is_slower(name: str) -> None:
    device = profile.load(name)

    slow, fast = estimate(device, mode="15W"), estimate(device)

    assert slow.decode < fast.decode
    assert slow.prefill < fast.prefill


def test_the_terms_of_a_card_by_hand() -> None:
    """RTX 4060: 272 GB/s and 60.5 / 4 FP32 TFLOPS."""
    found = speed.terms(speed.machine(CARD, CARD.mode()), LLAMA)

    fp32 = 15.125
    assert found.memory == pytest.approx(2 * GIB / (0.889 * 272e9))
    assert found.compute == pytest.approx(2.35 * 2 * 3.212749824e9 / (fp32 * 1e12))
    assert found.overhead == pytest.approx(28 * 230e-6 * fp32**-0.529)


def test_constants_of_the_device_itself_replace_the_law() -> None:
    own = SpeedConstants(decode_efficiency=0.5, layer_overhead_us=100.0, prefill_tflops=10.0, readings=2)
    device = replace(uncalibrated(CARD), power_modes=(replace(CARD.mode(), speed=own),))

    found = estimate(device)

    assert found.provenance == "calibrated"
    assert found.decode == pytest.approx(1 / (2 * GIB / 136e9 + 28 * 100e-6 + speed.SERVER.middle))
    assert found.prefill == pytest.approx(10e12 / (2 * LLAMA.weights))
    assert found.first_token == pytest.approx(512 / found.prefill + 1 / found.decode)


def test_constants_that_others_published_are_fitted_and_hold_for_their_runtime_only() -> None:
    assert PI.constants() is not None
    assert estimate(PI).provenance == "fitted"
    assert estimate(PI, runtime="transformers") == estimate(uncalibrated(PI), runtime="transformers")


def test_a_calibrated_interval_is_narrower_for_models_like_those_measured() -> None:
    own = SpeedConstants(decode_efficiency=0.5, layer_overhead_us=100.0, relative_interval=0.15, readings=2)

    dense, mixed = speed.own_spread(LLAMA, own), speed.own_spread(replace(LLAMA, experts=True), own)

    assert dense == pytest.approx(math.log(1.15))
    assert mixed == pytest.approx(1.5 * dense)


def test_the_less_bandwidth_explains_the_wider_the_interval() -> None:
    on = speed.machine(CARD, CARD.mode())

    large = speed.terms(on, Work(read=8 * GIB, weights=10**10, layers=32))
    small = speed.terms(on, Work(read=GIB // 16, weights=10**8, layers=32))

    assert speed.spread(small) > 1.5 * speed.spread(large)
    assert speed.spread(small, guessed=True) > speed.spread(small)


def test_pytorch_reads_a_long_context_far_slower() -> None:
    kv = GIB

    fast, slow = (estimate(CARD, kv=kv, runtime=name) for name in ("vllm", "transformers"))

    assert 1 / slow.decode_full - 1 / slow.decode == pytest.approx(kv / (0.032 * 272e9))
    assert 1 / fast.decode_full - 1 / fast.decode == pytest.approx(kv / (0.478 * 272e9))


def test_vllm_starts_its_operations_one_by_one_where_there_are_no_graphs() -> None:
    laptop, card = profile.load("x86-laptop"), CARD
    layers = LLAMA.layers * speed.EAGER.middle

    beside = {
        device: [1 / estimate(device, runtime=name).decode for name in ("vllm", "transformers")]
        for device in (laptop, card)
    }

    assert beside[laptop][0] == pytest.approx(beside[laptop][1])
    assert beside[card][1] - beside[card][0] == pytest.approx(layers)


# ── what a token asks for ──


def test_an_untied_embedding_is_not_read_and_a_tied_one_is() -> None:
    tied, untied = shapes.spec("qwen2.5-0.5b"), shapes.spec("qwen2.5-7b")

    assert speed.work(tied, "F16", imatrix=False).weights == tied.parameters
    assert speed.work(untied, "F16", imatrix=False).weights == untied.parameters - 152064 * 3584


def test_of_experts_only_those_in_use_are_read() -> None:
    """2 of 8 experts of three 1024 x 768 matrices in each of 16 layers."""
    spec = shapes.spec("qwen3-8-experts")

    found = speed.work(spec, "F16", imatrix=False)

    embedding = 32000 * 1024
    assert found.weights == spec.parameters - embedding - 16 * 6 * 3 * 1024 * 768
    assert found.experts


def test_embeddings_per_layer_are_looked_up() -> None:
    model = catalog.find("gemma-3n-e4b-it")
    assert model is not None
    spec = model.spec()

    found = speed.work(spec, "Q8_0", imatrix=False)

    assert found.weights == spec.parameters - 35 * 256 * 262400


def test_only_state_space_and_delta_net_layers_count_as_recurrent() -> None:
    assert speed.work(shapes.spec("qwen3.5-4b"), "Q8_0", imatrix=False).recurrent
    assert not speed.work(shapes.spec("lfm2-350m"), "Q8_0", imatrix=False).recurrent
    assert not speed.work(shapes.spec("qwen3-0.6b"), "Q8_0", imatrix=False).recurrent


# ── classes ──


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raspberry-pi-5-8gb", "cpu"), ("x86-laptop-ddr5", "cpu"), ("jetson-orin", "gpu-jetson"),
        ("rtx-3060-12gb", "gpu"), ("mac-mini-m4", "apple"), ("steam-deck", "gpu"),
    ],
)  # fmt: skip
def test_the_class_of_a_profile(name: str, expected: str) -> None:
    assert speed.generation(profile.load(name)) == expected


def test_older_hardware_has_classes_of_its_own() -> None:
    def with_card(card: Accelerator) -> DeviceProfile:
        return replace(CARD, accelerator=card)

    pascal = Accelerator(name="NVIDIA GeForce GTX 1070", backend="cuda", compute_capability="6.1")
    m1 = Accelerator(name="Apple M1", backend="metal")

    assert speed.generation(with_card(pascal)) == "gpu-old"
    assert speed.generation(with_card(m1)) == "apple-old"
    assert speed.generation(replace(PI, cpu_features=())) == "cpu-old"


def test_fp32_that_no_profile_gives_is_guessed_and_never_above_a_faster_mode() -> None:
    nx = profile.load("jetson-orin-nx-16gb")

    slow, fast = (speed.machine(nx, nx.mode(name)) for name in ("15W", "MAXN"))
    bare = speed.machine(CARD, PowerMode(name="default", bandwidth_gbs=272))

    assert (slow.guessed, fast.guessed) == (True, False)
    assert slow.fp32 <= fast.fp32
    assert bare.guessed
