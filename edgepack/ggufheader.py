"""The GGUF header: read without numpy, and counted to the byte before it is written."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgepack.errors import BadInput
from edgepack.units import pad

ALIGNMENT = 32
"""GGUF_DEFAULT_ALIGNMENT, ggml/include/gguf.h."""

BLOCKS: Mapping[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q8_1": (9, 32, 36),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18),
    "Q2_0": (42, 64, 18),
}
"""ggml type: its id (ggml/include/ggml.h, ggml_type), weights per block, bytes per block (ggml-common.h)."""

FILE_TYPES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    40: "Q1_0",
    41: "Q2_0",
}
"""general.file_type to the name llama-quantize uses (include/llama.h, llama_ftype)."""

ValueType = Literal["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64"]
_VALUE_TYPES: tuple[ValueType, ...] = (
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64",
)  # fmt: skip
_FORMATS = {
    "u8": "<B", "i8": "<b", "u16": "<H", "i16": "<h", "u32": "<I", "i32": "<i", "f32": "<f",
    "bool": "<?", "u64": "<Q", "i64": "<q", "f64": "<d",
}  # fmt: skip
_NEWEST = 3
_MAX_DIMS = 4
_PER_LAYER = 1024
"""Longest array kept: hyperparameters with a value per layer, not the tokenizer's tables."""
_TYPES = {number: (name, weights, size) for name, (number, weights, size) in BLOCKS.items()}

