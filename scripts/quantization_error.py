"""Measures each ggml type's rounding error on standard normal rows: the table in edgepack/degradation.py.

    python scripts/quantization_error.py

Uses llama.cpp's own quantizers (ggml_quantize_chunk) with a flat importance matrix where a type needs one.
"""

from __future__ import annotations

import ctypes

import numpy as np

from edgepack import toolchain
from edgepack.ggufheader import BLOCKS

TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0", "NVFP4", "MXFP4", "IQ3_S",
    "Q3_K", "IQ3_XXS", "IQ2_S", "Q2_K", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0",
)  # fmt: skip
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
        print(f"{name:<8} {float(((rows - back) ** 2).mean() / (rows**2).mean()):.3e}")


if __name__ == "__main__":
    main()
