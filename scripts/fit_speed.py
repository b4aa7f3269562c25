"""Fits speed.py's law on published runs, scores it on devices it has not seen, and prints the constants.

    python scripts/fit_speed.py            the constants and the scores
    python scripts/fit_speed.py --rows     also every row: published, predicted, interval

The rows are tests/truth/speed.jsonl, each with its source; speed_models.jsonl says which shape each model has and
speed_devices.jsonl what is known of each device before measuring. Needs numpy.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack import calibrate, catalog, modelspec, profile, schemes, speed
from edgepack.modelspec import ModelSpec
from edgepack.profile import SpeedConstants
from edgepack.speed import LAW, Law, Machine, Terms, Work
from edgepack.units import MIB

TRUTH = Path(__file__).parents[1] / "tests" / "truth"
Vector = npt.NDArray[np.float64]

# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────

SCHEMES: Mapping[str, str] = {
    "Q4_K_M (ollama default)": "Q4_K_M",
    "Q4_0 (ollama default)": "Q4_0",
    'Q4_0 ("4-bit")': "Q4_0",
    "Q4_0 QAT": "Q4_0",
    "ollama default": "Q8_0",  # of smollm2:1.7b (1.8 GB) and qwen3.5:2b (2.7 GB), unlike most
    "GGUF (101 MB file)": "Q4_K_M",
    "GGUF": "Q4_K_M",
    "UD-Q3_K_XL": "Q3_K_L",
    "Q4_K_P": "Q4_K_M",
    "Q8_K_XL": "Q8_0",
    "MXFP4": "MXFP4_MOE",
}
"""Published names to GGUF schemes. Those of Unsloth and others have no public rule; the nearest one stands in."""

LAYOUTS: Mapping[str, tuple[float, float]] = {
    "q4f16 (MLC INT4)": (4.5, 4.5),
    "q4f16_ft (MLC)": (4.0, 4.5),
    "AWQ int4 g128": (4.25, 16),
    "W4A16": (4.156, 16),
    "W4A16 (as published)": (4.156, 16),
    "NVFP4": (4.5, 16),
    "W8A16": (8, 16),
    "W16A16": (16, 16),
    "FP16": (16, 16),
    "mlx q8": (8.5, 8.5),
    "mlx q6": (6.5, 6.5),
    "mlx q5": (5.5, 5.5),
    "mlx q4": (4.5, 4.5),
}
"""Bits a weight of the layers and of the embedding and head, in formats that are not GGUF: group scales of 16 bits in
32 weights (MLC q4f16_1), none worth counting (q4f16_ft), two in 128 (TinyChat), one and a zero point in 128 (GPTQ and
compressed-tensors), one byte in 16 (NVFP4), two in 64 (MLX)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published reading with what edgepack's arithmetic knows of it."""

    id: str
    device: str
    memory: int | None
    """Bytes of the device's memory, where its name says so."""
    model: str
    quant: str
    runtime: str
    family: str
    machine: Machine
    spec: ModelSpec
    work: Work
    resident: int
    """Bytes of all weights."""
    kv: int
    """Bytes of KV cache read for one token, averaged over the run."""
    decode: float | None
    prefill: float | None
    context: int | None
    partial: bool
    """Published as running partly on the CPU."""
    source: str


def rows() -> tuple[Row, ...]:
    """Every row whose model has a known shape, in order; the others are in `dropped`."""
    known = specs()
    return tuple(_row(raw, known[raw["model"]]) for raw in raw_rows() if raw["model"] in known)


@cache
def raw_rows() -> tuple[dict[str, Any], ...]:
    return _jsonl("speed.jsonl")


@cache
def specs() -> Mapping[str, ModelSpec]:
    """Model, as the rows name it -> shapes."""
    found = {}
    for entry in _jsonl("speed_models.jsonl"):
        if "catalog" in entry:
            model = catalog.find(entry["catalog"])
            if model is None:
                raise SystemExit(f"speed_models.jsonl: the catalog has no {entry['catalog']}")
            spec = model.spec()
        else:
            spec = modelspec.from_config(entry["config"], name=entry["models"][0])
        found.update(dict.fromkeys(entry["models"], spec))
    return found


