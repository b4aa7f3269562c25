"""Requests through an engine: tokenized, measured against the slot, queued, generated, written out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

from . import VERSION, metrics
from .answers import DONE, AsChat, AsCompletion, Names, Part, Shape, Tally, Wanted, ended, joined
from .engines import CannotTokenize, Engine, Sampling
from .guard import Exchange, State
from .metrics import Gauge, Metrics
from .planned import Planned
from .refusal import Refused
from .scheduler import ClientGone, Event, Scheduler, Work
from .schema import (
    ChatAnswer,
    ChatCompletionRequest,
    ChatData,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    Health,
    HealthData,
    Message,
    Model,
    Models,
    Text,
    TokenizeRequest,
    Tokens,
    Version,
)
from .template import TemplateRefused

DEFAULT_COMPLETION = 16
"""Tokens of a completion whose request does not say (OpenAI's default); a chat's is all that the slot has left."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is known before the engine is loaded."""

    alias: str
    runtime: str
    slots: int
    context: int
    """Tokens of a slot."""
    queue: int
    timeout: float
    """Seconds from arrival to the end of an answer."""
    planned: Planned


class Serving:
    """An engine, once it is there, and the requests that go through it."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.metrics = Metrics()
        self._created = int(time.time())
        self._loaded: _Loaded | None = None
        self._stopping = False

    @property
    def state(self) -> State:
        if self._stopping:
            return "stopping"
        return "loading" if self._loaded is None else "ok"

    def use(self, engine: Engine) -> None:
        """From now on requests are served. Called in the event loop's thread."""
        self._loaded = _Loaded(engine, Scheduler(engine, self.terms.queue))

    async def drain(self, grace: float) -> None:
        """Refuses what is new or waits, lets what runs finish for so many seconds, then ends it."""
        self._stopping = True
        if self._loaded is None:
            return
        scheduler = self._loaded.scheduler
        stopping = Refused(503, "the server is stopping", reason="stopping", retry_after=5)
        scheduler.refuse_waiting(stopping)
        end = time.monotonic() + grace
        while scheduler.running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        scheduler.refuse_waiting(stopping)  # those that were still being tokenized
        scheduler.refuse_running(stopping)

    def close(self, seconds: float) -> bool:
        """Ends the workers and the engine; False if the engine did not let go within so many seconds."""
        if self._loaded is None:
            return True
        if not self._loaded.scheduler.close(seconds):
            return False
        self._loaded.text.shutdown(wait=False)
        self._loaded.engine.close()
        return True

    def health(self) -> Health:
        state = self.state
        loaded = self._loaded
        return Health(
            code=200 if state == "ok" else 503,
            message="success" if state == "ok" else f"the server is {state}",
            data=HealthData(
                status=state,
                model=self.terms.alias,
                runtime=self.terms.runtime,
                version=None if loaded is None else loaded.engine.version,
                queue=0 if loaded is None else loaded.scheduler.depth,
                running=0 if loaded is None else loaded.scheduler.running,
                slots=self.terms.slots,
                context=self.terms.context,
            ),
        )

    def version(self) -> Version:
        return Version(version=self._ready().engine.version, runtime=self.terms.runtime, edgepack=VERSION)

    def models(self) -> Models:
        return Models(data=[self._model()])

    def model(self, name: str) -> Model:
        self._check_model(name)
        return self._model()

    def metrics_page(self) -> str:
        terms, loaded = self.terms, self._loaded
        depth = running = held = 0
        memory = dict(metrics.process_memory())
        version = ""
        if loaded is not None:
            depth, running = loaded.scheduler.depth, loaded.scheduler.running
            held = loaded.scheduler.tokens_held
            memory = {**loaded.engine.memory(), **memory}
            version = loaded.engine.version
        about = {"runtime": terms.runtime, "version": version, "model": terms.alias}
        gauges = [
            Gauge("edgepack_info", "What is served by what.", [(about, 1)]),
            Gauge("edgepack_queue_depth", "Requests that wait for a slot.", [({}, depth)]),
            Gauge("edgepack_requests_running", "Requests in slots.", [({}, running)]),
            Gauge("edgepack_kv_tokens_used", "Tokens in the KV cache, kept ones included.", [({}, held)]),
            Gauge(
                "edgepack_kv_tokens_capacity",
                "Tokens that all slots hold.",
                [({}, terms.slots * terms.context)],
            ),
            Gauge(
                "edgepack_memory_bytes",
                "Tensors as the engine knows them; resident and peak memory of the process.",
                [({"part": part}, count) for part, count in memory.items()],
            ),
            *terms.planned.gauges(),
        ]
        return self.metrics.text(*gauges)

    async def tokenize(self, asked: TokenizeRequest, one: Exchange) -> Tokens:
        loaded = self._ready()
        self._check_model(asked.model)
        tokens = await self._text(
            one, loaded, lambda: loaded.engine.tokenize(asked.prompt, special=asked.add_special_tokens)
        )
        return Tokens(tokens=tokens, count=len(tokens), max_model_len=loaded.engine.context)

    async def detokenize(self, asked: DetokenizeRequest, one: Exchange) -> Text:
        loaded = self._ready()
        self._check_model(asked.model)
        _check_ids(asked.tokens, loaded.engine.vocabulary, "tokens")
        return Text(prompt=await self._text(one, loaded, lambda: loaded.engine.detokenize(asked.tokens)))

    async def completion(self, asked: CompletionRequest, one: Exchange) -> Answer:
        loaded = self._ready()
        self._check_model(asked.model)
        given = asked.prompt
        if isinstance(given, list) and isinstance(given[0], str):
            given = given[0]
        if isinstance(given, str):
            text = given
            prompt = await self._text(one, loaded, lambda: loaded.engine.tokenize(text, special=True))
        else:
            prompt = [token for token in given if isinstance(token, int)]
            _check_ids(prompt, loaded.engine.vocabulary, "prompt")
        limit = self._limit(prompt, asked.max_tokens, DEFAULT_COMPLETION)
        wanted = self._wanted(loaded, "cmpl", asked, asked.logprobs, one)
        work = self._work(asked, prompt, limit, asked.logprobs, one)
        return Answer(self, loaded, work, AsCompletion(wanted), one)

    async def chat_completion(self, asked: ChatCompletionRequest, one: Exchange) -> Answer:
        loaded = self._ready()
        self._check_model(asked.model)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise _invalid("top_logprobs needs logprobs", "top_logprobs")
        prompt = await self._rendered(asked.messages, loaded, one)
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        limit = self._limit(prompt, most, loaded.engine.context)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        wanted = self._wanted(loaded, "chatcmpl", asked, logprobs, one)
        work = self._work(asked, prompt, limit, logprobs, one)
        return Answer(self, loaded, work, AsChat(wanted), one)

    async def chat(self, asked: ChatRequest, one: Exchange) -> ChatAnswer:
        """The article's: one answer, clamped to what the slot has left beside the prompt."""
        loaded = self._ready()
        one.session_id = asked.session_id
        prompt = await self._rendered(asked.messages, loaded, one)
        work = Work(
            prompt=prompt,
            sampling=Sampling(temperature=asked.temperature),
            limit=min(asked.max_tokens, self._limit(prompt, None, loaded.engine.context)),
            stops=(),
            reuse=True,
            deadline=one.arrived + self.terms.timeout,
        )
        tally = Tally(exchange=one, metrics=self.metrics, prompt=len(prompt))
        part = await self._whole(loaded, work, one, tally)
        data = ChatData(
            response=part.text,
            prompt_tokens=len(prompt),
            completion_tokens=tally.tokens,
            session_id=asked.session_id,
            finish_reason=ended(part),
        )
        return ChatAnswer(data=data)

    async def events(
        self, loaded: _Loaded, work: Work, one: Exchange
    ) -> AsyncGenerator[Sequence[Event], None]:
        """What happens to the work, whatever has come together in one go."""
        began = False
        try:
            async with aclosing(loaded.scheduler.events(work, one.client)) as events:
                async for batch in events:
                    began = True
                    yield batch
        except ClientGone:
            self.metrics.aborted.add()
            raise
        finally:
            if began:
                self.metrics.request.observe(time.perf_counter() - one.arrived)

    async def _whole(self, loaded: _Loaded, work: Work, one: Exchange, tally: Tally) -> Part:
        parts = []
        async with aclosing(self.events(loaded, work, one)) as events:
            async for batch in events:
                parts.append(tally.part(batch))
        return joined(parts)

    async def _rendered(self, messages: Sequence[Message], loaded: _Loaded, one: Exchange) -> list[int]:
        plain = [message.plain() for message in messages]
        try:
            return await self._text(one, loaded, lambda: loaded.engine.render(plain))
        except TemplateRefused as refused:
            raise _invalid(str(refused), "messages") from refused

    async def _text(self, one: Exchange, loaded: _Loaded, work: Callable[[], T]) -> T:
        """Work of the tokenizer, one at a time beside the slots, within the request's time."""
        loop = asyncio.get_running_loop()
        left = one.arrived + self.terms.timeout - time.perf_counter()
        try:
            return await asyncio.wait_for(loop.run_in_executor(loaded.text, work), max(0.0, left))
        except CannotTokenize as error:
            raise _invalid(str(error), "prompt") from error
        except asyncio.TimeoutError:
            raise Refused(504, "not tokenized in time", reason="timeout", code="timeout") from None

    def _limit(self, prompt: Sequence[int], most: int | None, default: int) -> int:
        """Tokens that may be generated; refuses what a slot cannot hold."""
        context = self.terms.context
        if not prompt:
            raise _invalid("the prompt has no tokens", "prompt")
        left = context - len(prompt)
        if most is None and left >= 1:
            return min(default, left)
        if left < (most or 1):
            total = len(prompt) + (most or 1)
            raise Refused(
                400,
                f"prompt {len(prompt)} + max_tokens {most or 1} = {total} tokens; a slot holds {context}",
                reason="context",
                param="max_tokens" if left >= 1 else "prompt",
                code="context_length_exceeded",
            )
        return most or 1

    def _work(
        self, asked: Generation, prompt: list[int], limit: int, logprobs: int | None, one: Exchange
    ) -> Work:
        if asked.min_tokens > limit:
            raise _invalid(f"min_tokens {asked.min_tokens} is more than max_tokens {limit}", "min_tokens")
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        sampling = Sampling(
            temperature=_or(asked.temperature, 1.0),
            top_p=_or(asked.top_p, 1.0),
            top_k=max(0, _or(asked.top_k, 0)),
            min_p=_or(asked.min_p, 0.0),
            seed=asked.seed,
            logprobs=0 if logprobs is None else max(1, logprobs),
            ignore_eos=asked.ignore_eos,
            min_tokens=asked.min_tokens,
        )
        deadline = one.arrived + self.terms.timeout
        return Work(
            prompt=prompt,
            sampling=sampling,
            limit=limit,
            stops=stops,
            reuse=asked.cache_prompt,
            deadline=deadline,
        )

    def _wanted(
        self, loaded: _Loaded, kind: str, asked: Generation, logprobs: int | None, one: Exchange
    ) -> Wanted:
        one.session_id = asked.session_id
        if asked.stream_options is not None and not asked.stream:
            raise _invalid("stream_options needs stream", "stream_options")
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return Wanted(
            id=one.id.replace("req", kind),
            model=self.terms.alias,
            logprobs=logprobs,
            names=Names(text=loaded.token_text, as_ids=asked.return_tokens_as_token_ids),
            token_ids=asked.return_token_ids,
            stream=bool(asked.stream),
            usage=usage,
        )

    def _model(self) -> Model:
        engine = self._ready().engine
        return Model(
            id=self.terms.alias,
            created=self._created,
            root=self.terms.alias,
            max_model_len=engine.context,
            chat_template="none: plain" if engine.chat_template is None else "model",
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.terms.alias:
            raise Refused(
                404,
                f"the model {name!r} is not here; {self.terms.alias!r} is",
                reason="model",
                param="model",
                code="model_not_found",
            )

    def _ready(self) -> _Loaded:
        if self._loaded is None or self._stopping:
            raise Refused(503, f"the server is {self.state}", reason=self.state, retry_after=5)
        return self._loaded


class Answer:
    """A request that fits, ready to be generated whole or as a stream."""

    def __init__(
        self, serving: Serving, loaded: _Loaded, work: Work, shape: AsCompletion | AsChat, one: Exchange
    ) -> None:
        self._serving = serving
        self._loaded = loaded
        self._work = work
        self._shape: Shape = shape
        self._wanted = shape.wanted
        self._exchange = one
        self._tally = Tally(exchange=one, metrics=serving.metrics, prompt=len(work.prompt))

    @property
    def streams(self) -> bool:
        return self._wanted.stream

    async def whole(self) -> bytes:
        part = await self._serving._whole(self._loaded, self._work, self._exchange, self._tally)
        usage = self._tally.usage()
        return await self._written(lambda: self._shape.whole(part, usage))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Nothing comes before the first token, so that a refusal still has its status."""
        opened = False
        async with aclosing(self._serving.events(self._loaded, self._work, self._exchange)) as events:
            async for batch in events:
                part = self._tally.part(batch)
                if not part.pieces and part.reason is None:
                    continue
                chunk = await self._written(partial(self._shape.chunk, part))
                out = chunk if opened else self._shape.first() + chunk
                opened = True
                if out:
                    yield out
        yield (self._shape.last(self._tally.usage()) if self._wanted.usage else b"") + DONE

    async def _written(self, write: Callable[[], bytes]) -> bytes:
        """Log probabilities name tokens, which is the tokenizer's work."""
        if self._wanted.logprobs is None:
            return write()
        return await self._serving._text(self._exchange, self._loaded, write)


class _Loaded:
    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.text = ThreadPoolExecutor(1, thread_name_prefix="text")
        self.token_text = _remembered(engine)


def _remembered(engine: Engine) -> Callable[[int], str]:
    """The text of a token alone; alternatives repeat much."""

    @lru_cache(maxsize=8192)
    def text(token: int) -> str:
        return engine.detokenize([token])

    return text


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _check_ids(tokens: Sequence[int], vocabulary: int, param: str) -> None:
    if tokens and max(tokens) >= vocabulary:
        raise _invalid(f"token {max(tokens)}: the vocabulary has {vocabulary}", param)


def _invalid(message: str, param: str) -> Refused:
    return Refused(400, message, reason="invalid", param=param)
