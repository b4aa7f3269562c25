"""The front: a server's own stream passes unchanged, /chat and metrics are added, limits hold."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from edgepack import hub, modelspec, toolchain
from edgepack.builders import gguf
from edgepack.progress import Silent
from edgepack.server.front import FRESH_SECONDS
from tests.server_process import FAKE, KEY, Api, Server, free_port, fuzz, listening, running

pytestmark = pytest.mark.integration

FRONT = (sys.executable, "-m", "edgepack.server", "--engine", "front", "--parallel", "1", "--queue-size", "1")
SLOT = 256
EXAMPLES = 10
"""Of schemathesis for each operation."""


@contextmanager
def front(folder: Path, port: int, *flags: str) -> Iterator[Server]:
    """A front before the server on a port, which has the same key."""
    folder.mkdir(exist_ok=True)
    key = folder / "upstream-key"
    key.write_text(f"# the other server's\n{KEY}\n", encoding="ascii")
    upstream = ("--upstream", f"http://127.0.0.1:{port}", "--upstream-key-file", str(key))
    with listening((*FRONT, "--ctx-size", str(SLOT)), folder, *upstream, *flags) as one:
        yield one


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("behind")
    with running(FAKE, folder, "--model", str(folder), "--ctx-size", str(2 * SLOT), "--parallel", "2") as one:
        yield one.api


@pytest.fixture(scope="module")
def api(behind: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with front(tmp_path_factory.mktemp("front"), behind.port, "--timeout", "4") as one:
        yield one.api


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The real one, with the built-in model."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint = hub.resolve("demo", revision=None, offline=True, progress=Silent())
    built = gguf.build(
        checkpoint, modelspec.read(checkpoint.path), "Q8_0", folder, imatrix=None, toolchain=toolchain.find(),
        progress=Silent(),
    )  # fmt: skip
    key = folder / "key"
    key.write_text(KEY, encoding="ascii")
    port = free_port()
    command = [
        str(toolchain.find_server()), "-m", str(built.path), "-c", str(SLOT), "-np", "1", "-t", "1",
        "--port", str(port), "--api-key-file", str(key), "--alias", "demo",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        one = Api(port=port)
        one.until(lambda: answers(one), 60)
        yield one
        process.terminate()


def answers(api: Api) -> bool:
    try:
        return api("GET", "/health").status == 200
    except OSError:
        return False


def same_each_time(stream: bytes) -> list[Any]:
    """The events of a stream without what differs from one request to the next."""
    lines = stream.decode("utf-8").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    objects = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    for one in objects:
        for name in ("id", "created", "timings"):
            one.pop(name, None)
    return objects


# ── before llama-server ──────────────────────────────────────────────────────────────────────────────


def test_llama_servers_answers_pass_as_they_are_and_are_counted(llama_server: Api, tmp_path: Path) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "cache_prompt": False}
    streamed = {**body, "stream": True}

    own = llama_server("POST", "/v1/completions", streamed)
    with front(tmp_path, llama_server.port) as one:
        api = one.api
        passed = api("POST", "/v1/completions", streamed)
        whole = api("POST", "/v1/completions", body).json
        refused = api("POST", "/v1/completions", {**body, "prompt": "word " * 400})
        health = api("GET", "/health").json["data"]
        chat = api("POST", "/chat", {"messages": [{"role": "user", "content": "Hello"}]}).json
        models = api("GET", "/v1/models").json["data"]
        counted = api.metric("edgepack_generation_tokens_total"), api.metric("edgepack_prompt_tokens_total")
        between = api.metric("edgepack_inter_token_latency_seconds_count")

    assert same_each_time(passed.body) == same_each_time(own.body)
    assert passed.headers["content-type"] == own.headers["content-type"]
    assert whole["usage"]["completion_tokens"] == 12
    assert refused.status == 400
    assert refused.json["error"]["type"] == "exceed_context_size_error"  # llama-server's own words
    assert (health["runtime"], health["model"], health["context"]) == ("llama.cpp", "demo", SLOT)
    data = chat["data"]
    assert data["finish_reason"] == "length"
    assert data["prompt_tokens"] + data["completion_tokens"] == SLOT  # 2048 were asked for
    assert [model["id"] for model in models] == ["demo"]
    prompt = whole["usage"]["prompt_tokens"]
    assert counted == (24 + data["completion_tokens"], 2 * prompt + data["prompt_tokens"])
    assert between == 11


def test_the_openai_client_streams_from_llama_server_through_it(llama_server: Api, tmp_path: Path) -> None:
    with (
        front(tmp_path, llama_server.port) as one,
        openai.OpenAI(base_url=f"{one.api.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=6, stream=True
        )
        chunks = list(stream)

    assert chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_nothing_that_follows_or_breaks_its_description_fails_before_llama_server(
    llama_server: Api, tmp_path: Path
) -> None:
    with front(tmp_path, llama_server.port) as one:
        said = fuzz(one, tmp_path, phases="fuzzing", examples=EXAMPLES)

    assert "No issues found" in said


# ── before any server ────────────────────────────────────────────────────────────────────────────────


ODD = (
    b': a comment\r\n\r\ndata:{"a": 1}\n\ndata: {"choices": [{"text": "\xc3',
    b'\xa9"}]}\n\nevent: x\ndata: \n\n',
    b"data: {broken\n\n" + b"x" * 5000,
    b"\n\ndata: [DO",
    b"NE]\n\n",
)


@contextmanager
def raw_server(answer: bytes) -> Iterator[int]:
    """Takes one connection after another and gives each the same bytes, then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stopped = threading.Event()

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(10)
                    asked = connection.recv(65536)
                    if stopped.is_set():
                        return
                    assert asked
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stopped.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


