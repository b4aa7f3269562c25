"""Decoding speed of the server and flags that a bundle ships against the best that llama-bench finds.

    python benchmarks/decode.py [--rounds 16] [--folder DIR]

llama-bench first sweeps threads and flash attention, and its best pair is the peer, whatever edgepack ships. It chooses
no token and speaks no HTTP. Rounds are many and short, because rented machines drift by a tenth from second to second
(server_speed.py has the other runtimes and the processor's time).
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import comparison
import peers
import server_speed
import subjects
from comparison import CORES, Asked, Peer, Row

from edgepack import toolchain
from edgepack.errors import MissingTool

TOKENS = 24
SCHEME = "Q4_K_M"
NAME = "llama-bench"
THREADS = sorted({1, *(2**n for n in range(1, 8) if 2**n < CORES), CORES})


def found() -> Sequence[Peer]:
    missing = ""
    try:
        toolchain.find()
    except MissingTool as error:
        missing = str(error)
    command = (
        f"llama-bench -m MODEL.gguf -p 0 -n {TOKENS} -t {','.join(map(str, THREADS))} -fa 0,1 (its best pair)"
    )
    return (Peer(name=NAME, version=peers.LLAMA_VERSION, command=command, missing=missing),)


def compare(asked: Asked, by_name: Mapping[str, Peer]) -> Iterator[Row]:
    peer = by_name[NAME]
    what = f"decode {subjects.SHAPE} {SCHEME}"
    if peer.missing:
        yield comparison.absent(what, "tokens/s", "more", peer, peer.missing)
        return
    _, artifact = subjects.artifact(subjects.SHAPE, SCHEME, asked.folder)
    swept = bench(artifact.path, ",".join(map(str, THREADS)), "0,1", 3)
    threads, attention = max(swept, key=lambda pair: swept[pair])
    print(
        "llama-bench:",
        ", ".join(f"-t {t} -fa {fa}: {rate:.1f}" for (t, fa), rate in swept.items()),
        flush=True,
    )
    options = argparse.Namespace(
        runtime="llama.cpp",
        artifact=artifact.path,
        threads=CORES,
        context=512,
        server=toolchain.find_server(),
    )
    with server_speed.serving(options) as server:
        server(server_speed.SHORT)
        a, b = comparison.paired(
            asked.rounds,
            lambda: server(TOKENS)[0],
            partial(only, artifact.path, threads, attention),
        )
    best = Peer(name=peer.name, version=f"{peer.version} -t {threads} -fa {attention}", command=peer.command)
    yield comparison.of(
        what, "tokens/s", "more", best, a, b,
        why="llama-bench chooses no token and streams nothing; the server does, with the same kernels",
    )  # fmt: skip


def only(model: Path, threads: int, attention: int) -> float:
    """Tokens a second of one run."""
    return bench(model, str(threads), str(attention), 1)[threads, attention]


def bench(model: Path, threads: str, attention: str, repeat: int) -> dict[tuple[int, int], float]:
    """Tokens a second of each pair of threads and flash attention (0 or 1)."""
    command: list[str | Path] = [
        toolchain.find().bench,
        "-m",
        model,
        "-p",
        "0",
        "-n",
        str(TOKENS),
        "-ngl",
        "0",
    ]
    command += ["-r", str(repeat)]
    command += ["-t", threads, "-fa", attention, "-o", "json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {(run["n_threads"], int(run["flash_attn"])): run["avg_ts"] for run in json.loads(done.stdout)}


if __name__ == "__main__":
    comparison.main(__doc__, found, compare, rounds=16)
