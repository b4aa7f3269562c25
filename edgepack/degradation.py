"""What a quantization scheme costs in quality: from the rounding error of what its tensors really become.

A scheme's name says little: on hidden sizes that 256 does not divide, "Q4_K_M" is mostly Q5_0 and Q8_0.
So the loss in perplexity is computed from each tensor's type or format: the mean squared rounding error of the
matrices (measured, below) goes through a power law, times factors for the model's size and family and for how
the rounding was calibrated. Every constant is fitted on published tables (tests/truth/quality.jsonl) by
`python scripts/fit_degradation.py`, which also predicts each table from all the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from edgepack import layouts, schemes
from edgepack.errors import Unsupported
from edgepack.modelspec import ModelSpec, Tensor

ROUNDING_ERROR = {
    "F32": 0.0,
    "F16": 4.3e-8,
    "BF16": 2.8e-6,
    "Q8_0": 2.88e-5,
    "Q6_K": 3.16e-4,
    "Q5_K": 1.317e-3,
    "Q5_1": 1.447e-3,
    "Q5_0": 1.830e-3,
    "Q4_K": 5.107e-3,
    "IQ4_NL": 5.851e-3,
    "IQ4_XS": 5.933e-3,
    "Q4_1": 6.116e-3,
    "Q4_0": 7.436e-3,
    "NVFP4": 8.995e-3,
    "MXFP4": 1.336e-2,
    "IQ3_S": 1.885e-2,
    "Q3_K": 2.295e-2,
    "IQ3_XXS": 3.316e-2,
    "IQ2_S": 6.225e-2,
    "Q2_K": 8.768e-2,
    "IQ2_XS": 9.057e-2,
    "IQ2_XXS": 1.187e-1,
    "IQ1_M": 2.058e-1,
    "IQ1_S": 2.372e-1,
    "Q1_0": 3.601e-1,
    "Q2_0": 5.177e-1,
    "TQ1_0": 6.54e-1,
    "TQ2_0": 6.54e-1,
}
"""Mean squared error over mean square, standard normal rows of 1024, by ggml's own quantizers
(`python scripts/quantization_error.py`)."""

Group = int | None
"""Weights that share one scale; None for a whole row."""

INTEGER_ERROR: Mapping[tuple[int, Group], tuple[float, float]] = {
    (2, 16): (1.882e-1, 1.228e-1),
    (2, 32): (2.238e-1, 1.655e-1),
    (2, 64): (2.630e-1, 2.097e-1),
    (2, 128): (3.046e-1, 2.546e-1),
    (2, 256): (3.470e-1, 3.002e-1),
    (2, None): (5.065e-1, 4.668e-1),
    (3, 16): (3.483e-2, 2.216e-2),
    (3, 32): (4.145e-2, 2.996e-2),
    (3, 64): (4.885e-2, 3.818e-2),
    (3, 128): (5.673e-2, 4.668e-2),
    (3, 256): (6.496e-2, 5.539e-2),
    (3, None): (9.939e-2, 8.976e-2),
    (4, 16): (7.609e-3, 4.842e-3),
    (4, 32): (9.027e-3, 6.530e-3),
    (4, 64): (1.064e-2, 8.307e-3),
    (4, 128): (1.236e-2, 1.017e-2),
    (4, 256): (1.417e-2, 1.204e-2),
    (4, None): (2.164e-2, 1.949e-2),
    (8, 16): (2.628e-5, 1.672e-5),
    (8, 32): (3.130e-5, 2.263e-5),
    (8, 64): (3.685e-5, 2.880e-5),
    (8, 128): (4.278e-5, 3.511e-5),
    (8, 256): (4.892e-5, 4.175e-5),
    (8, None): (7.483e-5, 6.766e-5),
}
"""Bits and group -> error of symmetric and of asymmetric rounding to nearest, standard normal rows of 4096
(`python scripts/quantization_error.py`)."""

FLOAT_ERROR: Mapping[str, float] = {"nf4": 8.445e-3, "fp8_e4m3": 7.053e-4, "fp8_e5m2": 2.790e-3}
"""The same for formats with a table of values: NF4 in blocks of 64 (QLoRA, appendix E), FP8 with a scale a row."""

Measure = Literal["choice", "answers", "tokens"]
"""How quality is scored: "choice" is a mean of zero-shot multiple-choice tasks (PIQA, HellaSwag, ...); "answers" is
knowledge, instructions, code and mathematics (MMLU, IFEval, HumanEval, GSM8K), which suffer far more; "tokens" is the
share of a text's tokens that are the model's first choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Relative accuracy kept, 1.0 being the unquantized model; fitted, with an interval of about 90 %."""

    retention: float
    low: float
    high: float
    perplexity_ratio: float
    perplexity_low: float
    perplexity_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a scheme that is no GGUF stores the weights of the blocks, and how it rounds them."""

    method: Literal["none", "rtn", "gptq", "awq", "autoround", "nf4", "fp8"]
    bits: int
    group: Group = None
    symmetric: bool = True
    actorder: bool = False
    """Columns in order of their activations; no published table here tells its quality from plain GPTQ's."""
    activations: int = 16
    """Bits of the activations that the matrices are multiplied with."""
    output: int = 16
    """Bits of the output layer, where there is one of its own."""
    mixed: bool = False
    """Eight bits for half of the values and downs, as onnx-int4 has them (k_quant_mixed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Rounding error of the matrices, by how much it matters: each summed over elements, over all elements."""

    values: float
    downs: float
    others: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """ln(perplexity ratio) = scale * error ** exponent, for Llama-3-8B."""

    scale: float
    exponent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    plain: Law
    """GGUF types without an importance matrix."""
    weighted: Law
    """GGUF types with one."""
    integer: Law
    """Groups of integers, NF4 and FP8."""
    values: float
    """How much more an error in attn_v matters than elsewhere."""
    downs: float
    """The same of ffn_down."""
    size: float
    """Loss grows as parameters ** -size."""
    per_row: float
    """Real rows have longer tails than normal ones, which one scale for a whole row has to cover."""
    families: Mapping[str, float]
    """Loss relative to Llama-3's: more training tokens per parameter leave less slack."""
    unknown_family: float
    gains: Mapping[str, Mapping[int, float]]
    """Method -> bits -> loss relative to rounding to nearest; 4 also stands for more bits."""
    per_nat: Mapping[Measure, float]
    """Accuracy above chance is exp(-per_nat * nats) of the unquantized model's."""