def chunked(pieces: tuple[bytes, ...]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def test_a_stream_passes_byte_for_byte(tmp_path: Path) -> None:
    with raw_server(chunked(ODD) + b"0\r\n\r\n") as port, front(tmp_path, port) as one:
        passed = one.api("POST", "/v1/completions", {"prompt": "a", "stream": True})

        assert passed.body == b"".join(ODD)
        assert one.api.metric("edgepack_answers_without_usage_total") == 1


def test_a_stream_that_breaks_off_ends_with_an_error(tmp_path: Path) -> None:
    with raw_server(chunked((b"data: {}\n\n",))) as port, front(tmp_path, port) as one:
        passed = one.api("POST", "/v1/completions", {"prompt": "a", "stream": True})

    first, error, end = passed.body.split(b"\n\n")
    assert (first, end) == (b"data: {}", b"")
    assert b"the server behind broke off" in error


@pytest.mark.parametrize(
    "answer", [b"", b"no HTTP at all\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_server_that_does_not_speak_is_no_fault_of_ours(tmp_path: Path, answer: bytes) -> None:
    with raw_server(answer) as port, front(tmp_path, port) as one:
        health = one.api("GET", "/health")
        chat = one.api("POST", "/chat", {"messages": [{"role": "user", "content": "a"}]})

        assert health.status == 503
        assert health.json["data"]["status"] == "unreachable"
        assert chat.status in (502, 503)
        assert chat.json["data"] is None
        assert not one.events("failed")


def test_a_server_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with front(tmp_path, free_port()) as one:
        answers = [
            one.api("GET", "/health"),
            one.api("GET", "/version"),
            one.api("GET", "/v1/models"),
            one.api("POST", "/v1/completions", {"prompt": "a"}),
            one.api("POST", "/chat", {"messages": [{"role": "user", "content": "a"}]}),
        ]

    assert [answer.status for answer in answers] == [503] * 5
    assert "does not answer" in answers[3].json["error"]["message"]
    assert answers[3].headers["retry-after"] == "5"


def test_the_server_behind_is_asked_how_it_is_once_a_second_at_most(behind: Api, api: Api) -> None:
    def asked() -> int:
        lines = behind("GET", "/metrics").body.decode().splitlines()
        counts = [line for line in lines if line.startswith('edgepack_requests_total{endpoint="/health"')]
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in counts)

    before, began = asked(), time.monotonic()

    answers = [api("GET", "/health").status for _ in range(50)]

    assert answers == [200] * 50
    assert asked() - before <= 1 + (time.monotonic() - began) / FRESH_SECONDS


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": SLOT}, 400, "= 257 tokens; a slot holds 256"),
        ("POST", "/v1/chat/completions", {"max_completion_tokens": 999}, 400, "= 1000 tokens; a slot holds 256"),
        ("POST", "/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": "a", "n": 2}, 400, "n: "),
        ("POST", "/v1/completions", b"{", 400, "JSON"),
        ("POST", "/v1/completions", b"", 400, "JSON"),
        ("GET", "/v1/../slots", None, 404, "Not Found"),
        ("GET", "/v1/%2e%2e/slots", None, 404, "Not Found"),
        ("GET", "/slots", None, 404, "Not Found"),
        ("POST", "/chat", {"messages": []}, 400, "messages: List should have at least 1 item"),
    ],
)  # fmt: skip
def test_what_takes_more_than_a_slot_does_not_pass(
    api: Api, behind: Api, method: str, path: str, body: object, status: int, says: str
) -> None:
    before = behind.metric("edgepack_requests_total")

    answer = api(method, path, body)

    assert answer.status == status
    assert says in (answer.json.get("error") or answer.json)["message"]
    assert behind.metric("edgepack_requests_total") == before + 1  # that of asking


