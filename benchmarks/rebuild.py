"""A change of configuration alone: what it takes to build again, and what crosses the wire to a device.

    python benchmarks/rebuild.py [--rounds 5] [--folder DIR]

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
            "buildah --storage-driver vfs build --layers --isolation chroot CONTEXT; "
            "buildah --storage-driver vfs push --disable-compression IMAGE oci-archive:OUT",
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
        kept, out = _cache(Path(place) / "cache"), Path(place) / "out"
        contexts = iter(range(1024, 1 << 16, 256))

        def build(cache: Path = kept) -> float:
            """With a context that no build has had."""
            command: comparison.Command = [
                sys.executable, "-m", "edgepack", "-q", "build", "--profile", "jetson-orin", "--model", model,
                "--scheme", SCHEME, "--min-tokens-per-second", "0", "--no-quality", "--context", str(next(contexts)),
                "-o", out,
            ]  # fmt: skip
            return comparison.seconds(command, env={"EDGEPACK_CACHE": str(cache)})

        def whole() -> float:
            with tempfile.TemporaryDirectory(prefix="bench-") as fresh:
                return build(_cache(Path(fresh) / "cache"))

        build()  # what the next builds have in the cache
        a, b = comparison.paired(asked.rounds, build, whole)
        yield comparison.of(what, "s", "less", by_name[WHOLE], a, b, why="most of a build is what is kept")
        peer = by_name[IMAGE]
        if peer.missing:
            yield comparison.with_ours(comparison.absent(what, "s", "less", peer, peer.missing), a)
            return
        image = Image(Path(place), next(out.glob("*.tar")))
        try:
            image.built()
        except subprocess.CalledProcessError as error:
            reason = (
                f"it does not build here: {(error.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
            )
            yield comparison.with_ours(comparison.absent(what, "s", "less", peer, reason), a)
            return
        a, b = comparison.paired(asked.rounds, build, image.built)
        yield comparison.of(
            what, "s", "less", peer, a, b,
            why="both write the whole file again; edgepack also plans, checks what it kept, and syncs to the disk",
        )  # fmt: skip


def _cache(folder: Path) -> Path:
    """One with nothing but the toolchain."""
    folder.mkdir()
    (folder / "toolchain").symlink_to(workspace.cache_root() / "toolchain")
    return folder


class Image:
    """A container image of a bundle's files, the weights in one layer and the rest in another."""

    def __init__(self, place: Path, bundle: Path) -> None:
        self.place, self.context = place, place / "context"
        self.rest = self.context / "bundle"
        self.context.mkdir()
        comparison.seconds([sys.executable, "-m", "edgepack", "-q", "unpack", bundle, self.rest])
        files = [file for file in self.rest.rglob("*") if file.is_file()]
        weights = max(files, key=lambda file: file.stat().st_size)
        folder = weights.parent.relative_to(self.rest)
        weights.rename(self.context / weights.name)
        workspace.write_text(
            place / "Containerfile",
            f"FROM scratch\nCOPY {weights.name} /bundle/{folder.as_posix()}/\nCOPY bundle/ /bundle/\n",
        )
        self.changes = 0

    def built(self) -> float:
        """Seconds to build it after a change of the rest, and to write it as one file; raises CalledProcessError."""
        self.changes += 1
        workspace.write_text(self.rest / "changed.txt", f"{self.changes}\n")
        out = self.place / "image.tar"
        out.unlink(missing_ok=True)
        storage = [
            "--root",
            self.place / "storage",
            "--runroot",
            self.place / "run",
            "--storage-driver",
            "vfs",
        ]
        file = self.place / "Containerfile"
        began = comparison.clock()
        for words in (
            ["build", "--layers", "--isolation", "chroot", "-q", "-f", file, "-t", "bench", self.context],
            ["push", "-q", "--disable-compression", "bench", f"oci-archive:{out}"],
        ):
            command = [str(word) for word in ("buildah", *storage, *words)]
            subprocess.run(command, check=True, capture_output=True, text=True)
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
    comparison.main(__doc__, found, compare, rounds=5)
