"""Measures each ggml type's rounding error on standard normal rows: the table in edgepack/degradation.py.

    python scripts/quantization_error.py

Uses llama.cpp's own quantizers (ggml_quantize_chunk) with a flat importance matrix where a type needs one.
"""

from __future__ import annotations

import ctypes

import numpy as np

from edgepack import toolchain

TYPES = {
    "Q8_0": 8, "Q6_K": 14, "Q5_K": 13, "Q5_1": 7, "Q5_0": 6, "Q4_K": 12, "IQ4_NL": 20, "IQ4_XS": 23, "Q4_1": 3,
    "Q4_0": 2, "MXFP4": 39, "IQ3_S": 21, "Q3_K": 11, "IQ3_XXS": 18, "IQ2_S": 22, "Q2_K": 10, "IQ2_XS": 17,
    "IQ2_XXS": 16, "IQ1_M": 29, "IQ1_S": 19, "TQ1_0": 34, "TQ2_0": 35,
}  # fmt: skip
"""enum ggml_type, ggml.h."""
ROWS, COLUMNS = 64, 1024


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
    ggml = ctypes.CDLL(str(toolchain.find().package / "llama_cpp" / "lib" / "libllama.so"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    ]  # fmt: skip
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    rows = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    flat = np.ones(COLUMNS, np.float32)
    for name, kind in TYPES.items():
        packed = np.zeros(ggml.ggml_row_size(kind, COLUMNS) * ROWS, np.uint8)
        importance = flat.ctypes.data if name.startswith(("IQ1", "IQ2", "IQ3")) else None
        ggml.ggml_quantize_init(kind)
        ggml.ggml_quantize_chunk(kind, rows.ctypes.data, packed.ctypes.data, 0, ROWS, COLUMNS, importance)
        back = np.zeros_like(rows)
        ggml.ggml_get_type_traits(kind).contents.to_float(
            packed.ctypes.data, back.ctypes.data, ROWS * COLUMNS
        )
        print(f"{name:<8} {float(((rows - back) ** 2).mean() / (rows**2).mean()):.3e}")


if __name__ == "__main__":
    main()
