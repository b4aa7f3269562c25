"""Rebuilds what power cuts left of a recorded disk, mounts it, and says what is wrong with the store on it.

The first checks are written here from nothing but json and hashlib; the agent's own fsck must come to the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edgepack.device import agent, installer
from tests import releases, services
from tests.managed import Served
from tests.powercut import mounts, wlog
from tests.powercut.scenario import BUNDLE, HURT, PHASES, STORE, Flash, Recording

KINDS = {
    "file-system": "it does not mount, or is damaged: then the cut is none that it is made for",
    "no-current": "`current` or `previous` is missing or names no known release",
    "corrupt": "a release that has a name fails its manifest",
    "undone": "`current` is not what a finished command had said",
    "journal": "an event before the last cannot be read",
    "fsck": "the agent's fsck finds something, or does not end",
    "unit": "a unit is neither that of the one release, nor of the other, nor absent",
    "service": "when the device starts, its server does not run from the current release, with its units",
    "stuck": "installing again does not make the second release the current one",
}
"""What may be wrong with a state."""


UNITS = {"ext4": (512, 4096), "xfs": (4096,), "btrfs": (4096,)}
"""Bytes between which writes are torn. Where a disk tears smaller ones, a cut can take the whole file system, whatever
wrote to it: recovery of XFS does not write a block again whose first sector says that it is the newest
(fs/xfs/xfs_buf_item_recover.c), and finds its checksum wrong; btrfs mounts by one superblock of 4096 bytes."""
WHOLE = {"ext4": range(1024, 2048)}
"""ext4's superblock, written in place with one checksum over two sectors: never torn, for the same reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    kind: str
    """One of KINDS."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a cut left, judged."""

    after: int
    step: str
    lossy: bool
    faults: tuple[Fault, ...]
    current: str | None
    """first or second."""
    reruns: int | None
    """Runs of the installation until the second release was the current one; None where it was not tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How much of a recording is replayed."""

    states: int
    seed: int = 1
    rerun_each: int = 10
    """Of so many states one is installed on again."""
    steps: tuple[str, ...] = tuple(PHASES)
    """Steps within which it is cut."""


