"""Decoding speed of a bundle's server against the bare runtime on the same machine, alternating in one run.

    python benchmarks/server_speed.py onnx-genai ARTIFACT [--tokens 128] [--rounds 5] [--threads 2] [--context 512]
    python benchmarks/server_speed.py transformers ARTIFACT
    python benchmarks/server_speed.py llama.cpp model.gguf --server bin/llama-server [--bench bin/llama-bench]
    python benchmarks/server_speed.py vllm ARTIFACT --python VENV/bin/python

Bare is each runtime's own loop in a process of its own: generate_next_token() and generate(), and of llama.cpp and
vLLM, whose runtimes are their servers, one that is started with model, context, threads and one sequence alone; with
--bench it is llama-bench, which chooses no token: what choosing takes is then part of the ratio. The server is
started with the flags and environment of a plan and streams. Counted are the tokens after the first, per second; the
ratio is of one round's two figures, and the median over rounds, with the least and the greatest, is printed. So is
the processor's time of a token, of all threads, which others on the same cores disturb less: what an answer of all
tokens takes more than one of two. With a model of some million parameters both measure HTTP rather than the runtime.
On a machine whose speed drifts by a tenth from second to second, as rented ones do, take many short rounds
(--tokens 24 --rounds 60): five long ones have told 0.85 and 0.99 of the same two programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import comparison
import psutil

from edgepack import pipeline, profile, runtimes
from edgepack.runtimes import llama_cpp, vllm
from edgepack.settings import Settings

KEY = "benchmark"
PROMPT = list(range(5, 37))
"""Token ids; what they say does not matter to the speed."""

ONNX = """
import json, sys, time
import numpy as np, onnxruntime_genai as og
folder, threads, length, prompt = sys.argv[1], *map(int, sys.argv[2:4]), json.loads(sys.argv[4])
config = og.Config(folder)
config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
model = og.Model(config)
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=length)
generator = og.Generator(model, parameters)
for line in sys.stdin:
    count = int(line)
    generator.rewind_to(0)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    generator.generate_next_token()
    start = time.perf_counter()
    for _ in range(count - 1):
        generator.generate_next_token()
    print((count - 1) / (time.perf_counter() - start), flush=True)
"""
TORCH = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
folder, threads, length, prompt = sys.argv[1], *map(int, sys.argv[2:4]), json.loads(sys.argv[4])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
class Times:
    def __init__(self): self.at = []
    def put(self, value): self.at.append(time.perf_counter())
    def end(self): pass
for line in sys.stdin:
    count = int(line)
    times = Times()
    with torch.inference_mode():
        model.generate(
            torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=times
        )
    print((count - 1) / (times.at[-1] - times.at[-count]), flush=True)
"""
"""The streamer is given the prompt first, then each token."""


SHORT = 2
"""Tokens of the answer whose processor time is taken off: prompt, first token and HTTP."""


def main() -> None:
    asked = arguments()
    with ExitStack() as stack:
        server = stack.enter_context(serving(asked))
        bare = stack.enter_context(running(asked))
        ratios, seconds = compare(server, bare, rounds=asked.rounds, tokens=asked.tokens)
    print(
        f"{asked.runtime}: the server decodes at {summary(ratios)} of the bare runtime's speed over {len(ratios)} "
        f"rounds, with {summary(seconds)} of its processor time"
    )


def compare(server: Decode, bare: Decode, *, rounds: int, tokens: int) -> tuple[list[float], list[float]]:
    """Of each round, the server's speed over the bare runtime's and its processor's time over the other's."""
    server(SHORT)
    bare(SHORT)
    ratios, seconds = [], []
    for number in range(rounds):
        # The one that goes first changes: the machine may get warmer or busier.
        first, second = (server, bare) if number % 2 else (bare, server)
        done = {id(one): decoded(one, tokens) for one in (first, second)}
        (ours, own), (theirs, other) = done[id(server)], done[id(bare)]
        ratios.append(ours / theirs)
        seconds.append(own / other)
        print(
            f"round {number + 1}: server {ours:8.2f}, bare {theirs:8.2f} tokens/s, {ratios[-1]:.3f}; "
            f"processor {1000 * own:.2f} and {1000 * other:.2f} ms a token, {seconds[-1]:.3f}",
            flush=True,
        )
    return ratios, seconds


