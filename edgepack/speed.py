"""How fast a plan decodes: bytes read over bandwidth, plus a fixed cost per layer, plus the KV cache.

Decoding reads every weight once per token, so t = bytes / (efficiency * bandwidth) + overhead * layers, plus
what the server itself takes. Two constants per device fit published runs to a few percent; uncalibrated they carry the
profile's interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgepack.profile import DeviceProfile, PowerMode, SpeedConstants


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    decode: float
    """Tokens per second at a short context."""
    decode_low: float
    decode_high: float
    decode_full: float
    """Tokens per second with the context full."""
    decode_full_low: float
    decode_all: float
    """Tokens per second of all slots together, every one busy and full."""
    decode_all_low: float
    provenance: Literal["fitted", "measured"]


UNKNOWN = {
    "cpu": SpeedConstants(decode_efficiency=0.6, layer_overhead_us=60.0, relative_interval=0.6),
    "cuda": SpeedConstants(decode_efficiency=0.75, layer_overhead_us=70.0, relative_interval=0.6),
    "vulkan": SpeedConstants(decode_efficiency=0.6, layer_overhead_us=80.0, relative_interval=0.6),
    "metal": SpeedConstants(decode_efficiency=0.7, layer_overhead_us=70.0, relative_interval=0.6),
}
"""For a device nobody timed: x86 and Arm cores reach 0.5 to 0.85 of their bandwidth, GPUs 0.6 to 0.9, with
43 to 85 us a layer, over the published llama.cpp runs in profiles/*.yaml; integrated ones through Vulkan 0.45 to
0.85, Apple's 0.6 to 0.75; hence the wide interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seconds:
    low: float
    middle: float
    high: float


SERVER = _Seconds(low=100e-6, middle=300e-6, high=750e-6)
"""What llama-server adds to each token (sampling, detokenizing, one event over HTTP): from two models too small for
anything else to matter, on two x86-64 cores: stories260K 665 us and the built-in model 627 us a token in all."""


def read_per_token(weights: int, embedding: int, *, tied: bool) -> int:
    """Weight bytes read for one token: all of them, but of an untied embedding only one row (counted as 0)."""
    return weights if tied else weights - embedding


def estimate(
    profile: DeviceProfile, mode: PowerMode, *, read_bytes: int, layers: int, kv_bytes: int, slots: int = 1
) -> Speed:
    """Decode speed in tokens per second, with the context empty and full.

    ``read_bytes``: weights read per token; ``kv_bytes``: KV cache of one slot, read whole when it is full.
    """
    constants = profile.constants(mode.name) or UNKNOWN[profile.backend]
    bandwidth = mode.bandwidth_gbs * 1e9 * constants.decode_efficiency
    overhead = constants.layer_overhead_us * 1e-6 * layers
    spread = 1.0 + constants.relative_interval
    short = read_bytes / bandwidth + overhead
    full = (read_bytes + kv_bytes) / bandwidth + overhead
    every = (read_bytes + slots * kv_bytes) / bandwidth + overhead
    return Speed(
        decode_all=slots / (every + slots * SERVER.middle),
        decode_all_low=slots / (every * spread + slots * SERVER.high),
        decode=1.0 / (short + SERVER.middle),
        decode_low=1.0 / (short * spread + SERVER.high),
        decode_high=1.0 / (short / spread + SERVER.low),
        decode_full=1.0 / (full + SERVER.middle),
        decode_full_low=1.0 / (full * spread + SERVER.high),
        provenance="fitted",
    )
