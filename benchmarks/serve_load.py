"""Loads a server with concurrent streaming clients, some of which leave: refusals, errors, latency, memory.

    python benchmarks/serve_load.py --clients 32 --seconds 120 --leaving 0.25 --model NAME -- \\
        python -m edgepack.server --engine onnx-genai --model FOLDER --ctx-size 2048 --parallel 2 \\
        --port {port} --api-key-file {key}

Starts the command after `--`, with a free port for {port} and a file with a new key for {key}, waits for /health,
and counts the memory of the process and all its children. A refusal is a 429, or vLLM's 503 of a full queue; its
client waits as long as it was told and asks again. Anything else that is not an answer is an error. Exit status 1 if
there was one, or if requests are still in slots or queue when all clients have gone. A bundle's own start file:

    ... --model demo -- env EDGEPACK_PORT={port} EDGEPACK_KEY_FILE={key} sh FOLDER/start.sh

serving.py does so with bundles of all runtimes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

WORDS = (
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
)
MIB = 1 << 20


class NotServed(Exception):
    """The server did not start, or does not say what it does."""


@dataclass(slots=True)
class Seen:
    """What the clients saw."""

    done: int = 0
    left: int = 0
    tokens: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How a server is loaded."""

    model: str
    clients: int = 32
    seconds: float = 120
    leaving: float = 0
    """Share of the requests whose client leaves early."""
    words: int = 40
    tokens: int = 32
    warm: int = 8
    """Requests before memory is read."""


async def client(api: openai.AsyncOpenAI, options: Load, seed: int, seen: Seen, end: float) -> None:
    """Asks until the end, one request after another."""
    chance = random.Random(seed)
    while time.monotonic() < end:
        leaves = chance.random() < options.leaving
        prompt = " ".join(chance.choices(WORDS, k=chance.randint(1, options.words)))
        most = chance.randint(1, options.tokens)
        try:
            await request(api, options.model, prompt, most, seen, chance.randint(0, most) if leaves else None)
        except openai.APIError as error:
            if isinstance(error, openai.APIStatusError) and is_refusal(error.status_code, error.message):
                seen.refused[error.status_code] += 1
                told = float(error.response.headers.get("retry-after", "1"))
                await asyncio.sleep(told * chance.uniform(0.5, 1))
                continue
            seen.errors[f"{type(error).__name__}: {error} {error.__cause__!r}"[:200]] += 1
            await asyncio.sleep(0.5)


VLLM_BUSY = "The engine is currently busy"
"""How vLLM refuses what is beyond its queue (vllm/entrypoints/serve/engine/serving.py)."""


def is_refusal(status: int, message: str) -> bool:
    """Whether a server said that it has enough to do; any other 503 is one that does not serve."""
    return status == 429 or (status == 503 and VLLM_BUSY in message)


async def request(
    api: openai.AsyncOpenAI, model: str, prompt: str, most: int, seen: Seen, leaves_after: int | None
) -> None:
    """One streamed completion; a client that leaves does so after so many chunks, at 0 before the first."""
    asked = time.perf_counter()
    creating = api.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=most,
        temperature=0.8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    if leaves_after == 0:
        try:
            stream = await asyncio.wait_for(creating, 0.05)
        except asyncio.TimeoutError:
            seen.left += 1
            return
    else:
        stream = await creating
    async with stream:
        last, count = asked, 0
        async for chunk in stream:
            if chunk.usage is not None:  # a chunk may have held several tokens, or half a character
                seen.tokens += chunk.usage.completion_tokens - count
            if not chunk.choices or not chunk.choices[0].text:
                continue
            now = time.perf_counter()
            (seen.between if count else seen.first).append(now - last)
            last, count = now, count + 1
            seen.tokens += 1
            if count == leaves_after:
                seen.left += 1
                return
    seen.whole.append(time.perf_counter() - asked)
    seen.done += 1


