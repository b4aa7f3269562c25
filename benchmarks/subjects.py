"""The models that comparisons run on: the built-in one, and random weights in two shapes of Qwen2's."""

from __future__ import annotations

from pathlib import Path

import memory_accuracy

from edgepack import hub, pipeline
from edgepack.artifact import Artifact
from edgepack.modelspec import ModelSpec
from edgepack.progress import Silent

SHAPE = "qwen2.5-0.5b"
SMALL = "qwen2-0.15b"
"""For what is built again and again."""
KNOWN_AS = "qwen2"
"""How llama.cpp calls what the tokenizers of all these models do before they merge."""


def source(name: str, folder: Path) -> Path:
    """The Hugging Face folder; random weights are made once."""
    if name == "demo":
        return hub.resolve(name, revision=None, offline=True, progress=Silent()).path
    return memory_accuracy.random_model(name, folder)


def artifact(name: str, scheme: str, folder: Path) -> tuple[ModelSpec, Artifact]:
    """What edgepack makes of it, made once."""
    path = source(name, folder)
    spec = pipeline.read_model(path)
    return spec, memory_accuracy.build(path, spec, scheme, folder / name)
