"""What is recorded: a device with a release gets another, in two transfers, goes back, is damaged and mended.

Another device has a bundle on its own disk and consumes it, killed once on the way. Both are enrolled in mode system,
with their units on the recorded disk; systemctl says yes to everything.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgepack import enrolled
from edgepack.bundle import sign
from edgepack.device import agent
from edgepack.units import GIB, MIB
from tests import releases, services
from tests.managed import PLACED, Served, anywhere, changed
from tests.powercut import mounts
from tests.powercut.guest import Disk, Guest, record
from tests.powercut.wlog import Request, read

Without = Literal["", "all", "files", "folders"]
"""Whose fsync the agent in the guest goes without."""

STORE = "store"
"""The store's folder on the disk."""
BUNDLE = "bundle.tar"
"""The bundle on the disk of a device that consumes it."""
Job = Literal["flash", "consume"]
SIZES = {"ext4": 160 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
"""Bytes of a file system; xfs and btrfs take no fewer."""
PIECE = 2 * MIB
"""Bytes of a transfer between which it pauses, as a slow line does."""
DAMAGED = "part-1.txt"

JOB = """\
cd /powercut
all=
agent() {{
    python3.11 $disk/agent.pyz --root $disk "$@" >answer-$device || {{ cat answer-$device; exit 1; }}
}}
mkdir bin
cp systemctl bin
chmod 755 bin/systemctl
export PATH=/powercut/bin:$PATH
slowly() {{ for piece in "$@"; do cat $piece; sleep 0.5; done; }}
mark() {{ echo "$1" >&3; read -r marked <&4; }}
prepare() {{
    device=$1 type=$2 place=$3 disk=/mnt/$1/{store}
    export POWERCUT_WITHOUT_FSYNC=$4 EDGEPACK_TEST_PLACE=/mnt/$1
    mkdir /mnt/$device
    mkfifo asked-$device told-$device
    python3.11 marker /dev/$device $place <asked-$device >told-$device &
    exec 3>asked-$device 4<told-$device
    mount -t $type /dev/$device /mnt/$device
}}
flash() {{
    prepare "$@"
    mark offer;     agent offer --force-device <head
    mark receive;   slowly first.* | agent receive {release}
    mark resume;    slowly rest.* | agent receive {release}
    mark install;   agent install {release} --force-device --no-self-test
    mark installed; sleep 7
    mark rollback;  agent rollback
    mark back;      sleep 7
    mark damage
    echo broken | dd of=$disk/blobs/sha256/{damaged} bs=1 seek=1000 conv=notrunc 2>/dev/null
    sync
    mark damaged;   agent fsck
    mark offer-again; agent offer --force-device <head
    mark receive-again; slowly again.* | agent receive {release}
    mark mended;    sleep 7
    umount /mnt/$device
    mark end
}}
consume() {{
    prepare "$@"
    bundle=/mnt/$device/{bundle}
    mark consume
    python3.11 $disk/agent.pyz --root $disk install $bundle --consume --force-device --no-self-test &
    while [ -e $bundle ] && [ "$(stat -c %s $disk/incoming/{weights}.part 2>/dev/null || echo 0)" -lt {enough} ]; do
        sleep 0.05
    done
    kill -9 $!
    mark consume-again; agent install $bundle --consume --force-device --no-self-test
    mark consumed;  sleep 7
    umount /mnt/$device
    mark end
}}
"""

MARKER = """\
# Writes the name of each step behind the file system, past the cache and without a flush, and answers then.
import mmap, os, sys
disk = os.open(sys.argv[1], os.O_WRONLY | os.O_DIRECT)
sector = mmap.mmap(-1, 512)
for name in sys.stdin:
    sector[:] = name.encode().ljust(512, b"\\0")
    assert os.pwrite(disk, sector, int(sys.argv[2])) == 512
    print("marked", flush=True)
"""

PHASES = {
    "offer": ("first",), "receive": ("first",), "resume": ("first",), "install": ("first", "second"),
    "installed": ("second",), "rollback": ("second", "first"), "back": ("first",), "damage": ("first",),
    "damaged": ("first",), "offer-again": ("first",), "receive-again": ("first",), "mended": ("first",),
    "end": ("first",), "consume": ("first",), "consume-again": ("first", "second"), "consumed": ("second",),
}  # fmt: skip
"""What `current` may name while each step runs: what was answered for must have stayed."""
SWITCH = ("install", "installed", "rollback", "back")
"""Steps around the two switches, in which a missing fsync shows."""
CONSUME = ("consume", "consume-again")
"""Steps in which the bundle has holes, and only the store has what was there."""
ENOUGH = 22 * MIB
"""Bytes of the weights that are there when the first install is killed: more than were made durable."""
SYSTEMCTL = """\
#!/bin/sh
case "$*" in *LoadState*) echo LoadState=loaded;; *SubState*) echo SubState=running;; esac
"""

HURT = ("damage", "damaged", "offer-again", "receive-again")
"""Steps in which a blob of the second release is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flash:
    """Two signed releases and what goes over the line for the second."""

    first: Path
    second: Path
    signers: str
    releases: Mapping[str, str]
    """Hex digest of first and second."""
    damaged: str
    """Hex digest of the blob of the second that is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one disk was asked during a flash: its content before, and each request with the step that it belongs to."""

    filesystem: str
    without: Without
    job: Job
    what: Flash
    before: Path
    requests: tuple[Request, ...]
    steps: tuple[str, ...]


def whats(folder: Path) -> Mapping[Job, Flash]:
    """What each job does; the weights that are consumed are made durable in several steps."""
    (folder / "consumed").mkdir()
    return {"flash": flash(folder), "consume": flash(folder / "consumed", weights=38 * MIB)}


def flash(folder: Path, *, weights: int = 11 * MIB) -> Flash:
    """About 25 MB in several blobs for the second release, of which one is the first one's too, and other units."""
    key = folder / "key"
    sign.new_key(key)
    chance = random.Random(7)
    shared = chance.randbytes(1 * MIB).hex()
    made = []
    for sequence, size, part in ((1, 3 * MIB, MIB // 2), (2, weights, 2 * MIB)):
        files = {f"part-{number}.txt": chance.randbytes(part).hex() for number in range(3)}
        out = folder / f"{sequence}.tar"
        content = b"GGUF" + chance.randbytes(size)
        files["shared.txt"] = shared
        if sequence == 2:
            files |= {services.SERVER: "# the second one's\n", services.POWER: "# power\n"}
        made.append(releases.bundle(out, key, sequence=sequence, weights=content, files=files))
    damaged = agent.find_file(agent.read_bundle(str(made[1])), DAMAGED)
    assert damaged is not None
    return Flash(
        first=made[0],
        second=made[1],
        signers=sign.allowed_signer(key),
        releases={"first": releases.release_of(made[0]), "second": releases.release_of(made[1])},
        damaged=damaged["digest"].removeprefix("sha256:"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A disk, and what is done on it."""

    filesystem: str
    without: Without = ""
    job: Job = "flash"


def recorded(
    machine: Guest, whats: Mapping[Job, Flash], disks: Sequence[Asked], folder: Path, *, timeout: float = 900
) -> list[Recording]:
    """Does the jobs, each on a disk of its own, with or without fsync, in one guest."""
    drives, befores = [], []
    flashed = whats["flash"]
    job = JOB.format(
        store=STORE, release=flashed.releases["second"], damaged=flashed.damaged, bundle=BUNDLE, enough=ENOUGH,
        weights=_weights(whats["consume"]) if "consume" in whats else "",
    )  # fmt: skip
    for number, disk in enumerate(disks):
        before, image = folder / f"before-{number}", folder / f"image-{number}"
        prepared(whats[disk.job], disk, before)
        mounts.copy(before, image)
        befores.append(before)
        drives.append(Disk(image=image, log=folder / f"log-{number}"))
        words = f"vd{chr(ord('a') + number)} {disk.filesystem} {SIZES[disk.filesystem]} '{disk.without}'"
        job += f'{disk.job} {words} & all="$all $!"\n'
    files = {"marker": MARKER.encode(), "systemctl": SYSTEMCTL.encode(), **dict(_transfers(flashed))}
    record(machine, drives, files, job + "for one in $all; do wait $one; done\n", timeout=timeout)
    return [
        _recording(disk, whats[disk.job], before, read(drive.log))
        for disk, before, drive in zip(disks, befores, drives, strict=True)
    ]


def _weights(what: Flash) -> str:
    """Hex digest of the second release's weights."""
    found = agent.find_file(agent.read_bundle(str(what.second)), agent.WEIGHTS)
    assert found is not None
    return found["digest"].removeprefix("sha256:")


def memory_folder() -> str | None:
    """Where disks may lie in memory: each state is a disk, and a replay writes a hundred gigabytes. None: anywhere."""
    shm = Path("/dev/shm")
    return str(shm) if shm.is_dir() and shutil.disk_usage(shm).free > 2 * GIB else None


def prepared(what: Flash, asked: Asked, image: Path) -> None:
    """A disk whose store has the first release, good, and room behind the file system for marks."""
    mounts.make(asked.filesystem, image, SIZES[asked.filesystem])
    brought = image.with_suffix(".agent")
    brought.write_bytes(changed(*PLACED)(enrolled.zipapp()))
    with mounts.mounted(asked.filesystem, image) as disk:
        device = Served(disk, state=image.with_suffix(".manager"))
        with anywhere():
            assert device.enroll(what.signers, "--agent", str(brought), mode="system").status == 0
        assert device.run("install", what.first, "--no-self-test").document["outcome"] == "good"
        if asked.job == "consume":
            shutil.copyfile(what.second, disk / BUNDLE)


def _transfers(what: Flash) -> Iterator[tuple[str, bytes]]:
    """Files of the guest: the head of the second release, its blobs with a cut within one, the damaged one again."""
    yield "head", releases.offer_frames(what.second)
    known = {file["digest"] for file in agent.read_bundle(str(what.first))["files"]}
    files = agent.read_bundle(str(what.second))["files"]
    missing = {f["digest"]: f["size"] for f in files if f["digest"] not in known}
    largest = max(missing, key=missing.__getitem__)
    have = missing[largest] // 2
    whole = [{"digest": digest, "have": 0} for digest in missing if digest != largest]
    begun = b"".join(releases.blob_frames(what.second, [*whole[:1], {"digest": largest, "have": 0}]))
    yield from _pieces("first", begun[: -(missing[largest] - have)])
    rest = [{"digest": largest, "have": have}, *whole[1:]]
    yield from _pieces("rest", b"".join(releases.blob_frames(what.second, rest)))
    damaged = [{"digest": "sha256:" + what.damaged, "have": 0}]
    yield from _pieces("again", b"".join(releases.blob_frames(what.second, damaged)))


def _pieces(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    for number, begin in enumerate(range(0, len(content), PIECE)):
        yield f"{name}.{number:02}", content[begin : begin + PIECE]


def _recording(disk: Asked, what: Flash, before: Path, log: Sequence[Request]) -> Recording:
    """Splits the log into requests and the marks among them, which lie behind the file system."""
    requests: list[Request] = []
    steps: list[str] = []
    step = "mount"
    for request in log:
        if request.content and request.at >= SIZES[disk.filesystem]:
            step = request.content.rstrip(b"\0").decode().strip()
        else:
            requests.append(request)
            steps.append(step)
    assert step == "end", f"the record ends in the step {step}"
    return Recording(
        filesystem=disk.filesystem, without=disk.without, job=disk.job, what=what, before=before,
        requests=tuple(requests), steps=tuple(steps),
    )  # fmt: skip
