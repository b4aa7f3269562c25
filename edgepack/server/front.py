"""The same routes before a server that has OpenAI's API itself (llama-server, vLLM): passed through, unchanged.

It adds the article's /chat, one queue and body limit, and metrics under the names that every runtime has.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from . import VERSION, metrics, refusal
from .answers import error_event
from .gate import Gate
from .guard import Exchange, State, exchange
from .metrics import Gauge, Metrics
from .planned import Planned
from .refusal import Refused
from .routes import EVENTS, TAKES_BODY, Responses, answers, as_json, bare, page
from .scheduler import ClientGone
from .schema import (
    ChatAnswer,
    ChatData,
    ChatError,
    ChatRequest,
    ErrorAnswer,
    Health,
    HealthData,
    Version,
)
from .upstream import Broken, Reply, Unreachable, Upstream

PROBE_SECONDS = 5.0
"""Time that the server behind has to say how it is."""
FRESH_SECONDS = 1.0
"""Time for which what it said holds: /health needs no key, and who asks often would keep the server behind busy."""
ANSWER = 16 << 20
"""Bytes of a whole answer that are read."""
LINE = 1 << 20
"""Bytes of one line of a stream that are looked at for its numbers; longer ones pass unread."""

PATH = re.compile(r"(?!.*\.\.)[A-Za-z0-9_./:-]{1,512}")
KEPT = frozenset({b"content-type", b"cache-control", b"retry-after", b"content-length"})
"""Headers of an answer that are passed on; the others belong to its connection."""

T = TypeVar("T", bound=BaseModel)

Condition = tuple[Literal["loading", "ok", "stopping", "unreachable"], str]
"""How a server is, and a word on it."""

RUNTIMES = {"llamacpp": "llama.cpp", "vllm": "vllm"}
"""Who a server says it is, in owned_by of /v1/models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a request may take of the server behind."""

    slots: int
    context: int
    """Tokens of a slot."""
    queue: int
    timeout: float
    planned: Planned
    alias: str | None
    """Name of the model, where the server behind need not be asked."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the server behind says it is."""

    runtime: str
    version: str
    model: str


