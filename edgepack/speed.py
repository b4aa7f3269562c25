"""How fast a plan reads prompts and writes answers: a law with constants per class of device, and its interval.

One token costs the sum of four terms, each a time that hardware imposes:

    bytes / (efficiency x bandwidth)                 every weight is read once
  + compute x 2 x weights / FP32                     unpacking and multiplying them
  + overhead x layers                                starting kernels, waiting for them (a GPU's falls with its FP32)
  + KV bytes / (KV efficiency x bandwidth)           the context so far

The constants come from published runs: scripts/fit_speed.py fits and scores them, leaving each device out in turn.
A device that was measured itself (`edgepack calibrate`, or runs cited in its profile) has two constants of its own:
efficiency, which then holds the compute term too, and overhead per layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from edgepack import runtimes, schemes
from edgepack.modelspec import ModelSpec
from edgepack.profile import Backend, DeviceProfile, PowerMode, SpeedConstants

Provenance = Literal["fitted", "calibrated"]
Generation = Literal["gpu", "gpu-jetson", "gpu-old", "apple", "apple-old", "cpu", "cpu-old"]

PROMPT = 512
"""Tokens of the prompt that the time to the first token is given for, or the whole context where it is shorter."""


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
    prefill: float
    """Tokens of prompt per second, read from an empty context."""
    prefill_low: float
    prefill_high: float
    prompt: int
    """Tokens of the prompt that `first_token` is given for."""
    first_token: float
    """Seconds from a request with that prompt to the first token of the answer."""
    first_token_high: float
    provenance: Provenance
    """Decoding: calibrated when the device's own runs gave the constants; reading prompts is always fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one token asks of the hardware."""

    read: int
    """Weight bytes read: all but tables that rows are looked up in, and of experts only those in use."""
    weights: int
    """Weights multiplied by, likewise."""
    layers: int
    experts: bool = False
    """A mixture of experts."""
    recurrent: bool = False
    """Some layers keep a state instead of a KV cache (state space, gated delta net)."""
    vocab: int = 0
    """Tokens that one is chosen from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is known of a device before anything is measured."""

    bandwidth: float
    """Peak bytes per second of the memory that the weights lie in."""
    fp32: float
    """Peak single-precision FLOP per second of what decodes: GPU shaders without matrix units, or CPU vectors."""
    generation: Generation
    guessed: bool = False
    """FP32 is what such devices usually have; the interval is wider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Seconds of one token at a short context, by cause."""

    memory: float
    compute: float
    overhead: float

    @property
    def total(self) -> float:
        return self.memory + self.compute + self.overhead

    @property
    def certain(self) -> float:
        """Share that bandwidth explains; the rest varies more between devices and builds."""
        return self.memory / self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Constants of all classes of devices; scripts/fit_speed.py prints them."""

    efficiency: Mapping[str, float]
    """Share of the peak bandwidth that reading weights reaches, by "gpu" and "cpu"."""
    compute: Mapping[str, float]
    """Times the FP32 peak's own duration that unpacking and multiplying take beside the reading, by generation."""
    overhead: Mapping[str, float]
    """Seconds a layer and token, by "gpu" (of 1 FP32 TFLOPS) and "cpu" (any)."""
    exponent: float
    """How a GPU's falls with FP32: small kernels run at the clocks and widths that FP32 is made of."""
    experts: float
    """Times the overhead of a layer with a mixture of experts."""
    recurrent: float
    """Times the overhead of a model with recurrent layers."""
    kv: Mapping[str, float]
    """Share of the peak bandwidth at which attention reads the KV cache, by runtime family."""
    prefill: Mapping[str, float]
    """FLOP per second of reading a prompt over the FP32 peak, by generation; above 1 with matrix units."""
    spread_prefill: float
    """Logarithmic half width of its 90 % interval."""
    runtime_compute: Mapping[str, float]
    """Times the compute term of llama.cpp, by runtime family."""
    runtime_overhead: Mapping[str, float]
    spread: float
    """Logarithmic half width of the 90 % interval of a token that bandwidth explains."""
    spread_rest: float
    """What is added to it for one that bandwidth explains nothing of."""
    spread_runtime: float
    """Times as wide for other runtimes than llama.cpp."""


