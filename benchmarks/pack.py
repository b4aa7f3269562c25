"""Packing a file of weights into a bundle against `sha256sum` and `tar` of the same bytes.

    python benchmarks/pack.py [--rounds 5] [--folder DIR]

edgepack reads the file once: it is hashed against the digest that the plan was made for while it is written, and
synced to the disk before it gets its name. The last row's peer does the same work with two programs and `sync`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import comparison
import peers
from comparison import Asked, Peer, Row

MEGABYTES = 400
PACK = """
import sys
from pathlib import Path
from edgepack.bundle import oci
source, out, digest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
weights = oci.Layer(
    filepath="model.gguf", kind="weight", content=source, sha256=digest, bytes=source.stat().st_size
)
oci.write(out, oci.Image(name="benchmark", config={}, annotations={}, layers=(weights,)))
"""


def found() -> Sequence[Peer]:
    hashing = peers.installed("sha256sum", "apt install coreutils", "sha256sum WEIGHTS")
    tar = peers.installed("tar", "apt install tar", "tar -cf OUT WEIGHTS")
    both = Peer(
        name="tar + sha256sum + sync",
        version=f"{tar.version}, {hashing.version}",
        command="tar -cf OUT WEIGHTS; sha256sum OUT; sync OUT",
        missing=tar.missing or hashing.missing,
    )
    return hashing, tar, both


def compare(asked: Asked, by_name: Mapping[str, Peer]) -> Iterator[Row]:
    weights = asked.folder / "weights"
    weights.write_bytes(os.urandom(MEGABYTES * 10**6))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    ours, theirs = asked.folder / "packed.tar", asked.folder / "peer.tar"
    pack: comparison.Command = [sys.executable, "-c", PACK, weights, ours, digest]
    commands: Mapping[str, Sequence[comparison.Command]] = {
        "sha256sum": [["sha256sum", weights]],
        "tar": [["tar", "-C", asked.folder, "-cf", theirs, weights.name]],
        "tar + sha256sum + sync": [
            ["tar", "-C", asked.folder, "-cf", theirs, weights.name], ["sha256sum", theirs], ["sync", theirs],
        ],
    }  # fmt: skip
    why = {
        "sha256sum": "sha256sum only reads; edgepack also writes what it hashes and waits for the disk",
        "tar": "tar neither hashes nor waits for the disk; edgepack does both",
        "tar + sha256sum + sync": "the time is the disk's, and a Python interpreter's start is in edgepack's",
    }
    for name, command in commands.items():
        what = f"pack {MEGABYTES} MB"
        if by_name[name].missing:
            yield comparison.absent(what, "s", "less", by_name[name], by_name[name].missing)
            continue
        a, b = comparison.paired(asked.rounds, partial(written, pack), partial(written, *command))
        yield comparison.of(what, "s", "less", by_name[name], a, b, why=why[name])
    for file in (weights, ours, theirs):
        file.unlink(missing_ok=True)


def written(*commands: comparison.Command) -> float:
    """Seconds, begun with nothing left to write."""
    os.sync()
    return comparison.seconds(*commands)


if __name__ == "__main__":
    comparison.main(__doc__, found, compare, rounds=5)
