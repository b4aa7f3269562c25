"""Measures layouts.py's rounding errors: mean squared error over mean square, standard normal rows of 4096.

python scripts/rounding_of_layouts.py
"""

from __future__ import annotations

import numpy as np

ROWS, COLUMNS = 256, 4096


def integers(weights: np.ndarray, bits: int, group: int, *, symmetric: bool) -> float:
    """Round to nearest in groups along a row; symmetric over the full range -2^(b-1) .. 2^(b-1)-1."""
    grouped = weights.reshape(-1, group)
    if symmetric:
        scale = 2 * np.abs(grouped).max(axis=1, keepdims=True) / (2**bits - 1)
        codes = np.clip(np.round(grouped / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return error(grouped, codes * scale)
    low, high = np.minimum(grouped.min(axis=1), 0)[:, None], np.maximum(grouped.max(axis=1), 0)[:, None]
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    codes = np.clip(np.round(grouped / scale) + zero, 0, 2**bits - 1)
    return error(grouped, (codes - zero) * scale)


def fp8(weights: np.ndarray) -> float:
    """E4M3 with one scale for the matrix: 3 bits of mantissa, 448 at most, steps of 2^-9 below 2^-6."""
    scale = np.abs(weights).max() / 448
    scaled = weights / scale
    exponent = np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return error(weights, np.round(scaled / step) * step * scale)


def nf4(weights: np.ndarray) -> float:
    """NF4 (QLoRA, appendix E): 16 values, one scale for 64 weights."""
    table = np.array([
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ])  # fmt: skip
    grouped = weights.reshape(-1, 64)
    scale = np.abs(grouped).max(axis=1, keepdims=True)
    nearest = np.abs((grouped / scale)[..., None] - table).argmin(axis=-1)
    return error(grouped, table[nearest] * scale)


def error(weights: np.ndarray, rounded: np.ndarray) -> float:
    return float(((weights - rounded) ** 2).mean() / (weights**2).mean())


def main() -> None:
    weights = np.random.default_rng(1).standard_normal((ROWS, COLUMNS))
    for bits in (2, 3, 4, 8):
        for group in (16, 32, 64, 128, 256, COLUMNS):
            pair = (integers(weights, bits, group, symmetric=s) for s in (True, False))
            print(f"    ({bits}, {group}): ({', '.join(f'{e:.3e}' for e in pair)}),")
    print(f"NF4 {nf4(weights):.3e}  FP8 {fp8(weights):.3e}")


if __name__ == "__main__":
    main()