def summary(ratios: list[float]) -> str:
    """The median, the interval that holds it nine times of ten (bootstrap), and the rounds' least and greatest."""
    of = comparison.middle(ratios)
    return f"{of.value:.3f} [{of.low:.3f}, {of.high:.3f}] ({min(ratios):.3f} to {max(ratios):.3f})"


Decode = Callable[[int], tuple[float, float]]
"""So many tokens: how many a second after the first, and the processor's seconds in all."""


def decoded(one: Decode, tokens: int) -> tuple[float, float]:
    """Tokens a second, and the processor's seconds of each."""
    _, beside = one(SHORT)
    rate, whole = one(tokens)
    return rate, (whole - beside) / (tokens - SHORT)


def processor(process: psutil.Process) -> float:
    """Seconds that all threads of it and its children have computed."""
    all_times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(times.user + times.system for times in all_times))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtime", choices=runtimes.NAMES)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--server", type=Path, help="llama-server")
    parser.add_argument("--bench", type=Path, help="llama-bench")
    parser.add_argument("--python", default=sys.executable, help="the Python that has the runtime")
    return parser.parse_args()


@contextmanager
def serving(asked: argparse.Namespace, *, bare: bool = False) -> Iterator[Decode]:
    """A server that is ready; ``bare``: llama-server or vLLM without a plan's flags."""
    port = 18_000 + os.getpid() % 4000 + (4000 if bare else 0)
    with tempfile.TemporaryDirectory() as folder:
        key, log = Path(folder) / "key", Path(folder) / "log"
        key.write_text(KEY + "\n", encoding="utf-8")
        words, environment = (bare_command if bare else planned_command)(asked, key)
        if asked.runtime == vllm.NAME:  # what it compiles is of no use to another run
            environment = {**environment, "VLLM_API_KEY": KEY, "VLLM_CACHE_ROOT": folder}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*words, "--port", str(port)], env={**os.environ, **environment}, stdout=out, stderr=out
            )
        try:
            address = f"http://127.0.0.1:{port}"
            while not ready(address):
                if process.poll() is not None:
                    sys.exit(log.read_text(encoding="utf-8"))
                time.sleep(0.2)
            yield streaming(address, KEY, "benchmark", psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait()


Command = tuple[list[str], Mapping[str, str]]
"""The words of a server's command but for its port, and what they want in its environment."""


def planned_command(asked: argparse.Namespace, key: Path) -> Command:
    """With the flags and the environment of a plan."""
    runtime = runtimes.named(asked.runtime)
    kv_type = runtime.kv_types(runtimes.Machine(backend="cpu"))[0]
    if asked.runtime == vllm.NAME:
        device = replace(profile.load("x86-laptop"), cpu_cores=asked.threads)
        settings = vllm.settings_for(device, context=asked.context, slots=1, kv_type=kv_type, ubatch=512)
        told = vllm.start_up(
            pipeline.read_model(asked.artifact), settings, backend="cpu", needed=0, total=None
        )
    else:
        base = llama_cpp.cpu_settings(context=asked.context, kv_type="f16", threads=asked.threads)
        settings = Settings(**{name: getattr(base, name) for name in base.__slots__} | {"kv_type": kv_type})
        told = {}
    words = runtime.launch(settings, alias="benchmark", backend="cpu", start_up=told)
    environment = runtime.environment(
        settings, backend="cpu", arch="aarch64" if platform.machine() == "aarch64" else "x86_64"
    )
    match asked.runtime:
        case llama_cpp.NAME:
            return [
                str(asked.server),
                *words,
                "-m",
                str(asked.artifact),
                "--api-key-file",
                str(key),
            ], environment
        case vllm.NAME:
            return [asked.python, "-m", VLLM_SERVER, *words, "--model", str(asked.artifact)], environment
    own = [sys.executable, "-m", "edgepack.server", *words, "--model", str(asked.artifact)]
    return [*own, "--api-key-file", str(key)], environment


VLLM_SERVER = "vllm.entrypoints.openai.api_server"


def bare_command(asked: argparse.Namespace, key: Path) -> Command:
    """With model, context, threads and one sequence; vLLM also with the floats that a plan computes in, for those of
    the checkpoint may be others."""
    if asked.runtime == llama_cpp.NAME:
        words = [str(asked.server), "-m", str(asked.artifact), "-c", str(asked.context), "-np", "1"]
        words += ["-t", str(asked.threads), "--alias", "benchmark", "--api-key-file", str(key)]
        return words, {}
    kv_type = vllm.kv_types(runtimes.Machine(backend="cpu"))[0]
    words = [asked.python, "-m", VLLM_SERVER, "--model", str(asked.artifact), "--max-num-seqs", "1"]
    words += ["--max-model-len", str(asked.context), "--served-model-name", "benchmark"]
    words += ["--dtype", vllm.compute_type(kv_type)]
    words += ["--gpu-memory-utilization", "0.2"]  # by default it wants 92 % of a CPU's memory to be free
    return words, {"OMP_NUM_THREADS": str(asked.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def streaming(address: str, key: str, model: str, process: psutil.Process) -> Decode:
    """A server's decoding, as a client sees it."""

    def once(tokens: int) -> tuple[float, float]:
        before = processor(process)
        rate = served(address, key, model, tokens)
        return rate, processor(process) - before

    return once


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def served(address: str, key: str, model: str, tokens: int) -> float:
    """Tokens a second after the first, as a client sees them stream."""
    body = {
        "model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "cache_prompt": False, "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    at, counted = [], 0
    with urllib.request.urlopen(request, timeout=900) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
                if event["choices"]:
                    at.append(time.perf_counter())
    if counted != tokens:
        sys.exit(f"asked for {tokens} tokens and got {counted}")
    return (tokens - 1) / (at[tokens - 1 if len(at) >= tokens else -1] - at[0])


@contextmanager
def running(asked: argparse.Namespace) -> Iterator[Decode]:
    """The bare runtime."""
    if asked.runtime == vllm.NAME or (asked.runtime == llama_cpp.NAME and asked.bench is None):
        with serving(asked, bare=True) as one:
            yield one
        return
    if asked.runtime == llama_cpp.NAME:
        yield lambda tokens: llama_bench(asked, tokens)
        return
    source = ONNX if asked.runtime == "onnx-genai" else TORCH
    numbers = (str(asked.threads), str(asked.context), json.dumps(PROMPT))
    child = subprocess.Popen(
        [sys.executable, "-c", source, str(asked.artifact), *numbers],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    if child.stdin is None or child.stdout is None:
        sys.exit("no pipes")
    said, heard, watched = child.stdin, child.stdout, psutil.Process(child.pid)

    def once(tokens: int) -> tuple[float, float]:
        before = processor(watched)
        said.write(f"{tokens}\n")
        said.flush()
        rate = float(heard.readline())
        return rate, processor(watched) - before

    try:
        yield once
    finally:
        child.terminate()
        child.wait()


def llama_bench(asked: argparse.Namespace, tokens: int) -> tuple[float, float]:
    command = [asked.bench, "-m", asked.artifact, "-p", "0", "-n", tokens, "-t", asked.threads, "-r", "1"]
    command += ["-ngl", "0", "-o", "json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(json.loads(done.stdout)[0]["avg_ts"]), seconds


if __name__ == "__main__":
    main()
