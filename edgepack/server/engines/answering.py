"""How an engine answers, whatever computes its logits: what a slot holds is reused, the rest read in chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .. import template
from ..sampling import Chooser, likeliest, log_probabilities
from . import Sampling, Token
from .detokenize import Detokenizer

_LOOK_SECONDS = 0.1
"""How often one who waits for another slot's prompt looks whether its client is still there."""


class Cache(Protocol):
    """The keys and values of one slot's tokens."""

    def rewind(self, length: int) -> None:
        """Forgets what comes after ``length`` tokens."""
        ...

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens: the logits after the last of them, [vocabulary]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One sequence at a time, in the thread that answers."""

    cache: Cache
    held: list[int] = field(default_factory=list)
    """Tokens whose keys and values are known good; never more than the cache has. Other threads read it."""

    def common(self, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that need not be read again: all but its last at most, whose logits are wanted."""
        most = min(len(prompt) - 1, len(self.held))
        for place, (known, asked) in enumerate(zip(self.held, prompt, strict=False)):
            if place >= most or known != asked:
                return min(place, most)
        return max(most, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What all slots of an engine have in common."""

    ubatch: int
    """Tokens of a prompt that go through the model at once."""
    ends: frozenset[int]
    """Tokens that end a sequence."""
    decode: Callable[[Sequence[int]], str]
    reading: threading.Lock | None
    """Held while a prompt is read: activations and logits of a chunk exist once, however many slots there are."""
    last_alone: bool = False
    """Whether a prompt's last token goes through the model by itself, for a runtime that keeps the logits of the whole
    chunk until the next pass."""

    def answer(
        self,
        slot: Slot,
        prompt: Sequence[int],
        sampling: Sampling,
        limit: int,
        *,
        reuse: bool,
        cancelled: Callable[[], bool],
    ) -> Iterator[Token]:
        """`Engine.generate` for one slot."""
        if not self._begin(cancelled):
            return
        try:
            logits = self._read(slot, prompt, slot.common(prompt) if reuse else 0, cancelled)
        finally:
            if self.reading is not None:
                self.reading.release()
        chooser, text = Chooser(sampling), Detokenizer(self.decode, prompt)
        for count in range(limit):
            if logits is None or cancelled():
                return
            barred = self.ends if sampling.ignore_eos or count < sampling.min_tokens else frozenset[int]()
            chosen = chooser.choose(logits, tuple(barred))
            end = chosen in self.ends
            logs = log_probabilities(logits) if sampling.logprobs else None
            yield Token(
                id=chosen,
                text="" if end else text.push(chosen),
                logprob=None if logs is None else float(logs[chosen]),
                top=() if logs is None else likeliest(logs, sampling.logprobs),
                end=end,
            )
            if end or count + 1 == limit:
                return
            logits = slot.cache.read((chosen,))
            slot.held.append(chosen)

    def _begin(self, cancelled: Callable[[], bool]) -> bool:
        """Waits until no other slot reads a prompt; False when the client left meanwhile."""
        while self.reading is not None and not self.reading.acquire(timeout=_LOOK_SECONDS):
            if cancelled():
                return False
        return True

    def _read(
        self, slot: Slot, prompt: Sequence[int], kept: int, cancelled: Callable[[], bool]
    ) -> NDArray[np.float32] | None:
        """Logits after a prompt of which the slot holds ``kept`` tokens; None when it was cancelled before the end."""
        del slot.held[kept:]
        slot.cache.rewind(kept)
        logits = None
        for chunk in self._chunks(prompt, kept):
            if cancelled():
                return None
            logits = slot.cache.read(chunk)
            slot.held.extend(chunk)
        return logits

    def _chunks(self, prompt: Sequence[int], start: int) -> Iterator[Sequence[int]]:
        end = len(prompt) - 1 if self.last_alone else len(prompt)
        for first in range(start, end, self.ubatch):
            yield prompt[first : min(first + self.ubatch, end)]
        if self.last_alone:
            yield prompt[end:]


class Words(Protocol):
    """A model's tokenizer."""

    def encode(self, text: str, *, special: bool) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """`Engine` over a model that a library has loaded into this process."""

    name: str
    version: str
    vocabulary: int
    context: int
    slots: int
    chat_template: str | None
    marks: template.ChatTemplate
    """Of it also the texts of the special tokens."""
    words: Words
    parts: Mapping[str, int]
    reader: Reader
    sequences: tuple[Slot, ...]
    end: Callable[[], None]
    """Gives back what the library holds."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return self.words.encode(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self.words.decode(tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = template.render(self.chat_template, messages, bos=self.marks.bos, eos=self.marks.eos)
        return self.words.encode(text, special=False)

    def memory(self) -> Mapping[str, int]:
        return self.parts

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
        return self.reader.answer(
            self.sequences[slot], prompt, sampling, limit, reuse=reuse, cancelled=cancelled
        )

    def cached(self, slot: int, prompt: Sequence[int]) -> int:
        return self.sequences[slot].common(prompt)

    def close(self) -> None:
        self.end()
