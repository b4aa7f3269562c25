"""Turns a llama2.c checkpoint and its tokenizer (stories260K.bin, tok512.bin) into a Hugging Face folder.

    python scripts/stories260k_to_hf.py stories260K.bin tok512.bin DIR

The format is that of llama2.c's export.py, version 0: seven int32, then float32 tensors stacked over the
layers. The result is a llama model with tied embeddings in F32 and a SentencePiece tokenizer.model.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepack.builders.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN
from edgepack.workspace import whole_dir

Floats = NDArray[np.float32]

_EPSILON = 1e-5
"""llama2.c, run.c, rmsnorm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def read_checkpoint(path: Path) -> tuple[Shape, dict[str, Floats]]:
    """Shape and tensors of a llama2.c file, under Hugging Face names, q and k still in Meta's order."""
    data = path.read_bytes()
    shape = Shape(
        **dict(
            zip(
                ("hidden", "ffn", "layers", "heads", "kv_heads", "vocab", "context"),
                struct.unpack_from("<7i", data),
                strict=True,
            )
        )
    )
    if shape.vocab <= 0:
        raise SystemExit(f"{path} has an output matrix of its own, which this script does not read")
    values = np.frombuffer(data, dtype="<f4", offset=28)
    at = 0

    def take(*dims: int) -> Floats:
        nonlocal at
        count = int(np.prod(dims))
        part: Floats = values[at : at + count].reshape(dims)
        at += count
        return part

    n, d, f, kv = shape.layers, shape.hidden, shape.ffn, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": take(shape.vocab, d)}
    stacks = {
        "input_layernorm": take(n, d),
        "self_attn.q_proj": take(n, d, d),
        "self_attn.k_proj": take(n, kv, d),
        "self_attn.v_proj": take(n, kv, d),
        "self_attn.o_proj": take(n, d, d),
        "post_attention_layernorm": take(n, d),
        "mlp.gate_proj": take(n, f, d),
        "mlp.down_proj": take(n, d, f),
        "mlp.up_proj": take(n, f, d),
    }
    for name, stack in stacks.items():
        for layer in range(n):
            tensors[f"model.layers.{layer}.{name}.weight"] = stack[layer]
    tensors["model.norm.weight"] = take(d)
    return shape, tensors


def read_tokens(path: Path, count: int) -> Iterator[tuple[str, float]]:
    """(piece, score) of each token, with a space as SentencePiece writes it."""
    data = path.read_bytes()
    at = 4
    for number in range(count):
        score, length = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + length].decode("utf-8")
        at += 8 + length
        yield (text.strip("\n") if number < 3 else text.replace(" ", "▁")), score


def split_halves(weight: Floats, heads: int) -> Floats:
    """Rows of q or k from neighbouring rotary pairs (Meta, llama2.c) to half-split ones (transformers)."""
    rows, columns = weight.shape
    moved: Floats = (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )
    return moved


def sentencepiece_model(pieces: list[tuple[str, float]]) -> bytes:
    """A tokenizer.model (sentencepiece_model.proto): pieces, then a BPE trainer with byte fallback."""
    parts: list[bytes] = []
    for number, (text, score) in enumerate(pieces):
        kind = UNKNOWN if number == 0 else CONTROL if number < 3 else BYTE if number < 259 else NORMAL
        raw = text.encode("utf-8")
        body = (
            b"\x0a" + _varint(len(raw)) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        )
        parts.append(b"\x0a" + _varint(len(body)) + body)
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, 1)
    trainer += _number(40, 0) + _number(41, 1) + _number(42, 2) + _number(43, (1 << 64) - 1)
    normalizer = _number(3, 1) + _number(4, 0) + _number(5, 1)
    parts.append(b"\x12" + _varint(len(trainer)) + trainer)
    parts.append(b"\x1a" + _varint(len(normalizer)) + normalizer)
    return b"".join(parts)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def write_folder(checkpoint: Path, tokens: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors, tokenizer.model and tokenizer_config.json; appears whole."""
    shape, tensors = read_checkpoint(checkpoint)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": _EPSILON,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    with whole_dir(folder) as temporary:
        _json(temporary / "config.json", config)
        _json(temporary / "tokenizer_config.json", settings)
        (temporary / "tokenizer.model").write_bytes(
            sentencepiece_model(list(read_tokens(tokens, shape.vocab)))
        )
        _safetensors(temporary / "model.safetensors", shape, tensors)


def _safetensors(path: Path, shape: Shape, tensors: dict[str, Floats]) -> None:
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            heads = {"q_proj.weight": shape.heads, "k_proj.weight": shape.kv_heads}.get(
                ".".join(name.rsplit(".", 2)[-2:]), 0
            )
            stream.write((split_halves(tensor, heads) if heads else tensor).tobytes())


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    write_folder(asked.checkpoint, asked.tokens, asked.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
