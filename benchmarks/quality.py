"""Quality per byte: a GGUF that fills a budget against llama-quantize's Q4_K_M with the same importance matrix.

    python benchmarks/quality.py [--folder DIR]

The built-in model; the budget is the bytes of the peer's file. Divergence from the parent (mean KL, nats a token) on
held-out text, by llama.cpp; an interval is that of the text's windows, and --rounds is not used. budget.py has more
mixtures and models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import budget
import comparison
import peers
import subjects
from comparison import CORES, Asked, Figure, Peer, Row

SCHEME = "Q4_K_M"
TOKENS = 12288
"""Measured on."""
CALIBRATED_ON = 16384
"""Tokens, both files; a build takes more, which takes minutes."""
NAME = "llama-quantize"


def found() -> Sequence[Peer]:
    command = f"llama-quantize --imatrix IMATRIX.gguf MODEL.gguf OUT.gguf {SCHEME} {CORES}"
    return (peers.llama_cpp(NAME, command),)


def compare(asked: Asked, by_name: Mapping[str, Peer]) -> Iterator[Row]:
    peer = by_name[NAME]
    of = budget.subject("demo", asked.folder / "quality", [], calibrated_on=CALIBRATED_ON)
    if peer.missing:
        yield comparison.absent(f"divergence at the bytes of {SCHEME}", "nats", "less", peer, peer.missing)
        return
    whole, small = of.folder / "whole.gguf", of.folder / "peer.gguf"
    quantize: comparison.Command = [
        peers.program(NAME), "--imatrix", of.matrix, whole, small, SCHEME, str(CORES),
    ]  # fmt: skip
    comparison.seconds(peers.convert(of.checkpoint.path, whole, subjects.KNOWN_AS), quantize)
    theirs = budget.quality_of(of, small, tokens=TOKENS)
    base = budget.row(of, SCHEME, "anchor", small.stat().st_size, theirs, theirs, None, 0.0)
    budget.show(base)
    ours = budget.filled(of, small.stat().st_size, "fisher", "cpu")
    found = budget.row(
        of,
        SCHEME,
        "fisher",
        ours.path.stat().st_size,
        budget.quality_of(of, ours.path, tokens=TOKENS),
        theirs,
        ours.predicted,
        ours.seconds,
    )
    budget.show(found)
    yield comparison.figures(
        f"divergence at {small.stat().st_size:,} B or less", "nats", "less", peer,
        Figure(value=found.kl, low=found.kl_low, high=found.kl_high),
        Figure(value=base.kl, low=base.kl_low, high=base.kl_high),
        note=f"edgepack's file has {found.bytes:,} B",
        why="the mixture of types was as good by chance: the intervals overlap",
    )  # fmt: skip


if __name__ == "__main__":
    comparison.main(__doc__, found, compare, rounds=2)
