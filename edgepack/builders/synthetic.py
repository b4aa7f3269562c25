"""A GGUF with a real shape and no meaning: llama.cpp runs it at the speed of a real model of that shape."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

from edgepack import schemes
from edgepack.builders import ggufwriter
from edgepack.errors import Unsupported
from edgepack.ggufheader import ALIGNMENT, FILE_TYPES, Entry
from edgepack.modelspec import ModelSpec
from edgepack.units import pad
from edgepack.workspace import require_space, whole_file

_SCALE = struct.pack("<e", 2.0**-10)
"""A block's scale: small, so that activations stay finite."""
_SEED = 1
_TILE = 4096
"""Blocks in the piece that is written over and over; the speed does not depend on the values."""


def write(path: Path, spec: ModelSpec, scheme: str) -> Path:
    """Writes ``spec`` (Llama's tensors) in ``scheme``, with random blocks and no tokenizer, whole or not at all.

    Raises Unsupported for a scheme with types that are not among F32, Q4_K and Q6_K, NoSpace.
    """
    kinds = schemes.tensor_types(spec, scheme, imatrix=False)
    missing = sorted(set(kinds) - set(_BLOCKS) - {"F32"})
    if missing:
        raise Unsupported(f"{scheme} of {spec.name} has tensors of type {', '.join(missing)}")
    infos = ggufwriter.layout([(t.name, k, t.shape) for t, k in zip(spec.tensors, kinds, strict=True)])
    random_bytes = random.Random(_SEED).randbytes  # the same file every time; no secret
    tiles = {kind: b"".join(_BLOCKS[kind](random_bytes) for _ in range(_TILE)) for kind in _BLOCKS}
    tiles["F32"] = struct.pack("<f", 1.0) * _TILE
    head = ggufwriter.header(_entries(spec, scheme), infos)
    sizes = [schemes.tensor_bytes(kind, t.shape) for t, kind in zip(spec.tensors, kinds, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, len(head) + sum(pad(size, ALIGNMENT) for size in sizes))
    with whole_file(path) as temporary, temporary.open("wb") as out:
        out.write(head)
        for kind, size in zip(kinds, sizes, strict=True):
            tile = tiles[kind]
            for _ in range(size // len(tile)):
                out.write(tile)
            out.write(tile[: size % len(tile)])
            out.write(bytes(pad(size, ALIGNMENT) - size))
    return path


_RandomBytes = Callable[[int], bytes]


def _q4_k(random_bytes: _RandomBytes) -> bytes:
    """Two scales, twelve bytes of six-bit scales and minima, 128 bytes of nibbles (ggml-common.h, block_q4_K)."""
    return _SCALE + _SCALE + random_bytes(12 + 128)


def _q6_k(random_bytes: _RandomBytes) -> bytes:
    """Low and high bits, sixteen scales, then the scale of the whole (ggml-common.h, block_q6_K)."""
    return random_bytes(128 + 64 + 16) + _SCALE


_BLOCKS = {"Q4_K": _q4_k, "Q6_K": _q6_k}


def _entries(spec: ModelSpec, scheme: str) -> tuple[Entry, ...]:
    file_type = next(number for number, name in FILE_TYPES.items() if name == scheme)
    numbers = {
        "block_count": spec.layers,
        "context_length": spec.context_train,
        "embedding_length": spec.hidden,
        "feed_forward_length": spec.ffn,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "rope.dimension_count": spec.head_dim,
        "vocab_size": spec.vocab,
    }
    return (
        Entry(key="general.architecture", kind="str", value="llama"),
        Entry(key="general.name", kind="str", value=spec.name),
        Entry(key="general.file_type", kind="u32", value=file_type),
        Entry(key="general.quantization_version", kind="u32", value=2),
        *(Entry(key=f"llama.{key}", kind="u32", value=value) for key, value in numbers.items()),
        Entry(key="llama.attention.layer_norm_rms_epsilon", kind="f32", value=1e-5),
        Entry(key="tokenizer.ggml.model", kind="str", value="none"),
    )
