"""Measures what edgepack's own server takes on a CPU, beside what the plan says, and whether it stays so.

    python scripts/measure_servers.py RUNTIME SCHEME MODEL ARTIFACT [--context N] [--slots N] [--ubatch N] [--threads N]

MODEL is the folder of config.json, ARTIFACT what `edgepack quantize` made of it (for transformers and bf16 a folder of
16-bit safetensors). The server is started with the plan's flags and environment, and its VmRSS and VmHWM are read after
it loaded, after a prompt as long as a slot in all slots at once, and after prompts of many lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from edgepack import memory, modelspec, runtimes
from edgepack.settings import Settings
from edgepack.units import MIB

KEY = "measured"
LENGTHS = 24
"""Prompts of random lengths."""


def main() -> None:
    asked = arguments()
    spec = modelspec.read(asked.model)
    runtime = runtimes.named(asked.runtime)
    kv_type = runtime.kv_types(runtimes.Machine(backend="cpu"))[0]
    settings = cpu(asked, kv_type)
    estimate = memory.estimate(spec, asked.scheme, settings, backend="cpu", runtime=asked.runtime)
    with served(asked.runtime, asked.artifact, settings) as (process, address):
        print(say("loaded", process))
        length = settings.context // settings.slots
        with ThreadPoolExecutor(settings.slots) as slots:
            list(
                slots.map(
                    lambda seed: answer(address, spec.vocab, length - 9, 8, seed), range(settings.slots)
                )
            )
            print(say("full", process))
            some = random.Random(1)
            lengths = [some.randrange(1, length - 9) for _ in range(LENGTHS)]
            list(slots.map(lambda n: answer(address, spec.vocab, n, 4, n), lengths))
            print(say(f"{LENGTHS} lengths", process))
            list(
                slots.map(
                    lambda seed: answer(address, spec.vocab, length - 9, 8, seed), range(settings.slots)
                )
            )
        print(say("full again", process))
        peak = status(process)["VmHWM"]
    print(
        f"{asked.runtime} {asked.scheme} {spec.name}: {spec.parameters / 1e6:.0f} M parameters, "
        f"{settings.context} tokens in {settings.slots}, chunks of {settings.ubatch}: "
        f"predicted {estimate.total / MIB:.1f} MiB "
        f"[{estimate.low / MIB:.1f}, {estimate.high / MIB:.1f}], measured {peak / MIB:.1f}: "
        f"{estimate.total / peak - 1:+.1%}"
    )
    for part in estimate.parts:
        print(
            f"  {part.name:<12} {part.bytes / MIB:8.1f} [{part.low / MIB:.1f}, {part.high / MIB:.1f}]  {part.note}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtime", choices=("onnx-genai", "transformers"))
    parser.add_argument("scheme")
    parser.add_argument("model", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def cpu(asked: argparse.Namespace, kv_type: str) -> Settings:
    """What the planner would start on a CPU of so many threads."""
    return Settings(
        context=asked.context, slots=asked.slots, kv_type=kv_type, batch=asked.ubatch, ubatch=asked.ubatch,
        flash_attention=True, unified_kv=False, threads=asked.threads, gpu_layers=0, load_mode="none", repack=False,
    )  # fmt: skip


@contextmanager
def served(name: str, artifact: Path, settings: Settings) -> Iterator[tuple[int, str]]:
    """A server that is ready: its process and address."""
    runtime = runtimes.named(name)
    port = 18_000 + os.getpid() % 4000
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "key"
        key.write_text(KEY + "\n", encoding="utf-8")
        words = runtime.launch(settings, alias="measured", backend="cpu", start_up={})
        command = [sys.executable, "-m", "edgepack.server", *words, "--model", str(artifact)]
        command += ["--port", str(port), "--api-key-file", str(key)]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **runtime.environment(
                        settings,
                        backend="cpu",
                        arch="aarch64" if platform.machine() == "aarch64" else "x86_64",
                    ),
                },
                stdout=log,
                stderr=log,
            )
        try:
            address = f"http://127.0.0.1:{port}"
            while not ready(address):
                if process.poll() is not None:
                    sys.exit((Path(folder) / "log").read_text(encoding="utf-8"))
                time.sleep(0.2)
            yield process.pid, address
        finally:
            process.terminate()
            process.wait()


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def answer(address: str, vocabulary: int, prompt: int, tokens: int, seed: int) -> None:
    """An answer to random tokens, with log probabilities, none of the prompt taken from the cache."""
    some = random.Random(seed)
    body = {
        "model": "measured", "prompt": [some.randrange(1, vocabulary - 4) for _ in range(prompt)],
        "max_tokens": tokens, "temperature": 0.8, "top_p": 0.95, "logprobs": 5, "ignore_eos": True,
        "cache_prompt": False,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=900) as reply:
        counted = json.load(reply)["usage"]
    if counted["prompt_tokens"] != prompt or counted["completion_tokens"] != tokens:
        sys.exit(f"asked for {prompt} + {tokens} tokens, and got {counted}")


def status(process: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def say(what: str, process: int) -> str:
    now = status(process)
    names = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    return f"{what:<12}" + "  ".join(f"{name} {now[name] / MIB:7.1f}" for name in names) + "  MiB"


if __name__ == "__main__":
    main()