@cache
def marks() -> Mapping[str, Mapping[str, bool]]:
    """What a dense stand-in's shapes do not show: the model -> fields of Work."""
    return {
        name: {mark: True for mark in ("experts", "recurrent") if entry.get(mark)}
        for entry in _jsonl("speed_models.jsonl")
        for name in entry["models"]
    }


@cache
def machines() -> Mapping[str, Machine]:
    return {
        entry["device"]: Machine(
            bandwidth=entry["bandwidth_gbs"] * 1e9,
            fp32=entry["fp32_tflops"] * 1e12,
            generation=entry["generation"],
        )
        for entry in _jsonl("speed_devices.jsonl")
    }


def family(runtime: str) -> str:
    """Runtimes that share constants: "fused" kernels of one vendor, and "torch"."""
    name = runtime.lower()
    if "may 2024" in name:
        return "llama.cpp-2024"
    if name.startswith(("llama", "ollama")):
        return "llama.cpp"
    if any(word in name for word in ("mlc", "tinychat", "tensorrt")):
        return "fused"
    if any(word in name for word in ("vllm", "transformers")):
        return "torch"
    if name == "mlx-lm":
        return "llama.cpp"  # Metal kernels of the same kind, on the same hardware
    raise SystemExit(f"runtime {runtime!r} has no family")


def cost(spec: ModelSpec, quant: str, model: str) -> tuple[Work, int]:
    """What a token asks for, and the bytes of all weights, in any published format."""
    scheme = SCHEMES.get(quant, quant)
    if quant == "as published":
        scheme = "Q4_0" if "qat" in model.lower() else "Q4_K_M"
    if scheme in LAYOUTS:
        return _other_format(spec, *LAYOUTS[scheme])
    return speed.work(spec, scheme, imatrix=False), schemes.weights_bytes(spec, scheme, imatrix=False)


def _other_format(spec: ModelSpec, bits: float, outer: float) -> tuple[Work, int]:
    read = weights = resident = 0.0
    for tensor in spec.tensors:
        count = tensor.elements
        whole = len(tensor.shape) < 2
        width = 16 if whole else outer if tensor.name in ("token_embd.weight", "output.weight") else bits
        resident += count * width / 8
        if speed.is_table(tensor.name, tied=spec.tied):
            continue
        share = spec.experts_used / spec.experts if "_exps." in tensor.name else 1.0
        read, weights = read + count * share * width / 8, weights + count * share
    like = speed.work(spec, "F16", imatrix=False)
    return replace(like, read=round(read), weights=round(weights)), round(resident)


def kv_bytes(spec: ModelSpec, tokens: int) -> int:
    """Bytes of a 16-bit KV cache that hold this many tokens."""
    return sum(
        kind.count * kind.heads * (kind.key_dim + kind.value_dim) * 2 * min(tokens, kind.window or tokens)
        for kind in spec.kv
    )


_HALF_CLOCK = {"30W/50W": 3.4e12}
"""FP32 of the AGX Orin at 50 W; the row says one figure for both modes."""
_A78AE = Machine(bandwidth=102e9, fp32=0.163e12, generation="cpu")
"""Six Cortex-A78AE at 1.7 GHz, two 128-bit units each: the one row of a Jetson's CPU."""


