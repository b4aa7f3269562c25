"""Where each tensor of a Hugging Face checkpoint lies; headers are checked before they are believed."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

from edgepack.errors import BadInput, Unsupported
from edgepack.workspace import whole_file

ITEM_BYTES: Mapping[str, int] = {"BF16": 2, "F16": 2, "F32": 4}
"""The storage types that are converted, and the bytes of one element."""

_OTHER_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_PIECE = 1 << 22
"""Bytes that are copied at a time."""
_LARGEST_HEADER = 100_000_000
"""The limit of the reference implementation (safetensors, src/tensor.rs, MAX_HEADER_SIZE)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """As in the file: the last dimension is contiguous."""
    file: Path
    offset: int
    """From the start of the file, in bytes."""
    bytes: int


def checkpoint(folder: Path) -> Mapping[str, Stored]:
    """Every tensor of a checkpoint in one or several safetensors files, by name.

    Reads headers only. Raises BadInput for a missing, truncated or inconsistent file, Unsupported for
    checkpoints in another format.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        _no_weights(folder)
    weight_map = _weight_map(index)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if not path.is_file():
            raise BadInput(f"{index} names {file}, which is not there", hint="fetch the missing file")
        tensors.update(
            (name, stored) for name, stored in read_header(path).items() if weight_map.get(name) == file
        )
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise BadInput(
            f"{index} says that {missing[0]} is in {weight_map[missing[0]]}, and it is not"
            + (f" ({len(missing)} tensors in all)" if len(missing) > 1 else ""),
            hint="fetch the checkpoint again",
        )
    return tensors


def rewrite(folder: Path) -> None:
    """Puts a checkpoint into one model.safetensors in one order, whatever files and order its writer chose.

    Wide types first, then by name, so that every tensor is aligned; the file appears whole and the old ones go.
    """
    tensors = sorted(checkpoint(folder).values(), key=lambda t: (-(_item_bytes(t.dtype) or 0), t.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        span = [at, at + tensor.bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(folder / "model.safetensors") as temporary, temporary.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            with tensor.file.open("rb") as stream:
                stream.seek(tensor.offset)
                left = tensor.bytes
                while left:
                    piece = stream.read(min(left, _PIECE))
                    if not piece:
                        raise BadInput(f"{tensor.file} ends within {tensor.name}", hint="fetch it again")
                    out.write(piece)
                    left -= len(piece)
    for path in {t.file for t in tensors} | {folder / "model.safetensors.index.json"}:
        if path.name != "model.safetensors":
            path.unlink(missing_ok=True)


def read_header(path: Path) -> Mapping[str, Stored]:
    """The tensors of one safetensors file, by name, in the order of their data.

    Layout: 8 bytes of header length, JSON, then the data without gaps (safetensors format).
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise BadInput(f"{path} is {size} bytes long, too short for safetensors", hint="fetch it again")
        (length,) = struct.unpack("<Q", head)
        if length > min(_LARGEST_HEADER, size - 8):
            raise BadInput(
                f"{path} claims a header of {length} bytes and is {size} bytes long",
                hint="the file is truncated or is not safetensors; fetch it again",
            )
        text = stream.read(length)
    entries = _object(text, path)
    entries.pop("__metadata__", None)
    start, expected = 8 + length, 0
    tensors: dict[str, Stored] = {}
    for name, begin, stored in sorted(
        ((name, *_entry(name, entry, path, start)) for name, entry in entries.items()), key=lambda row: row[1]
    ):
        if begin != expected:
            raise BadInput(f"{path}: tensor {name} starts at {begin}, not at {expected} where the last ends")
        expected = begin + stored.bytes
        if start + expected > size:
            raise BadInput(
                f"{path} is truncated: tensor {name} needs {stored.bytes} bytes, "
                f"{max(0, size - stored.offset)} of them are there "
                f"(the file is {size} bytes long, at least {start + expected} are expected)",
                hint="fetch or copy the file again",
            )
        tensors[name] = stored
    if start + expected != size:
        surplus = size - start - expected
        raise BadInput(f"{path} has {surplus} bytes that belong to no tensor", hint="fetch it again")
    return tensors


def _entry(name: str, entry: object, path: Path, start: int) -> tuple[int, Stored]:
    """(offset in the data section, tensor) of one header entry; its byte count must follow from its shape."""
    if not isinstance(entry, dict):
        raise BadInput(f"{path}: tensor {name} is described by {entry!r}, not by an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    item = _item_bytes(str(dtype))
    if item is None:
        raise Unsupported(f"{path}: tensor {name} has the unknown type {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise BadInput(f"{path}: tensor {name} has the shape {shape!r} and the offsets {offsets!r}")
    count = 1
    for n in shape:
        count *= n
    begin, end = offsets
    if end - begin != count * item:
        raise BadInput(
            f"{path}: tensor {name} of shape {tuple(shape)} in {dtype} is {count * item} bytes, "
            f"its offsets span {end - begin}"
        )
    stored = Stored(
        name=name, dtype=str(dtype), shape=tuple(shape), file=path, offset=start + begin, bytes=end - begin
    )
    return begin, stored


def _item_bytes(dtype: str) -> int | None:
    return ITEM_BYTES.get(dtype) or _OTHER_BYTES.get(dtype)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _object(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise BadInput(f"{index}: {name} is said to be in {file!r}, which is not a file of this folder")
    return weight_map


def _object(text: bytes, path: Path) -> dict[str, object]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} holds no readable JSON: {error}", hint="fetch it again") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds JSON that is not an object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name appears twice")
    return value


def _no_weights(folder: Path) -> NoReturn:
    pickled = (".bin", ".pt", ".pth", ".h5", ".msgpack")
    others = sorted(path.name for path in folder.glob("*") if path.suffix in pickled)
    if others:
        raise Unsupported(
            f"{folder} holds {others[0]} and no safetensors file; pickled weights are never loaded",
            hint="save the model with save_pretrained(..., safe_serialization=True)",
        )
    raise BadInput(f"{folder} has no model.safetensors and no model.safetensors.index.json")