REFERENCE_PARAMETERS = 8.03e9
"""Llama-3-8B: its factors for size and family are 1."""

FITTED = Constants(
    plain=Law(scale=3.52, exponent=0.861),
    weighted=Law(scale=5.51, exponent=1.05),
    integer=Law(scale=30.3, exponent=1.38),
    values=2.68,
    downs=2.64,
    size=0.309,
    per_row=1.04,
    families={
        "Llama-3": 1.0,
        "Llama-2": 0.589,
        "LLaMA": 0.575,
        "Mistral": 0.816,
        "Qwen": 0.449,
        "Qwen2": 0.538,
        "Qwen2.5": 0.553,
        "Qwen3": 0.614,
    },
    unknown_family=0.594,
    gains={
        "gptq": {4: 0.755, 3: 0.476, 2: 0.695},
        "awq": {4: 0.635, 3: 0.376},
        "autoround": {4: 0.341, 3: 0.315, 2: 0.228},
    },
    per_nat={"choice": 0.514, "answers": 1.76, "tokens": 0.53},
)
"""`python scripts/fit_degradation.py` prints these; "tokens": `python scripts/demo_scores.py --damage` finds 0.535 in
the built-in model and 0.518 in one of Python code (scripts/train_code.py); single damages: 0.35 to 0.65."""

SPREAD = 2.2
"""Factor, up and down, on the loss of a model whose family is among the fitted."""
SPREAD_UNKNOWN = 2.5
"""The same for any other family. Both cover at least nine of ten published losses when their table, or their
family, is left out of the fit (`python scripts/fit_degradation.py`)."""
FLOOR = 3e-4
"""Nats that no published perplexity tells from nothing: two runs of one model differ by as much."""

_FAMILIES: tuple[tuple[str, str | None], ...] = (
    ("qwen3-next", None),
    ("llama-3", "Llama-3"),
    ("llama3", "Llama-3"),
    ("llama-2", "Llama-2"),
    ("llama2", "Llama-2"),
    ("mistral-7b", "Mistral"),
    ("qwen2.5", "Qwen2.5"),
    ("qwen2-", "Qwen2"),
    ("qwen3-", "Qwen3"),
    ("qwen-", "Qwen"),
)
"""Start of a model's name -> family with a published table; "Qwen3.5" is none of them."""


