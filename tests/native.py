"""llama.cpp inside the test process, through its C interface: token ids and logits of a GGUF."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack import toolchain


class Native:
    """A loaded model; use it as a context manager."""

    def __init__(self, path: Path, *, context: int = 256) -> None:
        self.llama: Any = toolchain.find().bindings()
        self.llama.llama_backend_init()
        params = self.llama.llama_model_default_params()
        params.load_mode, params.use_extra_bufts = 0, False
        self.model = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = self.llama.llama_model_get_vocab(self.model)
        wanted = self.llama.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = context
        wanted.n_threads = wanted.n_threads_batch = 1
        wanted.flash_attn_type = 0
        wanted.type_k = wanted.type_v = 0  # F32: the reference has no rounding here either
        self.context = self.llama.llama_init_from_model(self.model, wanted)
        assert self.context

    def __enter__(self) -> Native:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of ``text``, with the tokens around it that the model asks for."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 16))()
        count = self.llama.llama_tokenize(self.vocab, raw, len(raw), room, len(room), special, True)
        assert count >= 0
        return list(room[:count])

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits after every token: (tokens, vocabulary)."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, 1
        assert self.llama.llama_decode(self.context, batch) == 0
        width = self.llama.llama_vocab_n_tokens(self.vocab)
        values: NDArray[np.float32] = np.ctypeslib.as_array(
            self.llama.llama_get_logits(self.context), (len(tokens), width)
        ).copy()
        self.llama.llama_batch_free(batch)
        return values
