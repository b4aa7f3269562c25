"""Headers of safetensors files are believed only after they were checked."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.builders import safetensors
from edgepack.errors import BadInput, EdgepackError, Unsupported


def written(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def two_tensors() -> dict[str, object]:
    return {"a": entry([2, 3], 0, 24), "b": entry([4], 24, 32, "BF16"), "__metadata__": {"format": "pt"}}


def test_tensors_are_found_with_their_places(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", two_tensors(), bytes(32))

    found = safetensors.read_header(path)

    start = path.stat().st_size - 32
    assert [(t.name, t.dtype, t.shape, t.offset, t.bytes) for t in found.values()] == [
        ("a", "F32", (2, 3), start, 24),
        ("b", "BF16", (4,), start + 24, 8),
    ]


def test_a_truncated_file_names_file_tensor_and_sizes(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", two_tensors(), bytes(27))
    size = path.stat().st_size

    with pytest.raises(BadInput) as refused:
        safetensors.read_header(path)

    message = refused.value.message
    assert str(path) in message
    assert "tensor b needs 8 bytes, 3 of them are there" in message
    assert f"{size} bytes long, at least {size + 5} are expected" in message


@given(cut=st.integers(min_value=0))
def test_no_prefix_of_a_file_is_taken_for_the_whole(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("cut") / "m.safetensors", two_tensors(), bytes(32))
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])

    with pytest.raises(BadInput):
        safetensors.read_header(path)


@given(garbage=st.binary(max_size=200))
def test_garbage_is_refused_and_never_crashes(
    garbage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "m.safetensors"
    path.write_bytes(garbage)

    try:
        safetensors.read_header(path)
    except EdgepackError:
        return
    assert json.loads(garbage[8:]) in ({}, {"__metadata__": {}})


_HOSTILE: list[tuple[str, Callable[[Path], Path]]] = [
    ("claims a header of", lambda p: written(p, b"{}", length=1 << 62)),
    ("claims a header of", lambda p: written(p, b"{}", length=3)),
    ("readable JSON", lambda p: written(p, b"{" * 10)),
    ("readable JSON", lambda p: written(p, b'{"a":' * 5000 + b"1" + b"}" * 5000)),
    ("readable JSON", lambda p: written(p, b'{"a":1,"a":2}')),
    ("not an object", lambda p: written(p, [])),
    ("is described by", lambda p: written(p, {"a": 3})),
    ("has the shape", lambda p: written(p, {"a": entry([-1], 0, 4)}, bytes(4))),
    (
        "has the shape",
        lambda p: written(p, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)),
    ),
    (
        "has the shape",
        lambda p: written(p, {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
    ),
    ("its offsets span", lambda p: written(p, {"a": entry([2], 0, 4)}, bytes(4))),
    ("its offsets span", lambda p: written(p, {"a": entry([1 << 40, 1 << 40], 0, 4)}, bytes(4))),
    ("starts at 0, not at 4", lambda p: written(p, {"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4))),
    (
        "starts at 8, not at 4",
        lambda p: written(p, {"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    ),
    ("belong to no tensor", lambda p: written(p, {"a": entry([1], 0, 4)}, bytes(5))),
    ("unknown type 'Q7'", lambda p: written(p, {"a": entry([1], 0, 4, "Q7")}, bytes(4))),
]


@pytest.mark.parametrize(("message", "make"), _HOSTILE)
def test_a_hostile_header_is_refused(message: str, make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors")

    with pytest.raises(EdgepackError, match=message):
        safetensors.read_header(path)


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    written(tmp_path / "one.safetensors", {"a": entry([1], 0, 4)}, bytes(4))
    written(tmp_path / "two.safetensors", {"b": entry([1], 0, 4)}, bytes(4))
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    found = safetensors.checkpoint(tmp_path)

    assert {name: stored.file.name for name, stored in found.items()} == index["weight_map"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "gone.safetensors"}, "gone.safetensors, which is not there"),
        ({"a": "one.safetensors", "x": "one.safetensors"}, "x is in one.safetensors, and it is not"),
        ({"a": "../one.safetensors"}, "not a file of this folder"),
        ({"a": "/etc/passwd"}, "not a file of this folder"),
        ({"a": 7}, "not a file of this folder"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_does_not_hold_is_refused(
    weight_map: dict[str, object], message: str, tmp_path: Path
) -> None:
    written(tmp_path / "one.safetensors", {"a": entry([1], 0, 4)}, bytes(4))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(BadInput, match=message):
        safetensors.checkpoint(tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")

    with pytest.raises(Unsupported, match="pickled weights are never loaded"):
        safetensors.checkpoint(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no model\.safetensors"):
        safetensors.checkpoint(tmp_path)


def test_a_rewritten_checkpoint_has_the_same_tensors_in_one_order_whatever_files_they_came_in(
    tmp_path: Path,
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    written(
        one / "model.safetensors", {"b": entry([4], 0, 8, "BF16"), "a": entry([2], 8, 16)}, bytes(range(16))
    )
    written(several / "x.safetensors", {"a": entry([2], 0, 8)}, bytes(range(8, 16)))
    written(several / "y.safetensors", {"b": entry([4], 0, 8, "BF16")}, bytes(range(8)))
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (several / "model.safetensors.index.json").write_text(json.dumps(index))

    for folder in (one, several):
        safetensors.rewrite(folder)

    assert [path.name for path in several.iterdir()] == ["model.safetensors"]
    assert (one / "model.safetensors").read_bytes() == (several / "model.safetensors").read_bytes()
    found = safetensors.checkpoint(one)
    assert list(found) == ["a", "b"], "wide types first"
    assert (one / "model.safetensors").read_bytes()[found["a"].offset :] == bytes([*range(8, 16), *range(8)])
    assert found["a"].offset % 8 == 0