Scalar = int | float | bool | str
Value = Scalar | Sequence[Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key of the metadata: ``kind`` is the type of the value, or of the elements of a list."""

    key: str
    kind: ValueType
    value: Value

    @property
    def bytes(self) -> int:
        return entry_bytes(self.key, self.kind, self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the data section."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """An array of the metadata."""

    kind: ValueType
    count: int
    items: tuple[int, ...] | None = None
    """Its elements, of a list of whole numbers or booleans with a value per layer; else they are skipped."""
    start: int = field(default=0, compare=False)
    """Byte of the file at which its elements start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    version: int
    values: Mapping[str, Scalar | Array]
    tensors: tuple[TensorInfo, ...]
    unpadded: int
    """Bytes of the header before it is padded to the alignment."""
    alignment: int
    file_bytes: int


def entry_bytes(key: str, kind: ValueType, value: Value) -> int:
    """Bytes of one key in a GGUF v3 header; a sequence counts as an array of ``kind``."""
    head = 8 + len(key.encode()) + 4
    if isinstance(value, str) or not isinstance(value, Sequence):
        return head + _scalar_bytes(kind, value)
    return head + 4 + 8 + sum(_scalar_bytes(kind, item) for item in value)


def tensor_info_bytes(name: str, dims: int) -> int:
    """Bytes of one tensor's description; independent of its type."""
    return 8 + len(name.encode()) + 4 + 8 * dims + 4 + 8


def header_bytes(entries: Iterable[Entry], tensors: Iterable[tuple[str, int]]) -> int:
    """Bytes before the tensor data: magic, version, two counts, keys, tensor infos, padding to 32.

    ``tensors`` are (name, number of dimensions). Layout: ggml/src/gguf.cpp, gguf_writer.
    """
    fixed = 4 + 4 + 8 + 8
    keys = sum(entry.bytes for entry in entries)
    return pad(fixed + keys + sum(tensor_info_bytes(name, dims) for name, dims in tensors), ALIGNMENT)


def parse(path: Path) -> Header:
    """Reads a GGUF v2 or v3 header; every count is checked against the file before it is believed.

    Raises BadInput for anything else: wrong magic, another version, a truncated or inconsistent file.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            if size < 24:
                raise BadInput(f"{path} is {size} bytes long, too short for a GGUF file")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, size, path).header()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def texts(path: Path, array: Array) -> tuple[str, ...]:
    """The elements of an array of texts, such as tokenizer.ggml.tokens, of the file that it was parsed from."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, len(data), path)
        reader.at = array.start
        return tuple(reader.text() for _ in range(array.count))


class _Reader:
    """A cursor over the file that refuses to go past its end."""

    def __init__(self, data: mmap.mmap, size: int, path: Path) -> None:
        self.data = data
        self.size = size
        self.path = path
        self.at = 0

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise BadInput(f"{self.path} is not a GGUF file", hint="it does not start with the letters GGUF")
        self.at = 4
        version = self.scalar("u32")
        if version == 1:
            raise BadInput(
                f"{self.path} is GGUF version 1, which llama.cpp no longer reads", hint="convert it again"
            )
        if not isinstance(version, int) or version & 0xFFFF == 0:
            raise BadInput(f"{self.path} is a big-endian or damaged GGUF file")
        if version > _NEWEST:
            raise BadInput(
                f"{self.path} is GGUF version {version}; this edgepack knows versions 2 to {_NEWEST}",
                hint="update edgepack",
            )
        tensor_count, key_count = self.count(24), self.count(13)
        values: dict[str, Scalar | Array] = {}
        for _ in range(key_count):
            key = self.text()
            if key in values:
                raise self.damaged(f"key {key} appears twice")
            values[key] = self.value()
        alignment = values.get("general.alignment", ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
            raise self.damaged(f"general.alignment is {alignment!r}")
        if alignment & (alignment - 1):
            raise self.damaged(f"general.alignment {alignment} is not a power of two")
        tensors = tuple(self.tensor() for _ in range(tensor_count))
        self.check_data(tensors, pad(self.at, alignment), alignment)
        return Header(
            version=version,
            values=values,
            tensors=tensors,
            unpadded=self.at,
            alignment=alignment,
            file_bytes=self.size,
        )

    def check_data(self, tensors: tuple[TensorInfo, ...], start: int, alignment: int) -> None:
        if len({t.name for t in tensors}) != len(tensors):
            raise self.damaged("two tensors have the same name")
        expected = 0
        for tensor in tensors:
            if tensor.offset != expected:
                raise self.damaged(f"tensor {tensor.name} starts at {tensor.offset}, not at {expected}")
            _, weights, size = BLOCKS[tensor.type]
            count = 1
            for n in tensor.shape:
                count *= n
            end = start + expected + count // weights * size
            if end > self.size:
                raise BadInput(
                    f"{self.path} is truncated: {tensor.name} ends at byte {end}, the file at {self.size}",
                    hint="fetch or copy the file again",
                )
            expected += pad(count // weights * size, alignment)

    def tensor(self) -> TensorInfo:
        name = self.text()
        dims = self.scalar("u32")
        if not isinstance(dims, int) or not 1 <= dims <= _MAX_DIMS:
            raise self.damaged(f"tensor {name} has {dims} dimensions")
        shape = tuple(int(self.scalar("u64")) for _ in range(dims))
        number, offset = int(self.scalar("u32")), int(self.scalar("u64"))
        if number not in _TYPES:
            raise BadInput(
                f"{self.path}: tensor {name} has the unknown type {number}", hint="update edgepack"
            )
        kind, weights, _ = _TYPES[number]
        if any(n < 1 or n > 1 << 40 for n in shape):
            raise self.damaged(f"tensor {name} has the shape {shape}")
        if shape[0] % weights != 0:
            raise self.damaged(f"tensor {name} has rows of {shape[0]}, not a multiple of {weights} ({kind})")
        return TensorInfo(name=name, type=kind, shape=shape, offset=offset)

    def value(self) -> Scalar | Array:
        kind = self.kind()
        if kind == "str":
            return self.text()
        if kind != "arr":
            return self.scalar(kind)
        element = self.kind()
        if element == "arr":
            raise self.damaged("an array of arrays")
        if element == "str":
            count = self.count(8)
            start = self.at
            self.skip_texts(count)
            return Array(kind=element, count=count, start=start)
        width = struct.calcsize(_FORMATS[element])
        count = self.count(width)
        start, self.at = self.at, self.at + count * width
        if count > _PER_LAYER or element in ("f32", "f64"):
            return Array(kind=element, count=count, start=start)
        items = struct.unpack_from(f"<{count}{_FORMATS[element][-1]}", self.data, start)
        return Array(kind=element, count=count, items=tuple(int(item) for item in items), start=start)

    def skip_texts(self, count: int) -> None:
        data, at, size = self.data, self.at, self.size
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                raise self.truncated()
            at += 8 + unpack(data, at)[0]
        if at > size:
            raise self.truncated()
        self.at = at

    def kind(self) -> ValueType:
        number = int(self.scalar("u32"))
        if number >= len(_VALUE_TYPES):
            raise self.damaged(f"a value has the unknown type {number}")
        return _VALUE_TYPES[number]

    def count(self, smallest: int) -> int:
        """A number of things of at least ``smallest`` bytes each, which therefore must still fit."""
        count = int(self.scalar("u64"))
        if count * smallest > self.size - self.at:
            raise self.damaged(f"it claims {count} items and only {self.size - self.at} bytes are left")
        return count

    def text(self) -> str:
        length = self.count(1)
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def scalar(self, kind: ValueType) -> int | float | bool:
        layout = _FORMATS[kind]
        end = self.at + struct.calcsize(layout)
        if end > self.size:
            raise self.truncated()
        value: int | float | bool = struct.unpack_from(layout, self.data, self.at)[0]
        self.at = end
        return value

    def truncated(self) -> BadInput:
        return BadInput(
            f"{self.path} is truncated: the header goes past byte {self.size}", hint="fetch it again"
        )

    def damaged(self, what: str) -> BadInput:
        return BadInput(f"{self.path} is not a sound GGUF file: {what}", hint="fetch or convert it again")


def _scalar_bytes(kind: ValueType, value: object) -> int:
    if kind == "str":
        return 8 + len(str(value).encode())
    return struct.calcsize(_FORMATS[kind])
