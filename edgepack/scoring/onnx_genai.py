"""Logits by onnxruntime-genai: the graph that ships, with the cache and the generator that serve it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepack import serde
from edgepack.errors import BuildFailed, MissingTool
from edgepack.scoring import Facts, Logits, Options, serve
from edgepack.scoring.tokens import Tokenizer


class Model:
    """A folder of onnxruntime-genai's builder, made for a provider of this machine.

    Raises MissingTool without the package, and BuildFailed with its words when it does not load or compute.
    """

    def __init__(self, path: Path, options: Options) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise MissingTool(
                "onnxruntime-genai is not installed",
                hint="pip install 'edgepack[onnx]', or edgepack[onnx-gpu]",
            ) from error
        self._genai: Any = onnxruntime_genai
        told: Any = serde.read_object(path / "genai_config.json")["model"]
        threads = {"session_options": {"intra_op_num_threads": options.threads}}
        try:
            config = self._genai.Config(str(path))
            config.overlay(json.dumps({"model": {"decoder": threads}}))
            self._model = self._genai.Model(config)
        except RuntimeError as error:
            raise BuildFailed(
                f"onnxruntime-genai does not load {path.name}: {error}",
                hint="a graph made for CUDA is measured where there is a GPU",
            ) from error
        self._tokenizer = Tokenizer(path)
        ends = told["eos_token_id"]
        self.facts = Facts(
            runtime=f"onnxruntime-genai {onnxruntime_genai.__version__}",
            vocabulary=told["vocab_size"],
            tokens=self._tokenizer.known,
            context=told["context_length"],
            bos=self._tokenizer.bos,
            ends=(ends,) if isinstance(ends, int) else tuple(ends),
        )

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.tokenize(text)

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.text(tokens)

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """A graph whose head computes the last token only is run token by token from ``first`` on."""
        params = self._genai.GeneratorParams(self._model)
        # The cache is allocated for max_length at once, so it is no longer than this sequence needs.
        params.set_search_options(max_length=len(tokens) + 1, batch_size=1)
        try:
            generator = self._genai.Generator(self._model, params)
            found = self._after(generator, tokens)[first:]
            if len(found) == len(tokens) - first:
                return found
            generator = self._genai.Generator(self._model, params)
            rows = [self._after(generator, tokens[: first + 1])]
            rows += [self._after(generator, [token]) for token in tokens[first + 1 :]]
        except RuntimeError as error:
            raise BuildFailed(f"onnxruntime-genai does not compute the artifact: {error}") from error
        return np.concatenate([piece[-1:] for piece in rows])

    def _after(self, generator: Any, tokens: Sequence[int]) -> Logits:
        """Logits after each of the tokens that are added, or after the last of them."""
        generator.append_tokens(np.asarray([list(tokens)], dtype=np.int32))
        return np.asarray(generator.get_output("logits")[0], dtype=np.float32)


if __name__ == "__main__":
    serve(Model, sys.argv[1:])
