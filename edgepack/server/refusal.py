"""A request that is not served, with the status, the words and the numbers that its sender gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from starlette.responses import JSONResponse, Response

Kind = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
    "server_error",
]

KINDS: dict[int, Kind] = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


class Refused(Exception):
    """Why a request is not served. ``reason`` is its name in edgepack_refused_total."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message.encode("utf-8", "replace").decode(
            "utf-8"
        )  # it may quote half a surrogate pair
        self.reason = reason
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, object]:
        """The error in OpenAI's shape."""
        other: Kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, other),
                "param": self.param,
                "code": self.code,
            }
        }


def wrong_field(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """pydantic's first complaint: where and what, without what was sent; of a union what each kind wants."""
    where = _path(errors[0])
    wants = dict.fromkeys(str(error["msg"]) for error in errors if _path(error) == where)
    says = ", or: ".join(wants)
    return Refused(400, f"{where}: {says}" if where else says, reason="invalid", param=where or None)


def _path(error: Mapping[str, Any]) -> str:
    """ "messages.0.content": the steps that its sender knows, without pydantic's names for kinds of a union."""
    steps = [str(step) for step in error["loc"] if step != "body"]
    return ".".join(step for step in steps if step not in _KINDS and not set(step) & set("[]()-"))


_KINDS = frozenset({"str", "int", "float", "bool"})


def response(refused: Refused, path: str) -> Response:
    """The refusal as the path's callers know errors: in the article's shape for /chat and /health."""
    headers = {}
    if refused.retry_after is not None:
        headers["Retry-After"] = str(refused.retry_after)
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path in ("/chat", "/health"):
        content: dict[str, object] = {"code": refused.status, "message": refused.message, "data": None}
    else:
        content = refused.body()
    return JSONResponse(content, status_code=refused.status, headers=headers)
