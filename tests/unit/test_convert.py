"""The converter's header is what was counted, and what it cannot convert it refuses by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import random_model

from edgepack import ggufheader, modelspec
from edgepack.builders import convert, ggufwriter, safetensors
from edgepack.builders.convert import OutType
from edgepack.errors import BadInput, NoSpace, Unsupported
from edgepack.ggufheader import Entry
from edgepack.progress import Silent
from edgepack.units import pad

_TINY = {**random_model.SHAPES["tiny"], "num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    random_model.write(_TINY, path, seed=2, dtype="f32")
    return path


def change(folder: Path, name: str, how: Callable[[Any], None]) -> None:
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8"))
    how(value)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16"])
def test_the_file_is_read_back_as_it_was_meant(outtype: OutType, folder: Path, tmp_path: Path) -> None:
    spec = modelspec.read(folder)

    gguf = convert.convert(folder, tmp_path / "m.gguf", outtype=outtype, progress=Silent())

    header = ggufheader.parse(gguf)
    assert [(t.name, t.shape) for t in header.tensors] == [(t.name, t.shape) for t in spec.tensors]
    assert {t.type for t in header.tensors if len(t.shape) > 1} == {outtype}
    assert {t.type for t in header.tensors if len(t.shape) == 1} == {"F32"}
    assert header.values["general.architecture"] == "qwen2"
    assert header.values["qwen2.rope.freq_base"] == 1000000.0
    assert header.values["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16"])
def test_llama_cpp_s_own_reader_finds_every_tensor_with_its_values(
    outtype: OutType, folder: Path, tmp_path: Path
) -> None:
    gguf = convert.convert(folder, tmp_path / "m.gguf", outtype=outtype, progress=Silent())

    reader = GGUFReader(gguf)

    names = get_tensor_name_map(MODEL_ARCH.QWEN2, _TINY["num_hidden_layers"])
    sources = load_file(folder / "model.safetensors")
    expected = {names.get_name(name, (".weight", ".bias")): values for name, values in sources.items()}
    assert sorted(tensor.name for tensor in reader.tensors) == sorted(expected)
    for tensor in reader.tensors:
        source = expected[tensor.name]
        assert tensor.tensor_type.name == (outtype if source.ndim > 1 else "F32"), tensor.name
        assert tuple(tensor.shape) == source.shape[::-1], tensor.name
        assert tensor.data_offset % 32 == 0, tensor.name
        assert tensor.data.tobytes() == quantize(source, tensor.tensor_type).tobytes(), tensor.name


def test_llama_cpp_s_own_reader_finds_every_key_with_its_type_and_value(folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    ids = {number: text for text, number in tokenizer["model"]["vocab"].items()} | special
    normal, control = 1, 3  # llama_token_type

    fields = GGUFReader(convert.convert(folder, tmp_path / "m.gguf", outtype="F16", progress=Silent())).fields

    found = {name: ([kind.name for kind in field.types], field.contents()) for name, field in fields.items()}
    counted = {name: value for name, (_, value) in found.items() if name.startswith("GGUF.")}
    assert counted == {"GGUF.version": 3, "GGUF.tensor_count": 26, "GGUF.kv_count": len(found) - 3}
    assert {name: value for name, value in found.items() if not name.startswith("GGUF.")} == {
        "general.architecture": (["STRING"], "qwen2"),
        "general.type": (["STRING"], "model"),
        "general.file_type": (["UINT32"], 1),
        "general.quantization_version": (["UINT32"], 2),
        "qwen2.block_count": (["UINT32"], 2),
        "qwen2.context_length": (["UINT32"], 4096),
        "qwen2.embedding_length": (["UINT32"], 256),
        "qwen2.feed_forward_length": (["UINT32"], 512),
        "qwen2.attention.head_count": (["UINT32"], 4),
        "qwen2.attention.head_count_kv": (["UINT32"], 2),
        "qwen2.attention.key_length": (["UINT32"], 64),
        "qwen2.attention.value_length": (["UINT32"], 64),
        "qwen2.attention.layer_norm_rms_epsilon": (["FLOAT32"], float(np.float32(1e-6))),
        "qwen2.rope.dimension_count": (["UINT32"], 64),
        "qwen2.rope.freq_base": (["FLOAT32"], 1e6),
        "qwen2.vocab_size": (["UINT32"], 1024),
        "tokenizer.ggml.model": (["STRING"], "gpt2"),
        "tokenizer.ggml.pre": (["STRING"], "qwen2"),
        "tokenizer.ggml.tokens": (["ARRAY", "STRING"], [ids[number] for number in range(1024)]),
        "tokenizer.ggml.token_type": (
            ["ARRAY", "INT32"], [control if number in special else normal for number in range(1024)],
        ),
        "tokenizer.ggml.merges": (["ARRAY", "STRING"], tokenizer["model"]["merges"]),
        "tokenizer.ggml.bos_token_id": (["UINT32"], 1021),
        "tokenizer.ggml.eos_token_id": (["UINT32"], 1021),
        "tokenizer.ggml.padding_token_id": (["UINT32"], 1021),
        "tokenizer.ggml.add_bos_token": (["BOOL"], False),
        "tokenizer.ggml.add_eos_token": (["BOOL"], False),
    }  # fmt: skip


@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16"])
def test_the_header_has_the_bytes_that_were_counted(outtype: OutType, folder: Path, tmp_path: Path) -> None:
    gguf = convert.convert(folder, tmp_path / "m.gguf", outtype=outtype, progress=Silent())

    header = ggufheader.parse(gguf)

    assert convert.header_size(folder) == pad(header.unpadded, header.alignment)


def test_a_second_conversion_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    one = convert.convert(folder, tmp_path / "1.gguf", outtype="F16", progress=Silent())
    two = convert.convert(folder, tmp_path / "2.gguf", outtype="F16", progress=Silent())

    assert one.read_bytes() == two.read_bytes()


def test_a_truncated_checkpoint_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(BadInput, match="truncated"):
        convert.convert(folder, tmp_path / "out" / "m.gguf", outtype="F16", progress=Silent())

    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_seen_before_writing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))

    with pytest.raises(NoSpace):
        convert.convert(folder, tmp_path / "out" / "m.gguf", outtype="F16", progress=Silent())

    assert not (tmp_path / "out").exists()


def test_values_beyond_f16_are_refused_with_the_tensor_s_name(folder: Path, tmp_path: Path) -> None:
    stored = safetensors.checkpoint(folder)["model.layers.1.mlp.up_proj.weight"]
    with stored.file.open("r+b") as stream:
        stream.seek(stored.offset + 400)
        stream.write(np.float32(1e6).tobytes())

    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values beyond"):
        convert.convert(folder, tmp_path / "m.gguf", outtype="F16", progress=Silent())

    assert not (tmp_path / "m.gguf").exists()
    convert.convert(folder, tmp_path / "m.gguf", outtype="BF16", progress=Silent())


_REFUSALS: list[tuple[str, str, object]] = [
    ("hidden_act 'relu'", "hidden_act", "relu"),
    ("use_sliding_window", "use_sliding_window", True),
    ("already quantized", "quantization_config", {"bits": 4}),
    ("has the shape", "intermediate_size", 768),
    ("is not in the checkpoint", "num_hidden_layers", 3),
    ("the checkpoint holds model.layers.1", "num_hidden_layers", 1),
    ("rope_theta must be a number", "rope_theta", "many"),
]


@pytest.mark.parametrize(("message", "key", "value"), _REFUSALS)
def test_a_config_that_does_not_fit_is_refused(
    message: str, key: str, value: object, folder: Path, tmp_path: Path
) -> None:
    change(folder, "config.json", lambda config: config.update({key: value}))

    with pytest.raises((BadInput, Unsupported), match=message):
        convert.convert(folder, tmp_path / "m.gguf", outtype="F16", progress=Silent())

    assert not (tmp_path / "m.gguf").exists()


def test_gemma_s_attention_scale_must_be_llama_cpp_s(tmp_path: Path) -> None:
    config = {**_GEMMA, "query_pre_attn_scalar": 168}
    random_model.write(config, tmp_path / "gemma", seed=0)

    with pytest.raises(Unsupported, match="query_pre_attn_scalar 168"):
        convert.metadata(tmp_path / "gemma")


_GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "query_pre_attn_scalar": 32,
}  # fmt: skip


def test_the_text_model_of_a_multimodal_checkpoint_is_converted(tmp_path: Path) -> None:
    alone, inside = tmp_path / "alone", tmp_path / "inside"
    random_model.write(_GEMMA, alone, seed=0)
    random_model.write(_GEMMA, inside, seed=0)
    (inside / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": _GEMMA}))
    weights = inside / "model.safetensors"
    data = weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {
        name.replace("model.", "language_model.model."): e for name, e in json.loads(data[8:start]).items()
    }
    end = len(data) - start
    header["vision_tower.x"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + data[start:] + bytes(4))

    one = convert.convert(alone, tmp_path / "1.gguf", outtype="F16", progress=Silent())
    two = convert.convert(inside, tmp_path / "2.gguf", outtype="F16", progress=Silent())

    assert one.read_bytes() == two.read_bytes()


def test_bf16_ties_go_to_the_even_neighbour() -> None:
    ties = np.asarray([0x3F808000, 0x3F818000, 0xBF808000], dtype="<u4").view("<f4")

    assert [hex(bits) for bits in convert.round_to_bf16(ties)] == ["0x3f80", "0x3f82", "0xbf80"]


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bf16_rounds_to_nearest(values: list[float]) -> None:
    floats = np.asarray(values, dtype="<f4")

    bits = convert.round_to_bf16(floats)

    back = (bits.astype("<u4") << 16).view("<f4")
    nan = np.isnan(floats)
    assert (np.isnan(back) == nan).all()
    finite = ~nan & np.isfinite(back)
    low = (floats.view("<u4") & 0xFFFF0000).view("<f4")
    high = ((floats.view("<u4") & 0xFFFF0000) + 0x10000).view("<f4")
    with np.errstate(invalid="ignore", over="ignore"):
        best = np.minimum(np.abs(floats.astype("f8") - low), np.abs(floats.astype("f8") - high))
        error = np.abs(floats.astype("f8") - back)
    assert (error[finite] <= best[finite]).all()


_KINDS = st.sampled_from(["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"])
_ENTRIES = st.one_of(
    st.builds(lambda k, v: Entry(key=k, kind="str", value=v), st.text(min_size=1), st.text()),
    st.builds(
        lambda k, v: Entry(key=k, kind="str", value=tuple(v)), st.text(min_size=1), st.lists(st.text())
    ),
    st.builds(lambda k, v: Entry(key=k, kind="bool", value=v), st.text(min_size=1), st.booleans()),
    st.builds(
        lambda k, kind, v: Entry(key=k, kind=kind, value=tuple(v)),
        st.text(min_size=1),
        _KINDS,
        st.lists(st.integers(0, 127)),
    ),
    st.builds(lambda k, v: Entry(key=k, kind="f32", value=v), st.text(min_size=1), st.floats(width=32)),
)


@given(entries=st.lists(_ENTRIES, unique_by=lambda entry: entry.key, max_size=8), rows=st.integers(1, 5))
def test_any_header_is_as_long_as_counted_and_reads_back(
    entries: list[Entry], rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keyed = [entry for entry in entries if entry.key != "general.alignment"]
    tensors = ggufwriter.layout([("t", "F32", (3, rows)), ("größer", "Q8_0", (64,))])

    head = ggufwriter.header(keyed, tensors)

    assert len(head) == ggufheader.header_bytes(keyed, [("t", 2), ("größer", 1)])
    path = tmp_path_factory.mktemp("header") / "h.gguf"
    path.write_bytes(head + bytes(4096))
    read = ggufheader.parse(path)
    assert read.tensors == tensors
    assert {k: v for k, v in read.values.items() if isinstance(v, str)} == {
        e.key: e.value for e in keyed if isinstance(e.value, str)
    }