LAW = Law(
    efficiency={"gpu": 0.889, "cpu": 0.912},
    compute={
        "gpu": 2.35, "gpu-jetson": 4.23, "gpu-old": 7.74, "apple": 2.32, "apple-old": 7.10,
        "cpu": 1.99, "cpu-old": 4.22,
    },
    overhead={"gpu": 230e-6, "cpu": 34.2e-6},
    exponent=0.529,
    experts=1.94,
    recurrent=1.85,
    kv={"llama.cpp": 0.478, "fused": 0.478, "torch": 0.478, "transformers": 0.032},
    prefill={
        "gpu": 1.66, "gpu-jetson": 2.58, "gpu-old": 0.36, "apple": 0.76, "apple-old": 0.56,
        "cpu": 0.60, "cpu-old": 0.43,
    },
    spread_prefill=0.51,
    runtime_compute={"llama.cpp": 1.0, "fused": 0.546, "torch": 0.686},
    runtime_overhead={"llama.cpp": 1.0, "llama.cpp-2024": 1.2, "fused": 1.5, "torch": 1.08},
    spread=0.128,
    spread_rest=0.384,
    spread_runtime=1.6,
)  # fmt: skip

_VOLTA = 7
"""Major compute capability of the first generation that CUDA graphs and matrix units are used on."""
UNLIKE = 1.5
"""Times as wide for experts and recurrent layers, when a device's own constants come from other models."""
OWN_SPREAD_PREFILL = 0.6
"""Logarithmic half width of reading a prompt, with a rate of the device's own: small models and large ones of one
device differ by as much as devices of one class do."""
CORE_TFLOPS: Mapping[str, float] = {"x86_64": 0.11, "aarch64": 0.035}
"""FP32 peak of one core where a profile gives none, 10^12 per second: i5-1135G7 0.12 and N100 0.055, Cortex-A76 0.038
and A78AE 0.027 (tests/truth/speed_devices.jsonl)."""
FLOP_PER_BYTE: Mapping[str, float] = {
    "gpu": 40.0,
    "gpu-jetson": 20.0,
    "gpu-old": 20.0,
    "apple": 36.0,
    "apple-old": 34.0,
}
"""FP32 peak over bandwidth where a profile gives none, by generation: RTX 3060 35, 4090 82, Orin 18 to 26, GTX 1050 Ti
19, M1 to M4 26 to 38 (tests/truth/speed_devices.jsonl)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seconds:
    low: float
    middle: float
    high: float


_NONE = _Seconds(low=0.0, middle=0.0, high=0.0)
SERVER = _Seconds(low=100e-6, middle=300e-6, high=750e-6)
"""What llama-server adds to each token (detokenizing, one event over HTTP): from two models too small for anything else
to matter, on two x86-64 cores: stories260K 665 us and the built-in model 627 us a token in all."""
CHOICE = _Seconds(low=5e-9, middle=13e-9, high=35e-9)
"""Seconds it takes for each token of the vocabulary to choose one, on one core: with 151936 it took 2.2 ms a token
longer than llama-bench, which chooses none, beside an H200, and 2.7 ms on 8 cores of that host (a Xeon of 2023); cores
of boards are two to three times slower."""
EAGER = _Seconds(low=500e-6, middle=900e-6, high=3500e-6)
"""Seconds a layer that a runtime takes to start its operations one by one, on the host. Of transformers Qwen2.5's own
table (bf16, A100) has 0.88 to 0.90 ms a layer for 0.5B, 1.5B, 3B and 7B alike; 1.2 ms on one core of an x86-64 server
(demo against demo-half). Cores of boards are two to three times slower."""


@lru_cache(maxsize=4096)
def work(spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu") -> Work:
    """What one token of this model in this scheme asks for. Raises Unsupported like `schemes.tensor_types`."""
    embedding, per_layer = schemes.lookup_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    tables = per_layer + (0 if schemes.reads_table(spec, scheme) else embedding)
    read = schemes.active_bytes(spec, scheme, imatrix=imatrix, backend=backend) - tables
    return replace(_shape(spec), read=read)


@lru_cache(maxsize=1024)
def _shape(spec: ModelSpec) -> Work:
    """All but the bytes, which the scheme decides."""
    multiplied = sum(
        round(tensor.elements * spec.read_share(tensor))
        for tensor in spec.tensors
        if spec.loaded(tensor) and not is_table(tensor.name, tied=spec.tied)
    )
    return Work(
        read=0,
        weights=multiplied,
        layers=spec.layers,
        experts=spec.experts > 0,
        recurrent=any(".ssm_" in tensor.name for tensor in spec.tensors),
        vocab=spec.vocab,
    )


def is_table(name: str, *, tied: bool) -> bool:
    """Whether decoding only looks a row up in this tensor: an embedding that is not the output as well."""
    return name == "per_layer_token_embd.weight" or (name == "token_embd.weight" and not tied)


def machine(profile: DeviceProfile, mode: PowerMode) -> Machine:
    """The device in this power mode."""
    known = _fp32(profile, mode)
    return Machine(
        bandwidth=mode.bandwidth_gbs * 1e9,
        fp32=(known or _usual_fp32(profile, mode)) * 1e12,
        generation=generation(profile),
        guessed=known is None,
    )


def generation(profile: DeviceProfile) -> Generation:
    """The class of hardware whose constants hold, from what the profile says of it."""
    card = profile.accelerator
    if card is None:
        needed = {"x86_64": "avx2", "aarch64": "asimddp"}[profile.arch]
        return "cpu" if needed in profile.cpu_features else "cpu-old"
    if card.backend == "metal":
        return "apple-old" if re.search(r"\bM[12]\b", card.name) else "apple"
    major = re.match(r"\d+", card.compute_capability or "")
    if card.backend == "cuda" and major is not None and int(major.group()) < _VOLTA:
        return "gpu-old"
    return "gpu-jetson" if profile.device_class == "jetson" else "gpu"


def terms(on: Machine, work: Work, *, family: str = "llama.cpp", law: Law = LAW) -> Terms:
    """Seconds of one token at a short context, by the law of the device's class."""
    core: Literal["cpu", "gpu"] = "cpu" if on.generation.startswith("cpu") else "gpu"
    overhead = law.overhead[core] * weighted_layers(work, law)
    if core == "gpu":
        overhead *= (on.fp32 / 1e12) ** -law.exponent
    if on.generation == "gpu-old":
        overhead *= law.runtime_overhead[
            "llama.cpp-2024"
        ]  # no CUDA graphs below compute capability 7.0 either
    return Terms(
        memory=work.read / (law.efficiency[core] * on.bandwidth),
        compute=law.compute[on.generation]
        * law.runtime_compute.get(family, 1.0)
        * 2
        * work.weights
        / on.fp32,
        overhead=overhead * law.runtime_overhead[family],
    )


