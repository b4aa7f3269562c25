"""onnxruntime-genai's C interface: its Python classes hold the interpreter's lock during a whole pass of the model.

A chunk of a prompt takes seconds on a small device, and meanwhile no other request and no /health would be answered;
ctypes gives the lock back. The functions are those of ort_genai_c.h, 0.18.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int32, c_size_t, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import CannotTokenize


class GenaiError(Exception):
    """The library's own words."""


_RESULTS = {
    "OgaCreateConfig": (c_char_p, POINTER(c_void_p)),
    "OgaConfigClearProviders": (c_void_p,),
    "OgaConfigAppendProvider": (c_void_p, c_char_p),
    "OgaConfigOverlay": (c_void_p, c_char_p),
    "OgaCreateModelFromConfig": (c_void_p, POINTER(c_void_p)),
    "OgaCreateGeneratorParams": (c_void_p, POINTER(c_void_p)),
    "OgaGeneratorParamsSetSearchNumber": (c_void_p, c_char_p, c_double),
    "OgaGeneratorParamsSetSearchBool": (c_void_p, c_char_p, c_bool),
    "OgaCreateGenerator": (c_void_p, c_void_p, POINTER(c_void_p)),
    "OgaGenerator_AppendTokens": (c_void_p, POINTER(c_int32), c_size_t),
    "OgaGenerator_RewindTo": (c_void_p, c_size_t),
    "OgaGenerator_GetLogits": (c_void_p, POINTER(c_void_p)),
    "OgaTensorGetData": (c_void_p, POINTER(c_void_p)),
    "OgaCreateTokenizer": (c_void_p, POINTER(c_void_p)),
    "OgaUpdateTokenizerOptions": (c_void_p, POINTER(c_char_p), POINTER(c_char_p), c_size_t),
    "OgaCreateSequences": (POINTER(c_void_p),),
    "OgaTokenizerEncode": (c_void_p, c_char_p, c_void_p),
    "OgaTokenizerDecode": (c_void_p, POINTER(c_int32), c_size_t, POINTER(c_void_p)),
}
"""Functions that return null or an error, with their parameters."""

_DESTROYERS = (
    "Config",
    "Model",
    "GeneratorParams",
    "Generator",
    "Tensor",
    "Tokenizer",
    "Sequences",
    "Result",
    "String",
)


class Library:
    """The loaded library: `call` raises what a function reports."""

    def __init__(self) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = (
            "1"  # read when the library starts; it would write an id and upload
        )
        import onnxruntime_genai

        self.version: str = onnxruntime_genai.__version__
        folder = Path(onnxruntime_genai.__file__).parent
        self._c = ctypes.CDLL(str(next(folder.glob("libonnxruntime-genai.*"))))
        for name, parameters in _RESULTS.items():
            function = getattr(self._c, name)
            function.argtypes, function.restype = parameters, c_void_p
        for name in _DESTROYERS:
            function = getattr(self._c, f"OgaDestroy{name}")
            function.argtypes, function.restype = (c_void_p,), None
        self._c.OgaResultGetError.argtypes, self._c.OgaResultGetError.restype = (c_void_p,), c_char_p
        self._c.OgaSequencesGetSequenceCount.argtypes = (c_void_p, c_size_t)
        self._c.OgaSequencesGetSequenceCount.restype = c_size_t
        self._c.OgaSequencesGetSequenceData.argtypes = (c_void_p, c_size_t)
        self._c.OgaSequencesGetSequenceData.restype = POINTER(c_int32)

    def call(self, name: str, *arguments: object) -> None:
        """Raises GenaiError."""
        result = getattr(self._c, name)(*arguments)
        if result:
            message = self._c.OgaResultGetError(result).decode("utf-8", "replace")
            self._c.OgaDestroyResult(result)
            raise GenaiError(message)

    def make(self, name: str, *arguments: object) -> c_void_p:
        """What a function makes; it is to be destroyed."""
        made = c_void_p()
        self.call(name, *arguments, byref(made))
        return made

    def destroy(self, kind: str, thing: c_void_p) -> None:
        getattr(self._c, f"OgaDestroy{kind}")(thing)

    def sequence(self, sequences: c_void_p) -> list[int]:
        """The tokens of the first of some sequences."""
        count = self._c.OgaSequencesGetSequenceCount(sequences, 0)
        found: list[int] = self._c.OgaSequencesGetSequenceData(sequences, 0)[:count]
        return found


