"""Each built-in model is a whole Hugging Face folder, of sizes that K-quants like."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from edgepack import catalog, heldout

FOLDERS = tuple(catalog.built_in().values())
MIB = 2**20
HEADER_LENGTH = struct.Struct("<Q")


each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return content


def tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """The safetensors header: https://github.com/huggingface/safetensors#format"""
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size))
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


@each
def test_rows_are_whole_blocks_of_256_and_heads_are_64_wide(folder: Path) -> None:
    config = read(folder, "config.json")

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] * 64 == config["hidden_size"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


def test_the_teacher_stays_below_20_mib_and_its_students_together_below_15() -> None:
    sizes = {f.name: sum(path.stat().st_size for path in f.iterdir()) for f in FOLDERS}

    assert sizes.pop("demo") <= 20 * MIB
    assert sum(sizes.values()) <= 15 * MIB


@each
def test_tensors_have_the_shapes_of_the_config(folder: Path) -> None:
    config = read(folder, "config.json")
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

    assert {name: entry["shape"] for name, entry in tensors(folder).items()} == expected
    assert config["tie_word_embeddings"] is True


@each
def test_tensors_are_f16_and_fill_the_file(folder: Path) -> None:
    entries = tensors(folder).values()

    assert {entry["dtype"] for entry in entries} == {"F16"}
    assert all(
        end - start == 2 * math.prod(entry["shape"])
        for entry in entries
        for start, end in [entry["data_offsets"]]
    )
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size))
    assert HEADER_LENGTH.size + length + max(entry["data_offsets"][1] for entry in entries) == size


@each
def test_the_tokenizer_cuts_words_as_qwen2_and_knows_the_end(folder: Path) -> None:
    config, tokenizer = read(folder, "config.json"), read(folder, "tokenizer.json")

    vocabulary = tokenizer["model"]["vocab"]
    words = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    assert words.startswith(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|")
    assert vocabulary[read(folder, "tokenizer_config.json")["eos_token"]] == config["eos_token_id"]
    assert tokenizer["normalizer"] is None
    assert tokenizer["post_processor"] is None


@pytest.mark.parametrize("name", ["README.md", "generation_config.json"])
@each
def test_the_folder_has(folder: Path, name: str) -> None:
    assert (folder / name).stat().st_size > 0


@each
def test_a_students_tokens_are_its_teachers(folder: Path) -> None:
    assert (folder / "tokenizer.json").read_bytes() == (FOLDERS[0] / "tokenizer.json").read_bytes()


def test_the_held_out_text_is_long_enough_to_measure_on() -> None:
    assert 60_000 <= heldout.BUILT_IN.stat().st_size <= 100_000
