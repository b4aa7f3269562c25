"""Small checkpoints and calibration for the tests of quantizers: parts of the built-in model, and random ones."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import random_model

from edgepack import modelspec
from edgepack.artifact import Checkpoint

DEMO = Path(__file__).parents[1] / "edgepack" / "models" / "demo"
_PROSE = Path(__file__).parents[1] / "README.md"
"""Not the held-out text, on which results are looked at."""


def first_layers(out: Path, layers: int, *, source: Path = DEMO) -> Path:
    """The built-in model with its first layers only: real activations, in a fraction of the time."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    kept = {
        name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, out / name)
    return out


def qwen(out: Path) -> Path:
    """One random layer of Qwen2: biases, an untied head, bfloat16, and 384 and 128 columns."""
    shape = {
        "num_hidden_layers": 1, "vocab_size": 768, "bos_token_id": 765, "eos_token_id": 765, "hidden_size": 128,
        "intermediate_size": 384, "tie_word_embeddings": False,
    }  # fmt: skip
    random_model.write({**random_model.SHAPES["tiny"], **shape}, out, seed=1, dtype="bf16")
    return out


def windows(source: Path, out: Path, count: int, length: int) -> Path:
    """A .npy of calibration: ``count`` windows of prose in the model's own tokens."""
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode(_PROSE.read_text(encoding="utf-8")).ids
    vocab = modelspec.read(source).vocab
    known = np.array([i for i in ids if i < vocab][: count * length], dtype=np.int32)
    np.save(out, known.reshape(count, length))
    return out


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(path=folder, source=folder.name, revision=f"test-{folder.name}", license="unknown")


def heldout(count: int, length: int) -> torch.Tensor:
    """int64 [count, length] of the built-in model's held-out text."""
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids
    return torch.tensor(ids[: count * length]).view(count, length)


def plain_logits(source: Path, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [windows, tokens, vocab] of a plain float32 model of ``source``'s config with these weights."""
    config = AutoConfig.from_pretrained(source)
    config.quantization_config = None
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence over tokens, in nats."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
