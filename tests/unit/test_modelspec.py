"""Models as shapes: from a config.json and from a GGUF header, the same; what is not known is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepack import modelspec, schemes
from edgepack.builders import ggufwriter
from edgepack.errors import BadInput, NotFound, Unsupported
from edgepack.ggufheader import Entry
from tests.shapes import CONFIGS, spec, write_gguf


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("llama-3.2-1b", 1_235_814_400 + 32),
        ("qwen3-0.6b", 596_049_920),
        ("gemma-3-1b", 999_885_952),
    ],
)
def test_tensors_sum_to_the_published_parameters(name: str, parameters: int) -> None:
    assert spec(name).parameters == parameters


def test_gemma3_layers_5_11_and_so_on_are_global() -> None:
    """gguf-parser marks il % 6 == 0 instead, and so counts 6, 5 and 11 global layers."""
    counted = {
        name: next(kind.count for kind in spec(name).kv if kind.window is None)
        for name in ("gemma-3-4b", "gemma-3-1b", "gemma-3-27b", "gemma-3-12b")
    }

    assert counted == {"gemma-3-4b": 5, "gemma-3-1b": 4, "gemma-3-27b": 10, "gemma-3-12b": 8}


def test_the_head_size_is_read_not_divided_out() -> None:
    """hf-mem takes hidden / heads, which is 64 for Qwen3-0.6B and half the truth."""
    assert spec("qwen3-0.6b").head_dim == 128
    assert spec("qwen3-0.6b").kv[0].key_dim == 128


def test_rope_frequencies_are_a_tensor_of_llama_3_only() -> None:
    assert "rope_freqs.weight" in {t.name for t in spec("llama-3.2-1b").tensors}
    assert "rope_freqs.weight" not in {t.name for t in spec("stories260k").tensors}


def test_biases_and_norms_follow_the_architecture() -> None:
    def block(name: str) -> set[str]:
        return {t.name[6:] for t in spec(name).tensors if t.name.startswith("blk.0.")}

    assert {"attn_q.bias", "attn_k.bias", "attn_v.bias"} <= block("qwen2.5-0.5b")
    assert "attn_output.bias" not in block("qwen2.5-0.5b")
    assert {"attn_output.bias", "ffn_down.bias"} <= block("odd-biased")
    assert {"attn_q_norm.weight", "attn_k_norm.weight"} <= block("qwen3-0.6b")
    assert {"post_attention_norm.weight", "post_ffw_norm.weight"} <= block("gemma-3-1b")


def test_a_nested_text_config_is_read_with_the_defaults_of_gemma3() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}

    nested = modelspec.from_config({"model_type": "gemma3", "text_config": text}, name="gemma-3-4b")

    assert (nested.heads, nested.kv_heads, nested.head_dim, nested.vocab) == (8, 4, 256, 262208)
    assert nested.tied


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "None"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, "sliding_window_pattern"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"] * 5}, "layer_types"),
        ({"model_type": "qwen2", "head_dim": 96}, "hidden_size"),
    ],
)
def test_what_is_not_known_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        modelspec.from_config({**CONFIGS["stories260k"], **change}, name="x")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"hidden_size": 1 << 60}, "hidden_size"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "gemma3"}, "text_config"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        modelspec.from_config({**CONFIGS["stories260k"], **change}, name="x")


def test_a_folder_and_a_bare_config_give_the_same_shapes(tmp_path: Path) -> None:
    config = tmp_path / "tiny" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(CONFIGS["stories260k"]))

    assert modelspec.read(config) == modelspec.read(config.parent)
    assert modelspec.read(config).name == "tiny"


def test_missing_and_damaged_inputs_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "config.json"
    broken.write_text("{")

    with pytest.raises(NotFound):
        modelspec.read(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="JSON"):
        modelspec.read(broken)
    with pytest.raises(BadInput, match=r"config\.json"):
        modelspec.read(_empty(tmp_path / "folder"))


@pytest.mark.parametrize("name", ["stories260k", "gemma-3-eleven", "odd-biased", "qwen3-8-experts"])
def test_a_gguf_says_what_its_config_says(tmp_path: Path, name: str) -> None:
    wanted = spec(name)
    path = write_gguf(tmp_path / f"{name}.gguf", wanted, "Q4_K_M")

    got = modelspec.read(path)

    assert got.tensors == wanted.tensors
    assert (got.kv, got.tied, got.vocab, got.window_period) == (
        wanted.kv,
        wanted.tied,
        wanted.vocab,
        wanted.window_period,
    )
    assert got.gguf_scheme == "Q4_K_M"
    assert got.file_bytes == path.stat().st_size
    assert schemes.file_bytes(got, "q4_k_m", imatrix=False) == (path.stat().st_size, "exact")


def test_a_quantized_gguf_is_not_quantized_again(tmp_path: Path) -> None:
    got = modelspec.read(write_gguf(tmp_path / "x.gguf", spec("stories260k"), "Q8_0"))

    with pytest.raises(Unsupported, match="already quantized"):
        schemes.weights_bytes(got, "Q4_0", imatrix=False)


def test_an_f16_gguf_may_be_quantized_and_its_file_counted_exactly(tmp_path: Path) -> None:
    full = modelspec.read(write_gguf(tmp_path / "f16.gguf", spec("odd-heads"), "F16"))
    small = write_gguf(tmp_path / "q8.gguf", spec("odd-heads"), "Q8_0")

    assert schemes.file_bytes(full, "Q8_0", imatrix=False) == (small.stat().st_size, "exact")


def test_a_gguf_that_does_not_name_its_file_type_is_known_by_its_matrices(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", spec("stories260k"), "F32", with_file_type=False)

    assert modelspec.read(path).gguf_scheme == "F32"


def test_an_unknown_gguf_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(ggufwriter.header([Entry(key="general.architecture", kind="str", value="rwkv7")], ()))

    with pytest.raises(Unsupported, match="rwkv7"):
        modelspec.read(path)


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder
