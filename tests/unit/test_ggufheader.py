"""GGUF headers: counted before they are written, and read without believing a damaged file."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import ggufheader
from edgepack.builders import ggufwriter
from edgepack.errors import BadInput
from edgepack.ggufheader import Array, Entry

ENTRIES = (
    Entry(key="general.architecture", kind="str", value="llama"),
    Entry(key="a.count", kind="u32", value=7),
    Entry(key="a.flag", kind="bool", value=True),
    Entry(key="a.real", kind="f32", value=0.5),
    Entry(key="a.big", kind="u64", value=1 << 40),
    Entry(key="tokens", kind="str", value=("a", "süß", "<|x|>", "")),
    Entry(key="scores", kind="f32", value=(1.0, 2.0, 3.0)),
)
TENSORS = ggufwriter.layout([("token_embd.weight", "Q4_0", (64, 3)), ("output_norm.weight", "F32", (64,))])


def whole(entries: tuple[Entry, ...] = ENTRIES) -> bytes:
    return ggufwriter.header(entries, TENSORS) + bytes(128 + 256)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.gguf"


values = st.one_of(
    st.builds(lambda v: ("u32", v), st.integers(0, 2**32 - 1)),
    st.builds(lambda v: ("str", v), st.text(max_size=20)),
    st.builds(lambda v: ("str", tuple(v)), st.lists(st.text(max_size=8), max_size=6)),
    st.builds(lambda v: ("i32", tuple(v)), st.lists(st.integers(-5, 5), max_size=6)),
)


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=12), values, max_size=6))
def test_counted_bytes_are_written_bytes(
    named: dict[str, tuple[ggufheader.ValueType, ggufheader.Value]],
) -> None:
    entries = tuple(Entry(key=key, kind=kind, value=value) for key, (kind, value) in named.items())

    counted = ggufheader.header_bytes(entries, [(t.name, len(t.shape)) for t in TENSORS])

    assert counted == len(ggufwriter.header(entries, TENSORS))


def test_what_was_written_is_read(path: Path) -> None:
    path.write_bytes(whole())

    header = ggufheader.parse(path)

    assert header.values["general.architecture"] == "llama"
    assert header.values["a.big"] == 1 << 40
    assert header.values["tokens"] == Array(kind="str", count=4)
    assert header.tensors == TENSORS
    assert header.file_bytes == len(whole())


def test_the_texts_of_an_array_are_read_when_they_are_asked_for(path: Path) -> None:
    path.write_bytes(whole())
    tokens = ggufheader.parse(path).values["tokens"]

    assert isinstance(tokens, Array)
    assert ggufheader.texts(path, tokens) == ("a", "süß", "<|x|>", "")


def test_version_2_is_read_and_other_versions_are_refused(path: Path) -> None:
    data = whole()
    for version, message in ((1, "version 1"), (4, "version 4"), (0x03000000, "big-endian")):
        path.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
        with pytest.raises(BadInput, match=message):
            ggufheader.parse(path)

    path.write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    assert ggufheader.parse(path).version == 2


def test_every_truncation_is_refused(path: Path) -> None:
    """Only the padding behind the last tensor may be missing."""
    data = whole()
    needed = len(data) - 128 - 256 + TENSORS[1].offset + 256

    for length in range(needed):
        path.write_bytes(data[:length])
        with pytest.raises(BadInput):
            ggufheader.parse(path)

    path.write_bytes(data[:needed])
    ggufheader.parse(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(whole()) - 400), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, at: int, to: int
) -> None:
    data = bytearray(whole())
    data[at] = to
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(data)

    try:
        ggufheader.parse(path)
    except BadInput:
        return


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "keys"])
def test_hostile_counts_neither_allocate_nor_take_time(path: Path, at: int) -> None:
    data = bytearray(whole())
    data[at : at + 8] = struct.pack("<Q", 2**62)
    path.write_bytes(data)

    refused_cheaply(path)


def test_a_hostile_array_neither_allocates_nor_takes_time(path: Path) -> None:
    for kind in (8, 4):
        key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, 2**61)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(64))

        refused_cheaply(path)


def test_a_hostile_shape_is_refused(path: Path) -> None:
    name = struct.pack("<Q", 1) + b"w"
    tensor = name + struct.pack("<I4QIQ", 4, 2**39, 2**39, 2**39, 2**39, 0, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(64))

    refused_cheaply(path)


def test_two_keys_of_one_name_are_refused(path: Path) -> None:
    path.write_bytes(whole((ENTRIES[0], ENTRIES[0])))

    with pytest.raises(BadInput, match="twice"):
        ggufheader.parse(path)


def test_something_else_is_not_a_gguf(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(100))

    with pytest.raises(BadInput, match="not a GGUF"):
        ggufheader.parse(path)


def refused_cheaply(path: Path) -> None:
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with pytest.raises(BadInput):
            ggufheader.parse(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 4 << 20
    assert time.monotonic() - begun < 1.0
