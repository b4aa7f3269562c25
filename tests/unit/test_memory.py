"""The estimate in parts: they add up, say how sure they are, and count what lies in memory twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as config
from hypothesis import strategies as st

from edgepack import memory, schemes
from edgepack.memory import MemoryEstimate
from edgepack.profile import Arch
from edgepack.units import MIB
from tests.shapes import CONFIGS, settings, spec


def on_cpu(
    name: str,
    scheme: str,
    *,
    arch: Arch = "x86_64",
    context: int = 4096,
    slots: int = 1,
    load_mode: str = "none",
    repack: bool = True,
) -> MemoryEstimate:
    wanted = settings(context, slots=slots, load_mode=load_mode, repack=repack)
    return memory.estimate(spec(name), scheme, wanted, backend="cpu", arch=arch)


def on_gpu(name: str, scheme: str) -> MemoryEstimate:
    return memory.estimate(spec(name), scheme, settings(gpu_layers=99), backend="cuda")


def test_a_tied_embedding_lies_on_the_host_too_when_offloaded() -> None:
    """0.5B as Q4_K_M: 373 MiB on the device, and 137 MiB of token_embd on the host."""
    estimate = on_gpu("qwen2.5-0.5b", "Q4_K_M")

    assert estimate.part("weights") / MIB == pytest.approx(373.71, abs=0.01)
    assert estimate.part("host_copy") / MIB == pytest.approx(137.9, abs=0.1)
    assert estimate.bits_per_weight == pytest.approx(6.35, abs=0.005)


def test_an_untied_embedding_lies_on_the_host_only() -> None:
    estimate = on_gpu("qwen2.5-7b", "Q4_K_M")
    weights = {part.place: part.bytes for part in estimate.parts if part.name == "weights"}

    assert estimate.part("host_copy") == 0
    assert sum(weights.values()) == schemes.weights_bytes(spec("qwen2.5-7b"), "Q4_K_M", imatrix=False)
    assert weights["host"] == schemes.tensor_bytes("Q4_K", (3584, 152064))


@pytest.mark.parametrize(
    ("name", "scheme", "mib"),
    [("qwen2.5-0.5b", "Q4_0", 191.9), ("qwen2.5-0.5b", "Q4_K_M", 28.1), ("qwen2.5-1.5b", "Q4_K_M", 596.5)],
)
def test_a_mapped_file_stays_beside_its_repacked_tensors(name: str, scheme: str, mib: float) -> None:
    """The CPU_REPACK buffers that llama.cpp logged for these files."""
    assert on_cpu(name, scheme, load_mode="mmap").part("host_copy") / MIB == pytest.approx(mib, abs=0.06)
    assert on_cpu(name, scheme, load_mode="mmap", repack=False).part("host_copy") == 0
    assert on_cpu(name, scheme).part("host_copy") == 0, "read, not mapped: one copy"


def test_an_arm_cpu_repacks_a_tied_embedding_as_the_output_and_keeps_it_for_lookups() -> None:
    embedding = schemes.tensor_bytes("Q6_K", (1536, 151936))

    assert on_cpu("qwen2.5-1.5b", "Q4_K_M", arch="aarch64").part("host_copy") == embedding
    assert on_cpu("qwen2.5-1.5b", "Q4_K_M", arch="aarch64", repack=False).part("host_copy") == 0


def test_the_measured_server_lies_in_the_interval() -> None:
    """Peak RSS (VmHWM) of the static server, two threads, prompt of 700 to 4000 tokens."""
    measured = [
        (on_cpu("qwen2.5-0.5b", "Q4_K_M", context=512), 478.7),
        (on_cpu("qwen2.5-0.5b", "Q4_K_M"), 524.6),
        (on_cpu("qwen2.5-0.5b", "Q8_0", slots=4), 650.3),
        (on_cpu("qwen2.5-0.5b", "Q4_0", load_mode="mmap"), 668.3),
        (on_cpu("qwen2.5-0.5b", "Q4_K_S"), 516.0),
        (on_cpu("qwen2.5-1.5b", "Q4_0"), 1131.9),
        (on_cpu("qwen3-0.6b", "Q4_0"), 896.5),
        (on_cpu("llama-3.2-1b", "Q4_0"), 981.9),
        (on_cpu("llama-3.2-1b", "Q4_0", slots=4), 979.3),
        (on_cpu("gemma-3-1b", "Q4_K_M"), 922.2),
    ]
    for estimate, mib in measured:
        assert estimate.low / MIB < mib < estimate.high / MIB
        assert estimate.total / MIB == pytest.approx(mib, rel=0.02)


def test_only_the_process_is_fitted_on_a_cpu() -> None:
    fitted = {part.name for part in on_cpu("qwen3-0.6b", "Q8_0").parts if part.provenance != "exact"}

    assert fitted == {"process"}


@given(
    st.sampled_from(sorted(CONFIGS)),
    st.sampled_from(["F16", "Q8_0", "Q4_K_M", "Q4_0"]),
    st.integers(1, 33000),
    st.integers(1, 5),
    st.booleans(),
)
@config(max_examples=40, deadline=None)
def test_parts_add_up_and_bound_the_total(
    name: str, scheme: str, context: int, slots: int, offloaded: bool
) -> None:
    wanted = settings(context, slots=slots, gpu_layers=99 if offloaded else 0)

    estimate = memory.estimate(spec(name), scheme, wanted, backend="cuda" if offloaded else "cpu")

    assert estimate.total == sum(part.bytes for part in estimate.parts)
    assert estimate.low <= estimate.total <= estimate.high
    assert all(part.low <= part.bytes <= part.high for part in estimate.parts)
    assert estimate.at("device") + estimate.at("host") == estimate.high
    assert estimate.file_bytes >= estimate.part("weights")
