"""Building the formats that are no GGUF from the built-in model, and what that model itself answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
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

DEMO = catalog.built_in()["demo"]

Floats = np.ndarray[Any, np.dtype[np.float32]]


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


def copied(source: Path, folder: Path) -> Path:
    """The same model elsewhere, so that paths in an artifact show."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def random_model(folder: Path, model_type: str, **options: object) -> Path:
    """A model of random weights, small and of any architecture of transformers, with the built-in tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).to(torch.float16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros are left out of a graph
            torch.nn.init.normal_(parameter, std=0.1)
    copied(DEMO, folder)
    model.save_pretrained(folder)
    return folder


def windows(folder: Path, *, count: int, tokens: int) -> Path:
    """Calibration windows from the end of the held-out text, [count, tokens]; tests of answers read its start."""
    path = folder / "windows.npy"
    np.save(path, heldout()[-count * tokens :].reshape(count, tokens))
    return path


_RELOAD = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM
ids = torch.from_numpy(np.load(sys.argv[1]))[None]
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    with torch.inference_mode():
        np.save(folder + ".logits.npy", model(ids).logits[0].float().numpy())
"""


def reloaded(artifacts: Mapping[str, Artifact], *, tokens: int) -> dict[str, Floats]:
    """What a fresh process with plain transformers says of the first tokens of the held-out text, [tokens, vocabulary].

    That process has never seen the weights from which the artifacts were made.
    """
    folders = [str(artifact.path) for artifact in artifacts.values()]
    ids = Path(f"{folders[0]}.ids.npy")
    np.save(ids, heldout()[:tokens].astype(np.int64))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RELOAD, ids, *folders], check=True, capture_output=True
    )
    return {scheme: np.load(f"{artifact.path}.logits.npy") for scheme, artifact in artifacts.items()}


def quantize_here(
    scheme: str, folder: Path, *, source: Path, windows: Path | None = None, backend: Backend = "cpu"
) -> str:
    """Quantizes in this very process, and returns the digest of the folder."""
    folder.mkdir(parents=True)
    job = Job(
        source=source, out=folder, scheme=scheme, windows=windows, backend=backend, context=256, threads=1, seed=0
    )  # fmt: skip
    quantizers.named(scheme).quantize(job)
    return quantizers.folder_sha256(folder)


@lru_cache(maxsize=1)
def heldout() -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids of the text that the built-in model was not trained on."""
    from tokenizers import Tokenizer

    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids
    return np.array(ids, dtype=np.int32)


@lru_cache(maxsize=8)
def logits(source: Path, start: int, length: int) -> Floats:
    """What the unquantized model says in f32 of so many tokens of the held-out text, [length, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.from_numpy(heldout()[None, start : start + length].astype(np.int64))
        said: Floats = model(ids).logits[0].numpy()
    return said


def divergence(reference: Floats, other: Floats) -> float:
    """Mean over the tokens of KL(reference || other), in nats."""
    p, q = (
        x - x.max(axis=-1, keepdims=True) for x in (reference.astype(np.float64), other.astype(np.float64))
    )
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def document(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
