"""Room for so many requests at a time, a bounded queue before it, and reasons that end them early."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import cast

from .guard import Client
from .refusal import Refused
from .scheduler import ClientGone


class Gate:
    """First come, first served."""

    def __init__(self, room: int, queue: int) -> None:
        self._room = room
        self._queue = queue
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._inside = 0
        self._endings: set[_Ending] = set()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        return self._inside

    @asynccontextmanager
    async def enter(self, client: Client, deadline: float) -> AsyncGenerator[float, None]:
        """A place, from when there is one to the end of the block, which ends early for the reasons of Scheduler.

        Times are time.perf_counter(): ``deadline``, and the one at which the place was had. Raises Refused (429
        full, 504 deadline, 503 stopping) and ClientGone, out of whatever the block waits for.
        """
        with self._ended_early(client, deadline) as ending:
            await self._place(ending)
            try:
                yield time.perf_counter()
            finally:
                self._leave()

    @asynccontextmanager
    async def beside(self, client: Client, deadline: float) -> AsyncGenerator[None, None]:
        """The same without a place."""
        with self._ended_early(client, deadline):
            yield

    def refuse_waiting(self, why: Refused) -> None:
        for ending in self._endings:
            if ending.waits:
                ending.now(why)

    def refuse_inside(self, why: Refused) -> None:
        for ending in self._endings:
            ending.now(why)

    async def _place(self, ending: _Ending) -> None:
        if self._inside < self._room:
            self._inside += 1
            return
        if len(self._waiting) >= self._queue:
            raise Refused(
                429,
                f"{self._inside} requests run and {self.depth} wait: the queue is full",
                reason="queue_full",
                code="queue_full",
                retry_after=1 + self.depth // self._room,
            )
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        ending.waits = True
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif not turn.cancelled():  # a cancelled one was passed over: it was given no place
                self._leave()  # the place came together with the end
            raise
        finally:
            ending.waits = False

    def _leave(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)  # the place is handed on
                return
        self._inside -= 1

    @contextmanager
    def _ended_early(self, client: Client, deadline: float) -> Generator[_Ending, None, None]:
        ending = _Ending()
        self._endings.add(ending)
        late = Refused(504, "not finished in time", reason="timeout", code="timeout")
        left = max(0.0, deadline - time.perf_counter())
        timer = asyncio.get_running_loop().call_later(left, ending.now, late)
        client.when_gone(lambda: ending.now(ClientGone()))
        try:
            yield ending
        except asyncio.CancelledError:
            if ending.why is None:
                raise
            raise ending.why from None
        finally:
            ending.over = True
            self._endings.discard(ending)
            timer.cancel()


class _Ending:
    """Ends what a task waits for, once, with a reason."""

    def __init__(self) -> None:
        self.why: Refused | ClientGone | None = None
        self.over = False
        self.waits = False
        self._task = cast("asyncio.Task[None]", asyncio.current_task())  # a coroutine runs in one

    def now(self, why: Refused | ClientGone) -> None:
        if self.why is None and not self.over:
            self.why = why
            self._task.cancel()
