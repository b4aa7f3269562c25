"""Writes a Hugging Face folder with random weights in a real shape, to measure sizes and memory with.

    python scripts/random_model.py qwen2.5-0.5b DIR [--seed 0] [--shards 1] [--dtype bf16]

The weights are streamed, so any shape fits in memory. The tokenizer is byte-level BPE of exactly the
model's vocabulary: 256 bytes, then pairs merged in order, then special tokens.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepack import modelspec
from edgepack.builders.convert import hf_names
from edgepack.workspace import whole_dir

_QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}

SHAPES: Mapping[str, Mapping[str, object]] = {
    # The config.json of Qwen/Qwen2.5-0.5B and Qwen/Qwen2.5-1.5B.
    "qwen2.5-0.5b": {
        **_QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": {
        **_QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    # As wide as the first, with a third of its layers and a fifth of its vocabulary: a build of it takes seconds.
    "qwen2-0.15b": {
        **_QWEN,
        "vocab_size": 32768,
        "bos_token_id": 32765,
        "eos_token_id": 32765,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 8,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    # Small enough for any test: every matrix is a multiple of 256 wide.
    "tiny": {
        **_QWEN,
        "vocab_size": 1024,
        "bos_token_id": 1021,
        "eos_token_id": 1021,
        "max_position_embeddings": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}

_QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SLAB = 1 << 22
"""Random numbers drawn at a time."""


def write(
    config: Mapping[str, object], folder: Path, *, seed: int, shards: int = 1, dtype: str = "bf16"
) -> None:
    """Writes config.json, tokenizer.json, tokenizer_config.json and the weights; the folder appears whole."""
    spec = modelspec.from_config(config, name=folder.name)
    names = hf_names(spec)
    with whole_dir(folder) as temporary:
        _json(temporary / "config.json", config)
        write_tokenizer(temporary, spec.vocab)
        rows = [(names[t.name], t.shape[::-1]) for t in spec.tensors if t.name in names]
        parts = [rows[i::shards] for i in range(shards)]
        files = ["model.safetensors"]
        if shards > 1:
            files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
            weight_map = {name: file for file, part in zip(files, parts, strict=True) for name, _ in part}
            _json(temporary / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        for file, part in zip(files, parts, strict=True):
            _safetensors(temporary / file, part, seed, dtype)


def _safetensors(path: Path, rows: list[tuple[str, tuple[int, ...]]], seed: int, dtype: str) -> None:
    item = {"bf16": 2, "f16": 2, "f32": 4}[dtype]
    header: dict[str, object] = {}
    offset = 0
    for name, shape in rows:
        size = int(np.prod(shape)) * item
        header[name] = {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in rows:
            # A generator of its own for every tensor: the same values however they are sharded.
            generator = np.random.default_rng([seed, *name.encode()])
            left = int(np.prod(shape))
            while left:
                values = generator.standard_normal(min(left, _SLAB), dtype=np.float32)
                scaled = (
                    1 + 0.02 * values if len(shape) == 1 and name.endswith("norm.weight") else 0.02 * values
                )
                stream.write(_bits(scaled.astype(np.float32), dtype))
                left -= values.size


def _bits(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "f32":
        return values.tobytes()
    if dtype == "f16":
        return values.astype("<f2").tobytes()
    return (values.view("<u4") >> 16).astype("<u2").tobytes()


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Byte-level BPE: every byte, then merges of earlier tokens in a fixed order, up to the vocabulary."""
    alphabet = byte_alphabet()
    tokens = list(alphabet)
    merges: list[str] = []
    letters = list("etaoinshrdlcumwfgypbvkxjqz")
    known = set(tokens)
    heads = ["Ġ", *letters]
    wanted = vocab - len(_SPECIAL) - len(tokens)
    for head in heads:
        for letter in letters:
            if len(merges) < wanted and head + letter not in known:
                merges.append(f"{head} {letter}")
                known.add(head + letter)
                heads.append(head + letter)
        if len(merges) == wanted:
            break
    tokens += [merge.replace(" ", "") for merge in merges]
    special = [
        {"id": len(tokens) + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(_SPECIAL)
    ]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": _QWEN_REGEX}, "behavior": "Isolated", "invert": False}
    level: dict[str, object] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = False
    decoder = dict(level, use_regex=True)
    _json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": special,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": level,
            "decoder": decoder,
            "model": {
                "type": "BPE",
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {text: number for number, text in enumerate(tokens)},
                "merges": merges,
            },
        },
    )
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    settings |= {"eos_token": _SPECIAL[0], "pad_token": _SPECIAL[0]}
    _json(folder / "tokenizer_config.json", settings)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for every byte, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    stand_in = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or the path of a config.json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "f16", "f32"), default="bf16")
    asked = parser.parse_args()
    config = SHAPES.get(asked.shape) or json.loads(Path(asked.shape).read_text(encoding="utf-8"))
    write(config, asked.folder, seed=asked.seed, shards=asked.shards, dtype=asked.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
