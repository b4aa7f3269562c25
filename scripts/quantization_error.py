"""Measures the rounding error of every format on standard normal rows: the tables in edgepack/degradation.py.

    python scripts/quantization_error.py

ggml's types by llama.cpp's own quantizers (ggml_quantize_chunk), with a flat importance matrix where a type needs
one; the others by plain rounding to nearest, as their papers write it down.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from edgepack import toolchain
from edgepack.ggufheader import BLOCKS

Rows = npt.NDArray[np.float32]

TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0", "NVFP4", "MXFP4", "IQ3_S",
    "Q3_K", "IQ3_XXS", "IQ2_S", "Q2_K", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0",
)  # fmt: skip
ROWS, COLUMNS = 64, 1024
LONG = 4096
"""Columns for formats with one scale a row, as long as the rows of a model of 8B."""
GROUPS = (16, 32, 64, 128, 256, None)
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
)  # fmt: skip
"""QLoRA (arXiv 2305.14314), appendix E."""


class Traits(ctypes.Structure):
    """struct ggml_type_traits, ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


def main() -> None:
    for name, error in ggml_errors().items():
        print(f"{name:<8} {error:.3e}")
    for (bits, group), (symmetric, asymmetric) in integer_errors().items():
        print(f"int{bits} g{group or 'all':<4} symmetric {symmetric:.3e} asymmetric {asymmetric:.3e}")
    for name, error in float_errors().items():
        print(f"{name:<8} {error:.3e}")


def ggml_errors() -> dict[str, float]:
    """Type -> error, rows of 1024."""
    ggml = ctypes.CDLL(str(toolchain.find().package / "llama_cpp" / "lib" / "libllama.so"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    ]  # fmt: skip
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    rows = normal(COLUMNS)
    flat = np.ones(COLUMNS, np.float32)
    errors = {}
    for name in TYPES:
        kind = BLOCKS[name][0]
        packed = np.zeros(ggml.ggml_row_size(kind, COLUMNS) * ROWS, np.uint8)
        importance = flat.ctypes.data if name.startswith(("IQ1", "IQ2", "IQ3")) else None
        ggml.ggml_quantize_init(kind)
        ggml.ggml_quantize_chunk(kind, rows.ctypes.data, packed.ctypes.data, 0, ROWS, COLUMNS, importance)
        back = np.zeros_like(rows)
        ggml.ggml_get_type_traits(kind).contents.to_float(
            packed.ctypes.data, back.ctypes.data, ROWS * COLUMNS
        )
        errors[name] = relative(rows, back)
    return errors


def integer_errors() -> dict[tuple[int, int | None], tuple[float, float]]:
    """Bits and group -> error of symmetric and asymmetric rounding, rows of 4096."""
    rows = normal(LONG)
    return {
        (bits, group): (
            relative(rows, symmetric(rows, bits, group)),
            relative(rows, asymmetric(rows, bits, group)),
        )
        for bits in (2, 3, 4, 8)
        for group in GROUPS
    }


def float_errors() -> dict[str, float]:
    """Format with a table of values -> error, rows of 4096."""
    rows = normal(LONG)
    return {
        "nf4": relative(rows, table(rows, NF4, 64)),
        "fp8_e4m3": relative(rows, fp8(rows, mantissa=3, least=-6, most=448.0)),
        "fp8_e5m2": relative(rows, fp8(rows, mantissa=2, least=-14, most=57344.0)),
    }


def normal(columns: int) -> Rows:
    return np.random.default_rng(0).standard_normal((ROWS, columns)).astype(np.float32)


def relative(rows: Rows, back: Rows) -> float:
    """Mean squared error over mean square."""
    return float(((rows - back) ** 2).mean() / (rows**2).mean())


def symmetric(rows: Rows, bits: int, group: int | None) -> Rows:
    """The full range of codes over twice the largest magnitude (GPTQ sym, compressed-tensors, AutoRound)."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    grouped = rows.reshape(-1, group or rows.shape[1])
    scale = 2 * np.abs(grouped).max(axis=1, keepdims=True) / top
    codes = np.clip(np.round(grouped / scale) + middle, 0, top)
    return np.asarray((codes - middle) * scale, np.float32).reshape(rows.shape)


def asymmetric(rows: Rows, bits: int, group: int | None) -> Rows:
    """The codes over the range from the least to the greatest, zero included and exact (AWQ, GPTQ asym)."""
    top = 2**bits - 1
    grouped = rows.reshape(-1, group or rows.shape[1])
    low = np.minimum(grouped.min(axis=1, keepdims=True), 0)
    high = np.maximum(grouped.max(axis=1, keepdims=True), 0)
    scale = (high - low) / top
    zero = np.round(-low / scale)
    codes = np.clip(np.round(grouped / scale) + zero, 0, top)
    return np.asarray((codes - zero) * scale, np.float32).reshape(rows.shape)


def table(rows: Rows, values: tuple[float, ...], group: int) -> Rows:
    """The nearest of these values times the largest magnitude of the block."""
    grouped = rows.reshape(-1, group)
    scale = np.abs(grouped).max(axis=1, keepdims=True)
    known = np.asarray(values, np.float32)
    between = (known[1:] + known[:-1]) / 2
    return np.asarray(known[np.searchsorted(between, grouped / scale)] * scale, np.float32).reshape(
        rows.shape
    )


def fp8(rows: Rows, *, mantissa: int, least: int, most: float) -> Rows:
    """The nearest float of so many mantissa bits and so small an exponent, scaled by row to the largest."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / most
    scaled = rows / scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**least))), least)
    step = 2.0 ** (exponent - mantissa)
    return np.asarray(np.round(scaled / step) * step * scale, np.float32)


if __name__ == "__main__":
    main()