def resident(process: psutil.Process) -> int:
    """Bytes of a process and its children that are in memory."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return total


async def watch(process: psutil.Process, seen: Seen) -> None:
    while True:
        seen.memory.append((time.monotonic(), resident(process)))
        await asyncio.sleep(0.5)


async def load(options: Load, port: int, key: str, process: psutil.Process, seen: Seen) -> bool:
    """All clients to the end; whether the server then had nothing left in slots and queue."""
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key=key,
        max_retries=0,
        timeout=options.seconds + 60,
        # llama-server closes the connection of each streamed answer without having said so: of those that are used
        # again one in a hundred meets its closing, which the openai package tries again unless told not to.
        default_headers={"Connection": "close"},
    ) as api:
        for _ in range(options.warm):  # first requests fill caches of libraries; what is measured is growth
            await request(api, options.model, " ".join(WORDS * 8)[: options.words * 3], 8, Seen(), None)
        watcher = asyncio.ensure_future(watch(process, seen))
        end = time.monotonic() + options.seconds
        await asyncio.gather(*(client(api, options, seed, seen, end) for seed in range(options.clients)))
        await asyncio.sleep(2)
        watcher.cancel()
    return idle(port, key)


OPEN = (
    ("edgepack_requests_running", "edgepack_queue_depth"),
    ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
    ("vllm:num_requests_running", "vllm:num_requests_waiting"),
)
"""Requests in slots and queue, by edgepack's names (the front has them too), llama-server's and vLLM's."""


def idle(port: int, key: str) -> bool:
    """Whether nothing runs or waits. Raises NotServed where /metrics does not say."""
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    waiting = requests_in(page)
    if waiting is None:
        raise NotServed("/metrics does not say what runs and waits")
    return waiting == 0


def requests_in(page: str) -> float | None:
    """Requests in slots and queue by a page of metrics; None where it does not say."""
    samples: defaultdict[str, float] = defaultdict(float)
    for line in page.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[name.partition("{")[0]] += float(value)
    for names in OPEN:
        if samples.keys() >= set(names):
            return sum(samples[name] for name in names)
    return None


def measure(options: Load, port: int, key: str, process: psutil.Process) -> dict[str, Any]:
    """A whole load, and what came of it."""
    seen = Seen()
    was_idle = asyncio.run(load(options, port, key, process, seen))
    return report(options, seen, was_idle)


def report(options: Load, seen: Seen, was_idle: bool) -> dict[str, Any]:
    memory = [count / MIB for _, count in seen.memory]
    quarter = max(1, len(memory) // 4)
    return {
        "clients": options.clients,
        "seconds": options.seconds,
        "answered": seen.done,
        "left": seen.left,
        "refused": dict(seen.refused),
        "errors": dict(seen.errors),
        "tokens_per_second": round(seen.tokens / options.seconds, 1),
        "first_token_ms": percentiles(seen.first),
        "between_tokens_ms": percentiles(seen.between),
        "whole_ms": percentiles(seen.whole),
        "rss_mib": {
            "start": round(memory[0], 1),
            "first_quarter": round(statistics.mean(memory[:quarter]), 1),
            "last_quarter": round(statistics.mean(memory[-quarter:]), 1),
            "peak": round(max(memory), 1),
            "end": round(memory[-1], 1),
        },
        "idle_at_end": was_idle,
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {name: round(1000 * cuts[at - 1], 2) for name, at in (("p50", 50), ("p95", 95), ("p99", 99))}


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise NotServed(f"the server ended with {process.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:  # it does not listen yet
            time.sleep(0.2)
    raise NotServed(f"the server was not ready after {seconds} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument(
        "--leaving", type=float, default=0, help="share of requests whose client leaves early"
    )
    parser.add_argument("--model", required=True, help="the server's alias")
    parser.add_argument("--words", type=int, default=40, help="words of a prompt at most")
    parser.add_argument("--tokens", type=int, default=32, help="max_tokens at most")
    parser.add_argument("--warm", type=int, default=8, help="requests before memory is read")
    parser.add_argument("--start-seconds", type=float, default=120)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    asked = Load(**{name: getattr(options, name) for name in Load.__slots__})
    with serving(options.command, options.start_seconds) as (port, key, process):
        found = measure(asked, port, key, process)
    print(json.dumps(found, indent=2))
    sys.exit(1 if failed(found) else 0)


def failed(found: Mapping[str, Any]) -> bool:
    """Whether something else than answers and refusals came, or a client that had gone was still served."""
    return bool(found["errors"]) or not found["idle_at_end"]


@contextmanager
def serving(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[tuple[int, str, psutil.Process]]:
    """The server of a command once it is ready: its port, its key and its process."""
    key = secrets.token_urlsafe(24)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, (log or Path(os.devnull)).open("ab") as said:
        path = Path(folder) / "key"
        path.write_text(key, encoding="ascii")
        words = [word.replace("{port}", str(port)).replace("{key}", str(path)) for word in command]
        with subprocess.Popen(
            words, stdout=said, stderr=said, env={**os.environ, **(environment or {})}
        ) as server:
            try:
                wait_for(port, server, seconds)
                yield port, key, psutil.Process(server.pid)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