def replayed(recordings: Sequence[Recording], asked: Sequence[Asked]) -> list[list[State]]:
    """The judged states of each recording; recordings are replayed beside each other."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return [*pool.map(_replayed, recordings, asked)]


def _replayed(recording: Recording, asked: Asked) -> list[State]:
    with tempfile.TemporaryDirectory(dir=recording.before.parent) as folder:
        return [*replay(recording, Path(folder), asked)]


def replay(recording: Recording, folder: Path, asked: Asked) -> Iterator[State]:
    """Judges states: prefixes of the writes (each, if the number allows), and random losses."""
    chance = random.Random(asked.seed)
    medium, image = folder / "medium", folder / "state"
    mounts.copy(recording.before, medium)
    written = 0
    todo = places(recording, asked, chance)
    with medium.open("r+b") as stream:
        units, whole = UNITS[recording.filesystem], WHOLE.get(recording.filesystem, range(0))
        found = wlog.cuts(recording.requests, todo, chance, units=units, whole=whole)
        for number, cut in enumerate(found):
            for request in recording.requests[written : cut.durable]:
                os.pwrite(stream.fileno(), request.content, request.at)
            written = max(written, cut.durable)
            mounts.copy(medium, image)
            with image.open("r+b") as left:
                for write in cut.kept:
                    os.pwrite(left.fileno(), write.content, write.at)
            yield judged(recording, cut, image, rerun=number % asked.rerun_each == asked.rerun_each - 1)


def places(recording: Recording, asked: Asked, chance: random.Random) -> list[tuple[int, bool]]:
    """Where to cut: half of the states after writes, evenly, each write once; the others after any, with losses."""
    found = zip(recording.requests, recording.steps, strict=True)
    writes = [
        number for number, (request, step) in enumerate(found) if request.content and step in asked.steps
    ]
    count = min(len(writes), asked.states // 2)
    prefixes = [writes[number * len(writes) // count] for number in range(count)]
    losses = [chance.choice(writes) for _ in range(asked.states - count)]
    return sorted([(number, False) for number in prefixes] + [(number, True) for number in losses])


def judged(recording: Recording, cut: wlog.Cut, image: Path, *, rerun: bool) -> State:
    """Mounts what a cut left, looks at it and starts the device; ``rerun``: then installs the second release again."""
    what, step = recording.what, recording.steps[cut.after]
    faults: list[Fault] = []
    current: str | None = None
    reruns: int | None = None
    hurt = {what.damaged} if step in HURT else set()
    try:
        with mounts.mounted(recording.filesystem, image) as disk:
            store = disk / STORE
            names = {release: name for name, release in what.releases.items()}
            current = names.get(Path(_target(store / "current") or "").name)
            faults += inspected(store, what, hurt)
            if current is not None and current not in PHASES[step]:
                faults.append(Fault(kind="undone", message=f"current is the {current} release during {step}"))
            if not faults:
                faults += started(disk, what, image.with_suffix(".manager"))
            if rerun:
                again = {"flash": installed_again, "consume": consumed_again}[recording.job]
                reruns, told = again(store, what)
                faults += [*told, *inspected(store, what, set())]
            faults += checked_by_agent(store, set() if rerun else hurt)
        if rerun and not mounts.consistent(recording.filesystem, image):
            faults.append(Fault(kind="file-system", message="it is damaged"))
    except mounts.Unmountable as error:
        faults.append(Fault(kind="file-system", message=str(error)))
    return State(
        after=cut.after, step=step, lossy=cut.lossy, faults=tuple(faults), current=current, reruns=reruns
    )


def inspected(store: Path, what: Flash, hurt: set[str]) -> Iterator[Fault]:
    """Whether `current` is one of the two releases, and each that has a name is whole, but for the ``hurt`` blobs."""
    target = _target(store / "current")
    known = {"releases/" + release for release in what.releases.values()}
    if target not in known:
        yield Fault(kind="no-current", message=f"current is {target}")
    previous = _target(store / "previous")
    if previous is not None and previous not in known:
        yield Fault(kind="no-current", message=f"previous is {previous}")
    named = {target, previous} & known
    found = {f"releases/{p.name}" for p in (store / "releases").iterdir() if p.is_dir() and p.name[0] != "."}
    for release in sorted(found | {name for name in named if name is not None}):
        for message in wrong_files(store / release, set() if release == target else hurt):
            yield Fault(kind="corrupt", message=f"{release[:21]}: {message}")
    yield from journal_faults(store / "journal.jsonl")


def wrong_files(release: Path, hurt: set[str]) -> Iterator[str]:
    """What of a release is not as its manifest, and the manifest as the folder's name, says."""
    try:
        manifest = (release / ".release/manifest.json").read_bytes()
    except OSError as error:
        yield f"its manifest cannot be read: {error}"
        return
    if hashlib.sha256(manifest).hexdigest() != release.name:
        yield "its manifest has another sha256 than its name"
        return
    for layer in json.loads(manifest)["layers"]:
        digest = layer["digest"].removeprefix("sha256:")
        path = release / layer["annotations"]["org.cncf.model.filepath"]
        if digest in hurt:
            continue
        try:
            content = path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else None
        except OSError as error:
            yield str(error)
            continue
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            size = None if content is None else len(content)
            yield f"{path.name} has {size} bytes, not the {layer['size']} that its digest is of"


def journal_faults(journal: Path) -> Iterator[Fault]:
    """Every line but the last is an event."""
    try:
        lines = journal.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        yield Fault(kind="journal", message=str(error))
        return
    for number, line in enumerate(lines):
        if not line.startswith(b"{") or b"\0" in line:
            if number < len(lines) - 1:
                yield Fault(kind="journal", message=f"line {number + 1} of {len(lines)}: {line[:60]!r}")
        else:
            assert "event" in json.loads(line)