def spread(parts: Terms, *, family: str = "llama.cpp", guessed: bool = False, law: Law = LAW) -> float:
    """Logarithmic half width of the interval that 90 % of left-out devices' readings lie in.

    With FP32 guessed, what bandwidth does not explain is twice as unsure.
    """
    width = law.spread + law.spread_rest * (1.0 - parts.certain) * (2.0 if guessed else 1.0)
    return width * (1.0 if family.startswith("llama.cpp") else law.spread_runtime)


def estimate(
    profile: DeviceProfile,
    mode: PowerMode,
    work: Work,
    *,
    kv_bytes: int,
    slots: int = 1,
    prompt: int = PROMPT,
    runtime: str = "llama.cpp",
) -> Speed:
    """Decoding with the context empty and full, and reading a prompt of ``prompt`` tokens.

    ``kv_bytes``: KV cache of one slot, read whole when it is full. A device's own constants hold where the profile
    has them for this mode and runtime; else those of its class, with the width that left-out devices showed.
    """
    on, how = machine(profile, mode), runtimes.named(runtime)
    family = how.SPEED_FAMILY
    own = profile.constants(mode.name)
    if own is not None and own.runtime != runtime:
        own = None
    parts = terms(on, work, family=family) if own is None else own_terms(mode, work, own)
    width = spread(parts, family=family, guessed=on.guessed) if own is None else own_spread(work, own)
    cache = kv_bytes / (LAW.kv.get(runtime, LAW.kv[family]) * on.bandwidth)
    flops = LAW.prefill[on.generation] * on.fp32
    unsure = LAW.spread_prefill
    if own is not None and own.prefill_tflops is not None:
        flops, unsure = own.prefill_tflops * 1e12, OWN_SPREAD_PREFILL
    rate = flops / (2 * work.weights)
    wide = math.exp(width)
    eager = _plus(_NONE, EAGER, work.layers) if profile.backend in how.EAGER else _NONE
    reading = _reading(prompt / rate, unsure, _plus(_NONE, eager, -(-prompt // PROMPT)))
    beside = _plus(SERVER, eager, 1)
    if runtime == "llama.cpp":
        beside = _plus(beside, CHOICE, work.vocab)
    first = reading.middle + parts.total + beside.middle
    # Of several slots the weights are read and unpacked once; what each more costs is at best the multiplication at
    # the rate of reading prompts, at worst the whole compute term of its class again.
    best = parts.total + (slots - 1) * 2 * work.weights / flops
    again = terms(on, work, family=family).compute
    worst = parts.total + (slots - 1) * max(again, 2 * work.weights / flops)
    if how.ONE_BY_ONE:
        best = worst = slots * parts.total
    return Speed(
        decode_all=slots / (best + slots * (cache + beside.middle)),
        decode_all_low=slots / ((worst + slots * cache) * wide + slots * beside.high),
        decode=1.0 / (parts.total + beside.middle),
        decode_low=1.0 / (parts.total * wide + beside.high),
        decode_high=1.0 / (parts.total / wide + beside.low),
        decode_full=1.0 / (parts.total + cache + beside.middle),
        decode_full_low=1.0 / ((parts.total + cache) * wide + beside.high),
        prefill=prompt / reading.middle,
        prefill_low=prompt / reading.high,
        prefill_high=prompt / reading.low,
        prompt=prompt,
        first_token=first,
        first_token_high=reading.high + parts.total * wide + beside.high,
        provenance="calibrated" if own is not None and own.readings else "fitted",
    )


def _reading(seconds: float, unsure: float, starting: _Seconds) -> _Seconds:
    """A prompt's time: that of its arithmetic, and of starting the operations of each chunk one by one, where the
    runtime does so: 0.5B and 1.5B in bf16 read 512 tokens in 24 and 22 ms on an H200, most of it this."""
    wide = math.exp(unsure)
    return _Seconds(
        low=seconds / wide + starting.low,
        middle=seconds + starting.middle,
        high=seconds * wide + starting.high,
    )


def _plus(each: _Seconds, one: _Seconds, times: float) -> _Seconds:
    """Seconds a token beside those of the law."""
    return _Seconds(
        low=each.low + times * one.low,
        middle=each.middle + times * one.middle,
        high=each.high + times * one.high,
    )


def own_terms(mode: PowerMode, work: Work, own: SpeedConstants) -> Terms:
    """Seconds of one token by constants of the device's own; its efficiency holds the compute term."""
    return Terms(
        memory=work.read / (own.decode_efficiency * mode.bandwidth_gbs * 1e9),
        compute=0.0,
        overhead=own.layer_overhead_us * 1e-6 * weighted_layers(work),
    )


def own_spread(work: Work, own: SpeedConstants) -> float:
    """Logarithmic half width around ``own_terms``."""
    return math.log1p(own.relative_interval) * (UNLIKE if work.experts or work.recurrent else 1.0)


def weighted_layers(work: Work, law: Law = LAW) -> float:
    """Layers, those of experts and of recurrent models counted by what they cost."""
    return work.layers * (law.experts if work.experts else 1.0) * (law.recurrent if work.recurrent else 1.0)


def _fp32(profile: DeviceProfile, mode: PowerMode) -> float | None:
    """10^12 FLOP per second, as the profile gives it or from its FP16: 4 times as much on cards, 8 on Jetsons."""
    if mode.fp32_tflops is not None:
        return mode.fp32_tflops
    if mode.fp16_tflops is not None and profile.backend == "cuda":
        return mode.fp16_tflops / (8 if profile.device_class == "jetson" else 4)
    return None


def _usual_fp32(profile: DeviceProfile, mode: PowerMode) -> float:
    """By the cores, or by the bandwidth and at most what the slowest mode with a figure has."""
    if profile.accelerator is None:
        return CORE_TFLOPS[profile.arch] * profile.cpu_cores
    usual = mode.bandwidth_gbs * FLOP_PER_BYTE[generation(profile)] / 1e3
    return min((usual, *(known for m in profile.power_modes if (known := _fp32(profile, m)) is not None)))
