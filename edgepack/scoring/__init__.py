"""Logits of any artifact through its own runtime: one module a runtime, each run in a process of its own.

The process answers one request at a time: `tokenize`, `text` and `logits`. What it is asked is a line of JSON on its
stdin; what it answers is a line of JSON on its stdout and, for logits, that many rows of raw float32 behind it. So
the memory of both sides is that of one request, and a library's environment, prints and crashes stay with it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from edgepack import errors, serde, toolchain
from edgepack.builders import child
from edgepack.errors import BuildFailed, EdgepackError, NotFound, Unsupported
from edgepack.shell import Dialog, dialog
from edgepack.toolchain import COMMIT

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a runtime says about the model it has loaded."""

    runtime: str
    """Name, version, and the types it computes in where they are not the model's own."""
    vocabulary: int
    """Logits a row: rows of the output matrix, padding included."""
    tokens: int
    """Ids below it are tokens; what rows from it on say is nothing (a matrix is padded for speed)."""
    context: int
    """Tokens it was trained on; longer windows mean nothing."""
    bos: int | None
    """Token that every text starts with; None for a model that wants none."""
    ends: tuple[int, ...]
    """Tokens that end an answer."""


class Model(Protocol):
    """A loaded model, in its own process: what each runtime's module implements."""

    facts: Facts

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text alone, without what the model wants around it."""
        ...

    def text(self, tokens: Sequence[int]) -> str: ...

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """Logits after each of ``tokens[first:]``: [tokens - first, vocabulary]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a runtime is to compute; what it does not know it leaves alone."""

    threads: int
    kv_type: str = "f16"
    """KV cache of llama.cpp: the plan's, for the cache's rounding is part of what ships."""
    package: str = ""
    """Folder of llama.cpp's bindings (toolchain.Toolchain.package)."""


class Scorer:
    """A `Model` in another process; raises the errors that it raised."""

    def __init__(self, process: Dialog) -> None:
        self._process = process
        facts = self._answer()
        self.facts = Facts(**{**facts, "ends": tuple(facts["ends"])})

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self._ask(tokenize=text)["tokens"]
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._ask(text=[int(token) for token in tokens])["text"])

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        rows = self._ask(logits=[int(token) for token in tokens], first=first)["rows"]
        shape = (rows, self.facts.vocabulary)
        return np.frombuffer(self._process.read(4 * rows * shape[1]), dtype=np.float32).reshape(shape)

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._process.send(json.dumps(request))
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._process.line())
        if "error" in answer:
            kind = getattr(errors, answer["error"], EdgepackError)
            raise kind(answer["message"], hint=answer["hint"])
        return answer


def runtime_of(artifact: Path) -> str:
    """Module of the runtime that runs an artifact: a .gguf file, a folder of onnxruntime-genai's, or a checkpoint.

    Raises NotFound, and Unsupported for anything else.
    """
    if not artifact.exists():
        raise NotFound(f"{artifact} does not exist", hint="check the path")
    if artifact.is_file() and artifact.suffix == ".gguf":
        return "llama_cpp"
    if (artifact / "genai_config.json").is_file():
        return "onnx_genai"
    if (artifact / "config.json").is_file():
        return "transformers"
    raise Unsupported(
        f"{artifact} is no artifact that can be measured",
        hint="a .gguf, a folder with config.json and weights, one with genai_config.json, or a bundle",
    )


_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "transformers": ("transformers", "torch", "GPTQModel", "compressed-tensors", "bitsandbytes"),
    "onnx_genai": ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime", "onnxruntime-gpu"),
}
"""Distributions that compute a runtime's logits."""


def version_for(parent: Path, artifact: Path) -> str:
    """What computes a parent's logits when it is compared with an artifact: part of the reference's name."""
    on_llama = "llama_cpp" in (runtime_of(artifact), runtime_of(parent))
    return _version("llama_cpp" if on_llama else "transformers")


def version_of(artifact: Path) -> str:
    """What computes an artifact's logits, before it is loaded: part of the name under which its figures are kept."""
    return _version(runtime_of(artifact))


def _version(module: str) -> str:
    if module == "llama_cpp":
        return f"llama.cpp {COMMIT}"
    there = {found.name: found.version for found in importlib.metadata.distributions()}
    return ", ".join(f"{name} {there[name]}" for name in _PACKAGES[module] if name in there)


@contextmanager
def opened(artifact: Path, *, kv_type: str = "f16", threads: int | None = None) -> Iterator[Scorer]:
    """The artifact, loaded by its runtime in a process that ends with the block.

    Raises NotFound, Unsupported, MissingTool with the extra to install, and BuildFailed with the runtime's words
    when it does not load or compute the artifact.
    """
    module = runtime_of(artifact)
    package = str(toolchain.find().package.resolve()) if module == "llama_cpp" else ""
    count = threads or len(os.sched_getaffinity(0))
    options = Options(threads=count, kv_type=kv_type, package=package)
    environment = child.environment_of(count) | {"GPTQMODEL_CPU_WORKERS": "2"}
    words: list[str | Path] = [
        sys.executable,
        "-m",
        f"{__name__}.{module}",
        artifact.resolve(),
        json.dumps(asdict(options)),
    ]
    with dialog(words, env=environment) as process:
        yield Scorer(process)


# ── the other process ──


def serve(load: Any, words: Sequence[str]) -> None:
    """Answers requests until stdin ends. ``load(path, options)`` gives the `Model`.

    stdout is kept for answers: whatever a library prints goes to stderr.
    """
    child.end_with_parent()
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        try:
            model: Model = load(Path(words[0]), Options(**json.loads(words[1])))
            _say(out, asdict(model.facts))
            for line in sys.stdin:
                _reply(out, model, json.loads(line))
        except EdgepackError as error:
            _say(out, {"error": type(error).__name__, "message": error.message, "hint": error.hint})
        except Exception as error:  # a library's words without its traceback: they raise whatever they like
            said = str(error).strip().partition("\n")[0][:300]
            message = f"{Path(words[0]).name} cannot be run: {type(error).__name__}: {said}"
            _say(out, {"error": "BuildFailed", "message": message, "hint": "the artifact may be damaged"})


def _reply(out: BinaryIO, model: Model, request: Mapping[str, Any]) -> None:
    match request:
        case {"tokenize": text}:
            _say(out, {"tokens": model.tokenize(text)})
        case {"text": tokens}:
            _say(out, {"text": model.text(tokens)})
        case {"logits": tokens, "first": first}:
            rows = np.ascontiguousarray(model.logits(tokens, first), dtype=np.float32)
            if rows.shape != (len(tokens) - first, model.facts.vocabulary):
                raise BuildFailed(f"{model.facts.runtime} gave logits of shape {rows.shape}")
            _say(out, {"rows": len(rows)})
            out.write(rows.data)
            out.flush()


def _say(out: BinaryIO, answer: Mapping[str, Any]) -> None:
    out.write(json.dumps(answer).encode() + b"\n")
    out.flush()


def config(folder: Path) -> Mapping[str, object]:
    """config.json of a checkpoint."""
    return serde.read_object(folder / "config.json")
