"""Who is served when: order, slots, the queue's end, and what leaving and failing leave behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from edgepack.server.engines import Options, Sampling, Token
from edgepack.server.gate import Gate
from edgepack.server.guard import Client
from edgepack.server.refusal import Refused
from edgepack.server.scheduler import ClientGone, End, Piece, Scheduler, Started, Work
from tests.fake_engine import FakeEngine

OPTIONS = Options(
    model=Path(), context=64, slots=1, ubatch=8, kv_type="f32", threads=1, provider="cpu"
)  # fmt: skip


class Held(FakeEngine):
    """Waits before each answer until it is let go, once for each."""

    def __init__(self, slots: int = 1) -> None:
        super().__init__(
            Options(**{name: getattr(OPTIONS, name) for name in OPTIONS.__slots__} | {"slots": slots})
        )
        self.go = threading.Semaphore(0)
        self.served: list[str] = []

    def generate(
        self, slot: int, prompt: Sequence[int], sampling: Sampling, limit: int, *, reuse: bool,
        cancelled: Callable[[], bool],
    ) -> Iterator[Token]:  # fmt: skip
        while not self.go.acquire(timeout=0.01):
            if cancelled():
                return
        self.served.append(self.detokenize(prompt))
        yield from super().generate(slot, prompt, sampling, limit, reuse=reuse, cancelled=cancelled)


def work(text: str, *, seconds: float = 30.0) -> Work:
    return Work(
        prompt=list(text.encode()),
        sampling=Sampling(temperature=0),
        limit=3,
        stops=(),
        reuse=True,
        deadline=time.perf_counter() + seconds,
    )


async def said(scheduler: Scheduler, one: Work, client: Client | None = None) -> str:
    out = ""
    async with aclosing(scheduler.events(one, client or Client())) as events:
        async for batch in events:
            out += "".join(event.text for event in batch if isinstance(event, (Piece, End)))
    return out


async def settled(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def with_scheduler(engine: Held, queue: int, body: Callable[[Scheduler], Awaitable[None]]) -> None:
    async def run() -> None:
        scheduler = Scheduler(engine, queue)
        await body(scheduler)
        engine.go.release(100)
        assert await asyncio.to_thread(scheduler.close, 10)

    asyncio.run(run())


def test_requests_are_served_in_the_order_in_which_they_came() -> None:
    engine = Held()

    async def body(scheduler: Scheduler) -> None:
        asked = []
        for text in ("a", "b", "c", "d"):
            asked.append(asyncio.ensure_future(said(scheduler, work(text))))
            await asyncio.sleep(0)
        engine.go.release(4)
        assert await asyncio.gather(*asked) == ["a", "b", "c", "d"]

    with_scheduler(engine, 3, body)
    assert engine.served == ["a", "b", "c", "d"]


def test_one_too_many_is_refused_and_the_next_after_an_end_is_not() -> None:
    engine = Held()

    async def body(scheduler: Scheduler) -> None:
        first = asyncio.ensure_future(said(scheduler, work("a")))
        second = asyncio.ensure_future(said(scheduler, work("b")))
        await settled(lambda: (scheduler.running, scheduler.depth) == (1, 1))
        with pytest.raises(Refused) as refused:
            await said(scheduler, work("c"))
        assert (refused.value.status, refused.value.retry_after) == (429, 2)
        engine.go.release(3)
        await first
        assert await said(scheduler, work("d")) == "d"
        await second

    with_scheduler(engine, 1, body)


def test_without_a_queue_a_next_turn_finds_its_slot_free() -> None:
    engine = Held()
    engine.go.release(50)

    async def body(scheduler: Scheduler) -> None:
        for _ in range(50):
            assert await said(scheduler, work("a")) == "a"

    with_scheduler(engine, 0, body)


def test_who_waits_and_leaves_is_never_started() -> None:
    engine = Held()

    async def body(scheduler: Scheduler) -> None:
        client = Client()
        first = asyncio.ensure_future(said(scheduler, work("a")))
        leaving = asyncio.ensure_future(said(scheduler, work("b"), client))
        last = asyncio.ensure_future(said(scheduler, work("c")))
        await settled(lambda: scheduler.depth == 2)
        client.left()
        with pytest.raises(ClientGone):
            await leaving
        assert scheduler.depth == 1
        engine.go.release(2)
        await asyncio.gather(first, last)

    with_scheduler(engine, 2, body)
    assert engine.served == ["a", "c"]


def test_who_leaves_a_slot_gives_it_to_the_next() -> None:
    engine = Held()

    async def body(scheduler: Scheduler) -> None:
        client = Client()
        leaving = asyncio.ensure_future(said(scheduler, work("a"), client))
        await settled(lambda: scheduler.running == 1)
        next_one = asyncio.ensure_future(said(scheduler, work("b")))
        await settled(lambda: scheduler.depth == 1)
        client.left()
        with pytest.raises(ClientGone):
            await leaving
        await settled(lambda: scheduler.depth == 0)
        engine.go.release()
        assert await next_one == "b"

    with_scheduler(engine, 1, body)
    assert engine.served == ["b"]


def test_time_runs_out_in_the_queue() -> None:
    engine = Held()

    async def body(scheduler: Scheduler) -> None:
        first = asyncio.ensure_future(said(scheduler, work("a")))
        await settled(lambda: scheduler.running == 1)
        with pytest.raises(Refused) as refused:
            await said(scheduler, work("b", seconds=0.05))
        assert refused.value.status == 504
        assert "still waited" in refused.value.message
        engine.go.release()
        await first

    with_scheduler(engine, 1, body)


def test_tokens_in_slots_are_counted_while_and_after_they_are_used() -> None:
    engine = Held(slots=2)
    engine.go.release(2)

    async def body(scheduler: Scheduler) -> None:
        assert scheduler.tokens_held == 0
        await said(scheduler, work("abcde"))
        assert scheduler.tokens_held == 5 + 3
        await said(scheduler, work("xy"))
        assert scheduler.tokens_held == 5 + 3 + 2 + 3  # its end is a token too

    with_scheduler(engine, 0, body)


def test_the_slot_that_holds_most_of_a_prompt_is_taken_and_else_the_longest_idle() -> None:
    engine = Held(slots=3)
    engine.go.release(9)

    async def taken(scheduler: Scheduler, text: str) -> tuple[int, int]:
        async with aclosing(scheduler.events(work(text), Client())) as events:
            batches = [batch async for batch in events]
        started = batches[0][0]
        assert isinstance(started, Started)
        return started.slot, started.cached

    async def body(scheduler: Scheduler) -> None:
        found = [await taken(scheduler, text) for text in ("abcdefg", "xyzzy", "12345", "abcdefgh", "q")]
        assert found == [(0, 0), (1, 0), (2, 0), (0, 7), (1, 0)]

    with_scheduler(engine, 0, body)


# ── the front's gate ─────────────────────────────────────────────────────────────────────────────────


def soon(seconds: float = 30.0) -> float:
    return time.perf_counter() + seconds


def test_a_gate_lets_in_as_many_as_there_is_room_in_order() -> None:
    order: list[int] = []

    async def visit(gate: Gate, number: int) -> None:
        async with gate.enter(Client(), soon()):
            assert gate.inside <= 2
            order.append(number)
            await asyncio.sleep(0.01)

    async def run() -> None:
        gate = Gate(2, 8)
        await asyncio.gather(*(visit(gate, number) for number in range(8)))
        assert (gate.inside, gate.depth) == (0, 0)

    asyncio.run(run())
    assert order == list(range(8))


def test_a_gate_refuses_late_and_surplus_visitors() -> None:
    async def wait(gate: Gate, client: Client, deadline: float) -> None:
        async with gate.enter(client, deadline):
            await asyncio.sleep(30)

    async def run() -> None:
        gate = Gate(1, 2)
        client = Client()
        inside = asyncio.ensure_future(wait(gate, client, soon()))
        await asyncio.sleep(0)
        late = asyncio.ensure_future(wait(gate, Client(), soon(0.05)))
        leaving_client = Client()
        leaving = asyncio.ensure_future(wait(gate, leaving_client, soon()))
        await asyncio.sleep(0)
        with pytest.raises(Refused) as full:
            await wait(gate, Client(), soon())
        leaving_client.left()
        with pytest.raises(ClientGone):
            await leaving
        with pytest.raises(Refused) as expired:
            await late
        client.left()
        with pytest.raises(ClientGone):
            await inside
        assert (full.value.status, expired.value.status) == (429, 504)
        assert (gate.inside, gate.depth) == (0, 0)

    asyncio.run(run())
