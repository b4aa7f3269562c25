"""A change of configuration alone: what it takes to build again, and what crosses the wire to a device.

    python benchmarks/rebuild.py [--rounds 3] [--folder DIR]

The bundle of a model with random weights is built again with another context, against the whole build, and against a
container image of the same files whose layers buildah keeps, its file written as edgepack writes its bundle. Then the
built-in model is flashed over ssh twice, the second release with another context; rsync is given the same files.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import comparison
import flash
import peers
import subjects
from comparison import Asked, Peer, Row

from edgepack import workspace
from edgepack.bundle import sign

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.sshd import serving

WHOLE = "edgepack's own whole build"
IMAGE = "buildah"
RSYNC = "rsync"
SCHEME = "Q4_K_M"


def found() -> Sequence[Peer]:
    return (
        Peer(name=WHOLE, version="", command="edgepack build with an empty cache"),
        peers.installed(
            IMAGE,
            "apt install buildah",
            "buildah build --layers CONTEXT; buildah push -D IMAGE oci-archive:OUT",
        ),
        peers.installed(RSYNC, "apt install rsync", "rsync --no-whole-file --stats NEW.tar OLD.tar"),
    )


def compare(asked: Asked, by_name: Mapping[str, Peer]) -> Iterator[Row]:
    yield from _builds(asked, by_name)
    yield from _wire(by_name[RSYNC])


def _builds(asked: Asked, by_name: Mapping[str, Peer]) -> Iterator[Row]:
    model = subjects.source(subjects.SMALL, asked.folder)
    what = "rebuild, another context"
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        cache, out = Path(place) / "cache", Path(place) / "out"
        cache.mkdir()
        (cache / "toolchain").symlink_to(workspace.cache_root() / "toolchain")
        contexts = iter(range(1024, 1 << 16, 256))

        def build() -> float:
            """With a context that no build has had."""
            command: comparison.Command = [
                sys.executable, "-m", "edgepack", "-q", "build", "--profile", "jetson-orin", "--model", model,
                "--scheme", SCHEME, "--min-tokens-per-second", "0", "--no-quality", "--context", str(next(contexts)),
                "-o", out,
            ]  # fmt: skip
            return comparison.seconds(command, env={"EDGEPACK_CACHE": str(cache)})

        whole = build()
        again = [build() for _ in range(asked.rounds)]
        yield comparison.of(
            what,
            "s",
            "less",
            by_name[WHOLE],
            again,
            [whole] * len(again),
            why="most of a build is what is kept",
        )
        peer = by_name[IMAGE]
        if peer.missing:
            yield comparison.with_ours(comparison.absent(what, "s", "less", peer, peer.missing), again)
            return
        bundle = next(out.glob("*.tar"))
        unpacked = Path(place) / "context"
        comparison.seconds([sys.executable, "-m", "edgepack", "-q", "unpack", bundle, "-o", unpacked])
        image = Path(place) / "image.tar"
        weights = max(
            (file for file in unpacked.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
        )
        try:
            layered(unpacked, weights, image, Path(place), 0)
        except subprocess.CalledProcessError as error:
            reason = f"it does not build here: {error.stderr.strip().splitlines()[-1]}"
            yield comparison.with_ours(comparison.absent(what, "s", "less", peer, reason), again)
            return
        a, b = comparison.paired(
            asked.rounds, build, partial(layered, unpacked, weights, image, Path(place), 1)
        )
        yield comparison.of(
            what, "s", "less", peer, a, b,
            why="both write the whole file again; edgepack also plans, checks what it kept, and syncs to the disk",
        )  # fmt: skip


def layered(context: Path, weights: Path, image: Path, place: Path, change: int) -> float:
    """Seconds to build and write an image with the weights in one layer and the rest in another."""
    rest = context / "changed.txt"
    previous = int(rest.read_text(encoding="utf-8")) if rest.exists() else 0
    rest.write_text(f"{previous + change}\n", encoding="utf-8")
    containerfile = place / "Containerfile"
    containerfile.write_text(
        f"FROM scratch\nCOPY {weights.relative_to(context)} /model/\nCOPY . /bundle/\n", encoding="utf-8"
    )
    (context / ".containerignore").write_text("", encoding="utf-8")
    image.unlink(missing_ok=True)
    storage = ["--root", str(place / "storage"), "--runroot", str(place / "run"), "--storage-driver", "vfs"]
    began = comparison.clock()
    for words in (
        [
            "build",
            "--layers",
            "--isolation",
            "chroot",
            "-q",
            "-f",
            str(containerfile),
            "-t",
            "bench",
            str(context),
        ],
        ["push", "-q", "--disable-compression", "bench", f"oci-archive:{image}"],
    ):
        subprocess.run(["buildah", *storage, *words], check=True, capture_output=True, text=True)
    return comparison.clock() - began


def _wire(peer: Peer) -> Iterator[Row]:
    what = "reflash, another context"
    with tempfile.TemporaryDirectory(prefix="bench-") as place, serving(Path(place) / "sshd") as sshd:
        folder = Path(place)
        key, signers = folder / "key", folder / "signers"
        sign.new_key(key)
        workspace.write_text(signers, sign.allowed_signer(key))
        done = flash.update(sshd, folder, key, signers)
        whole = Peer(name="the whole bundle", version="", command="scp BUNDLE.tar")
        yield comparison.exactly(what, "bytes", "less", whole, done.wire, done.bundle.stat().st_size, why="")
        if peer.missing:
            yield comparison.absent(what, "bytes", "less", peer, peer.missing)
            return
        copy = folder / "copy.tar"
        shutil.copyfile(done.before, copy)
        said = subprocess.run(
            ["rsync", "--no-whole-file", "--stats", done.bundle, copy],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        moved = sum(
            int(re.sub(r"\D", "", number))
            for number in re.findall(r"Total bytes (?:sent|received): ([\d,.]+)", said)
        )
        yield comparison.exactly(
            what, "bytes", "less", peer, done.wire, moved,
            why="rsync's bytes are without ssh and its login, and it neither verifies, installs, switches nor checks",
        )  # fmt: skip


if __name__ == "__main__":
    comparison.main(__doc__, found, compare, rounds=3)
