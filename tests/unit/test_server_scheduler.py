"""Who is served when: order, slots, the queue's end, and what leaving and failing leave behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_who_has_left_before_it_enters_costs_no_other_conversation_its_prefix() -> None:
    engine = Held()
    engine.go.release(2)

    async def body(scheduler: Scheduler) -> None:
        await said(scheduler, work("abcdefgh"))
        client = Client()
        client.left()
        with pytest.raises(ClientGone):
            await said(scheduler, work("xy"), client)
        assert scheduler.running == 0
        assert engine.cached(0, list(b"abcdefghij")) == len("abcdefgh")

    with_scheduler(engine, 1, body)


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


def test_who_waits_and_leaves_as_a_place_is_given_back_neither_gets_it_nor_gives_it_back_again() -> None:
    async def run() -> None:
        gate = Gate(1, 8)
        clients = [Client() for _ in range(3)]
        visits = [asyncio.ensure_future(_stay(gate, client)) for client in clients]
        await _turns()
        clients[0].left()
        clients[1].left()
        await _turns()
        assert (gate.inside, gate.depth) == (1, 0)
        clients[2].left()
        await asyncio.gather(*visits)
        assert (gate.inside, gate.depth) == (0, 0)

    asyncio.run(run())


EVENTS = st.tuples(st.sampled_from(("leaves", "is cancelled", "ends")), st.integers(0, 9))


@given(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 4), st.lists(EVENTS, max_size=4)), max_size=12))
def test_a_gate_has_never_more_inside_than_places_and_all_are_free_at_the_end(
    places: int, turns: Sequence[tuple[int, Sequence[tuple[str, int]]]]
) -> None:
    async def run() -> None:
        gate = Gate(places, 4)
        visitors: list[tuple[Client, asyncio.Event, asyncio.Task[None]]] = []
        inside: set[Client] = set()

        async def visit(client: Client, over: asyncio.Event) -> None:
            async with gate.enter(client, soon()):
                inside.add(client)
                try:
                    await over.wait()
                finally:
                    inside.remove(client)

        for arrivals, events in turns:
            for client, over in ((Client(), asyncio.Event()) for _ in range(arrivals)):
                visitors.append((client, over, asyncio.ensure_future(visit(client, over))))
            for event, number in events if visitors else ():
                client, over, task = visitors[number % len(visitors)]
                acts: dict[str, Callable[[], object]] = {
                    "leaves": client.left, "is cancelled": task.cancel, "ends": over.set
                }  # fmt: skip
                acts[event]()
            await asyncio.sleep(0)
            assert len(inside) <= places
            assert 0 <= gate.inside <= places
        for _, over, _ in visitors:
            over.set()
        results = await asyncio.gather(*(task for *_, task in visitors), return_exceptions=True)
        assert all(
            result is None or isinstance(result, (Refused, ClientGone, asyncio.CancelledError))
            for result in results
        )
        assert (gate.inside, gate.depth, inside) == (0, 0, set())

    asyncio.run(run())


async def _stay(gate: Gate, client: Client) -> None:
    with pytest.raises(ClientGone):
        async with gate.enter(client, soon()):
            await asyncio.get_running_loop().create_future()


async def _turns() -> None:
    """As many turns of the loop as anything here takes to come to rest."""
    for _ in range(5):
        await asyncio.sleep(0)
