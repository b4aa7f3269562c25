"""A process around an app: it listens while the engine loads, and stops in order when told to."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import log
from .engines import CannotLoad
from .guard import BODY_SECONDS, State

EXIT_ENGINE = 3
CLOSING_SECONDS = 5.0
"""Time for connections and workers to end once everything is cancelled."""
KEEP_ALIVE_SECONDS = 65
CONNECTIONS = 256
"""Connections beside those with a request; more are refused, for each takes memory."""


class Target(Protocol):
    """What is served."""

    @property
    def state(self) -> State: ...

    async def drain(self, grace: float) -> None: ...

    def close(self, seconds: float) -> bool: ...


def run(
    app: ASGIApp,
    target: Target,
    listener: socket.socket,
    *,
    prepare: Callable[[], Callable[[], None]],
    requests: int,
    grace: float,
    about: dict[str, log.Value],
) -> int:
    """Serves until SIGTERM or SIGINT, and gives the exit status.

    ``prepare`` runs in a thread of its own and may take its time; what it gives back then runs in the event
    loop, after which requests are served. A second signal ends the time of grace. Where a thread does not come
    back from its library, the process ends without it.
    """
    code, clean = asyncio.run(_serve(app, target, listener, prepare, requests, grace, about))
    log.event("stopped", code=code)
    if not clean:
        sys.stderr.flush()
        os._exit(code)
    return code


async def _serve(
    app: ASGIApp,
    target: Target,
    listener: socket.socket,
    prepare: Callable[[], Callable[[], None]],
    requests: int,
    grace: float,
    about: dict[str, log.Value],
) -> tuple[int, bool]:
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.put_nowait, int(number))
    server = _Uvicorn(_config(app, requests))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    loading = _in_thread(prepare)
    stop = asyncio.ensure_future(told.get())

    code = 0
    first: set[asyncio.Future[Any]] = {loading, stop, serving}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        code = _begin(loading, target, listener, about)
        if code == 0:
            await asyncio.wait({stop, serving}, return_when=asyncio.FIRST_COMPLETED)
    log.event("stopping", grace_seconds=grace)
    draining = asyncio.ensure_future(target.drain(grace))
    again = asyncio.ensure_future(told.get())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        await target.drain(0)
    server.should_exit = True
    await serving
    clean = await asyncio.to_thread(target.close, CLOSING_SECONDS)
    return code, clean and loading.done()


def _begin(
    loading: asyncio.Future[Callable[[], None]],
    target: Target,
    listener: socket.socket,
    about: dict[str, log.Value],
) -> int:
    error = loading.exception()
    if isinstance(error, CannotLoad):
        log.event("cannot_load", message=error.message, hint=error.hint)
        return EXIT_ENGINE
    if isinstance(error, ModuleNotFoundError):
        log.event("cannot_load", message=str(error), hint="this Python needs what requirements.txt names")
        return EXIT_ENGINE
    if error is not None:
        log.failure("cannot_load", error)
        return EXIT_ENGINE
    loading.result()()
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.event("ready", url=f"http://{shown}:{port}", **about)
    return 0


def _in_thread(work: Callable[[], Callable[[], None]]) -> asyncio.Future[Callable[[], None]]:
    """A thread that a stopping process does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Callable[[], None]] = loop.create_future()

    def tell(result: Callable[[], None] | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if result is None:
            future.set_exception(error or RuntimeError("nothing was prepared"))
        else:
            future.set_result(result)

    def body() -> None:
        try:
            result = work()
        # A library may raise anything, SystemExit too; whatever it is, the process says so and ends.
        except BaseException as error:
            loop.call_soon_threadsafe(tell, None, error)
        else:
            loop.call_soon_threadsafe(tell, result, None)

    threading.Thread(target=body, name="load", daemon=True).start()
    return future


def _config(app: ASGIApp, requests: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=Timed,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(CLOSING_SECONDS),
        limit_concurrency=requests + CONNECTIONS,
    )


class Timed(H11Protocol):
    """A connection that opens, or begins a request, and does not ask within BODY_SECONDS is closed: silent ones count
    against what may be open at once."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """More bytes give no more time."""
        asking = self.cycle is not None and not self.cycle.response_complete
        if asking and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif not asking and self._timer is None:
            self._timer = self.loop.call_later(BODY_SECONDS, self.transport.abort)


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to us: it would close its socket at the first one, before what runs has finished."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