class Front:
    """What goes through."""

    def __init__(self, terms: Terms, upstream: Upstream) -> None:
        self.terms = terms
        self.upstream = upstream
        self.metrics = Metrics()
        self.gate = Gate(terms.slots, terms.queue)
        self.no_usage = metrics.Counter(
            "edgepack_answers_without_usage_total", "Answers that did not say how many tokens they took."
        )
        self._stopping = False
        self._identity: Identity | None = None
        self._probing = asyncio.Lock()
        self._probed: tuple[float, Condition] | None = None

    @property
    def state(self) -> State:
        return "stopping" if self._stopping else "ok"

    async def drain(self, grace: float) -> None:
        """Refuses what is new or waits, lets what runs finish for so many seconds, then ends it."""
        self._stopping = True
        stopping = Refused(503, "the server is stopping", reason="stopping", retry_after=5)
        self.gate.refuse_waiting(stopping)
        end = time.monotonic() + grace
        while self.gate.inside and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.gate.refuse_inside(stopping)

    def close(self, seconds: float) -> bool:
        return True

    async def health(self) -> Health:
        """As the server behind is; ours only where we stop."""
        stopping: Condition = ("stopping", "the server is stopping")
        status, message = stopping if self._stopping else await self._condition()
        known = self._identity
        return Health(
            code=200 if status == "ok" else 503,
            message=message,
            data=HealthData(
                status=status,
                model=self.terms.alias or ("" if known is None else known.model),
                runtime="" if known is None else known.runtime,
                version=None if known is None else known.version,
                queue=self.gate.depth,
                running=self.gate.inside,
                slots=self.terms.slots,
                context=self.terms.context,
            ),
        )

    async def identity(self) -> Identity:
        """Asked once. Raises Refused (503) while the server behind does not say."""
        if self._identity is None:
            try:
                self._identity = await asyncio.wait_for(self._introduced(), PROBE_SECONDS)
            except (ValidationError, IndexError, asyncio.TimeoutError) as error:
                raise Refused(503, "the server behind does not say what it is", reason="upstream") from error
        return self._identity

    async def chat(self, asked: ChatRequest, one: Exchange) -> ChatAnswer:
        """The article's, over the server's own chat completions."""
        one.session_id = asked.session_id
        deadline = one.arrived + self.terms.timeout
        try:
            async with self.gate.enter(one.client, deadline):
                wanted = {
                    "messages": [message.plain() for message in asked.messages],
                    "temperature": asked.temperature,
                    "max_tokens": await self._room(asked),
                    "stream": False,
                }
                answer = await self._post("/v1/chat/completions", wanted, _ChatCompletion)
        except ClientGone:
            self.metrics.aborted.add()
            raise
        choice = answer.choices[0]
        numbers = Numbers(self, one)
        numbers.usage = answer.usage
        numbers.reason = choice.finish_reason
        numbers.finish()
        data = ChatData(
            response=choice.message.content or "",
            prompt_tokens=answer.usage.prompt_tokens,
            completion_tokens=answer.usage.completion_tokens,
            session_id=asked.session_id,
            finish_reason="length" if choice.finish_reason == "length" else "stop",
        )
        return ChatAnswer(data=data)

    async def _room(self, asked: ChatRequest) -> int:
        """Tokens that an answer may have. llama-server ends by itself where the slot is full; vLLM refuses."""
        most = min(asked.max_tokens, self.terms.context)
        if (await self.identity()).runtime != "vllm":
            return most
        wanted = {"messages": [message.plain() for message in asked.messages]}
        counted = await self._post("/tokenize", wanted, _Counted)
        return max(1, min(most, counted.max_model_len - counted.count))

    def check(self, body: bytes, one: Exchange) -> None:
        """Refuses what would take more of the server behind than one slot."""
        try:
            asked = _Asked.model_validate_json(body)
        except ValidationError as error:
            raise refusal.wrong_field(error.errors()) from error
        one.session_id = asked.session_id
        context = self.terms.context
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"):
            most = getattr(asked, name)
            if most is not None and most >= context:
                raise Refused(
                    400,
                    f"{name} {most} + at least 1 token of prompt = {most + 1} tokens; a slot holds {context}",
                    reason="context",
                    param=name,
                    code="context_length_exceeded",
                )

    async def _post(self, target: str, asked: object, answer: type[T]) -> T:
        """What the server behind answers. Raises Refused with its own status and words where it refuses."""
        async with self.ask("POST", target, json.dumps(asked).encode("ascii")) as reply:
            body = await reply.whole(ANSWER)
        if reply.status != 200:
            raise Refused(reply.status, _said(body), reason="upstream")
        try:
            return answer.model_validate_json(body)
        except ValidationError as error:
            message = f"the server behind does not answer {target} as it should"
            raise Refused(502, message, reason="upstream") from error

    @asynccontextmanager
    async def ask(self, method: str, target: str, body: bytes | None = None) -> AsyncGenerator[Reply, None]:
        """A request to the server behind.

        Raises Refused: 503 where it cannot be reached, 502 where it broke off or does not take our key.
        """
        try:
            async with self.upstream.ask(method, target, body) as reply:
                if reply.status == 401:  # passed on, it would blame a key that this front has just accepted
                    raise Refused(502, "the server behind does not take this front's key", reason="upstream")
                yield reply
        except Unreachable as error:
            raise _unreachable(error) from error
        except Broken as error:
            raise Refused(502, f"the server behind broke off: {error}", reason="upstream") from error

    async def _condition(self) -> Condition:
        """As the server behind said when it was asked last, at most FRESH_SECONDS ago."""
        async with self._probing:
            if self._probed is None or time.monotonic() - self._probed[0] > FRESH_SECONDS:
                said = await self._probe()
                self._probed = time.monotonic(), said
            return self._probed[1]

    async def _probe(self) -> Condition:
        try:
            status, _ = await asyncio.wait_for(self._get("/health"), PROBE_SECONDS)
            if status == 200:
                await self.identity()
                return "ok", "success"
        except (Refused, asyncio.TimeoutError) as error:
            return "unreachable", str(error) or "the server behind does not answer in time"
        return ("loading" if status == 503 else "unreachable"), f"the server behind answers {status}"

    async def _introduced(self) -> Identity:
        status, body = await self._get("/v1/models")
        if status != 200:
            raise Refused(503, f"the server behind answers {status} to /v1/models", reason="upstream")
        model = _Models.model_validate_json(body).data[0]
        runtime = RUNTIMES.get(model.owned_by, model.owned_by)
        if runtime == "llama.cpp":
            _, body = await self._get("/props")
            version = _Props.model_validate_json(body).build_info
        else:
            status, body = await self._get("/version")
            version = _Version.model_validate_json(body).version if status == 200 else ""
        return Identity(runtime, version, model.id)

    async def _get(self, target: str) -> tuple[int, bytes]:
        async with self.ask("GET", target) as reply:
            return reply.status, await reply.whole(ANSWER)

    def metrics_page(self) -> str:
        terms, known = self.terms, self._identity
        about = {
            "runtime": "" if known is None else known.runtime,
            "version": "" if known is None else known.version,
            "model": terms.alias or ("" if known is None else known.model),
        }
        memory = [({"part": f"front_{part}"}, count) for part, count in metrics.process_memory().items()]
        gauges = [
            Gauge("edgepack_info", "What is served by what.", [(about, 1)]),
            Gauge("edgepack_queue_depth", "Requests that wait for a slot.", [({}, self.gate.depth)]),
            Gauge("edgepack_requests_running", "Requests in slots.", [({}, self.gate.inside)]),
            Gauge(
                "edgepack_kv_tokens_capacity",
                "Tokens that all slots hold.",
                [({}, terms.slots * terms.context)],
            ),
            Gauge("edgepack_memory_bytes", "Memory of this front; not of the server behind.", memory),
            *terms.planned.gauges(),
        ]
        return self.metrics.text(self.no_usage, *gauges)