def _row(raw: Mapping[str, Any], spec: ModelSpec) -> Row:
    device, runtime, context = raw["device"], raw["runtime"], raw["context"]
    machine = machines()[device]
    if "CPU (6x" in runtime:
        device, machine = f"{device}, CPU", _A78AE
    if raw.get("power_mode") in _HALF_CLOCK:
        machine = replace(machine, fp32=_HALF_CLOCK[raw["power_mode"]])
    work, resident = cost(spec, raw["quant"], raw["model"])
    work = replace(work, **marks()[raw["model"]])
    averaged = "tg N averaged" in (raw.get("note") or "")  # the only rows that say what their context means
    size = re.search(r"(\d+)GB", device)
    return Row(
        id=raw["id"],
        device=device,
        memory=int(size.group(1)) * 1024 * MIB if size else None,
        model=raw["model"],
        quant=raw["quant"],
        runtime=runtime,
        family=family(runtime),
        machine=machine,
        spec=spec,
        work=work,
        resident=resident,
        kv=kv_bytes(spec, context // 2) if averaged else 0,
        decode=raw["decode_tps"],
        prefill=raw["prefill_tps"],
        context=context,
        partial="gpu_layers" in raw or "partial" in runtime,
        source=raw["source"],
    )


def _jsonl(name: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(line) for line in (TRUTH / name).read_text(encoding="utf-8").splitlines())


# ── the filter ───────────────────────────────────────────────────────────────────────────────────────

STALLED = 0.05
"""Share of the peak bandwidth below which a model of a gigabyte or more was not running on the device's memory."""
SPILLED = 2 / 3
"""Of the device's own median share, below which a model that needs all its memory was partly elsewhere."""
TAKEN = 1312 * MIB
"""What a desktop, the context and a margin take of a card: as profiles/rtx-4060-laptop-8gb.yaml."""


def dropped() -> Mapping[str, str]:
    """Id -> why the row is not fitted; decided by the reading and the arithmetic, never by the law's residual."""
    reasons = {
        raw["id"]: "the model's shape is not public" for raw in raw_rows() if raw["model"] not in specs()
    }
    every = [row for row in rows() if row.decode]
    shares = {row.id: _share(row) for row in every}
    for row in every:
        mine = shares[row.id]
        same = [other for other in every if other.device == row.device and other.family == row.family]
        usual = float(np.median([shares[other.id] for other in same]))
        need = row.resident + kv_bytes(row.spec, 4096) + TAKEN
        if row.partial:
            reasons[row.id] = "published as running partly on the CPU"
        elif mine > 1.0:
            reasons[row.id] = f"implies {mine:.2f} of the peak bandwidth"
        elif mine < STALLED and row.work.read > 1e9:
            reasons[row.id] = f"implies {mine:.3f} of the peak bandwidth: a stall or the CPU"
        elif row.memory and need > row.memory and mine < SPILLED * usual:
            reasons[row.id] = (
                f"needs {need / 2**30:.1f} of {row.memory / 2**30:.0f} GiB with 4096 tokens, and implies {mine:.2f} of "
                f"the peak bandwidth where {usual:.2f} is usual: it did not fit"
            )
        elif (better := _contradiction(row, same)) is not None:
            times = (better.decode or 0.0) / (row.decode or 1.0)
            reasons[row.id] = (
                f"{better.id} reads more a token on the same device and is {times:.1f} times as fast"
            )
    return dict(sorted(reasons.items()))


def _share(row: Row) -> float:
    return row.work.read * (row.decode or 0.0) / row.machine.bandwidth


def _contradiction(row: Row, same: Iterable[Row]) -> Row | None:
    decode = row.decode or 0.0
    faster = [
        o
        for o in same
        if o.work.read >= row.work.read and (o.decode or 0.0) > 2 * decode and not row.work.experts
    ]
    return max(faster, key=lambda o: o.decode or 0.0, default=None)


# ── the fit ──────────────────────────────────────────────────────────────────────────────────────────

Prior = tuple[float, float]
_GENERATIONS: tuple[tuple[speed.Generation, float], ...] = (
    ("gpu", 3.0), ("gpu-jetson", 3.0), ("gpu-old", 3.0), ("apple", 3.0), ("apple-old", 3.0),
    ("cpu", 1.5), ("cpu-old", 1.5),
)  # fmt: skip
PRIORS: Mapping[str, Prior] = {
    "efficiency gpu": (0.88, 0.1),
    "efficiency cpu": (0.80, 0.15),
    **{f"compute {name}": (center, 0.7) for name, center in _GENERATIONS},
    "overhead gpu": (250e-6, 0.7),
    "overhead cpu": (30e-6, 0.3),  # measured here, see OWN_CORE
    "exponent": (0.5, 0.4),
    "experts": (2.0, 0.5),
    "recurrent": (1.5, 0.5),
    "kv": (0.4, 0.7),
    "overhead llama.cpp-2024": (1.5, 0.4),
    "overhead fused": (1.0, 0.7),
    "overhead torch": (2.0, 0.7),
    "compute fused": (1.0, 0.5),
    "compute torch": (1.0, 0.5),
}
"""Constant -> center and logarithmic width of a weak prior: what a class without a row of its own falls back to."""
NAMES = tuple(PRIORS)
OWN_CORE: Mapping[str, float] = {"small": 0.00142, "mid": 0.01873, "large": 0.09463}
"""CPU seconds a token of random Llamas in Q4_K_M (edgepack/builders/synthetic.py) with 8 layers of 512, 16 of 1024 and
16 of 2048, on one core of a virtual Xeon (Sapphire Rapids, 2.1 GHz, AVX2 build): 29 million weights, most of them in
its cache, leave at most 36 us a layer to anything but arithmetic, which ran at 22 to 24 GFLOP/s in the larger ones."""
TOLERANCE = 0.12
"""Logarithmic error up to which a reading counts in full; larger ones count by their size, not its square."""


class Matrix:
    """The rows as columns: seconds of each term for constants of 1, and which constants multiply it."""

    def __init__(self, chosen: Sequence[Row]) -> None:
        self.seconds = np.array([1.0 / (row.decode or math.nan) for row in chosen])
        # A CPU's overhead does not fall with its FP32; 1 to any power leaves it alone.
        self.fp32 = np.array(
            [1.0 if row.machine.generation.startswith("cpu") else row.machine.fp32 / 1e12 for row in chosen]
        )
        self.base = np.array(
            [
                [row.work.read / row.machine.bandwidth for row in chosen],
                [2 * row.work.weights / row.machine.fp32 for row in chosen],
                [row.work.layers for row in chosen],
                [row.kv / row.machine.bandwidth for row in chosen],
            ]
        )
        self.use = np.zeros((len(NAMES), 4, len(chosen)))
        for at, row in enumerate(chosen):
            generation = row.machine.generation
            core = "cpu" if generation.startswith("cpu") else "gpu"
            self._mark(at, f"efficiency {core}", 0, -1.0)
            self._mark(at, f"compute {generation}", 1)
            self._mark(at, f"overhead {core}", 2)
            self._mark(at, "kv", 3, -1.0)
            if row.work.experts:
                self._mark(at, "experts", 2)
            if row.work.recurrent:
                self._mark(at, "recurrent", 2)
            for term, name in ((1, f"compute {row.family}"), (2, f"overhead {row.family}")):
                if name in PRIORS:
                    self._mark(at, name, term)
            if generation == "gpu-old":
                self._mark(at, "overhead llama.cpp-2024", 2)

    def _mark(self, at: int, name: str, term: int, sign: float = 1.0) -> None:
        self.use[NAMES.index(name), term, at] = sign

    def terms(self, logs: Vector) -> Vector:
        """Seconds by term and row, for the logarithms of the constants."""
        scale: Vector = np.exp(np.einsum("c,ctr->tr", logs * self.linear, self.use))
        scale[2] *= self.fp32 ** -math.exp(logs[NAMES.index("exponent")])
        found: Vector = self.base * scale
        return found

    linear = np.array([name != "exponent" for name in NAMES], dtype=float)

    def jacobian(self, logs: Vector, terms: Vector) -> Vector:
        """Of the logarithm of the whole, by row and constant."""
        whole = terms.sum(axis=0)
        slopes: Vector = np.einsum("ctr,tr->rc", self.use, terms) / whole[:, None]
        at = NAMES.index("exponent")
        slopes[:, at] = -terms[2] * np.log(self.fp32) * math.exp(logs[at]) / whole
        return slopes


def fit(chosen: Sequence[Row]) -> dict[str, float]:
    """Constants by iteratively reweighted least squares on the logarithm of the time.

    A device with n rows weighs as much as sqrt(n), so that one with many does not decide alone.
    """
    matrix = Matrix(chosen)
    counts = {row.device: 0 for row in chosen}
    for row in chosen:
        counts[row.device] += 1
    weight = np.array([counts[row.device] ** -0.5 for row in chosen])
    center = np.log([PRIORS[name][0] for name in NAMES])
    strength = np.array([PRIORS[name][1] ** -2 for name in NAMES])
    logs: Vector = center.copy()
    for _ in range(60):
        terms = matrix.terms(logs)
        off = np.log(terms.sum(axis=0) / matrix.seconds)
        slopes = matrix.jacobian(logs, terms)
        each = weight * np.minimum(1.0, TOLERANCE / np.maximum(np.abs(off), 1e-9)) / TOLERANCE**2
        normal = slopes.T @ (slopes * each[:, None]) + np.diag(strength)
        step = np.clip(
            -np.linalg.solve(normal, slopes.T @ (each * off) + strength * (logs - center)), -0.5, 0.5
        )
        logs = logs + step
        if float(np.abs(step).max()) < 1e-4:
            break
    return dict(zip(NAMES, (float(value) for value in np.exp(logs)), strict=True))


def law(found: Mapping[str, float], like: Law = LAW) -> Law:
    """The fitted constants as speed.py holds them, rounded to three digits; the rest as in ``like``."""

    def value(name: str) -> float:
        return float(f"{found[name]:.3g}")

    return replace(
        like,
        efficiency={core: value(f"efficiency {core}") for core in ("gpu", "cpu")},
        compute={name: value(f"compute {name}") for name, _ in _GENERATIONS},
        overhead={core: value(f"overhead {core}") for core in ("gpu", "cpu")},
        exponent=value("exponent"),
        experts=value("experts"),
        recurrent=value("recurrent"),
        kv={**like.kv, **dict.fromkeys(("llama.cpp", "fused", "torch"), value("kv"))},
        runtime_compute={"llama.cpp": 1.0, "fused": value("compute fused"), "torch": value("compute torch")},
        runtime_overhead={
            "llama.cpp": 1.0,
            **{name: value(f"overhead {name}") for name in ("llama.cpp-2024", "fused", "torch")},
        },
    )


# ── the scores ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A reading and what was predicted without its device."""

    row: Row
    predicted: float
    """Tokens per second."""
    terms: Terms

    @property
    def error(self) -> float:
        """Share of the published figure."""
        return self.predicted / (self.row.decode or math.nan) - 1.0

    @property
    def off(self) -> float:
        return abs(math.log(self.predicted / (self.row.decode or math.nan)))


def predict(row: Row, law: Law) -> Scored:
    """By the very function that plans are made with."""
    terms = speed.terms(row.machine, row.work, family=row.family, law=law)
    kv = row.kv / (law.kv["llama.cpp"] * row.machine.bandwidth)
    return Scored(row=row, predicted=1.0 / (terms.total + kv), terms=terms)


@cache
def leave_one_device_out(*, filtered: bool) -> tuple[Scored, ...]:
    """Every decoding row of a known shape, predicted by a fit that saw no row of its device.

    With ``filtered`` the dropped rows are neither fitted nor scored.
    """
    out = dropped() if filtered else {}
    every = [row for row in rows() if row.decode and row.id not in out]
    scored = []
    for device in sorted({row.device for row in every}):
        constants = law(fit([row for row in every if row.device != device]))
        scored += [predict(row, constants) for row in every if row.device == device]
    return tuple(scored)


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


HELD = 0.92
"""Share of the rows that the widths are chosen to hold, so that 90 % of those of an unseen device are held."""


def spreads(scored: Sequence[Scored]) -> tuple[float, float]:
    """The narrowest pair of `spread` and `spread_rest` whose intervals hold these rows."""
    best = (math.inf, 0.0, 0.0)
    for ratio in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0):
        scale = [
            (1.0 + ratio * (1.0 - s.terms.certain))
            * (1.0 if s.row.family.startswith("llama.cpp") else LAW.spread_runtime)
            for s in scored
        ]
        width = quantile((s.off / of for s, of in zip(scored, scale, strict=True)), HELD)
        best = min(best, (width * sum(scale) / len(scale), width, width * ratio))
    return best[1], best[2]


