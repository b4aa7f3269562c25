"""Fits degradation.py's loss law on published perplexities and prints the constants with their residuals.

    python scripts/fit_degradation.py

The rows are Llama-3-8B on the wikitext-2 test set: ggml-org/llama.cpp, perplexity README @c392e509.
"""

from __future__ import annotations

import math

from edgepack import degradation, modelspec, schemes

LLAMA_3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
PLAIN = {
    "Q8_0": 1.000425, "Q6_K": 1.00349, "Q5_K_M": 1.009142, "Q5_K_S": 1.016843, "Q5_1": 1.017045,
    "Q5_0": 1.021116, "Q4_K_M": 1.028159, "Q4_K_S": 1.04315, "Q4_1": 1.072389, "Q4_0": 1.075183,
    "Q3_K_L": 1.089261, "Q3_K_M": 1.105408, "Q3_K_S": 1.261914, "Q2_K": 1.564849,
}  # fmt: skip
WEIGHTED = {
    "Q4_K_M": 1.024279, "Q4_K_S": 1.028574, "IQ4_NL": 1.035939, "IQ4_XS": 1.036599, "Q3_K_L": 1.070541,
    "Q3_K_M": 1.080656, "IQ3_M": 1.106985, "IQ3_S": 1.117764, "IQ3_XS": 1.149464, "IQ3_XXS": 1.196866,
    "Q3_K_S": 1.220045, "IQ2_M": 1.380183, "Q2_K": 1.387729, "Q2_K_S": 1.496201, "IQ2_S": 1.548675,
    "IQ2_XS": 1.726902, "IQ2_XXS": 2.261329,
}  # fmt: skip


def main() -> None:
    spec = modelspec.from_config(LLAMA_3_8B, name="Llama-3-8B")
    for title, rows, imatrix in (("without imatrix", PLAIN, False), ("with imatrix", WEIGHTED, True)):
        points = []
        for scheme, ratio in rows.items():
            types = schemes.tensor_types(spec, scheme, imatrix=imatrix)
            points.append(
                (math.log(degradation.rounding_error(spec.tensors, types)), math.log(math.log(ratio)))
            )
        exponent, offset = least_squares(points)
        print(f"{title}: scale={math.exp(offset):.2f} exponent={exponent:.3f}")
        for (x, y), scheme in zip(points, rows, strict=True):
            print(
                f"  {scheme:<8} published {math.exp(y):.5f} nats, law {math.exp(offset + exponent * x):.5f}"
            )


def least_squares(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of the line with the least squared vertical distance."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


if __name__ == "__main__":
    main()