def test_the_key_is_the_fronts_and_the_others_is_not_told(api: Api) -> None:
    assert Api(port=api.port, key=None)("GET", "/v1/models").status == 401
    assert api("GET", "/v1/models").status == 200


def test_a_wrong_key_for_the_server_behind_is_not_the_clients_fault(behind: Api, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong", encoding="ascii")
    with front(tmp_path, behind.port, "--upstream-key-file", str(wrong)) as one:
        answers = [
            one.api("POST", "/v1/completions", {"prompt": "a"}),
            one.api("POST", "/chat", {"messages": [{"role": "user", "content": "a"}]}),
        ]

    assert [answer.status for answer in answers] == [502, 502]
    assert "does not take this front's key" in answers[0].json["error"]["message"]


def test_refusals_of_the_server_behind_pass_as_they_are(api: Api, behind: Api) -> None:
    wrong = {"prompt": "a", "surprise": 1}

    assert api("POST", "/v1/completions", wrong).json == behind("POST", "/v1/completions", wrong).json
    assert api("POST", "/chat", {"messages": [{"role": "user", "content": "x" * 300}]}).json == {
        "code": 400, "message": "prompt 325 + max_tokens 256 = 581 tokens; a slot holds 256", "data": None
    }  # fmt: skip


def test_a_full_queue_refuses_and_time_runs_out_in_it(api: Api) -> None:
    slow = {"prompt": "!slow", "max_tokens": 200, "stream": True}
    first = api.send("POST", "/v1/completions", slow)
    api.until(lambda: api.metric("edgepack_requests_running") == 1)
    second = api.send("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})
    api.until(lambda: api.metric("edgepack_queue_depth") == 1)

    third = api("POST", "/v1/completions", slow)
    streamed = first.getresponse().read().rstrip().split(b"\n\n")
    waited = second.getresponse()

    assert third.status == 429
    assert third.headers["retry-after"] == "2"
    assert waited.status in (200, 504)  # the first one's end and the second one's come together
    assert json.loads(streamed[-1].removeprefix(b"data: "))["error"]["code"] == "timeout"


@pytest.mark.parametrize("path", ["/v1/completions", "/chat"])
def test_a_client_that_leaves_frees_the_slot_behind(api: Api, behind: Api, path: str) -> None:
    api.until(lambda: behind.metric("edgepack_requests_running") == 0)  # what an earlier test left has ended
    aborted = behind.metric("edgepack_aborted_total")
    body = {"prompt": "!slow", "max_tokens": 200}
    chat = {"messages": [{"role": "user", "content": "!slow"}], "max_tokens": 200}
    connection = api.send("POST", path, chat if path == "/chat" else body)
    api.until(lambda: behind.metric("edgepack_requests_running") == 1)

    connection.close()

    api.until(lambda: behind.metric("edgepack_requests_running") == 0, 2)
    api.until(lambda: api.metric("edgepack_requests_running") == 0, 2)
    assert behind.metric("edgepack_aborted_total") == aborted + 1


def test_told_to_stop_it_ends_what_outlasts_the_grace(behind: Api, tmp_path: Path) -> None:
    with front(tmp_path, behind.port, "--grace", "0.3") as one:
        stream = one.api.send(
            "POST", "/v1/completions", {"prompt": "!slow", "max_tokens": 200, "stream": True}
        )
        answer = stream.getresponse()
        answer.readline()

        assert one.stop() == 0
        assert b"the server is stopping" in answer.read()