def coverage(scored: Sequence[Scored]) -> tuple[float, float]:
    """Share of rows inside intervals whose widths were chosen without their device, and the median half width."""
    inside, widths = [], []
    for device in {s.row.device for s in scored}:
        spread, rest = spreads([s for s in scored if s.row.device != device])
        constants = replace(LAW, spread=spread, spread_rest=rest)
        for s in scored:
            if s.row.device == device:
                width = speed.spread(s.terms, family=s.row.family, law=constants)
                inside.append(s.off <= width)
                widths.append(width)
    return sum(inside) / len(inside), float(np.median(widths))


# ── reading a prompt ─────────────────────────────────────────────────────────────────────────────────

SMALL = 500_000_000
"""Weights below which launching kernels, not arithmetic, sets the pace of a prompt."""


LONG = 1024
"""Tokens above which a published prompt is left out: attention's share grows, without flash attention to a half."""


def prompts() -> tuple[Row, ...]:
    """The rows that say how fast a prompt of usual length is read."""
    out = dropped()
    return tuple(
        row
        for row in rows()
        if row.prefill and row.work.weights > SMALL and row.id not in out and (row.context or 0) <= LONG
    )


def prefill_ratios() -> Mapping[str, Mapping[str, float]]:
    """Generation -> device -> FLOP per second of reading a prompt over the FP32 peak, the median of its rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in prompts():
        ratio = 2 * row.work.weights * (row.prefill or 0.0) / row.machine.fp32
        found.setdefault(row.machine.generation, {}).setdefault(row.device, []).append(ratio)
    return {name: {device: float(np.median(v)) for device, v in some.items()} for name, some in found.items()}


def prefill() -> Mapping[str, float]:
    """The median of a generation's devices."""
    return {name: float(np.median(list(some.values()))) for name, some in prefill_ratios().items()}