def family_of(name: str) -> str | None:
    """The family whose quantization losses are published, from a model's name or repository; None for others.

    All published ones are dense: a mixture of experts ("30B-A3B") is of no known family.
    """
    start = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    if re.search(r"-a\d+(\.\d+)?b\b", start):
        return None
    return next((family for prefix, family in _FAMILIES if start.startswith(prefix)), None)


def importance(tensor: str) -> float:
    """How much more an error in this tensor matters than in others of as many weights."""
    if "attn_v." in tensor:
        return FITTED.values
    return FITTED.downs if "ffn_down" in tensor else 1.0


@lru_cache(maxsize=4096)
def of_scheme(
    spec: ModelSpec, scheme: str, *, imatrix: bool, family: str | None, measure: Measure = "answers"
) -> Loss:
    """What a model keeps in this scheme, GGUF or not. Raises Unsupported for one whose cost is not known."""
    if schemes.is_gguf(scheme):
        alike = schemes.groups(spec, scheme, imatrix=imatrix)
        error = _sum((tensor, _type_error(kind, tensor), count) for kind, tensor, count in alike)
        law = FITTED.weighted if imatrix else FITTED.plain
        return _judged(nats(error, law, parameters=spec.parameters, family=family), family, measure)
    how = format_of(layouts.parse(scheme))
    return loss_of(how, spec.tensors, parameters=spec.parameters, family=family, measure=measure)


def loss(
    tensors: Sequence[Tensor], types: Sequence[str], *, parameters: int, imatrix: bool,
    family: str | None = None, measure: Measure = "answers",
) -> Loss:  # fmt: skip
    """What a model of so many parameters keeps when its tensors are stored as these GGUF types.

    Raises Unsupported for a type of which nothing was measured.
    """
    law = FITTED.weighted if imatrix else FITTED.plain
    lost = nats(rounding(tensors, types), law, parameters=parameters, family=family)
    return _judged(lost, family, measure)


def loss_of(
    how: Format, tensors: Sequence[Tensor], *, parameters: int,
    family: str | None = None, measure: Measure = "answers",
) -> Loss:  # fmt: skip
    """What a model keeps when the matrices of its blocks are stored in a format that is no GGUF."""
    lost = nats_of(how, rounding_of(how, tensors), parameters=parameters, family=family)
    return _judged(lost, family, measure)


def format_of(scheme: layouts.Scheme) -> Format:
    """The format behind a scheme that is no GGUF.

    What its name leaves open is as the usual tool has it: GPTQ and AutoRound symmetric, AWQ not; compressed-tensors
    says how weights are stored and not how they were rounded, so to nearest; ONNX with its output layer.
    """
    bits, group = scheme.bits, scheme.group
    match scheme.family:
        case "bf16":
            return Format(method="none", bits=16)
        case "fp8":
            return Format(method="fp8", bits=8, activations=8)
        case "bnb":
            nf4 = Format(method="nf4", bits=4, group=64)
            return nf4 if bits == 4 else Format(method="rtn", bits=8, activations=8)
        case "onnx" if bits == 16:
            return Format(method="none", bits=16)
        case "onnx":
            output = 8 if scheme.mixed else bits
            return Format(
                method="rtn",
                bits=bits,
                group=group,
                symmetric=not scheme.mixed,
                output=output,
                mixed=scheme.mixed,
            )
        case "ct":
            return Format(method="rtn", bits=bits, group=group, activations=scheme.activations)
        case method:
            return Format(
                method=method,
                bits=bits,
                group=group,
                symmetric=not scheme.asymmetric,
                actorder=scheme.act_order,
            )


def rounding(tensors: Sequence[Tensor], types: Sequence[str]) -> Rounding:
    """Rounding error of the matrices as these types.

    Raises Unsupported for a type of which nothing was measured.
    """
    return _sum((tensor, _type_error(kind, tensor), 1) for tensor, kind in zip(tensors, types, strict=True))


def rounding_of(how: Format, tensors: Sequence[Tensor]) -> Rounding:
    """Rounding error of the matrices in this format; what lies outside the blocks keeps 16 bits unless told."""
    if how.method == "none":
        return Rounding(values=0.0, downs=0.0, others=0.0)
    inner = _error(how, how.bits)
    wide = _error(how, 8) if how.mixed else inner
    # Error of the activations adds to that of the weights they are multiplied with.
    extra = 0.0 if how.activations == 16 else _activation_error(how)
    outer = 0.0 if how.output == 16 else _error(how, how.output)
    layers = 1 + max((_layer(t.name) for t in tensors), default=-1)

    def error(tensor: Tensor) -> float:
        layer = _layer(tensor.name)
        if layer < 0:
            return outer
        is_wide = how.mixed and _matters(tensor.name) and _more(layer, layers)
        return (wide if is_wide else inner) + extra

    return _sum((tensor, error(tensor), 1) for tensor in tensors)


def nats(
    error: Rounding, law: Law, *, parameters: int, family: str | None, per_row: bool = False, gain: float = 1.0,
    constants: Constants = FITTED,
) -> float:  # fmt: skip
    """ln(perplexity ratio) that this rounding error costs a model of so many parameters and this family."""
    total = constants.values * error.values + constants.downs * error.downs + error.others
    if not total:
        return 0.0
    size = (REFERENCE_PARAMETERS / max(parameters, 1)) ** constants.size
    slack = constants.families.get(family or "", constants.unknown_family)
    tails = constants.per_row if per_row else 1.0
    return float(law.scale * total**law.exponent * size * slack * tails * gain)


def nats_of(
    how: Format, error: Rounding, *, parameters: int, family: str | None, constants: Constants = FITTED
) -> float:
    """The same for a format that is no GGUF."""
    return nats(
        error,
        constants.integer,
        parameters=parameters,
        family=family,
        per_row=how.group is None and how.method not in ("nf4", "fp8"),
        gain=constants.gains.get(how.method, {}).get(min(how.bits, 4), 1.0),
        constants=constants,
    )


def kept(lost: float, measure: Measure, *, chance: float = 0.0, constants: Constants = FITTED) -> float:
    """Share of the accuracy that is left after losing so many nats.

    ``chance``: what guessing earns, as a share of the unquantized model's score; 0 where a guess earns nothing.
    """
    return chance + (1.0 - chance) * math.exp(-constants.per_nat[measure] * lost)


def left(lost: float, *, least: float, most: float, measure: Measure) -> Loss:
    """What is left of a model that loses so many nats, ``least`` and ``most`` at the ends of their interval."""
    return Loss(
        retention=kept(lost, measure), low=kept(most, measure), high=kept(least, measure),
        perplexity_ratio=math.exp(min(lost, 50.0)),
        perplexity_low=math.exp(min(least, 50.0)), perplexity_high=math.exp(min(most, 50.0)),
    )  # fmt: skip


def spread(family: str | None) -> float:
    """Factor, up and down, that bounds the loss of a model of this family."""
    return SPREAD if family in FITTED.families else SPREAD_UNKNOWN


CACHE_COST = 1.87
"""Accuracy lost by a quantized KV cache, relative, per unit of rounding error (mean of K's and V's): what the
published 4-bit caches lose (tests/truth/cache_quality.jsonl, `python scripts/fit_degradation.py`)."""
CACHE_SPREAD = 2.5
"""Covers every published row; the least and the most are no change at all and 3 %, both at four bits."""


@lru_cache(maxsize=256)
def cache_loss(kv_type: str) -> Loss:
    """What a model keeps with its KV cache in this type, or "K/V" pair: ggml's, or another runtime's name.

    Raises Unsupported for a type of which nothing was measured.
    """
    k, _, v = kv_type.partition("/")
    lost = CACHE_COST * cache_error(k, v or k)
    least, most = max(0.0, lost / CACHE_SPREAD - FLOOR), lost * CACHE_SPREAD + FLOOR
    if not lost:
        least = most = 0.0
    return Loss(
        retention=max(0.0, 1.0 - lost), low=max(0.0, 1.0 - most), high=max(0.0, 1.0 - least),
        perplexity_ratio=1.0 + lost, perplexity_low=1.0 + least, perplexity_high=1.0 + most,
    )  # fmt: skip


