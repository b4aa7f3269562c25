"""The server as a process of its own on loopback, and a plain client for what the openai package would hide."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEY = "a-key-for-tests"


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """Requests to one address; ``key`` None sends none."""

    port: int
    key: str | None = KEY

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        connection = self.send(method, path, body, **headers)
        try:
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def send(self, method: str, path: str, body: object = None, **headers: str) -> http.client.HTTPConnection:
        """A request whose answer is not read yet; closing the connection is leaving."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        if self.key is not None:
            sent["Authorization"] = f"Bearer {self.key}"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode("ascii")
        connection.request(method, path, body=data, headers={**sent, **headers})
        return connection

    def metric(self, name: str) -> float:
        """The sum of a series' samples."""
        lines = self("GET", "/metrics").body.decode().splitlines()
        found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def until(self, holds: Callable[[], bool], seconds: float = 15.0) -> None:
        """Waits for what must come to hold."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    process: subprocess.Popen[str]
    api: Api
    lines: Sequence[str]
    """What it has written to stderr so far."""

    def events(self, name: str) -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [event for event in parsed if event["event"] == name]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=30)


def start(program: Sequence[str], folder: Path, *flags: str) -> Server:
    """Starts a server on a free port and gives it back once it listens; it may still be loading."""
    folder.mkdir(exist_ok=True)
    key = folder / "key"
    key.write_text(f"{KEY}\n", encoding="ascii")
    port = free_port()
    command = [*program, *flags, "--port", str(port), "--api-key-file", str(key)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    lines: list[str] = []
    assert process.stderr is not None
    threading.Thread(target=_collect, args=(process.stderr, lines), daemon=True).start()
    server = Server(process=process, api=Api(port=port), lines=lines)
    server.api.until(lambda: process.poll() is not None or _answers(server.api), 60)
    return server


@contextmanager
def listening(program: Sequence[str], folder: Path, *flags: str) -> Iterator[Server]:
    """A server that listens, for as long as the block lasts."""
    server = start(program, folder, *flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@contextmanager
def running(program: Sequence[str], folder: Path, *flags: str) -> Iterator[Server]:
    """The same once it is ready."""
    with listening(program, folder, *flags) as server:
        server.api.until(lambda: server.api("GET", "/health").status == 200, 60)
        yield server


def fuzz(server: Server, folder: Path, *, phases: str, examples: int) -> str:
    """What schemathesis says of requests that follow the server's own description and of such that break it.

    Phase "coverage" has cases for every field, "fuzzing" so many random ones for each operation. All its checks but
    positive_data_acceptance and its warning: a token beyond the vocabulary and a NUL follow the description and are
    refused.
    """
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.api.url}/openapi.json",
        "--header", f"Authorization: Bearer {KEY}", "--phases", phases, "--checks", "all",
        "--exclude-checks", "positive_data_acceptance", "--max-examples", str(examples), "--seed", "1",
        "--generation-database", "none", "--no-color", "--warnings", "off",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "No issues found" in done.stdout
    assert not [event for event in server.events("request") if event["status"] >= 500]
    return done.stdout


FAKE = (sys.executable, "-m", "tests.fake_engine", "--engine", "onnx-genai", "--alias", "fake")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _answers(api: Api) -> bool:
    try:
        api("GET", "/health")
    except OSError:
        return False
    return True


def _collect(stream: Iterator[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))