def prefill_errors() -> list[float]:
    """Logarithmic error of each row, by the median of the other devices of its generation, where there is one."""
    errors = []
    for row in prompts():
        others = [r for d, r in prefill_ratios()[row.machine.generation].items() if d != row.device]
        if others:
            predicted = float(np.median(others)) * row.machine.fp32 / (2 * row.work.weights)
            errors.append(abs(math.log(predicted / (row.prefill or math.nan))))
    return errors


def prefill_repeats() -> list[float]:
    """Logarithmic error of each row by the median of the other rows of the same device, mode and family."""
    errors = []
    for row in prompts():
        others = [
            2 * other.work.weights * (other.prefill or 0.0)
            for other in prompts()
            if (other.device, other.family, other.machine) == (row.device, row.family, row.machine)
            and other.id != row.id
        ]
        if others:
            mine = 2 * row.work.weights * (row.prefill or math.nan)
            errors.append(abs(math.log(float(np.median(others)) / mine)))
    return errors


# ── the context of PyTorch's attention ───────────────────────────────────────────────────────────────


def _shape(model: str) -> ModelSpec:
    """Qwen2.5-32B has the shape of its distilled and its coding sibling."""
    return specs().get(model) or specs()[model.replace("Qwen2.5-", "Qwen2.5-Coder-") + "-Instruct"]


