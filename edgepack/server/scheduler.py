"""Who is served when: a worker thread for each slot, a bounded first-in-first-out queue before them.

All of it but the workers' loop runs in the event loop's thread, so nothing is locked. A worker hands tokens over
in a deque and wakes the loop once for all that lie there.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

from . import log
from .engines import Engine, Sampling, Token
from .guard import Client
from .refusal import Refused
from .stops import Stops

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be generated."""

    prompt: Sequence[int]
    sampling: Sampling
    limit: int
    """Tokens at most."""
    stops: Sequence[str]
    reuse: bool
    """May start from what the slot holds of this prompt."""
    deadline: float
    """time.perf_counter() at which it is ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A slot took the work."""

    slot: int
    cached: int
    """Tokens of the prompt that it already held."""
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token, and the text that is certain now (stop strings are held back)."""

    token: Token
    text: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Nothing follows."""

    reason: FinishReason
    text: str
    """What was still held back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The engine raised; the log says what."""

    refused: Refused


Event = Started | Piece | End | Failed


class ClientGone(Exception):
    """The one who asked has left; nobody reads an answer."""


class Scheduler:
    """The slots of one engine, in the event loop that is running when it is made."""

    def __init__(self, engine: Engine, queue_size: int) -> None:
        self._engine = engine
        self._queue_size = queue_size
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Ticket] = deque()
        self._running: dict[int, _Ticket] = {}
        self._idle: list[int] = list(range(engine.slots))  # the longest idle first
        self._held = [0] * engine.slots
        self._inboxes: list[SimpleQueue[_Ticket | None]] = [SimpleQueue() for _ in range(engine.slots)]
        self._threads = [
            threading.Thread(target=self._worker, args=(slot,), name=f"slot-{slot}", daemon=True)
            for slot in range(engine.slots)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def tokens_held(self) -> int:
        """Tokens in the KV cache of all slots, those kept for a next turn included."""
        return sum(self._held)

    async def events(self, work: Work, client: Client) -> AsyncGenerator[Sequence[Event], None]:
        """What happens to the work, to its End, in batches of what has come together.

        Closing the iterator gives the slot back.

        Raises Refused (429 when the queue is full, 504 at the deadline, 503 when the server stops, 500 when the
        engine failed) and ClientGone.
        """
        if client.gone:  # it would take a slot, and with it what the slot holds of another conversation
            raise ClientGone()
        ticket = _Ticket(work, self._loop)
        self._enter(ticket)
        timer = self._loop.call_later(max(0.0, work.deadline - time.perf_counter()), ticket.expire)
        client.when_gone(lambda: ticket.fail(ClientGone()))
        try:
            while True:
                await ticket.changed.wait()
                ticket.changed.clear()
                batch = ticket.take()
                if batch:
                    last = batch[-1]
                    if isinstance(last, Failed):
                        raise last.refused
                    if self._running.get(ticket.slot) is ticket:
                        self._held[ticket.slot] += sum(isinstance(event, Piece) for event in batch)
                    yield batch
                    if isinstance(last, End):
                        return
                if ticket.failure is not None:
                    raise ticket.failure
        finally:
            timer.cancel()
            self._leave(ticket)

    def refuse_waiting(self, why: Refused) -> None:
        """Ends all that has not begun."""
        for ticket in self._waiting:
            ticket.fail(why)

    def refuse_running(self, why: Refused) -> None:
        for ticket in self._running.values():
            ticket.fail(why)

    def close(self, seconds: float) -> bool:
        """Ends the workers; False if one is still in the engine after so many seconds."""
        for inbox in self._inboxes:
            inbox.put(None)
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _enter(self, ticket: _Ticket) -> None:
        if self._idle:
            slot = max(self._idle, key=lambda slot: self._cached(slot, ticket))  # of equals the longest idle
            self._idle.remove(slot)
            self._start(slot, ticket)
        elif len(self._waiting) < self._queue_size:
            self._waiting.append(ticket)
        else:
            raise Refused(
                429,
                f"{self.running} requests run and {self.depth} wait: the queue is full",
                reason="queue_full",
                code="queue_full",
                retry_after=1 + self.depth // len(self._threads),
            )

    def _start(self, slot: int, ticket: _Ticket) -> None:
        self._running[slot] = ticket
        self._held[slot] = len(ticket.work.prompt)
        ticket.slot = slot
        ticket.put(Started(slot=slot, cached=self._cached(slot, ticket), at=time.perf_counter()))
        self._inboxes[slot].put(ticket)

    def _cached(self, slot: int, ticket: _Ticket) -> int:
        """Tokens that need not be computed again; the last one always is, for its logits."""
        if not ticket.work.reuse:
            return 0
        return min(self._engine.cached(slot, ticket.work.prompt), len(ticket.work.prompt) - 1)

    def _leave(self, ticket: _Ticket) -> None:
        ticket.cancelled.set()
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    def _finish(self, slot: int, held: int, last: End | Failed | None) -> None:
        """A worker is done. Its slot is free before its client hears of the end, so that a next turn finds it."""
        ticket = self._running.pop(slot)
        if last is not None:
            ticket.put(last)
        self._held[slot] = held
        while self._waiting:
            next_one = self._waiting.popleft()
            if not next_one.cancelled.is_set():
                self._start(slot, next_one)
                return
        self._idle.append(slot)

    def _worker(self, slot: int) -> None:
        while (ticket := self._inboxes[slot].get()) is not None:
            count = 0
            last: End | Failed | None = None
            try:
                for event in _generate(self._engine, slot, ticket):
                    if isinstance(event, End):
                        last = event
                    else:
                        count += 1
                        ticket.hand_over(event)
            except Exception as error:
                log.failure("engine_failed", error, slot=slot)
                refused = Refused(500, "the engine failed; the server's log says why", reason="engine_failed")
                last = Failed(refused=refused)
            self._loop.call_soon_threadsafe(self._finish, slot, len(ticket.work.prompt) + count, last)


class _Ticket:
    """Work on its way through queue, slot and answer."""

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.slot = -1
        self.changed = asyncio.Event()
        self.cancelled = threading.Event()
        self.failure: Refused | ClientGone | None = None
        self._loop = loop
        self._events: deque[Event] = deque()
        self._woken = False

    def put(self, event: Event) -> None:
        """From the loop's thread."""
        self._events.append(event)
        self.changed.set()

    def hand_over(self, event: Event) -> None:
        """From a worker's thread."""
        self._events.append(event)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    def take(self) -> list[Event]:
        batch = []
        while self._events:
            batch.append(self._events.popleft())
        return batch

    def fail(self, why: Refused | ClientGone) -> None:
        if self.failure is None:
            self.failure = why
            self.cancelled.set()
            self.changed.set()

    def expire(self) -> None:
        where = "it still waited in the queue" if self.slot < 0 else f"it ran in slot {self.slot}"
        self.fail(Refused(504, f"not finished in time; {where}", reason="timeout", code="timeout"))

    def _wake(self) -> None:
        self._woken = False
        self.changed.set()


def _generate(engine: Engine, slot: int, ticket: _Ticket) -> Iterator[Piece | End]:
    """Runs in a slot's thread. Ends without an End when the ticket was cancelled."""
    work = ticket.work
    stops = Stops(work.stops)
    count = 0
    tokens = engine.generate(
        slot, work.prompt, work.sampling, work.limit, reuse=work.reuse, cancelled=ticket.cancelled.is_set
    )
    for token in tokens:
        count += 1
        text, met = stops.feed(token.text)
        yield Piece(token=token, text=text, at=time.perf_counter())
        if met:
            yield End(reason="stop", text="")
            return
        if token.end:
            yield End(reason="stop", text=stops.rest())
            return
    if count == work.limit:
        yield End(reason="length", text=stops.rest())
    elif not ticket.cancelled.is_set():
        raise RuntimeError(f"the engine ended after {count} of {work.limit} tokens")
