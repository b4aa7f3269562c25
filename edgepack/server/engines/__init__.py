"""What the server asks of a runtime: token ids in, one token at a time out, all memory taken when it loads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

KvType = Literal["f32", "f16", "bf16"]
Provider = Literal["cpu", "cuda"]

MODULES: Mapping[str, str] = {"onnx-genai": ".onnx_genai", "transformers": ".transformers"}


class CannotLoad(Exception):
    """The engine or its model cannot be loaded here: the reason in one line, and what to do about it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CannotTokenize(ValueError):
    """A text that the runtime's tokenizer does not take: the request is wrong, not the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line's values that an engine needs."""

    model: Path
    """Folder of the artifact."""
    context: int
    """Tokens that one slot holds (--ctx-size // --parallel)."""
    slots: int
    ubatch: int
    """Tokens of a prompt that go through the model at once."""
    kv_type: KvType
    threads: int
    provider: Provider


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: temperature 0 is the most likely one, top_k 0 and top_p 1 leave all in.

    The same seed, prompt and values give the same tokens; without a seed each call differs. ``min_tokens`` bars
    the end of the sequence before so many tokens, ``ignore_eos`` until the limit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int = 0
    """Most likely tokens to report with each token; 0 reports none, and no log probability of the token itself."""
    ignore_eos: bool = False
    min_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token."""

    id: int
    text: str
    """Text that became whole characters with this token: "" while a character is unfinished."""
    logprob: float | None
    """Natural logarithm of its probability, of the model's raw logits before temperature and filters."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens with their log probabilities, the likeliest first."""
    end: bool
    """This is an end-of-sequence token; its text is ""."""


class Engine(Protocol):
    """A loaded model. Everything that grows with use is allocated when it loads, for all slots."""

    name: str
    version: str
    vocabulary: int
    context: int
    """Tokens that one slot holds, prompt and answer together."""
    slots: int
    chat_template: str | None

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; ``special``: with what the tokenizer adds, such as a beginning of sequence.

        Raises CannotTokenize.
        This, ``detokenize`` and ``render`` are called one at a time, from another thread than the slots'.
        """
        ...

    def detokenize(self, tokens: Sequence[int]) -> str: ...

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's chat template; raises template.TemplateRefused."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Bytes that are known exactly: "weights" and "kv_cache"."""
        ...

    def generate(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: Sampling,
        limit: int,
        *,
        reuse: bool,
        cancelled: Callable[[], bool],
    ) -> Iterator[Token]:
        """At most ``limit`` tokens that follow a prompt; prompt and limit fit into the slot together.

        Runs in the thread of its slot. Asks ``cancelled()`` between chunks of the prompt and between tokens and
        then ends; so it does when the iterator is closed. Keeps the slot's KV cache for the next call, which
        starts from it unless ``reuse`` is false. After an end-of-sequence token nothing follows.
        """
        ...

    def cached(self, slot: int, prompt: Sequence[int]) -> int:
        """Tokens of this prompt that the slot already holds. Any thread may ask, also while the slot works."""
        ...

    def close(self) -> None: ...


def load(name: str, options: Options) -> Engine:
    """The engine of that name with its model loaded. Raises CannotLoad.

    An engine's module has ``load(options) -> Engine`` and imports its library only there.
    """
    if name not in MODULES:
        raise CannotLoad(f"{name} is not an engine", hint=f"one of {', '.join(sorted(MODULES))}")
    module = importlib.import_module(MODULES[name], __name__)
    return cast("Engine", module.load(options))  # a module found by its name has no static type