class Numbers:
    """Tokens and times of an answer that passes, read from its own words."""

    def __init__(self, front: Front, one: Exchange) -> None:
        self.usage: _Usage | None = None
        self.reason: str | None = None
        self._front = front
        self._exchange = one
        self._rest = b""
        self._last: float | None = None

    def events(self, piece: bytes) -> None:
        """Looks at a piece of a stream; pieces may end anywhere."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > LINE:
            self._rest = b""
        for line in lines:
            if line.startswith(b"data:") and line[5:7].lstrip().startswith(b"{"):
                self._object(line[5:])

    def whole(self, body: bytes) -> None:
        self._object(body)

    def finish(self) -> None:
        """Into log and metrics."""
        one, totals = self._exchange, self._front.metrics
        totals.request.observe(time.perf_counter() - one.arrived)
        one.finish_reason = self.reason
        if self.usage is None:
            self._front.no_usage.add()
            return
        one.prompt_tokens, one.completion_tokens = self.usage.prompt_tokens, self.usage.completion_tokens
        one.cached_tokens = self.usage.cached
        totals.prompt_tokens.add(one.prompt_tokens)
        totals.cached_tokens.add(one.cached_tokens)
        totals.generation_tokens.add(one.completion_tokens)

    def _object(self, text: bytes) -> None:
        try:
            answer = _Answer.model_validate_json(text)
        except ValidationError:
            return  # not ours to judge: it passes as it is
        if answer.usage is not None:
            self.usage = answer.usage
        elif answer.timings is not None:
            self.usage = answer.timings.usage()
        for choice in answer.choices or ():
            self.reason = choice.finish_reason or self.reason
            if choice.says:
                self._token()

    def _token(self) -> None:
        now = time.perf_counter()
        one, totals = self._exchange, self._front.metrics
        if self._last is None:
            one.first_token = now - one.arrived
            totals.first_token.observe(one.first_token)
        else:
            totals.between_tokens.observe(now - self._last)
        self._last = now


class Passed(Response):
    """An answer of the server behind, byte for byte. What has a body takes a place."""

    def __init__(self, front: Front, method: str, target: str, body: bytes | None) -> None:
        self.background = None
        self._front = front
        self._ask = method, target, body
        self._takes_place = body is not None
        self._begun: Literal["no", "stream", "whole"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        one = exchange(Request(scope))
        gate, deadline = self._front.gate, one.arrived + self._front.terms.timeout
        try:
            if self._takes_place:
                async with gate.enter(one.client, deadline) as began:
                    one.waited = began - one.arrived
                    await self._pass(one, send)
            else:
                async with gate.beside(one.client, deadline):
                    await self._pass(one, send)
        except ClientGone:
            if self._takes_place:
                self._front.metrics.aborted.add()
            if self._begun == "no":
                raise
        except Refused as refused:
            if self._begun == "no":
                raise
            one.refused = refused.reason
            if self._begun == "stream":
                await send(_body(error_event(refused.body()), more=False))
            # An answer with a length is left unfinished: the connection closes, and its reader knows.

    async def _pass(self, one: Exchange, send: Send) -> None:
        numbers = Numbers(self._front, one)
        async with self._front.ask(*self._ask) as reply:
            headers = [(name.lower(), value) for name, value in reply.headers]
            kept = [(name, value) for name, value in headers if name in KEPT]
            streams = dict(kept).get(b"content-type", b"").startswith(EVENTS.encode())
            await send({"type": "http.response.start", "status": reply.status, "headers": kept})
            self._begun = "stream" if streams else "whole"
            body = bytearray()
            async for piece in reply.body:
                if streams:
                    numbers.events(piece)
                elif len(body) <= ANSWER:
                    body += piece
                await send(_body(piece, more=True))
        if self._takes_place and reply.status == 200:
            if not streams:
                numbers.whole(bytes(body))
            numbers.finish()
        await send(_body(b"", more=False))


ANY_OBJECT = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}}},
        "description": "what the server behind takes; checked here is what decides how much it takes",
    }
}


REFUSED: dict[str, Any] = {
    "description": "this front's refusal, or that of the server behind as it is: llama-server's `code` is a number",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message"],
                        "properties": {"message": {"type": "string"}},
                    }
                },
            }
        }
    },
}


def application(front: Front) -> FastAPI:
    """The routes before another server."""
    app = bare("edgepack_server front")
    passed: Responses = {
        200: {"description": "as the server behind answers", "content": {"application/json": {}, EVENTS: {}}},
        **dict.fromkeys((400, 404, 408, 413, 429, 500, 502, 503, 504), REFUSED),
        401: {"model": ErrorAnswer},
    }

    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}}, response_model=None)
    async def health() -> Response:
        answer = await front.health()
        return as_json(answer, status=answer.code)

    @app.get("/version", responses=answers(Version, 502, 503), response_model=None)
    async def version() -> Response:
        known = await front.identity()
        return as_json(Version(version=known.version, runtime=known.runtime, edgepack=VERSION))

    @app.get("/metrics", responses=page(metrics.CONTENT_TYPE), response_model=None)
    async def metrics_page() -> Response:
        return Response(front.metrics_page(), media_type=metrics.CONTENT_TYPE)

    @app.post("/chat", responses=answers(ChatAnswer, *TAKES_BODY, 502, error=ChatError), response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return as_json(await front.chat(asked, exchange(request)))

    async def passing(request: Request) -> Response:
        if request.method == "GET":
            return Passed(front, "GET", _target(request), None)
        body = await request.body()
        front.check(body, exchange(request))
        return Passed(front, "POST", _target(request), body)

    app.get("/v1/models", responses=passed, response_model=None)(passing)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.post(path, responses=passed, response_model=None, openapi_extra=ANY_OBJECT)(passing)
    everything = app.api_route("/v1/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
    everything(passing)

    return app


class _Loose(BaseModel):
    """What is read of others' JSON; they may add to it."""

    model_config = ConfigDict(extra="ignore")


