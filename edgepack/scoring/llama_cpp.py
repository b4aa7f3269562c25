"""Logits by llama.cpp through its C interface; also for use inside a process that already has the bindings."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgepack.errors import BuildFailed
from edgepack.ggufheader import BLOCKS
from edgepack.runtimes.llama_cpp import split_types
from edgepack.scoring import Facts, Logits, Options, serve
from edgepack.toolchain import COMMIT, LLAMA_VERSION, load_bindings

UBATCH = 256
"""Tokens computed at once: the weights are read once for so many, and llama.cpp holds as many rows of logits, 156 MB
for a vocabulary of 152,000."""

_UNUSED = 1 << 1
"""LLAMA_TOKEN_ATTR_UNUSED (llama.h): what converters call rows without a token."""
_ROOM = 256
"""A context is made for so many tokens or a multiple of it."""


class Model:
    """A GGUF, loaded once; its context grows to the longest sequence asked for. Close it, or use it in a `with`.

    Flash attention and the type of the KV cache are as llama-server runs the artifact. Raises BuildFailed with
    llama.cpp's last words when it does not load or compute.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self._llama: Any = load_bindings(Path(options.package))
        self._options = options
        self._said: list[bytes] = []
        self._listen = self._llama.llama_log_callback(lambda level, text, data: self._hear(text))
        self._llama.llama_log_set(self._listen, None)
        self._llama.llama_backend_init()
        self._context: Any = None
        self._room = 0
        self._held: list[int] = []
        self._model = self._llama.llama_model_load_from_file(
            os.fsencode(path), self._llama.llama_model_default_params()
        )
        if not self._model:
            raise BuildFailed(f"llama.cpp does not load {path.name}:\n{self._words()}")
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        vocabulary = self._llama.llama_vocab_n_tokens(self._vocab)
        adds = self._llama.llama_vocab_get_add_bos(self._vocab)
        self.facts = Facts(
            runtime=f"llama.cpp {LLAMA_VERSION} ({COMMIT[:9]}), KV cache {options.kv_type}",
            vocabulary=vocabulary,
            tokens=1
            + max(
                token
                for token in range(vocabulary)
                if not self._llama.llama_vocab_get_attr(self._vocab, token) & _UNUSED
            ),
            context=self._llama.llama_model_n_ctx_train(self._model),
            bos=self._llama.llama_vocab_bos(self._vocab) if adds else None,
            ends=tuple(
                token for token in range(vocabulary) if self._llama.llama_vocab_is_eog(self._vocab, token)
            ),
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._context is not None:
            self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)
        self._llama.llama_log_set(
            ctypes.cast(0, type(self._listen)), None
        )  # it would call what is gone with self
        self._context = self._model = None

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 16))()
        count = self._llama.llama_tokenize(self._vocab, raw, len(raw), room, len(room), False, True)
        if count < 0:
            raise BuildFailed(f"llama.cpp does not tokenize a text of {len(raw)} bytes")
        return list(room[:count])

    def text(self, tokens: Sequence[int]) -> str:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        size = 64 * (len(tokens) + 1)
        while True:
            room = ctypes.create_string_buffer(size)
            count = self._llama.llama_detokenize(self._vocab, ids, len(tokens), room, size, False, False)
            if count >= 0:
                return room.raw[:count].decode("utf-8", errors="replace")
            size = -count

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """What is common with the sequence before, up to ``first``, is still in the cache and not computed again."""
        wanted = list(tokens)
        self._make_room(len(wanted))
        memory = self._llama.llama_get_memory(self._context)
        keep = min(_common(self._held, wanted), first)
        if not self._llama.llama_memory_seq_rm(memory, 0, keep, -1):
            self._llama.llama_memory_clear(memory, True)
            keep = 0
        self._held = []
        out = np.empty((len(wanted) - first, self.facts.vocabulary), dtype=np.float32)
        for start in range(keep, len(wanted), UBATCH):
            self._decode(wanted, start, min(start + UBATCH, len(wanted)), first, out)
        self._held = wanted
        return out

    def _decode(self, tokens: list[int], start: int, end: int, first: int, out: Logits) -> None:
        """Computes the tokens from ``start`` to ``end`` and copies the logits from ``first`` on into ``out``."""
        batch = self._llama.llama_batch_init(end - start, 0, 1)
        try:
            batch.n_tokens = end - start
            for at in range(start, end):
                row = at - start
                batch.token[row], batch.pos[row], batch.n_seq_id[row] = tokens[at], at, 1
                batch.seq_id[row][0], batch.logits[row] = 0, at >= first
            status = self._llama.llama_decode(self._context, batch)
            if status != 0:
                raise BuildFailed(f"llama.cpp ended with status {status} while computing:\n{self._words()}")
        finally:
            self._llama.llama_batch_free(batch)
        begin = max(start, first)
        if begin < end:
            shape = (end - begin, self.facts.vocabulary)
            out[begin - first : end - first] = np.ctypeslib.as_array(
                self._llama.llama_get_logits(self._context), shape
            )

    def _make_room(self, tokens: int) -> None:
        if tokens <= self._room:
            return
        if self._context is not None:
            self._llama.llama_free(self._context)
            self._context, self._held = None, []
        key, value = split_types(self._options.kv_type)
        params = self._llama.llama_context_default_params()
        params.n_ctx = self._room = -(-tokens // _ROOM) * _ROOM
        params.n_batch = params.n_ubatch = UBATCH
        params.n_threads = params.n_threads_batch = self._options.threads
        params.flash_attn_type = 1
        params.type_k, params.type_v = BLOCKS[key.upper()][0], BLOCKS[value.upper()][0]
        self._context = self._llama.llama_init_from_model(self._model, params)
        if not self._context:
            self._context, self._room = None, 0
            raise BuildFailed(f"llama.cpp makes no context of {params.n_ctx} tokens:\n{self._words()}")

    def _hear(self, text: bytes) -> None:
        self._said.append(text)
        del self._said[:-40]

    def _words(self) -> str:
        return b"".join(self._said).decode("utf-8", errors="replace").strip()[-800:]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


if __name__ == "__main__":
    serve(Model, sys.argv[1:])