class Model:
    """A model with its tokenizer; generators made of it are to be closed before it."""

    def __init__(self, library: Library, folder: Path, *, provider: str, overlay: str) -> None:
        """``overlay``: JSON that is laid over genai_config.json."""
        self._library = library
        config = library.make("OgaCreateConfig", str(folder).encode())
        try:
            library.call("OgaConfigClearProviders", config)
            if provider != "cpu":
                library.call("OgaConfigAppendProvider", config, provider.encode())
            library.call("OgaConfigOverlay", config, overlay.encode())
            self._model = library.make("OgaCreateModelFromConfig", config)
        finally:
            library.destroy("Config", config)
        self._tokenizer = library.make("OgaCreateTokenizer", self._model)
        self._tokenizing = threading.Lock()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. Raises CannotTokenize for one with a NUL, which would end it."""
        raw = text.encode()
        if b"\0" in raw:
            raise CannotTokenize("a NUL character in the text cannot be tokenized")
        key, value = (c_char_p * 1)(b"add_special_tokens"), (c_char_p * 1)(b"true" if special else b"false")
        with self._tokenizing:
            self._library.call("OgaUpdateTokenizerOptions", self._tokenizer, key, value, 1)
            sequences = self._library.make("OgaCreateSequences")
            try:
                self._library.call("OgaTokenizerEncode", self._tokenizer, raw, sequences)
                return self._library.sequence(sequences)
            finally:
                self._library.destroy("Sequences", sequences)

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, without special tokens."""
        if not tokens:
            return ""
        with self._tokenizing:
            text = self._library.make(
                "OgaTokenizerDecode", self._tokenizer, (c_int32 * len(tokens))(*tokens), len(tokens)
            )
        try:
            return ctypes.string_at(text.value or 0).decode("utf-8", "replace")
        finally:
            self._library.destroy("String", text)

    def generator(self, *, max_length: int, vocabulary: int) -> Generator:
        """One sequence; its whole cache is allocated here."""
        parameters = self._library.make("OgaCreateGeneratorParams", self._model)
        try:
            for name, number in (("max_length", max_length), ("batch_size", 1), ("num_beams", 1)):
                self._library.call("OgaGeneratorParamsSetSearchNumber", parameters, name.encode(), number)
            share = ("OgaGeneratorParamsSetSearchBool", parameters, b"past_present_share_buffer", True)
            self._library.call(*share)
            made = self._library.make("OgaCreateGenerator", self._model, parameters)
        finally:
            self._library.destroy("GeneratorParams", parameters)
        return Generator(self._library, made, vocabulary)

    def close(self) -> None:
        self._library.destroy("Tokenizer", self._tokenizer)
        self._library.destroy("Model", self._model)


class Generator:
    """The cache of one sequence (answering.Cache)."""

    def __init__(self, library: Library, generator: c_void_p, vocabulary: int) -> None:
        self._library = library
        self._generator = generator
        self._vocabulary = vocabulary

    def rewind(self, length: int) -> None:
        self._library.call("OgaGenerator_RewindTo", self._generator, length)

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        count = len(tokens)
        self._library.call("OgaGenerator_AppendTokens", self._generator, (c_int32 * count)(*tokens), count)
        tensor = self._library.make("OgaGenerator_GetLogits", self._generator)
        try:
            data = c_void_p()
            self._library.call("OgaTensorGetData", tensor, byref(data))
            return np.frombuffer(ctypes.string_at(data.value or 0, 4 * self._vocabulary), dtype=np.float32)
        finally:
            self._library.destroy("Tensor", tensor)

    def close(self) -> None:
        self._library.destroy("Generator", self._generator)
