"""The paths of the API and what /openapi.json says of them; both apps answer errors alike."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import VERSION, log, metrics, refusal
from .answers import error_event
from .guard import GONE, exchange
from .refusal import Refused
from .scheduler import ClientGone
from .schema import (
    ChatAnswer,
    ChatCompletion,
    ChatCompletionRequest,
    ChatError,
    ChatRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    ErrorAnswer,
    Health,
    Model,
    Models,
    Text,
    TokenizeRequest,
    Tokens,
    Version,
)
from .serving import Answer, Serving

EVENTS = "text/event-stream"

EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
"""A server-sent event: a chunk in JSON, or [DONE]."""

Responses = dict[int | str, dict[str, Any]]


def application(serving: Serving) -> FastAPI:
    """The routes over an engine."""
    app = bare("edgepack_server")

    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}}, response_model=None)
    async def health() -> Response:
        answer = serving.health()
        return as_json(answer, status=answer.code)

    @app.get("/version", responses=answers(Version, 503), response_model=None)
    async def version() -> Response:
        return as_json(serving.version())

    @app.get("/metrics", responses=page(metrics.CONTENT_TYPE), response_model=None)
    async def metrics_page() -> Response:
        return Response(serving.metrics_page(), media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/models", responses=answers(Models, 503), response_model=None)
    async def models() -> Response:
        return as_json(serving.models())

    @app.get("/v1/models/{name:path}", responses=answers(Model, 404, 503), response_model=None)
    async def model(name: str) -> Response:
        return as_json(serving.model(name))

    @app.post("/tokenize", responses=answers(Tokens, *TAKES_BODY), response_model=None)
    async def tokenize(asked: TokenizeRequest, request: Request) -> Response:
        return as_json(await serving.tokenize(asked, exchange(request)))

    @app.post("/detokenize", responses=answers(Text, *TAKES_BODY), response_model=None)
    async def detokenize(asked: DetokenizeRequest, request: Request) -> Response:
        return as_json(await serving.detokenize(asked, exchange(request)))

    @app.post("/v1/completions", responses=streams(Completion), response_model=None)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await _answered(await serving.completion(asked, exchange(request)))

    @app.post("/v1/chat/completions", responses=streams(ChatCompletion), response_model=None)
    async def chat_completions(asked: ChatCompletionRequest, request: Request) -> Response:
        return await _answered(await serving.chat_completion(asked, exchange(request)))

    @app.post("/chat", responses=answers(ChatAnswer, *TAKES_BODY, error=ChatError), response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return as_json(await serving.chat(asked, exchange(request)))

    return app


TAKES_BODY = (400, 404, 408, 413, 429, 503, 504)
"""What may be answered to a request with a body, beside 401 and 500."""


SILENT: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""FastAPI would hand invalid requests, prompts in them, to whatever telemetry the environment names. Versions
without it, as in vLLM's images, ignore the word."""


def bare(title: str) -> FastAPI:
    """An app without pages that load scripts from elsewhere, whose errors are in OpenAI's shape, or the article's."""
    app = FastAPI(title=title, version=VERSION, docs_url=None, redoc_url=None, telemetry=SILENT)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _failed)

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's own way to extend its description
    return app


def answers(success: type, *errors: int, error: type = ErrorAnswer) -> Responses:
    """What a route answers, for its description."""
    return {200: {"model": success}, **{status: {"model": error} for status in (401, *errors, 500)}}


def streams(success: type) -> Responses:
    described = answers(success, *TAKES_BODY)
    described[200]["content"] = {EVENTS: {"itemSchema": EVENT}}
    return described


def page(content_type: str) -> Responses:
    return {200: {"content": {content_type: {"schema": {"type": "string"}}}}, 401: {"model": ErrorAnswer}}


class EventStream(Response):
    """Server-sent events as they come; an error after the first is an event of its own, and ends the stream."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "content-type": EVENTS})
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(body: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._rest):
            try:
                await write(self._first)
                async for chunk in self._rest:
                    await write(chunk)
            except ClientGone:
                return
            except Refused as refused:
                exchange(Request(scope)).refused = refused.reason
                await write(error_event(refused.body()))
            except Exception as error:
                log.failure("failed", error, id=exchange(Request(scope)).id)
                await write(error_event(BROKEN.body()))
            await write(b"", more=False)


BROKEN = Refused(500, "the server failed; its log says why", reason="failed")


async def _answered(answer: Answer) -> Response:
    if not answer.streams:
        return Response(await answer.whole(), media_type="application/json")
    chunks = answer.stream()
    return EventStream(await anext(chunks), chunks)


def as_json(value: BaseModel, status: int = 200) -> Response:
    return Response(value.model_dump_json(), status_code=status, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    refused = cast("Refused", error)  # registered for it; so below
    exchange(request).refused = refused.reason
    return refusal.response(refused, request.url.path)


async def _invalid(request: Request, error: Exception) -> Response:
    """Names the first field that is wrong, without what it held."""
    errors = cast("RequestValidationError", error).errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return await _refused(request, Refused(400, message, reason="invalid"))
    return await _refused(request, refusal.wrong_field(errors))


async def _http(request: Request, error: Exception) -> Response:
    known = cast("HTTPException", error)
    message = f"{known.detail}: {request.method} {request.url.path}"
    answer = await _refused(request, Refused(known.status_code, message, reason="path"))
    answer.headers.update(known.headers or {})
    return answer


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    return refusal.response(BROKEN, request.url.path)


def _described(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the key, and without the 422 that is never answered."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path == "/health":
                operation["security"] = []
    unused = ("HTTPValidationError", "ValidationError")
    components = schema.setdefault("components", {})
    for name in unused:
        components.get("schemas", {}).pop(name, None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"key": []}]
    return schema
