"""The server over a real socket, with a fake engine: what clients get, what they are refused, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.server_process import FAKE, KEY, ROOT, Api, Reply, Server, fuzz, running, start

pytestmark = pytest.mark.integration

SLOT = 256
SMALL = ("--ctx-size", str(2 * SLOT), "--parallel", "2", "--queue-size", "2", "--ubatch-size", "16")
USER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Grüße, 世界 🎉"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with running(FAKE, folder, "--model", str(folder), *SMALL, "--max-body-bytes", "65536") as one:
        yield one


@pytest.fixture(scope="module")
def api(server: Server) -> Api:
    return server.api


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0) as one:
        yield one


def events(body: bytes) -> list[Any]:
    """The objects of a stream that ended as it should."""
    *lines, last, end = body.decode("utf-8").split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])


def in_background(work: Callable[[], Reply]) -> Callable[[], Reply]:
    found: list[Reply] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()

    def result() -> Reply:
        thread.join()
        return found[0]

    return result


# ── what clients get ─────────────────────────────────────────────────────────────────────────────────


def test_the_openai_client_streams_a_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake",
        messages=USER,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == "<user>Grüße, 世界 🎉</user><assistant>"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    sent = len(said.encode("utf-8"))
    assert (usage.prompt_tokens, usage.completion_tokens) == (sent + 1, sent + 1)  # begin; end


def test_the_openai_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="one two", temperature=0, max_tokens=3)

    assert answer.choices[0].text == "one"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        8,
        3,
        11,
    )


def test_asynchronous_clients_stream_beside_each_other(api: Api) -> None:
    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="fake", prompt=prompt, temperature=0, max_tokens=64, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of(prompts: list[str]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert asyncio.run(all_of(["a b", "c d", "é"])) == ["a b", "c d", "é"]


def test_the_openai_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").model_extra == {
        "root": "fake", "max_model_len": SLOT, "chat_template": "model"
    }  # fmt: skip


def test_characters_are_never_split(api: Api) -> None:
    prompt = "é世🎉"

    chunks = events(api("POST", "/v1/completions", {"prompt": prompt, "temperature": 0, "stream": True}).body)

    assert text(chunks) == prompt  # half a character would have become another one


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "said", "tokens"), [("c d", "ab", 5), (["zz", "世"], "abc d é", 11), ("none", "abc d é世!", 13)]
)
def test_stop_strings_end_the_text(
    api: Api, stream: bool, stop: str | list[str], said: str, tokens: int
) -> None:
    body = {"prompt": "abc d é世!", "temperature": 0, "stop": stop, "stream": stream, "max_tokens": 50}

    if stream:
        chunks = events(
            api("POST", "/v1/completions", {**body, "stream_options": {"include_usage": True}}).body
        )
        out, reason, usage = text(chunks), chunks[-2]["choices"][0]["finish_reason"], chunks[-1]["usage"]
    else:
        answer = api("POST", "/v1/completions", body).json
        choice = answer["choices"][0]
        out, reason, usage = choice["text"], choice["finish_reason"], answer["usage"]

    assert (out, reason, usage["completion_tokens"]) == (said, "stop", tokens)


def test_a_seed_gives_the_same_answer_again(api: Api) -> None:
    def said(seed: int | None) -> str:
        answer = api("POST", "/v1/completions", {"prompt": "x", "seed": seed, "max_tokens": 12}).json
        out: str = answer["choices"][0]["text"]
        return out

    assert said(7) == said(7)
    assert said(7) != said(8)
    assert said(None) != said(None)


def test_log_probabilities_of_a_completion_have_openais_shape(api: Api) -> None:
    body = {"prompt": "aé", "temperature": 0, "logprobs": 2, "max_tokens": 4, "return_token_ids": True}

    choice = api("POST", "/v1/completions", body).json["choices"][0]

    assert choice["logprobs"] == {
        "tokens": ["a", "\ufffd", "é", ""],
        "token_logprobs": [-0.25] * 4,
        "text_offset": [0, 1, 1, 2],
        "top_logprobs": [
            {"a": -0.25, "b": -2.5}, {"\ufffd": -0.25}, {"é": -0.25, "\ufffd": -2.5}, {"": -0.25, "\0": -2.5}
        ],
    }  # fmt: skip
    assert choice["token_ids"] == [97, 0xC3, 0xA9, 257]


def test_streamed_log_probabilities_are_those_of_the_whole(api: Api) -> None:
    body = {"prompt": "abc", "temperature": 0, "logprobs": 1, "stop": "bc", "return_token_ids": True}
    whole = api("POST", "/v1/completions", body).json["choices"][0]

    chunks = [c["choices"][0] for c in events(api("POST", "/v1/completions", {**body, "stream": True}).body)]

    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [one for chunk in chunks for one in chunk["logprobs"][name]] == whole["logprobs"][name]
    assert [one for chunk in chunks for one in chunk["token_ids"]] == whole["token_ids"] == [97, 98, 99]
    assert whole["text"] == "a"


def test_log_probabilities_of_a_chat_have_openais_shape(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake",
        messages=USER,
        temperature=0,
        max_tokens=1,
        logprobs=True,
        top_logprobs=3,
    )

    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [one.model_dump() for one in answer.choices[0].logprobs.content] == [
        {
            "token": "<", "logprob": -0.25, "bytes": [60],
            "top_logprobs": [
                {"token": "<", "logprob": -0.25, "bytes": [60]},
                {"token": "=", "logprob": -2.5, "bytes": [61]},
                {"token": ">", "logprob": -9999.0, "bytes": [62]},  # JSON has no minus infinity
            ],
        }
    ]  # fmt: skip


def test_tokens_can_be_named_by_their_ids(api: Api) -> None:
    body = {"prompt": [256, 97], "temperature": 0, "logprobs": 1, "max_tokens": 1}

    found = api("POST", "/v1/completions", {**body, "return_tokens_as_token_ids": True}).json

    assert found["choices"][0]["logprobs"]["top_logprobs"] == [{"token_id:97": -0.25}]


def test_the_end_can_be_ignored(api: Api) -> None:
    body = {"prompt": "ab", "temperature": 0, "max_tokens": 7}

    ignored = api("POST", "/v1/completions", {**body, "ignore_eos": True}).json
    later = api("POST", "/v1/completions", {**body, "min_tokens": 3}).json

    assert (ignored["choices"][0]["text"], ignored["choices"][0]["finish_reason"]) == ("abababa", "length")
    assert (later["choices"][0]["text"], later["choices"][0]["finish_reason"]) == ("abab", "stop")


def test_a_prompt_that_a_slot_still_holds_goes_to_that_slot(api: Api) -> None:
    first, other = "a long first conversation", "something else entirely, also long"

    def cached(prompt: str, **more: object) -> int:
        answer = api("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1, **more}).json
        out: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return out

    cached(first)
    cached(other)

    assert cached(first + ", continued") == len(first) + 1
    assert cached(other + ", continued") == len(other) + 1
    assert cached(first + ", continued", cache_prompt=False) == 0


def test_text_becomes_tokens_and_text_again(api: Api) -> None:
    tokens = api("POST", "/tokenize", {"prompt": "é"}).json
    plain = api("POST", "/tokenize", {"prompt": "é", "add_special_tokens": False}).json

    assert tokens == {"tokens": [256, 195, 169], "count": 3, "max_model_len": SLOT}
    assert plain["tokens"] == [195, 169]
    assert api("POST", "/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": "é"}


def test_the_articles_chat_answers_in_its_shape(api: Api, server: Server) -> None:
    body = {"messages": [{"role": "system", "content": "Be brief."}, *USER], "session_id": "session-1"}

    answer = api("POST", "/chat", {**body, "temperature": 0})

    said = "<system>Be brief.</system><user>Grüße, 世界 🎉</user><assistant>"
    assert answer.status == 200
    assert answer.json == {
        "code": 200,
        "message": "success",
        "data": {
            "response": said,
            "prompt_tokens": len(said.encode()) + 1,
            "completion_tokens": len(said.encode()) + 1,
            "session_id": "session-1",
            "finish_reason": "stop",
        },
    }
    api.until(lambda: logged(server, "session-1") == [(len(said.encode()) + 1, len(said.encode()) + 1)])


def logged(server: Server, session: str) -> list[tuple[int, int]]:
    """Tokens in and out of a session's requests."""
    found = [event for event in server.events("request") if event.get("session_id") == session]
    return [(one["prompt_tokens"], one["completion_tokens"]) for one in found]


