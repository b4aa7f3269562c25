"""What llama-server took on an NVIDIA H200 (driver 580.159.04, CUDA 13.0, the pinned commit), against the plan."""

from __future__ import annotations

import pytest

from edgepack.memory import Part
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings
from edgepack.units import MIB
from tests import shapes

PRINTED = {
    ("Q8_0", 8192): {
        ("weights", "device"): 1564.63,
        ("host_copy", "host"): 236.47,
        ("kv_cache", "device"): 119.02,
        ("compute", "device"): 69.59,
        ("compute", "host"): 14.09,
        ("output", "host"): 0.58,
    },
    ("Q4_K_M", 32768): {
        ("weights", "device"): 934.70,
        ("host_copy", "host"): 182.57,
        ("kv_cache", "device"): 476.02,
        ("compute", "device"): 93.59,
        ("compute", "host"): 38.09,
        ("output", "host"): 0.58,
    },
}
"""MiB, two digits, of CUDA0 and CUDA_Host buffers with K and V in q8_0, by scheme and context."""
PADDING = 0.025
"""MiB by which a quantized buffer may be printed larger: ggml-cuda fills up the last row of a tensor."""
PEAKS = {("Q8_0", 8192): 700_514_304, ("Q4_K_M", 32768): 680_927_232}
"""VmHWM of the process, whose pinned memory is part of it."""


@pytest.mark.parametrize(("scheme", "context"), list(PRINTED))
def test_buffers_on_a_card(scheme: str, context: int) -> None:
    found = {(part.name, str(part.place)): part.bytes / MIB for part in planned(scheme, context)}

    for part, printed in PRINTED[scheme, context].items():
        assert -0.006 < printed - found[part] < PADDING, part


@pytest.mark.parametrize(("scheme", "context"), list(PEAKS))
def test_the_host_beside_a_card(scheme: str, context: int) -> None:
    parts = [part for part in planned(scheme, context) if part.place == "host"]

    assert abs(PEAKS[scheme, context] / sum(part.bytes for part in parts) - 1) < 0.03
    assert sum(part.low for part in parts) < PEAKS[scheme, context] < sum(part.high for part in parts)


def planned(scheme: str, context: int) -> tuple[Part, ...]:
    settings = Settings(
        context=context, slots=1, kv_type="q8_0", batch=2048, ubatch=512, flash_attention=True, unified_kv=False,
        threads=16, gpu_layers=99, load_mode="none", repack=False,
    )  # fmt: skip
    spec = shapes.spec("qwen2.5-1.5b")
    return llama_cpp.parts(spec, scheme, settings, backend="cuda", arch="x86_64", imatrix=False)