def checked_by_agent(store: Path, hurt: set[str]) -> Iterator[Fault]:
    """The agent's fsck, whose word must be the same: nothing bad or missing but what was damaged."""
    answer = releases.Device(store).run("fsck")
    if answer.status != 0:
        yield Fault(kind="fsck", message=f"status {answer.status}: {answer.said[-200:]}")
        return
    for entry in [*answer.document["bad"], *answer.document["missing"]]:
        if (entry["digest"] or "").removeprefix("sha256:") not in hurt:
            yield Fault(kind="fsck", message=json.dumps(entry))


def started(disk: Path, what: Flash, state: Path) -> Iterator[Fault]:
    """What is wrong with the units, and with what runs when the device starts on what a cut left of them."""
    brought = {name: {None, *_brought(what, name)} for name in installer.UNITS}
    units = disk / "units"
    for name, texts in brought.items():
        text = (units / name).read_text(encoding="utf-8") if (units / name).exists() else None
        if text not in texts:
            yield Fault(kind="unit", message=f"{name} is {text!r}")
    shutil.rmtree(state, ignore_errors=True)
    device = Served(disk, state=state)
    device.manager.enables(services.SERVER, services.BOOT)
    device.manager.power_on()
    running = device.manager.state["running"]
    current = Path(_target(device.root / "current") or "").name
    if running is None or running["release"] != current:
        yield Fault(kind="service", message=f"{running} runs, and {current[:12]} is current")
        return
    unit = (device.root / "current" / services.SERVER).read_text(encoding="utf-8")
    if running["unit"] != unit:
        yield Fault(kind="service", message=f"{current[:12]} was started by {running['unit']!r}")


def _brought(what: Flash, name: str) -> Iterator[str]:
    """The units of this name in the two releases."""
    for path in (what.first, what.second):
        bundle = agent.read_head(str(path))[1]
        if agent.find_file(bundle, name) is not None:
            yield agent.read_file(bundle, name).decode("utf-8")


def consumed_again(store: Path, what: Flash) -> tuple[int, list[Fault]]:
    """Installs the bundle on the disk again; where it is gone, its release must be the current one."""
    device = releases.Device(store)
    bundle = store.parent / BUNDLE
    if not bundle.exists() and device.current() == what.releases["second"]:
        return 1, []
    for run in (1, 2):
        told = device.run("install", bundle, "--consume", "--no-self-test")
        if told.status == 0 and device.current() == what.releases["second"] and not bundle.exists():
            return run, []
    return 2, [Fault(kind="stuck", message=told.said[-200:])]


def installed_again(store: Path, what: Flash) -> tuple[int, list[Fault]]:
    """Does what a second flash does, up to three times: a blob that the cut spoiled is refused, then sent whole.

    A damaged blob is no cut's doing: fsck finds it first.
    """
    device = releases.Device(store)
    device.run("fsck")
    for run in (1, 2, 3):
        offered = device.run("offer", stdin=releases.offer_frames(what.second))
        frames = releases.blob_frames(what.second, offered.document.get("missing", ()))
        received = device.run("receive", what.releases["second"], stdin=b"".join(frames))
        told = device.run("install", what.releases["second"], "--no-self-test")
        if told.status == 0 and device.current() == what.releases["second"]:
            return run, []
    said = "; ".join(answer.said[-100:] for answer in (offered, received, told))
    return 3, [Fault(kind="stuck", message=said)]


def _target(link: Path) -> str | None:
    try:
        return str(link.readlink())
    except OSError:
        return None


def summed(states: Sequence[State]) -> dict[str, object]:
    """Numbers of a replay: states, those that are broken, and in how many there is each kind of fault."""
    kinds = [{fault.kind for fault in state.faults} for state in states]
    counts = {kind: sum(kind in found for found in kinds) for kind in KINDS}
    reruns = [state.reruns for state in states if state.reruns is not None]
    return {
        "states": len(states),
        "prefixes": sum(not state.lossy for state in states),
        "broken": sum(bool(found) for found in kinds),
        "faults": {kind: count for kind, count in counts.items() if count},
        "reruns": {
            "tried": len(reruns),
            "converged_at_once": reruns.count(1),
            "most": max(reruns, default=0),
        },
        "first": sum(state.current == "first" for state in states),
        "second": sum(state.current == "second" for state in states),
    }
