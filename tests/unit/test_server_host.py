"""How long a connection may be open without a request; time passes only where a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from edgepack.server.guard import BODY_SECONDS
from edgepack.server.host import Timed

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
REFUSED = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
"""Answered before its body has come, as a request without a key is."""


class Clock(asyncio.SelectorEventLoop):
    passed = 0.0

    def time(self) -> float:
        return self.passed

    async def wait(self, seconds: float) -> None:
        self.passed += seconds
        for _ in range(10):
            await asyncio.sleep(0)


class Wire(asyncio.Transport):
    """What a client sees of its connection."""

    def __init__(self) -> None:
        super().__init__()
        self.got = b""
        self.open = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.got += data

    def is_closing(self) -> bool:
        return not self.open

    def close(self) -> None:
        self.open = False

    abort = close

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def send(connection: Timed, data: bytes) -> None:
    if data:  # to a protocol none at all is the end
        connection.data_received(data)


Story = Callable[[Clock, Timed, Wire, asyncio.Event], Awaitable[None]]


def told(story: Story) -> None:
    """Plays it on one connection; requests are answered once the event is set."""
    answered = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answered.wait()
        await PlainTextResponse("ok")(scope, receive, send)

    clock, wire = Clock(), Wire()
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=65)
    connection = Timed(config, ServerState(), {}, clock)
    connection.connection_made(wire)
    try:
        clock.run_until_complete(story(clock, connection, wire, answered))
    finally:
        clock.close()


@pytest.mark.parametrize(
    ("first", "then"), [(b"", b""), (b"", b"G"), (HEALTH, b"G"), (HEALTH + HEALTH, b"G"), (REFUSED, b"{")]
)
def test_who_begins_a_request_and_does_not_ask_is_closed(first: bytes, then: bytes) -> None:
    async def story(clock: Clock, connection: Timed, wire: Wire, answered: asyncio.Event) -> None:
        answered.set()
        send(connection, first)
        await clock.wait(0)
        assert wire.got.count(b"200 OK") == first.count(b"HTTP/1.1")
        send(connection, then)
        await clock.wait(BODY_SECONDS - 1)
        assert wire.open
        send(connection, then)  # more bytes give no more time
        await clock.wait(1)
        assert not wire.open

    told(story)


@pytest.mark.parametrize("first", [b"", HEALTH])
def test_who_asks_is_not_closed_while_it_waits_for_the_answer(first: bytes) -> None:
    async def story(clock: Clock, connection: Timed, wire: Wire, answered: asyncio.Event) -> None:
        answered.set()
        send(connection, first)
        await clock.wait(0)
        answered.clear()
        connection.data_received(HEALTH[:5])
        await clock.wait(BODY_SECONDS - 1)
        connection.data_received(HEALTH[5:])
        await clock.wait(600)
        assert wire.open
        answered.set()
        await clock.wait(BODY_SECONDS + 1)  # kept for a next request
        assert wire.open
        assert wire.got.count(b"200 OK") == len(first + HEALTH) // len(HEALTH)

    told(story)
