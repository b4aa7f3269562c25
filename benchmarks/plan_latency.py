"""How long a user waits for a plan, and for what one model takes: cold starts of each program.

    python benchmarks/plan_latency.py [--rounds 5] [--folder DIR]

A plan chooses among the whole catalog for one profile; shown is the slowest profile. What one GGUF file takes at one
context is what the peers tell as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import comparison
import peers
import subjects
from comparison import Asked, Peer, Row

from edgepack import profile

CONTEXT = "2048"
FIT_PARAMS = "llama-fit-params"
INFO = "modelinfo-cli"
LLMFIT = "llmfit"


def found() -> Sequence[Peer]:
    return (
        peers.from_pypi(LLMFIT, "1.1.17", "llmfit --json recommend", proof=["{bin}/llmfit", "--version"]),
        peers.llama_cpp(FIT_PARAMS, f"llama-fit-params -m MODEL.gguf -c {CONTEXT} --fit-print on"),
        peers.from_pypi(
            INFO, "1.4.4", f"modelinfo MODEL.gguf --context {CONTEXT}", proof=["{bin}/modelinfo", "--version"]
        ),
    )


def compare(asked: Asked, by_name: Mapping[str, Peer]) -> Iterator[Row]:
    yield _plans(asked, by_name[LLMFIT])
    _, artifact = subjects.artifact("demo", "Q8_0", asked.folder)
    model = artifact.path
    fit: comparison.Command = ["fit", "--model", model, "--scheme", "Q8_0", "--context", CONTEXT, "--json"]
    for name in (FIT_PARAMS, INFO):
        what, peer = "memory of one GGUF, asked once", by_name[name]
        if peer.missing:
            yield comparison.absent(what, "ms", "less", peer, peer.missing)
            continue
        command: comparison.Command = (
            [peers.program(name), "-m", model, "-c", CONTEXT, "--fit-print", "on"]
            if name == FIT_PARAMS
            else [peers.venv().parent / "modelinfo", model, "--context", CONTEXT]
        )
        a, b = comparison.paired(
            2 * asked.rounds,
            partial(comparison.seconds, _edgepack(*fit)),
            partial(comparison.seconds, command),
        )
        why = {
            FIT_PARAMS: "llama.cpp is compiled; edgepack's time is the start of Python and its imports, and it also "
            "tells the interval, the parts and the change that would make it fit",
            INFO: "it reads the header alone; edgepack lays out every buffer of the runtime",
        }
        yield comparison.of(what, "ms", "less", peer, a, b, why=why[name])


def _plans(asked: Asked, peer: Peer) -> Row:
    """Of the profile that took longest in one run of each."""
    once = {name: comparison.seconds(_plan(name)) for name in profile.names()}
    slowest = max(once, key=lambda name: once[name])
    what = f"plan over the catalog ({slowest})"
    ours = partial(comparison.seconds, _plan(slowest))
    if peer.missing:
        alone = comparison.absent(what, "ms", "less", peer, peer.missing)
        return comparison.with_ours(alone, [ours() for _ in range(asked.rounds)])
    command: comparison.Command = [peers.venv().parent / "llmfit", "--json", "recommend"]
    a, b = comparison.paired(asked.rounds, ours, partial(comparison.seconds, command))
    return comparison.of(
        what, "ms", "less", peer, a, b,
        note="unlike work: llmfit ranks its own table of models for this machine; edgepack plans its catalog for a "
        "profile",
        why="llmfit is compiled and looks its models up; edgepack lays out each candidate's buffers",
    )  # fmt: skip


def _plan(name: str) -> comparison.Command:
    return _edgepack("plan", "--profile", name, "--json")


def _edgepack(*words: str | Path) -> comparison.Command:
    return [sys.executable, "-m", "edgepack", *words]


if __name__ == "__main__":
    comparison.main(__doc__, found, compare, rounds=5)