Limit = Annotated[int, Field(lt=2**31)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class _Asked(_Loose):
    """The fields that decide how much a request takes; all others are for the server behind to judge."""

    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    max_output_tokens: Limit | None = None
    n_predict: Limit | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    prompt: (
        str
        | TokenIds
        | Annotated[list[str | TokenIds], Field(min_length=1, max_length=1, fail_fast=True)]
        | None
    ) = None
    session_id: Annotated[str, Field(max_length=128)] | None = None


class _Details(_Loose):
    cached_tokens: int | None = None


class _Usage(_Loose):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    @property
    def cached(self) -> int:
        details = self.prompt_tokens_details
        return 0 if details is None or details.cached_tokens is None else details.cached_tokens


class _Timings(_Loose):
    """llama-server's, in the last chunk of each stream: tokens computed now and taken from the cache."""

    prompt_n: int
    cache_n: int = 0
    predicted_n: int

    def usage(self) -> _Usage:
        return _Usage(
            prompt_tokens=self.prompt_n + self.cache_n,
            completion_tokens=self.predicted_n,
            prompt_tokens_details=_Details(cached_tokens=self.cache_n),
        )


class _Delta(_Loose):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(_Loose):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def says(self) -> bool:
        """Whether a chunk carries text."""
        return bool(self.text or (self.delta and (self.delta.content or self.delta.reasoning_content)))


class _Answer(_Loose):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: _Timings | None = None


class _ChatMessage(_Loose):
    content: str | None


class _ChatChoice(_Loose):
    message: _ChatMessage
    finish_reason: str


class _ChatCompletion(_Loose):
    choices: Annotated[list[_ChatChoice], Field(min_length=1)]
    usage: _Usage


class _Counted(_Loose):
    count: int
    max_model_len: int


class _Model(_Loose):
    id: str
    owned_by: str


class _Models(_Loose):
    data: list[_Model]


class _Props(_Loose):
    build_info: str


class _Version(_Loose):
    version: str


class _Error(_Loose):
    message: str


class _ErrorAnswer(_Loose):
    error: _Error


def _said(body: bytes) -> str:
    """The message of an error of the server behind."""
    try:
        return _ErrorAnswer.model_validate_json(body).error.message
    except ValidationError:
        return "the server behind refused, without saying why"


def _unreachable(error: Unreachable) -> Refused:
    return Refused(503, f"the server behind does not answer: {error}", reason="upstream", retry_after=5)


def _target(request: Request) -> str:
    path, query = request.url.path, request.url.query
    if not PATH.fullmatch(path):
        raise Refused(404, f"Not Found: {request.method} {path}", reason="path")
    return f"{path}?{query}" if query else path


def _body(piece: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": more}
