"""The server as a bundle starts it: it answers, streams, refuses what does not fit, and says the plan's numbers."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from edgepack.plan import Plan
from edgepack.runtimes import vllm
from tests.vllm.test_pool import DEMO, planned

KEY = "a-key"
START = 300
"""Seconds to wait for it; it takes 30 to 100 on two cores."""
METRICS = (
    "vllm:cache_config_info",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_success_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:admission_rejections_total",
    "vllm:num_preemptions_total",
    "process_resident_memory_bytes",
)
"""Names that docs/ maps to those of our own server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    url: str
    plan: Plan
    log: Path

    def get(self, path: str, *, key: str | None = KEY) -> str:
        asked = urllib.request.Request(self.url + path)
        if key is not None:
            asked.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two slots of 512 tokens."""
    chosen = planned(DEMO, kv_type="f16", context=1024, slots=2)
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = vllm.launch(
        chosen.settings, alias="demo", backend="cpu", start_up=chosen.start_up, version=vllm.CPU_VERSION
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO)),
                *("--host", "127.0.0.1", "--port", str(port), *words),
            ],
            env={
                **kept,
                **vllm.environment(chosen.settings, backend="cpu", arch="x86_64"),
                "VLLM_API_KEY": KEY,
            },
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    here = Served(url=f"http://127.0.0.1:{port}", plan=chosen, log=log)
    try:
        _wait(here, process)
        yield here
    finally:
        process.terminate()
        process.wait(60)


def _wait(here: Served, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert process.poll() is None, here.log.read_text(encoding="utf-8", errors="replace")[-4000:]
        try:
            here.get("/health")
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(
        f"not up after {START} s: {here.log.read_text(encoding='utf-8', errors='replace')[-4000:]}"
    )


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


def test_its_log_and_metrics_name_the_pool_of_the_plan(served: Served) -> None:
    told = served.plan.start_up
    log = served.log.read_text(encoding="utf-8", errors="replace")

    said = re.search(
        r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", log
    )
    info = next(
        line for line in served.get("/metrics").splitlines() if line.startswith("vllm:cache_config_info{")
    )
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info))

    assert said is not None
    numbers = [float(text.replace(",", "")) for text in said.groups()]
    assert numbers == [told["kv_cache_tokens"], told["max_model_len"], told["max_concurrency"]]
    assert int(labels["num_gpu_blocks"]) == told["num_blocks"] == 9
    assert int(labels["kv_cache_size_tokens"]) == told["kv_cache_tokens"] == 1152
    assert int(labels["block_size"]) == told["block_size"]
    assert int(labels["kv_cache_memory_bytes"]) == served.plan.memory.part("kv_cache")


def test_metrics_have_the_names_that_the_docs_map(served: Served, client: openai.OpenAI) -> None:
    client.completions.create(model="demo", prompt="The river", max_tokens=2)

    names = set(re.findall(r"^([a-z0-9_:]+)", served.get("/metrics"), flags=re.M))

    assert not set(METRICS) - names


def test_a_client_streams_and_the_counts_are_right(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="demo",
        prompt="The river",
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )

    chunks = list(stream)

    text = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    usage = chunks[-1].usage
    assert usage is not None
    assert len("".join(text)) > 0
    assert len(text) >= 6
    assert usage.completion_tokens == 12
    assert usage.prompt_tokens + 12 == usage.total_tokens


def test_a_prompt_that_was_there_is_said_to_be_cached(client: openai.OpenAI) -> None:
    prompt = [int(token) for token in range(300, 600)]

    first, second = (
        client.completions.create(model="demo", prompt=prompt, max_tokens=1, temperature=0) for _ in range(2)
    )

    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == 256, "two whole blocks of 128"


def test_a_prompt_beyond_a_slot_is_refused_by_number_and_an_answer_is_cut(client: openai.OpenAI) -> None:
    """vLLM itself shortens max_tokens to what is left of a slot; our own server and the front refuse it."""
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model="demo", prompt=[5] * 513, max_tokens=1)

    cut = client.completions.create(
        model="demo", prompt=[5] * 500, max_tokens=100, extra_body={"ignore_eos": True}
    )

    assert cut.usage is not None
    assert cut.usage.total_tokens == 512
    assert cut.choices[0].finish_reason == "length"


def test_forty_alternatives_are_given_and_one_more_is_refused(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="The", max_tokens=1, temperature=0, logprobs=40)

    top = answer.choices[0].logprobs
    assert top is not None
    assert top.top_logprobs is not None
    assert len(top.top_logprobs[0]) >= 40
    with pytest.raises(openai.BadRequestError, match="40"):
        client.completions.create(model="demo", prompt="The", max_tokens=1, logprobs=41)


def test_the_key_is_needed_and_not_in_its_command_line(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        served.get("/v1/models", key="another")

    models = json.loads(served.get("/v1/models"))
    assert models["data"][0]["id"] == "demo"
    assert models["data"][0]["max_model_len"] == served.plan.start_up["max_model_len"]
    assert KEY not in served.log.read_text(encoding="utf-8", errors="replace")
