"""The built-in model is a whole Hugging Face folder, of sizes that K-quants like."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "edgepack" / "models" / "demo"
MIB = 2**20
HEADER_LENGTH = struct.Struct("<Q")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def tensors() -> dict[str, dict[str, Any]]:
    """The safetensors header: https://github.com/huggingface/safetensors#format"""
    with (FOLDER / "model.safetensors").open("rb") as file:
        (length,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size))
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def test_rows_are_whole_blocks_of_256_and_heads_are_64_wide() -> None:
    config = read("config.json")

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] * 64 == config["hidden_size"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


def test_the_whole_folder_stays_below_20_mib() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 20 * MIB


def test_tensors_have_the_shapes_of_the_config() -> None:
    config = read("config.json")
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": [hidden],
        "mlp.down_proj": [hidden, ffn],
        "mlp.gate_proj": [ffn, hidden],
        "mlp.up_proj": [ffn, hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.k_proj": [key_value, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.v_proj": [key_value, hidden],
    }
    expected = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    } | {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }

    assert {name: entry["shape"] for name, entry in tensors().items()} == expected
    assert config["tie_word_embeddings"] is True


def test_tensors_are_f16_and_fill_the_file() -> None:
    entries = tensors().values()

    assert {entry["dtype"] for entry in entries} == {"F16"}
    assert all(
        end - start == 2 * math.prod(entry["shape"])
        for entry in entries
        for start, end in [entry["data_offsets"]]
    )
    size = (FOLDER / "model.safetensors").stat().st_size
    with (FOLDER / "model.safetensors").open("rb") as file:
        (length,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size))
    assert HEADER_LENGTH.size + length + max(entry["data_offsets"][1] for entry in entries) == size


def test_the_tokenizer_cuts_words_as_qwen2_and_knows_the_end() -> None:
    config, tokenizer = read("config.json"), read("tokenizer.json")

    vocabulary = tokenizer["model"]["vocab"]
    words = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    assert words.startswith(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|")
    assert vocabulary[read("tokenizer_config.json")["eos_token"]] == config["eos_token_id"]
    assert tokenizer["normalizer"] is None
    assert tokenizer["post_processor"] is None


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "heldout.txt"])
def test_the_folder_has(name: str) -> None:
    assert (FOLDER / name).stat().st_size > 0


def test_the_held_out_text_is_long_enough_to_measure_on() -> None:
    assert 60_000 <= (FOLDER / "heldout.txt").stat().st_size <= 100_000
