"""What a quantization scheme costs in quality: from the rounding error of the types its tensors really get.

A scheme's name says little: on hidden sizes that 256 does not divide, "Q4_K_M" is mostly Q5_0 and Q8_0.
So the loss is computed from each tensor's type: the mean squared rounding error of the matrices (measured,
below) goes through a power law fitted on published perplexities, and grows as models shrink.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgepack import layouts
from edgepack.errors import Unsupported
from edgepack.modelspec import Tensor

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

REFERENCE_PARAMETERS = 8.03e9
"""Llama-3-8B, on whose published perplexities the law is fitted."""

SIZE_EXPONENT = 0.23
"""Loss grows as parameters^-0.23: Llama-3.2-1B against Llama-3-8B at Q4_0 (ln ratio 0.118 against 0.073) and
Q4_K_S (0.042 against 0.028), both with imatrix, wikitext-2 (ik_llama.cpp discussion 63; llama.cpp
perplexity README @c392e509)."""

ACCURACY_PER_NAT = 0.25
"""Relative accuracy lost per nat of perplexity: 10-task means of Llama-3.1-8B from Q2_K_S to Q4_K_M
(auto-round docs @b9f3d007) against the same schemes' perplexities: 0.17 to 0.34."""

SPREAD = (0.45, 1.9)
"""Factors on the loss that cover families: Llama-2-7B loses half of what Llama-3-8B does at Q4_K_M
(1.4 % against 2.8 %), and the law misses single schemes of its own fit by up to 42 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Relative accuracy kept, 1.0 being the unquantized model; fitted."""

    retention: float
    low: float
    high: float
    perplexity_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Law:
    """ln(perplexity ratio) = scale * error ** exponent, for the reference model."""

    scale: float
    exponent: float


PLAIN = _Law(scale=5.72, exponent=0.908)
WEIGHTED = _Law(scale=6.21, exponent=1.004)
"""Least squares in logarithms on the Llama-3-8B rows of llama.cpp's perplexity README @c392e509, without and
with an importance matrix (`python scripts/fit_degradation.py`)."""


def rounding_error(tensors: Sequence[Tensor], types: Sequence[str]) -> float:
    """Mean rounding error of the matrices, weighted by elements; the token embedding is not counted
    (a row is read at a time, and its errors do not add up over a sum).

    Raises Unsupported for a type of which nothing was measured.
    """
    total = weighted = 0.0
    for tensor, kind in zip(tensors, types, strict=True):
        if len(tensor.shape) < 2 or tensor.name == "token_embd.weight":
            continue
        error = ROUNDING_ERROR[kind] if kind in ROUNDING_ERROR else layouts.rounding_error(kind)
        if error is None:
            raise Unsupported(f"what {kind} costs in quality is not known ({tensor.name})")
        count = tensor.elements
        total += count
        weighted += count * error
    return weighted / total if total else 0.0


def loss(tensors: Sequence[Tensor], types: Sequence[str], *, parameters: int, imatrix: bool) -> Loss:
    """What a model of so many parameters keeps when its tensors are stored as ``types``."""
    law = WEIGHTED if imatrix else PLAIN
    error = rounding_error(tensors, types)
    size = (REFERENCE_PARAMETERS / max(parameters, 1)) ** SIZE_EXPONENT
    nats = law.scale * error**law.exponent * size if error else 0.0
    least, most = (nats * factor for factor in SPREAD)
    return Loss(
        retention=_kept(nats), low=_kept(most), high=_kept(least), perplexity_ratio=math.exp(min(nats, 50.0))
    )


def _kept(nats: float) -> float:
    return max(0.0, 1.0 - ACCURACY_PER_NAT * nats)