def kv_transformers() -> float:
    """Share of the peak bandwidth at which transformers reads its KV cache: from the shortest to the longest input of
    each model in speed_context.jsonl, the median."""
    shares = []
    found = _jsonl("speed_context.jsonl")
    for model in sorted({entry["model"] for entry in found}):
        mine = sorted((e for e in found if e["model"] == model), key=lambda e: int(e["input_tokens"]))
        short, long = mine[0], mine[-1]
        tokens = long["input_tokens"] - short["input_tokens"]
        seconds = 1 / long["decode_tps"] - 1 / short["decode_tps"]
        shares.append(kv_bytes(_shape(model), tokens) / seconds / (long["bandwidth_gbs"] * 1e9))
    return float(np.median(shares))


# ── two readings of the device itself ────────────────────────────────────────────────────────────────

HOMOGENEOUS = ("RTX 5070 12GB", "RX 7900 XT 20GB", "NVIDIA GB10 (DGX Spark) 128GB", "GTX 1050 Ti 4GB")
"""Devices with ten or more readings of one host, one program and one kind of scheme (llmfit's community data)."""
_PLAIN = frozenset({"llama", "qwen2", "qwen3", "phi3", "granite", "smollm3", "minicpm"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A reading, predicted from one or two readings of other models on the same device."""

    row: Row
    predicted: float
    plain: bool

    @property
    def error(self) -> float:
        return self.predicted / (self.row.decode or math.nan) - 1.0


def plain(row: Row) -> bool:
    """A dense transformer without extra norms around each part, whose rows fill 256-wide blocks."""
    return (
        not (row.work.experts or row.work.recurrent)
        and row.spec.architecture in _PLAIN
        and row.spec.hidden % 256 == 0
    )


def leave_one_model_out(readings: int) -> tuple[Calibrated, ...]:
    """Each reading of the homogeneous devices from the smallest of 1 GB-class and the largest other plain model, or the
    largest alone.

    Models of the same shape as the one left out do not calibrate it. Where a device has fewer than two plain ones,
    any dense ones do.
    """
    found = []
    out = dropped()
    for device in HOMOGENEOUS:
        mine = [
            r for r in rows() if r.device == device and r.decode and r.source.startswith("AlexsJones/llmfit")
        ]
        mine = [row for row in mine if row.id not in out]
        for left in mine:
            others = [row for row in mine if row.work != left.work]
            usable = [row for row in others if plain(row)]
            if len({row.work for row in usable}) < 2:
                usable = [row for row in others if not (row.work.experts or row.work.recurrent)]
            large = [row for row in usable if row.work.weights >= 0.95e9] or usable
            chosen = [max(large, key=lambda row: row.work.read)]
            if readings == 2:
                chosen.append(min(large, key=lambda row: row.work.read))
            found.append(Calibrated(row=left, predicted=_calibrated(left, chosen), plain=plain(left)))
    return tuple(found)


def _calibrated(left: Row, chosen: Sequence[Row]) -> float:
    """By the functions that `edgepack calibrate` uses; the class's law saw nothing of this device."""
    seconds = [1.0 / (row.decode or math.nan) for row in chosen]
    works = [row.work for row in chosen]
    constants = _without(left.device)
    terms = [speed.terms(row.machine, row.work, family=row.family, law=constants) for row in chosen]
    if len(chosen) == 2 and calibrate.apart(works):
        per_byte, per_layer = calibrate.two_constants(works, seconds, terms)
    else:
        per_byte, per_layer = calibrate.one_constant(works, seconds, terms, left.machine.bandwidth)
    return 1.0 / (per_byte * left.work.read + per_layer * speed.weighted_layers(left.work))


@cache
def _without(device: str) -> Law:
    out = dropped()
    return law(fit([row for row in rows() if row.decode and row.device != device and row.id not in out]))


# ── constants of devices that others measured ────────────────────────────────────────────────────────

OWN: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("raspberry-pi-5-8gb", "default"): ("s102", "s103", "s104", "s105", "s107"),
    ("rtx-3060-12gb", "default"): (
        "s111", "s136", "s474", "s477", "s480", "s481", "s482", "s484", "s486", "s489", "s491", "s492", "s493",
        "s498", "s499", "s501",
    ),
    ("rtx-3070-8gb", "default"): ("s139", "s141", "s142"),
    ("rtx-4070-laptop-8gb", "default"): ("s192",),
    ("mac-mini-m4", "default"): ("s130",),
    ("jetson-agx-orin-64gb", "MAXN"): ("s079", "s080"),
    ("jetson-agx-orin-64gb", "50W"): ("s078",),
    ("jetson-agx-orin-64gb", "30W"): ("s078",),
    ("jetson-orin-nano-8gb", "25W"): ("s081", "s083", "s084", "s087"),
}  # fmt: skip
"""Profile and mode -> the rows of that device with llama.cpp on its own, in that mode as far as they say one. Left out
are mixtures of experts, rates of prompt and answer mixed, and schemes without public rules. The Orin Nano's say 25W,
MAXN_SUPER (the same memory clock) or nothing."""


def own_constants(name: str, mode: str) -> SpeedConstants:
    """What the profile says in its ``speed``: fitted like a calibration, on other people's runs.

    They are of several hosts and builds, and of other units than the user's: no interval is below one reading's.
    """
    device = profile.load(name)
    chosen = [row for row in rows() if row.id in OWN[name, mode]]
    readings = [
        calibrate.Reading(
            where=row.id, model=row.model, scheme=row.quant, work=row.work, decode=row.decode or math.nan,
            prefill=row.prefill, kv_bytes=row.kv,
        )
        for row in chosen
    ]  # fmt: skip
    found = calibrate.calibrate(device, device.mode(mode), readings).constants
    least = float(f"{math.expm1(calibrate.SPREAD_ONE):.4g}")
    return replace(found, readings=0, relative_interval=max(least, found.relative_interval))


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", action="store_true", help="also print every row")
    options = parser.parse_args(words)
    out = dropped()
    say = sys.stdout.write
    found = fit([row for row in rows() if row.decode and row.id not in out])
    say("constants (speed.LAW)\n")
    for name, value in found.items():
        say(f"  {name:<26}{value:.3g}\n")
    kept, every = leave_one_device_out(filtered=True), leave_one_device_out(filtered=False)
    spread, rest = spreads(kept)
    say(f"  {'spread':<26}{spread:.3f}\n  {'spread_rest':<26}{rest:.3f}\n\n")
    say(
        "prefill, over the FP32 peak: "
        + ", ".join(f"{n} {v:.2f}" for n, v in sorted(prefill().items()))
        + "\n"
    )
    errors = prefill_errors()
    say(
        f"  left-out devices: {len(errors)} rows, median {math.expm1(quantile(errors, 0.5)):.1%}, 90th percentile a "
        f"factor of {math.exp(quantile(errors, 0.9)):.2f} (log {quantile(errors, 0.9):.3f})\n"
    )
    own = prefill_repeats()
    say(
        f"  other runs of the same device: {len(own)} rows, median {math.expm1(quantile(own, 0.5)):.1%}, "
        f"90th percentile a factor of {math.exp(quantile(own, 0.9)):.2f} (log {quantile(own, 0.9):.3f})\n"
    )
    say(f"KV cache of transformers: {kv_transformers():.3f} of the bandwidth\n\n")
    say(f"dropped: {len(out)} of {len(raw_rows())} rows\n")
    for name, reason in out.items():
        say(f"  {name} {reason}\n")
    say("\nleave one device out, decoding\n")
    for title, some in (("with the filter", kept), ("without", every)):
        errors = [abs(s.error) for s in some]
        say(
            f"  {title:<16}{len(some):4} rows  median {quantile(errors, 0.5):.1%}  "
            f"90th percentile {quantile(errors, 0.9):.1%}\n"
        )
    covered, width = coverage(kept)
    say(f"  intervals hold {covered:.1%}; median half width a factor of {math.exp(width):.2f}\n")
    say("\n  device                                        rows   median  largest\n")
    for device in sorted({s.row.device for s in kept}):
        errors = sorted((s.error for s in kept if s.row.device == device), key=abs)
        say(f"  {device:<46}{len(errors):4}{float(np.median(errors)):9.1%}{errors[-1]:9.1%}\n")
    for readings in (2, 1):
        say(f"\nleave one model out, from {readings} reading(s) of the same device\n")
        found_here = leave_one_model_out(readings)
        for device in (*HOMOGENEOUS, "all"):
            here = [c for c in found_here if device in (c.row.device, "all")]
            for title, those in (("plain", [c for c in here if c.plain]), ("every model", here)):
                off = [abs(c.error) for c in those]
                if off:
                    say(
                        f"  {device:<34}{title:<12}{len(off):4} rows  median {quantile(off, 0.5):.1%}  "
                        f"90th percentile {quantile(off, 0.9):.1%}\n"
                    )
    say("\nconstants of devices with readings of their own (profiles/*.yaml)\n")
    for name, mode in OWN:
        of = own_constants(name, mode)
        say(
            f"  {name} {mode}: {{decode_efficiency: {of.decode_efficiency}, layer_overhead_us: {of.layer_overhead_us}, "
            f"prefill_tflops: {of.prefill_tflops}, relative_interval: {of.relative_interval}}}\n"
        )
    if options.rows:
        for s in every:
            mark = f" dropped: {out[s.row.id]}" if s.row.id in out else ""
            say(
                f"  {s.row.id} {s.row.device}: {s.row.model} {s.row.quant} {s.row.decode:.2f} published, "
                f"{s.predicted:.2f} ({s.error:+.0%}){mark}\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