def test_the_articles_defaults_are_clamped_to_the_slot(api: Api) -> None:
    data = api("POST", "/chat", {"messages": USER}).json["data"]

    assert data["session_id"] == "default"
    assert data["finish_reason"] == "length"
    assert data["prompt_tokens"] + data["completion_tokens"] == SLOT


def test_health_says_what_serves(api: Api) -> None:
    answer = Api(port=api.port, key=None)("GET", "/health")

    assert answer.json == {
        "code": 200, "message": "success",
        "data": {
            "status": "ok", "model": "fake", "runtime": "onnx-genai", "version": "1.2.3", "queue": 0,
            "running": 0, "slots": 2, "context": SLOT,
        },
    }  # fmt: skip


def test_metrics_count_what_happened(api: Api) -> None:
    names = (
        "edgepack_prompt_tokens_total", "edgepack_generation_tokens_total",
        "edgepack_time_to_first_token_seconds_count", "edgepack_inter_token_latency_seconds_count",
        "edgepack_request_seconds_count",
    )  # fmt: skip
    before = {name: api.metric(name) for name in names}

    api("POST", "/v1/completions", {"prompt": "abcd", "temperature": 0})

    assert [api.metric(name) - before[name] for name in names] == [5, 5, 1, 4, 1]
    assert api.metric('edgepack_memory_bytes{part="weights"}') == 1000
    assert api.metric('edgepack_memory_bytes{part="resident"}') > 1 << 20
    assert api.metric("edgepack_kv_tokens_capacity") == 2 * SLOT
    assert 0 < api.metric("edgepack_kv_tokens_used") <= 2 * SLOT


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 300}, 400, "prompt 2 + max_tokens 300 = 302 tokens"),
        ("/v1/completions", {"prompt": "x" * 300}, 400, "prompt 301 + max_tokens 1 = 302 tokens; a slot holds 256"),
        ("/v1/completions", {"prompt": [256, 258]}, 400, "token 258: the vocabulary has 258"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "n: Input should be 1"),
        ("/v1/completions", {"prompt": "a", "echo": True}, 400, "echo"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "temperature": 1e400}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "logprobs": 41}, 400, "logprobs"),
        ("/v1/completions", {"prompt": "a", "frequency_penalty": 1}, 400, "frequency_penalty"),
        ("/v1/completions", {"prompt": "a", "surprise": 1}, 400, "surprise: Extra inputs are not permitted"),
        ("/v1/completions", {"prompt": "a", "min_tokens": 99}, 400, "min_tokens 99 is more than max_tokens 16"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "'other' is not here; 'fake' is"),
        ("/v1/completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options needs stream"),
        ("/v1/completions", {"prompt": "a\ud800"}, 400, "half a surrogate pair at character 1"),
        ("/v1/completions", {"prompt": "a\0"}, 400, "a NUL character"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2**31}, 400, "max_tokens"),
        ("/v1/completions", b'{"prompt": ', 400, "the body is not JSON"),
        ("/v1/completions", b'{"prompt": "\xff"}', 400, "pars"),
        ("/v1/completions", b"[" * 60000, 400, ""),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": ""}]}, 400, "messages.0.role"),
        ("/v1/chat/completions", {"messages": USER, "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ("/v1/chat/completions", {"messages": USER, "tools": [{}]}, 400, "tools"),
        ("/tokenize", {}, 400, "prompt: Field required"),
        ("/detokenize", {"tokens": [999]}, 400, "token 999: the vocabulary has 258"),
        ("/v1/embeddings", {"input": "a"}, 404, "Not Found: POST /v1/embeddings"),
        ("/health", {}, 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_why(api: Api, path: str, body: object, status: int, says: str) -> None:
    answer = api("POST", path, body)

    assert answer.status == status
    assert says in (answer.json.get("error") or answer.json)["message"]


def test_a_request_beyond_the_slot_has_openais_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fake", prompt="abc", max_tokens=1000)

    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "max_tokens"


def test_errors_of_the_articles_chat_have_real_statuses(api: Api) -> None:
    answer = api("POST", "/chat", {"messages": [{"role": "user", "content": "x" * 300}]})

    assert answer.status == 400
    assert answer.json == {
        "code": 400,
        "message": "prompt 325 + max_tokens 1 = 326 tokens; a slot holds 256",
        "data": None,
    }


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/version", "/nothing"])
def test_only_health_is_told_without_a_key(api: Api, path: str) -> None:
    for key in (None, "wrong", "ä"):
        answer = Api(port=api.port, key=None)("GET", path, **({} if key is None else {"x-api-key": key}))

        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert Api(port=api.port, key=None)("GET", path, **{"x-api-key": KEY}).status != 401


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(api: Api, chunked: bool) -> None:
    body = json.dumps({"prompt": "x" * 70000}).encode()
    whole = api("POST", "/v1/completions", body) if not chunked else sent_in_chunks(api, body)

    assert whole.status == 413
    assert whole.json["error"]["message"] == f"{len(body)} bytes: a request's body may have 65536 bytes"


def sent_in_chunks(api: Api, body: bytes) -> Reply:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
    pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body=iter(pieces), headers=headers, encode_chunked=True)
    answer = connection.getresponse()
    return Reply(answer.status, {}, answer.read())


def test_a_body_of_many_gigabytes_is_refused_before_it_comes(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + KEY.encode() + b"\r\nContent-Length: 99999999999\r\n\r\n{"
        )

        assert b" 413 " in raw.recv(4096)


def test_no_page_of_another_origin_may_read_an_answer(api: Api) -> None:
    asked = api("GET", "/health", Origin="http://evil.example")
    preflight = api(
        "OPTIONS", "/chat", Origin="http://evil.example", **{"Access-Control-Request-Method": "POST"}
    )

    assert preflight.status == 405
    assert not [name for name in {**asked.headers, **preflight.headers} if name.startswith("access-control")]


def test_nothing_is_loaded_from_elsewhere(api: Api) -> None:
    assert [api("GET", path).status for path in ("/docs", "/redoc")] == [404, 404]


def test_a_full_queue_refuses_and_says_when_to_come_again(api: Api) -> None:
    slow = {"prompt": "!slow, for a while", "max_tokens": 20}
    sent = [api.send("POST", "/v1/completions", slow) for _ in range(4)]
    api.until(lambda: api.metric("edgepack_queue_depth") == 2)

    fifth = api("POST", "/v1/completions", slow)
    served = [connection.getresponse().status for connection in sent]

    assert fifth.status == 429
    assert fifth.headers["retry-after"] == "2"
    assert fifth.json["error"]["message"] == "2 requests run and 2 wait: the queue is full"
    assert served == [200] * 4


def test_the_description_is_true_and_nothing_that_follows_or_breaks_it_fails(tmp_path: Path) -> None:
    """Random cases: EDGEPACK_FUZZ_EXAMPLES for each operation."""
    examples = int(os.environ.get("EDGEPACK_FUZZ_EXAMPLES", "5"))
    with running(FAKE, tmp_path, "--model", str(tmp_path), "--ctx-size", "64", "--parallel", "2") as server:
        said = fuzz(server, tmp_path, phases="coverage,fuzzing", examples=examples)

    assert "10 selected / 10 total" in said


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_is_a_500_and_the_next_request_is_served(
    api: Api, server: Server, stream: bool
) -> None:
    answer = api("POST", "/v1/completions", {"prompt": "!fail", "stream": stream})
    after = api("POST", "/v1/completions", {"prompt": "ok", "temperature": 0})

    assert answer.status == 500
    assert answer.json["error"]["message"] == "the engine failed; the server's log says why"
    assert "told to fail" in server.events("engine_failed")[-1]["error"]
    assert after.json["choices"][0]["text"] == "ok"


LONG = {"prompt": "!slow" + "x" * 100, "max_tokens": 150, "temperature": 0}
"""A prompt of 1.4 s and tokens of 5 s."""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(api: Api, stream: bool) -> None:
    aborted, tokens = api.metric("edgepack_aborted_total"), api.metric("edgepack_generation_tokens_total")
    sent = [api.send("POST", "/v1/completions", {**LONG, "stream": stream}) for _ in range(3)]
    api.until(
        lambda: api.metric("edgepack_queue_depth") == 1 and api.metric("edgepack_requests_running") == 2
    )

    for connection in sent:
        connection.close()

    api.until(lambda: api.metric("edgepack_requests_running") == 0, 1)
    assert api.metric("edgepack_queue_depth") == 0
    assert api.metric("edgepack_aborted_total") - aborted == 3
    assert api.metric("edgepack_generation_tokens_total") == tokens  # they left while their prompts were read


def test_a_client_that_leaves_its_stream_frees_its_slot(api: Api) -> None:
    connection = api.send("POST", "/v1/completions", {"prompt": "!slow", "max_tokens": 200, "stream": True})
    first = connection.getresponse().readline()

    connection.close()

    assert first.startswith(b"data: {")
    api.until(lambda: api.metric("edgepack_requests_running") == 0, 1)


def test_requests_that_take_too_long_end(tmp_path: Path) -> None:
    flags = ("--ctx-size", "256", "--parallel", "1", "--timeout", "1")
    with running(FAKE, tmp_path, "--model", str(tmp_path), *flags) as server:
        api = server.api
        stream = api("POST", "/v1/completions", {"prompt": "!slow", "max_tokens": 99, "stream": True})
        broken = stream.body.decode().rstrip().split("\n\n")
        stuck = in_background(lambda: api("POST", "/v1/completions", {"prompt": "!stuck", "stream": True}))
        api.until(lambda: api.metric("edgepack_requests_running") == 1)
        waiting = api("POST", "/v1/completions", {"prompt": "a"})
        api.until(lambda: api.metric("edgepack_requests_running") == 0)
        after = api("POST", "/v1/completions", {"prompt": "ok", "temperature": 0})

    assert stream.status == 200
    assert len(broken) > 2
    assert json.loads(broken[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert stuck().status == 504
    assert stuck().json["error"]["message"] == "not finished in time; it ran in slot 0"
    assert waiting.status == 504
    assert waiting.json["error"]["message"] == "not finished in time; it still waited in the queue"
    assert after.status == 200


# ── how it starts and ends ───────────────────────────────────────────────────────────────────────────


def test_told_to_stop_it_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    flags = ("--ctx-size", "256", "--parallel", "1")
    with running(FAKE, tmp_path, "--model", str(tmp_path), *flags) as server:
        api = server.api
        runs = in_background(lambda: api("POST", "/v1/completions", {"prompt": "!slow", "max_tokens": 30}))
        api.until(lambda: api.metric("edgepack_requests_running") == 1)
        waits = in_background(lambda: api("POST", "/v1/completions", {"prompt": "a"}))
        api.until(lambda: api.metric("edgepack_queue_depth") == 1)

        server.process.send_signal(signal.SIGTERM)
        refused = waits()
        new = api("POST", "/v1/completions", {"prompt": "a"})
        health = api("GET", "/health")

        assert runs().json["usage"]["completion_tokens"] == 30
        assert server.process.wait(timeout=10) == 0
    assert [refused.status, new.status, health.status] == [503, 503, 503]
    assert new.json["error"]["message"] == "the server is stopping"
    assert health.json["data"]["status"] == "stopping"
    api.until(lambda: "closed" in server.lines)


def test_what_outlasts_the_grace_is_ended(tmp_path: Path) -> None:
    flags = ("--ctx-size", "256", "--parallel", "1", "--grace", "0.2")
    with running(FAKE, tmp_path, "--model", str(tmp_path), *flags) as server:
        api = server.api
        stream = api.send("POST", "/v1/completions", {"prompt": "!slow", "max_tokens": 200, "stream": True})
        answer = stream.getresponse()
        answer.readline()

        server.process.send_signal(signal.SIGTERM)

        assert b'"the server is stopping"' in answer.read()
        assert server.process.wait(timeout=10) == 0


def test_while_the_model_loads_it_says_so(tmp_path: Path) -> None:
    model = tmp_path / "slow-to-load"
    model.mkdir()
    server = start(FAKE, tmp_path, "--model", str(model), "--ctx-size", "64")
    health = server.api("GET", "/health")
    asked = server.api("POST", "/v1/completions", {"prompt": "a"})
    models = server.api("GET", "/v1/models")

    assert server.stop() == 0
    assert [health.status, asked.status, models.status] == [503, 503, 503]
    assert health.json["data"]["status"] == "loading"
    assert asked.headers["retry-after"] == "5"


def test_an_engine_that_cannot_load_ends_it(tmp_path: Path) -> None:
    model = tmp_path / "broken"
    model.mkdir()
    server = start(FAKE, tmp_path, "--model", str(model), "--ctx-size", "64")

    assert server.process.wait(timeout=20) == 3
    server.api.until(lambda: bool(server.events("stopped")))
    found = server.events("cannot_load")[0]
    assert (found["message"], found["hint"]) == ("model.onnx is missing", "build the bundle again")


def test_an_address_that_is_taken_ends_it(tmp_path: Path, api: Api) -> None:
    command = [*FAKE, "--model", str(tmp_path), "--ctx-size", "64", "--port", str(api.port)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 4
    assert json.loads(done.stderr)["event"] == "cannot_listen"


def test_the_log_has_no_text_of_prompts_or_answers(server: Server, api: Api) -> None:
    secret = "a very private question"
    for body in ({"prompt": secret}, {"prompt": secret, "surprise": secret}, {"prompt": [secret, secret]}):
        api("POST", "/v1/completions", {**body, "temperature": 0})
    api("POST", "/chat", {"messages": [{"role": "user", "content": secret}]})

    assert len(server.events("request")) > 3
    assert not [line for line in list(server.lines) if "private" in line]
    assert not [line for line in list(server.lines) if not line.startswith("{")]
