"""Another HTTP server on this machine, asked over h11, the protocol library that uvicorn brings along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import h11

PIECE = 1 << 16

Headers = Sequence[tuple[bytes, bytes]]


class Unreachable(Exception):
    """The server does not answer, or not in HTTP."""


class Broken(Exception):
    """The server broke off in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer whose body still comes."""

    status: int
    headers: Headers
    body: AsyncGenerator[bytes, None]
    """Pieces as they arrive, unchanged. Raises Broken."""

    async def whole(self, limit: int) -> bytes:
        """The body at once. Raises Broken if it is larger than ``limit`` bytes."""
        out = bytearray()
        async for piece in self.body:
            out += piece
            if len(out) > limit:
                raise Broken(f"an answer of more than {limit} bytes")
        return bytes(out)


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where the server is, and the key it wants."""

    host: str
    port: int
    key: str | None

    @asynccontextmanager
    async def ask(
        self, method: str, target: str, body: bytes | None = None, headers: Headers = ()
    ) -> AsyncGenerator[Reply, None]:
        """One request on a connection of its own, closed on leaving: so the server sees that nobody listens.

        Raises Unreachable.
        """
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        except OSError as error:
            raise Unreachable(f"{self.host}:{self.port}: {error}") from error
        try:
            connection = h11.Connection(h11.CLIENT)
            request = h11.Request(method=method, target=target, headers=[*self._headers(body), *headers])
            writer.write(connection.send(request) or b"")
            if body:
                writer.write(connection.send(h11.Data(data=body)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            yield await _reply(connection, reader)
        finally:
            writer.transport.abort()  # whatever is unread is not wanted

    def _headers(self, body: bytes | None) -> list[tuple[bytes, bytes]]:
        host = f"[{self.host}]" if ":" in self.host else self.host
        out = [(b"Host", f"{host}:{self.port}".encode()), (b"Connection", b"close")]
        if self.key is not None:
            out.append((b"Authorization", f"Bearer {self.key}".encode()))
        if body is not None:
            out += [(b"Content-Type", b"application/json"), (b"Content-Length", str(len(body)).encode())]
        return out


def parse(url: str, key: str | None) -> Upstream:
    """An http:// address with a port and nothing more. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path not in ("", "/"):
        raise ValueError(f"{url} is not like http://127.0.0.1:8080")
    return Upstream(parts.hostname, parts.port, key)


async def _reply(connection: h11.Connection, reader: asyncio.StreamReader) -> Reply:
    try:
        while True:
            event = await _next(connection, reader)
            if isinstance(event, h11.Response):
                return Reply(event.status_code, list(event.headers.raw_items()), _body(connection, reader))
            if not isinstance(event, h11.InformationalResponse):
                raise Unreachable(f"{type(event).__name__} instead of an answer")
    except (OSError, h11.RemoteProtocolError) as error:
        raise Unreachable(str(error)) from error


async def _body(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    try:
        while not isinstance(event := await _next(connection, reader), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise Broken(f"{type(event).__name__} instead of the rest of an answer")
            yield bytes(event.data)
    except (OSError, h11.RemoteProtocolError) as error:
        raise Broken(str(error)) from error


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Event | type[h11.PAUSED]:
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return cast("h11.Event | type[h11.PAUSED]", event)  # the checker cannot tell sentinels apart
        connection.receive_data(await reader.read(PIECE))
