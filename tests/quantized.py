"""Building the formats that are no GGUF from the built-in model, and what that model itself answers."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgepack import catalog, modelspec
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import quantizers
from edgepack.builders.quantizers import Job
from edgepack.profile import Backend
from edgepack.progress import Silent

DEMO = catalog.built_in_folder()


def build(
    scheme: str,
    folder: Path,
    *,
    source: Path = DEMO,
    windows: Path | None = None,
    backend: Backend = "cpu",
    context: int = 256,
) -> Artifact:
    checkpoint = Checkpoint(path=source, source=str(source), revision="sha256:test", license="unknown")
    job = Job(
        source=source, out=folder, scheme=scheme, windows=windows, backend=backend, context=context, threads=1, seed=0
    )  # fmt: skip
    calibration = None if windows is None else "of the test"
    return quantizers.build(
        checkpoint, modelspec.read(source), job, folder, calibration=calibration, progress=Silent()
    )


@lru_cache(maxsize=1)
def heldout() -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids of the text that the built-in model was not trained on."""
    from tokenizers import Tokenizer

    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids
    return np.array(ids, dtype=np.int32)


@lru_cache(maxsize=8)
def logits(source: Path, start: int, length: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What the unquantized model says in f32 of so many tokens of the held-out text, [length, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.from_numpy(heldout()[None, start : start + length].astype(np.int64))
        said: np.ndarray[Any, np.dtype[np.float32]] = model(ids).logits[0].numpy()
    return said


def divergence(
    reference: np.ndarray[Any, np.dtype[np.float32]], other: np.ndarray[Any, np.dtype[np.float32]]
) -> float:
    """Mean over the tokens of KL(reference || other), in nats."""
    p, q = (
        x - x.max(axis=-1, keepdims=True) for x in (reference.astype(np.float64), other.astype(np.float64))
    )
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def document(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
