"""Logits by transformers: checkpoints of floats computed in float32, quantized ones as transformers loads them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import BuildFailed, MissingTool
from edgepack.scoring import Facts, Logits, Options, config, serve
from edgepack.scoring.tokens import Tokenizer


class Model:
    """A checkpoint folder, on the GPU when there is one. Needs four bytes a parameter where it is not quantized.

    Raises MissingTool for a library that the format needs, and BuildFailed when it does not load or compute.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self._model = load(path, threads=options.threads)
        import torch
        import transformers

        self._torch = torch
        self._device = self._model.device.type
        self._tokenizer = Tokenizer(path)
        shape = self._model.config.get_text_config()
        kind = str(self._model.dtype).removeprefix("torch.")
        self.facts = Facts(
            runtime=f"transformers {transformers.__version__}, torch {torch.__version__}, {kind} on {self._device}",
            vocabulary=shape.vocab_size,
            tokens=self._tokenizer.known,
            context=shape.max_position_embeddings,
            bos=self._tokenizer.bos,
            ends=_ends(self._model.generation_config.eos_token_id),
        )

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.tokenize(text)

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.text(tokens)

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        ids = self._torch.tensor([list(tokens)], device=self._device)
        try:
            with self._torch.inference_mode():
                found = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens) - first).logits
        except RuntimeError as error:
            raise BuildFailed(f"transformers does not compute the artifact: {error}") from error
        return np.asarray(found[0].float().cpu().numpy(), dtype=np.float32)


def load(path: Path, *, threads: int) -> Any:
    """A checkpoint as a transformers model that is ready to be run, on the GPU when there is one.

    Raises MissingTool for a library that the format needs, and BuildFailed when it does not load.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingTool(f"{error.name} is not installed", hint="pip install 'edgepack[torch]'") from error
    torch.set_num_threads(threads)
    plain = "quantization_config" not in config(path)
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if plain else "auto",
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except ImportError as error:
        raise MissingTool(
            f"transformers needs another library for {path.name}: {error}",
            hint="pip install 'edgepack[quant]'",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise BuildFailed(f"transformers does not load {path.name}: {error}") from error
    return model.eval()


def _ends(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


if __name__ == "__main__":
    serve(Model, sys.argv[1:])
