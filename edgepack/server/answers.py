"""What a caller gets: tokens put into OpenAI's objects, whole or in chunks, and their numbers into log and metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .engines import Token
from .guard import Exchange
from .metrics import Metrics
from .scheduler import End, Event, FinishReason, Piece, Started
from .schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)

IMPOSSIBLE = -9999.0
"""Log probability written for one that JSON cannot carry (vLLM's and OpenAI's number)."""

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What came together: the text that is certain and the tokens behind it."""

    text: str
    pieces: Sequence[Piece]
    reason: FinishReason | None
    offset: int
    """Characters of all tokens before these, text that a stop string cut included."""


def joined(parts: Sequence[Part]) -> Part:
    """All parts of an answer as one."""
    return Part(
        text="".join(part.text for part in parts),
        pieces=[piece for part in parts for piece in part.pieces],
        reason=parts[-1].reason,
        offset=0,
    )


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts an answer's tokens and times while it comes."""

    exchange: Exchange
    metrics: Metrics
    prompt: int
    cached: int = 0
    tokens: int = 0
    characters: int = 0
    _last: float | None = None

    def part(self, events: Sequence[Event]) -> Part:
        """One part of the answer out of what has happened since the last."""
        offset = self.characters
        text: list[str] = []
        pieces: list[Piece] = []
        reason: FinishReason | None = None
        for event in events:
            if isinstance(event, Started):
                self._start(event)
            elif isinstance(event, Piece):
                self._count(event)
                pieces.append(event)
                text.append(event.text)
            elif isinstance(event, End):
                text.append(event.text)
                reason = self.exchange.finish_reason = event.reason
        return Part(text="".join(text), pieces=pieces, reason=reason, offset=offset)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.tokens,
            total_tokens=self.prompt + self.tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached),
        )

    def _start(self, started: Started) -> None:
        self.cached = started.cached
        self.metrics.prompt_tokens.add(self.prompt)
        self.metrics.cached_tokens.add(self.cached)
        one = self.exchange
        one.prompt_tokens, one.cached_tokens, one.slot = self.prompt, self.cached, started.slot
        one.completion_tokens = 0
        one.waited = started.at - one.arrived

    def _count(self, piece: Piece) -> None:
        if self._last is None:
            self.exchange.first_token = piece.at - self.exchange.arrived
            self.metrics.first_token.observe(self.exchange.first_token)
        else:
            self.metrics.between_tokens.observe(piece.at - self._last)
        self._last = piece.at
        self.tokens += 1
        self.characters += len(piece.token.text)
        self.exchange.completion_tokens = self.tokens
        self.metrics.generation_tokens.add()


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How tokens are called in log probabilities."""

    text: Callable[[int], str]
    """The text of a token alone."""
    as_ids: bool
    """As "token_id:123"."""

    def chosen(self, token: Token) -> str:
        return token.text if token.text and not self.as_ids else self.other(token.id)

    def other(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.text(token)


class Shape(Protocol):
    """One of OpenAI's two ways to write an answer. Methods may ask for names of tokens, which takes the tokenizer."""

    def first(self) -> bytes:
        """What a stream opens with."""
        ...

    def chunk(self, part: Part) -> bytes: ...

    def last(self, usage: Usage) -> bytes:
        """The chunk with the usage alone."""
        ...

    def whole(self, part: Part, usage: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What of an answer was asked for."""

    id: str
    model: str
    logprobs: int | None
    """Alternatives to report with each token; None: no log probabilities at all."""
    names: Names
    token_ids: bool
    stream: bool
    usage: bool
    """A stream ends with a chunk of its usage."""
    created: int = field(default_factory=lambda: int(time.time()))

    def ids(self, part: Part) -> list[int] | None:
        return [piece.token.id for piece in part.pieces] if self.token_ids else None

    def shows(self, part: Part) -> bool:
        """Whether a chunk with this part says anything."""
        details = self.logprobs is not None or self.token_ids
        return bool(part.text or part.reason is not None or (details and part.pieces))


@dataclass(frozen=True, slots=True)
class AsCompletion:
    wanted: Wanted

    def first(self) -> bytes:
        return b""

    def chunk(self, part: Part) -> bytes:
        return _event(self._object(part, None)) if self.wanted.shows(part) else b""

    def last(self, usage: Usage) -> bytes:
        wanted = self.wanted
        empty = Completion(id=wanted.id, created=wanted.created, model=wanted.model, choices=[], usage=usage)
        return _event(empty)

    def whole(self, part: Part, usage: Usage) -> bytes:
        return _json(self._object(part, usage))

    def _object(self, part: Part, usage: Usage | None) -> Completion:
        wanted = self.wanted
        choice = CompletionChoice(
            index=0,
            text=part.text,
            logprobs=self._logprobs(part),
            finish_reason=part.reason,
            token_ids=wanted.ids(part),
        )
        return Completion(
            id=wanted.id, created=wanted.created, model=wanted.model, choices=[choice], usage=usage
        )

    def _logprobs(self, part: Part) -> CompletionLogprobs | None:
        count, names = self.wanted.logprobs, self.wanted.names
        if count is None:
            return None
        out = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        offset = part.offset
        for piece in part.pieces:
            token = piece.token
            name, value = names.chosen(token), _chosen(token)
            top = {name: value}
            for other, logprob in token.top[:count]:
                if other != token.id:
                    top.setdefault(names.other(other), _writable(logprob))
            out.tokens.append(name)
            out.token_logprobs.append(value)
            out.text_offset.append(offset)
            out.top_logprobs.append(top)
            offset += len(token.text)
        return out


@dataclass(frozen=True, slots=True)
class AsChat:
    wanted: Wanted

    def first(self) -> bytes:
        return self._chunk(Delta(role="assistant", content=""), None, None, None)

    def chunk(self, part: Part) -> bytes:
        if not self.wanted.shows(part):
            return b""
        delta = Delta(content=part.text) if part.text or part.reason is None else Delta()
        return self._chunk(delta, self._logprobs(part), part.reason, self.wanted.ids(part))

    def last(self, usage: Usage) -> bytes:
        wanted = self.wanted
        empty = ChatChunk(id=wanted.id, created=wanted.created, model=wanted.model, choices=[], usage=usage)
        return _event(empty)

    def whole(self, part: Part, usage: Usage) -> bytes:
        wanted = self.wanted
        choice = ChatChoice(
            index=0,
            message=AssistantMessage(content=part.text),
            logprobs=self._logprobs(part),
            finish_reason=ended(part),
            token_ids=wanted.ids(part),
        )
        answer = ChatCompletion(
            id=wanted.id, created=wanted.created, model=wanted.model, choices=[choice], usage=usage
        )
        return _json(answer)

    def _chunk(
        self, delta: Delta, logprobs: ChatLogprobs | None, reason: FinishReason | None, ids: list[int] | None
    ) -> bytes:
        wanted = self.wanted
        choice = ChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=reason, token_ids=ids)
        return _event(ChatChunk(id=wanted.id, created=wanted.created, model=wanted.model, choices=[choice]))

    def _logprobs(self, part: Part) -> ChatLogprobs | None:
        count, names = self.wanted.logprobs, self.wanted.names
        if count is None:
            return None
        content = []
        for piece in part.pieces:
            token = piece.token
            name = names.chosen(token)
            top = [
                _top(name if other == token.id else names.other(other), _writable(logprob))
                for other, logprob in token.top[:count]
            ]
            chosen = _top(name, _chosen(token))
            content.append(
                TokenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)
            )
        return ChatLogprobs(content=content)


def ended(part: Part) -> FinishReason:
    if part.reason is None:
        raise RuntimeError("a whole answer without an end")
    return part.reason


def error_event(body: dict[str, object]) -> bytes:
    """An error in the middle of a stream."""
    return b"data: " + json.dumps(body).encode("ascii") + b"\n\n"


def _top(name: str, logprob: float) -> TopLogprob:
    known = None if "\ufffd" in name else list(name.encode("utf-8"))  # part of a character has no bytes here
    return TopLogprob(token=name, logprob=logprob, bytes=known)


def _chosen(token: Token) -> float:
    if token.logprob is None:
        raise RuntimeError("the engine gave a token without the log probability that was asked for")
    return _writable(token.logprob)


def _writable(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)


def _event(chunk: Completion | ChatChunk) -> bytes:
    return b"data: " + _json(chunk) + b"\n\n"


def _json(value: Completion | ChatCompletion | ChatChunk) -> bytes:
    return value.model_dump_json().encode("utf-8")
