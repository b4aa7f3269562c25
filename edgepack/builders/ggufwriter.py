"""The GGUF header, written: the same entries and tensors always give the same bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from edgepack.ggufheader import ALIGNMENT, BLOCKS, Entry, TensorInfo, ValueType
from edgepack.schemes import tensor_bytes
from edgepack.units import pad

_NUMBERS: dict[ValueType, int] = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "arr": 9,
    "u64": 10, "i64": 11, "f64": 12,
}  # fmt: skip
"""enum gguf_type (ggml/include/gguf.h)."""
_CODES: dict[ValueType, str] = {
    "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?",
    "u64": "Q", "i64": "q", "f64": "d",
}  # fmt: skip


def header(entries: Sequence[Entry], tensors: Sequence[TensorInfo]) -> bytes:
    """A GGUF v3 header, padded to where the tensor data starts (ggml/src/gguf.cpp, gguf_writer)."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(entries))]
    for entry in entries:
        parts.append(_text(entry.key))
        parts.append(_value(entry))
    for tensor in tensors:
        parts.append(_text(tensor.name))
        parts.append(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
        parts.append(struct.pack("<IQ", BLOCKS[tensor.type][0], tensor.offset))
    whole = b"".join(parts)
    return whole + bytes(pad(len(whole), ALIGNMENT) - len(whole))


def layout(named: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorInfo, ...]:
    """Offsets for (name, type, shape in ggml order) in this order, each padded to the alignment."""
    infos: list[TensorInfo] = []
    offset = 0
    for name, kind, shape in named:
        infos.append(TensorInfo(name=name, type=kind, shape=shape, offset=offset))
        offset += pad(tensor_bytes(kind, shape), ALIGNMENT)
    return tuple(infos)


def _value(entry: Entry) -> bytes:
    value = entry.value
    if isinstance(value, str) or not isinstance(value, Sequence):
        return struct.pack("<I", _NUMBERS[entry.kind]) + _scalar(entry.kind, value)
    head = struct.pack("<IIQ", _NUMBERS["arr"], _NUMBERS[entry.kind], len(value))
    if entry.kind == "str":
        return head + b"".join(_text(str(item)) for item in value)
    return head + struct.pack(f"<{len(value)}{_CODES[entry.kind]}", *value)


def _scalar(kind: ValueType, value: object) -> bytes:
    return _text(str(value)) if kind == "str" else struct.pack(f"<{_CODES[kind]}", value)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
