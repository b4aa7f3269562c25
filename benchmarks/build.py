"""A build against llama.cpp's own convert_hf_to_gguf.py and llama-quantize: time and peak memory.

    python benchmarks/build.py [--rounds 5] [--folder DIR]

Both make Q4_K_M of the same Hugging Face folder with all cores. A build also plans, hashes, records the answers that a
device is checked against (it runs the model for that; kept for the next build of the same artifact, as in the rows
"again"), and writes the bundle. Memory is anonymous, at its highest.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import comparison
import peers
import subjects
from build_time import forget_all_but_answers
from comparison import CORES, Asked, Peer, Row, Run

from edgepack import workspace

SCHEME = "Q4_K_M"
BARE = "convert_hf_to_gguf.py + llama-quantize"


def found() -> Sequence[Peer]:
    command = (
        f"convert_hf_to_gguf.py MODEL --outfile MODEL.gguf --outtype bf16; "
        f"llama-quantize MODEL.gguf OUT.gguf {SCHEME} {CORES}"
    )
    quantize = peers.llama_cpp("llama-quantize", command)
    missing = quantize.missing or peers.importable("torch", "transformers", "sentencepiece", "gguf")
    return (Peer(name=BARE, version=quantize.version, command=command, missing=missing),)


def compare(asked: Asked, by_name: Mapping[str, Peer]) -> Iterator[Row]:
    peer = by_name[BARE]
    for name in ("demo", subjects.SMALL):
        if peer.missing:
            yield comparison.absent(f"build {name}", "s", "less", peer, peer.missing)
            continue
        model = subjects.source(name, asked.folder)
        bare, first, again = [], [], []
        for number in range(asked.rounds):
            if number % 2:
                bare.append(converted(model))
            whole, kept = built(model)
            first.append(whole)
            again.append(kept)
            if number % 2 == 0:
                bare.append(converted(model))
        recording = "recording the answers runs the model, which converting and quantizing does not"
        beside = "a build also starts edgepack, plans, hashes every byte, and writes and syncs the bundle"
        for what, ours, why in (
            (f"build {name}", first, recording),
            (f"build {name} again", again, beside),
        ):
            yield comparison.of(
                what, "s", "less", peer, [run.seconds for run in ours], [run.seconds for run in bare], why=why
            )
        yield comparison.of(
            f"build {name}: memory", "MiB", "less", peer, [run.memory for run in first],
            [run.memory for run in bare], why="recording the answers holds the quantized model in memory",
        )  # fmt: skip


def converted(model: Path) -> Run:
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        whole, small = Path(place) / "whole.gguf", Path(place) / "small.gguf"
        return comparison.watched(
            peers.convert(model, whole, subjects.KNOWN_AS),
            [peers.program("llama-quantize"), whole, small, SCHEME, str(CORES)],
        )


def built(model: Path) -> tuple[Run, Run]:
    """With an empty cache, and with only the recorded answers kept."""
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        cache, out = Path(place) / "cache", Path(place) / "out"
        cache.mkdir()
        (cache / "toolchain").symlink_to(workspace.cache_root() / "toolchain")
        command: comparison.Command = [
            sys.executable, "-m", "edgepack", "-q", "build", "--profile", "jetson-orin", "--model", model,
            "--scheme", SCHEME, "--min-tokens-per-second", "0", "--no-quality", "-o", out,
        ]  # fmt: skip
        first = comparison.watched(command, env={"EDGEPACK_CACHE": str(cache)})
        shutil.rmtree(out)
        forget_all_but_answers(cache)
        return first, comparison.watched(command, env={"EDGEPACK_CACHE": str(cache)})


if __name__ == "__main__":
    comparison.main(__doc__, found, compare, rounds=5)