def cache_error(k: str, v: str) -> float:
    """Mean rounding error of a cache with these types."""
    return (_cache_error(k) + _cache_error(v)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Which of two candidates of one panel is better, and how sure that is."""

    first: float
    """Probability that the first is better."""
    words: Literal["first", "second", "cannot tell"]


SURE = 0.9
PANEL_NOISE = 0.01
"""Standard error of a panel's mean score, relative (400 to 14,000 questions a benchmark)."""


def compare(first: tuple[float, Loss], second: tuple[float, Loss]) -> Verdict:
    """Weighs score and loss of one candidate against another's, e.g. 3B at Q3 against 1.5B at Q6.

    Scores must come from one panel. The losses count as independent, each lognormal within its interval, and
    the scores carry the panel's own noise. Below 90 % either way it cannot be told.
    """
    middle_a, spread_a = _as_logarithm(*first)
    middle_b, spread_b = _as_logarithm(*second)
    probability = 0.5 * (1.0 + math.erf((middle_a - middle_b) / math.sqrt(2.0 * (spread_a**2 + spread_b**2))))
    if probability >= SURE:
        return Verdict(first=probability, words="first")
    return Verdict(first=probability, words="second" if probability <= 1.0 - SURE else "cannot tell")


def _as_logarithm(score: float, loss: Loss) -> tuple[float, float]:
    """Mean and standard deviation of ln(score kept); 1.645 deviations bound nine tenths."""
    least = 1e-9
    low, high = math.log(max(loss.low, least)), math.log(max(loss.high, least))
    deviation = (high - low) / (2 * 1.645)
    return math.log(max(score * loss.retention, least)), math.hypot(deviation, PANEL_NOISE)


def _judged(lost: float, family: str | None, measure: Measure) -> Loss:
    factor = spread(family)
    least, most = max(0.0, lost / factor - FLOOR), lost * factor + FLOOR
    if not lost:
        least = most = 0.0
    return left(lost, least=least, most=most, measure=measure)


def _sum(errors: Iterable[tuple[Tensor, float, int]]) -> Rounding:
    """Of tensors, their errors and how many there are of each; weighted by elements.

    The token embedding is not counted: a row is read at a time, and its errors do not add up over a sum.
    """
    total = values = downs = others = 0.0
    for tensor, error, alike in errors:
        name = tensor.name
        if len(tensor.shape) < 2 or name == "token_embd.weight":
            continue
        count = tensor.elements * alike
        total += count
        if "attn_v." in name:
            values += count * error
        elif "ffn_down" in name:
            downs += count * error
        else:
            others += count * error
    total = total or 1.0
    return Rounding(values=values / total, downs=downs / total, others=others / total)


def _type_error(kind: str, tensor: Tensor) -> float:
    if kind in ROUNDING_ERROR:
        return ROUNDING_ERROR[kind]
    if len(tensor.shape) < 2 or tensor.name == "token_embd.weight":
        return 0.0
    raise Unsupported(f"what {kind} costs in quality is not known ({tensor.name})")


def _error(how: Format, bits: int) -> float:
    if how.method == "nf4":
        return FLOAT_ERROR["nf4"]
    if how.method == "fp8":
        return FLOAT_ERROR["fp8_e4m3"]
    symmetric, asymmetric = INTEGER_ERROR[bits, how.group]
    return symmetric if how.symmetric else asymmetric


def _activation_error(how: Format) -> float:
    """One scale a token, found while running."""
    return FLOAT_ERROR["fp8_e4m3"] if how.method == "fp8" else INTEGER_ERROR[how.activations, None][0]


def _cache_error(kind: str) -> float:
    by_head = re.fullmatch(r"int([48])(_per_token_head)?", kind)
    if by_head:
        return INTEGER_ERROR[int(by_head[1]), 128][1]
    kind = "fp8_e4m3" if kind == "fp8" else kind
    error = FLOAT_ERROR.get(kind, ROUNDING_ERROR.get(kind.upper()))
    if error is None:
        raise Unsupported(f"what a KV cache of type {kind} costs in quality is not known")
    return error


def _layer(name: str) -> int:
    """Number of the block a tensor belongs to; -1 outside the blocks."""
    return int(name.split(".", 2)[1]) if name.startswith("blk.") else -1


def _matters(name: str) -> bool:
    return "attn_v." in name or "attn_qkv." in name or "ffn_down" in name


def _more(layer: int, layers: int) -> bool:
    """Layers that mixtures give more bits (onnxruntime-genai's builder has them from llama.cpp)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
