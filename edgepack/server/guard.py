"""What every request passes first: key, state, room, a bounded body, a watch on its client, a count and a log line."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import log, refusal
from .metrics import Metrics
from .refusal import Refused

State = Literal["loading", "ok", "stopping"]

ENDPOINTS = frozenset(
    {
        "/health", "/version", "/metrics", "/openapi.json", "/chat", "/tokenize", "/detokenize",
        "/v1/models", "/v1/completions", "/v1/chat/completions",
    }
)  # fmt: skip
"""Routes with a label of their own in the metrics; all others share "other", so that callers cannot add labels."""
OPEN = frozenset({"/health"})
"""Asked without a key."""
QUIET = frozenset({"/health", "/metrics"})
"""Asked every few seconds by machines: logged only when they fail, and not because the model still loads."""

BESIDE = 8
"""Requests with a body that may be read beside those in slots and queue; more would only take memory."""
BODY_SECONDS = 30.0
"""Time in which a body must have come."""
DRAIN = 4 << 20
"""Bytes of a refused body that are still read (and dropped), so that its sender gets to read the refusal."""
SLACK_SECONDS = 10.0
"""Time beyond a request's timeout after which it is ended even if its client does not read."""
GONE = 499
"""Status in log and metrics of a request whose client went away (nginx's)."""


class Client:
    """Whether the one who asked is still there."""

    def __init__(self) -> None:
        self.gone = False
        self._tell: list[Callable[[], None]] = []

    def when_gone(self, tell: Callable[[], None]) -> None:
        """``tell`` is called once, at once if the client has already left."""
        if self.gone:
            tell()
        else:
            self._tell.append(tell)

    def left(self) -> None:
        self.gone = True
        for tell in self._tell:
            tell()
        self._tell.clear()


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request and what is known of it so far; it ends as a line of the log."""

    id: str
    arrived: float
    """When its body had come, time.perf_counter()."""
    client: Client = field(default_factory=Client)
    session_id: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    slot: int | None = None
    waited: float | None = None
    """Seconds in the queue."""
    first_token: float | None = None
    """Seconds from arrival to the first token."""
    refused: str | None = None
    """Reason, if it was refused."""
    complete: bool = False
    """The whole response has been handed over."""


def exchange(request: Request) -> Exchange:
    """The exchange that Guard put beside this request."""
    return cast("Exchange", request.scope["edgepack.exchange"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a request may be."""

    keys: Sequence[bytes]
    """Keys of which one must be given; empty: none is asked for."""
    open_metrics: bool
    body: int
    """Bytes of a request's body at most."""
    bodies: int
    """Requests with a body at a time."""
    timeout: float
    """Seconds from arrival to the end of an answer."""


class Guard:
    """ASGI middleware around either app."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics, state: Callable[[], State]) -> None:
        self._app = app
        self._rules = rules
        self._metrics = metrics
        self._state = state
        self._bodies = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        one = Exchange(id=f"req-{secrets.token_hex(8)}", arrived=started)
        scope["edgepack.exchange"] = one
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", one.id.encode())]}
            elif not message.get("more_body", False):
                one.complete = True
            await send(message)

        try:
            await self._admit(scope, receive, answer, one)
        except Refused as refused:
            one.refused = refused.reason
            await refusal.response(refused, scope["path"])(scope, receive, answer)
        except Exception as error:
            log.failure("failed", error, id=one.id, path=_endpoint(scope))
            if not status:  # else the app has answered 500 itself, or broken off what it had begun
                broken = Refused(500, "the server failed; its log says why", reason="failed")
                await refusal.response(broken, scope["path"])(scope, receive, answer)
        finally:
            self._record(scope, one, GONE if one.client.gone or not status else status, started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send, one: Exchange) -> None:
        self._check_key(scope)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._watched(scope, receive, send, one, b"")
            return
        self._check_room(scope)
        self._bodies += 1
        try:
            body = await self._body(receive)
            if body is None:
                one.client.left()
                return
            one.arrived = time.perf_counter()
            await self._watched(scope, receive, send, one, body)
        finally:
            self._bodies -= 1

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._rules.keys or path in OPEN or (path == "/metrics" and self._rules.open_metrics):
            return
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = (bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode()
        matches = [hmac.compare_digest(given, key) for key in self._rules.keys]  # all: no early end to time
        if not any(matches):
            raise Refused(401, "no valid API key", reason="key", code="invalid_api_key")

    def _check_room(self, scope: Scope) -> None:
        state = self._state()
        if state != "ok":
            raise Refused(503, f"the server is {state}", reason=state, retry_after=5)
        if self._bodies >= self._rules.bodies:
            message = f"{self._bodies} requests are being served or wait"
            raise Refused(429, message, reason="queue_full", retry_after=1)
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdecimal() and int(said) > self._rules.body + DRAIN:
            raise self._too_large(f"{int(said)} bytes")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, or None if the client left before it came."""
        try:
            return await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            message = f"the body did not come within {BODY_SECONDS:.0f} s"
            raise Refused(408, message, reason="slow_body") from None

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            size += len(piece)
            if size <= self._rules.body:
                body += piece
            elif size > self._rules.body + DRAIN:
                raise self._too_large(f"more than {size} bytes")
            if not message.get("more_body", False):
                break
        if size > self._rules.body:
            raise self._too_large(f"{size} bytes")
        return bytes(body)

    def _too_large(self, what: str) -> Refused:
        message = f"{what}: a request's body may have {self._rules.body} bytes"
        return Refused(413, message, reason="body", code="body_too_large")

    async def _watched(self, scope: Scope, receive: Receive, send: Send, one: Exchange, body: bytes) -> None:
        """Runs the app with a body that is already here, and tells it when its client leaves."""
        left = asyncio.Event()
        one.client.when_gone(left.set)
        given = late = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not one.complete:  # a server also says so once the response is out
                one.client.left()

        def overdue(task: asyncio.Task[None]) -> None:
            nonlocal late
            late = True
            task.cancel()

        watcher = asyncio.ensure_future(watch())
        task = cast("asyncio.Task[None]", asyncio.current_task())  # there is one: this is a coroutine
        timer = asyncio.get_running_loop().call_later(self._rules.timeout + SLACK_SECONDS, overdue, task)
        try:
            await self._app(scope, replay, send)
        except asyncio.CancelledError:
            if not late:
                raise
            one.client.left()  # it did not read its answer: to the server that is the same as having left
        finally:
            timer.cancel()
            watcher.cancel()

    def _record(self, scope: Scope, one: Exchange, status: int, started: float) -> None:
        endpoint = _endpoint(scope)
        self._metrics.requests.add(endpoint=endpoint, status=str(status))
        if one.refused is not None:
            self._metrics.refused.add(reason=one.refused)
        if endpoint in QUIET and (status < 400 or self._state() != "ok"):
            return
        log.event(
            "request",
            id=one.id,
            method=scope["method"],
            endpoint=endpoint,
            status=status,
            seconds=round(time.perf_counter() - started, 4),
            session_id=one.session_id,
            prompt_tokens=one.prompt_tokens,
            cached_tokens=one.cached_tokens,
            completion_tokens=one.completion_tokens,
            finish_reason=one.finish_reason,
            slot=one.slot,
            queue_seconds=None if one.waited is None else round(one.waited, 4),
            first_token_seconds=None if one.first_token is None else round(one.first_token, 4),
            refused=one.refused,
        )


def _endpoint(scope: Scope) -> str:
    path: str = scope["path"]
    return path if path in ENDPOINTS else "other"
