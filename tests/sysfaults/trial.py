"""Commands of an enrolled agent, what each may leave behind when it is cut off, and what it left."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory

from edgepack import enrolled
from edgepack.bundle import sign
from edgepack.device import agent
from edgepack.units import MIB
from tests import releases
from tests.powercut import replay
from tests.powercut.scenario import Flash
from tests.releases import Answer, Device
from tests.sysfaults.strace import Fault, Point, counted, first_beside, injected

FAULTS: tuple[Fault, ...] = ("KILL", "ENOSPC", "EIO")
STATUS: Mapping[Fault, int] = {"ENOSPC": 10, "EIO": 2}
"""Exit status of a command that such an error ended."""


Links = Collection[tuple[str | None, str | None]]
NEW: Links = {("second", "first")}
ALONE: Links = {("first", None)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command on a store, and what it comes to."""

    name: str
    before: Path
    """The folder with the store before it; a bundle beside it, where the command takes one."""
    words: tuple[str, ...]
    """Its command line; {folder} is where the copy of ``before`` lies."""
    stdin: bytes = b""
    status: int = 0
    hurt: frozenset[str] = frozenset()
    """Blobs, but not of the current release, that are damaged before it."""
    again: Callable[[Flash, Device], Answer]
    """What a user does who does not know how far it came."""
    ends: Links
    """What `current` and `previous` may name when it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    what: Flash
    commands: tuple[Command, ...]
    agent: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One fault at one call."""

    command: str
    point: Point
    fault: Fault
    faults: tuple[str, ...]
    """What was wrong; nothing as a rule."""


def stage(
    folder: Path, *, weights: int = MIB, code: Callable[[bytes], bytes] = lambda zipapp: zipapp
) -> Stage:
    """Two signed releases, stores in all states of a flash from one to the other; ``code`` may change the agent."""
    what = _flash(folder, weights)
    second = what.releases["second"]
    place = folder / "agent.pyz"
    place.write_bytes(code(enrolled.zipapp()))
    names = iter(f"state-{number}" for number in range(20))

    def state(after: Path | None, *acts: Callable[[Device], Answer | None]) -> Path:
        made = folder / next(names)
        made.mkdir()
        if after is None:
            shutil.copyfile(what.second, made / "bundle.tar")
        else:
            releases.copied(after, made)
        for act in acts:
            answer = act(Device(made / "store"))
            assert answer is None or answer.status == 0, answer
        return made

    offered = releases.offer_frames(what.second)
    frames = b"".join(releases.blob_frames(what.second, _lacking(what)))
    one = state(
        None,
        lambda device: device.enroll(what.signers),
        lambda device: device.run("install", what.first, "--no-self-test"),
    )
    head = state(one, lambda device: device.run("offer", stdin=offered))
    blobs = state(head, lambda device: device.run("receive", second, stdin=frames))
    both = state(blobs, lambda device: device.run("install", second, "--no-self-test"))
    back = state(both, lambda device: device.run("rollback"))

    install = ("install", second, "--force-device")
    made = (
        Command(name="offer", before=one, words=("offer", "--force-device"), stdin=offered, again=_flashed, ends=NEW),
        Command(name="receive", before=head, words=("receive", second), stdin=frames, again=_flashed, ends=NEW),
        Command(name="install", before=blobs, words=(*install, "--no-self-test"), again=_flashed, ends=NEW),
        Command(name="bundle", before=one, again=_consumed, ends=NEW, words=(
            "install", "{folder}/bundle.tar", "--consume", "--force-device", "--no-self-test")),
        Command(name="bad release", before=blobs, words=install, status=5, again=_refused, ends=ALONE),
        Command(name="rollback", before=both, words=("rollback",), again=_rolled_back, ends=ALONE),
        # A boot is over when current is right; that previous names the same does no harm.
        Command(name="boot", before=state(both, _never_good(second)), words=("boot",), again=_booted,
                ends={*ALONE, ("first", "first")}),
        Command(name="gc", before=state(back, _unneeded), words=("gc", "--keep", "1"), again=_collected, ends=ALONE),
        Command(name="fsck", before=state(back, _flipped(what)), hurt=frozenset({what.damaged}),
                words=("fsck", "--repair-from", "{folder}/bundle.tar"), again=_mended, ends=ALONE),
    )  # fmt: skip
    return Stage(what=what, commands=made, agent=place)


def _flash(folder: Path, size: int) -> Flash:
    """The second release has the units, the server and the plan of the first, other weights and a file more."""
    key = folder / "key"
    sign.new_key(key)
    first = releases.bundle(folder / "first.tar", key, sequence=1)
    weights = b"GGUF" + bytes(range(256)) * (size // 256)
    second = releases.bundle(
        folder / "second.tar", key, sequence=2, weights=weights, files={"notes.txt": "2\n"}
    )
    damaged = agent.find_file(agent.read_bundle(str(second)), "notes.txt")
    assert damaged is not None
    return Flash(
        first=first,
        second=second,
        signers=sign.allowed_signer(key),
        releases={"first": releases.release_of(first), "second": releases.release_of(second)},
        damaged=damaged["digest"].removeprefix("sha256:"),
    )


def _lacking(what: Flash) -> list[dict[str, object]]:
    known = {file["digest"] for file in agent.read_bundle(str(what.first))["files"]}
    mine = {file["digest"] for file in agent.read_bundle(str(what.second))["files"]}
    return [{"digest": digest, "have": 0} for digest in sorted(mine - known)]


def _never_good(release: str) -> Callable[[Device], None]:
    """It was started as often as it may be, and passed no test."""

    def act(device: Device) -> None:
        (device.root / "releases" / f"{release}.good").unlink()
        (device.root / "releases" / f"{release}.tries").write_text("3\n", encoding="ascii")

    return act


def _unneeded(device: Device) -> None:
    """Nothing names the release that was rolled back from, and an upload was given up."""
    (device.root / "incoming" / ("a" * 64 + ".part")).write_bytes(b"left by an upload")


def _flipped(what: Flash) -> Callable[[Device], None]:
    def act(device: Device) -> None:
        blob = device.root / "blobs/sha256" / what.damaged
        blob.chmod(0o644)
        blob.write_bytes(b"3\n")

    return act


# ── the same again ──


def _flashed(what: Flash, device: Device) -> Answer:
    sent = device.run("offer", stdin=releases.offer_frames(what.second))
    frames = releases.blob_frames(what.second, sent.document["missing"])
    device.run("receive", what.releases["second"], stdin=b"".join(frames))
    return device.run("install", what.releases["second"], "--no-self-test")


def _consumed(_: Flash, device: Device) -> Answer:
    bundle = device.root.parent / "bundle.tar"
    if not bundle.exists():
        return device.run("status")
    return device.run("install", bundle, "--consume", "--no-self-test")


def _refused(what: Flash, device: Device) -> Answer:
    """It fails its test again."""
    failure = {"kind": "exited", "stage": "start", "message": "it ended"}
    failing = Device(device.root, check=lambda _: {**releases.passing(), "failure": failure})
    return failing.run("install", what.releases["second"])


def _rolled_back(what: Flash, device: Device) -> Answer:
    """Once; whoever asks again after it was done is refused."""
    done = (device.current(), device.previous()) == (what.releases["first"], None)
    return device.run("status" if done else "rollback")


def _booted(_: Flash, device: Device) -> Answer:
    return device.run("boot")


def _collected(_: Flash, device: Device) -> Answer:
    return device.run("gc", "--keep", "1")


def _mended(_: Flash, device: Device) -> Answer:
    return device.run("fsck", "--repair-from", device.root.parent / "bundle.tar")


# ── faults ──


def trial(
    on: Stage, folder: Path, *, each: int = 1, names: Collection[str] | None = None
) -> Iterator[Result]:
    """Every fault at every point of the commands; with ``each`` at one of so many, another one for each fault."""
    commands = [command for command in on.commands if names is None or command.name in names]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        calls = pool.map(points, repeat(on), commands, repeat(folder))
        todo = [
            (command, point, fault)
            for command, found in zip(commands, calls, strict=True)
            for shift, fault in enumerate(FAULTS)
            for point in found[shift * each // len(FAULTS) :: each]
        ]
        yield from pool.map(tried, repeat(on), *zip(*todo, strict=True), repeat(folder))


def flushing(folder: Path) -> Iterator[Result]:
    """Every fault at the fsync that goes on beside an upload, of a blob that is large enough for one."""
    on = stage(folder, weights=17 * MIB)
    command = next(command for command in on.commands if command.name == "receive")
    weights = agent.find_file(agent.read_bundle(str(on.what.second)), agent.WEIGHTS)
    assert weights is not None
    part = f"store/incoming/{weights['digest'].removeprefix('sha256:')}.part"
    with TemporaryDirectory(dir=folder) as work:
        place = _placed(command, Path(work))
        argv = _argv(on, command, place)
        point = first_beside(argv, command.stdin, place, Path(work) / "log", "fsync", part)
    for fault in FAULTS:
        yield tried(on, command, point, fault, folder)


def points(on: Stage, command: Command, folder: Path) -> list[Point]:
    """The calls of a run without a fault, which comes to what it should."""
    with TemporaryDirectory(dir=folder) as work:
        place = _placed(command, Path(work))
        run, found = counted(_argv(on, command, place), command.stdin, place, Path(work) / "log")
        assert run.status == command.status, run.stderr
        assert found
        return found


def tried(on: Stage, command: Command, point: Point, fault: Fault, folder: Path) -> Result:
    """One fault; then what is left, and a rerun. Raises Missed where the fault did not come about."""
    with TemporaryDirectory(dir=folder) as work:
        place = _placed(command, Path(work))
        run = injected(_argv(on, command, place), command.stdin, place, Path(work) / "log", point, fault)
        found = []
        if "Traceback" in run.stderr:
            found.append(f"traceback: {run.stderr[-300:]}")
        if fault != "KILL" and run.status not in (0, command.status, STATUS[fault]):
            found.append(f"status {run.status}: {run.stderr[-300:]}")
        store = place / "store"
        found += [f"{f.kind}: {f.message}" for f in replay.inspected(store, on.what, set(command.hurt))]
        found += _rerun(on, command, store)
    return Result(command=command.name, point=point, fault=fault, faults=tuple(found))


def _rerun(on: Stage, command: Command, store: Path) -> Iterator[str]:
    """What is wrong after the command was given again, without a fault."""
    device = Device(store)
    answer = command.again(on.what, device)
    if answer.status not in (0, command.status):
        yield f"stuck: the rerun ended with {answer.status}: {answer.said[-300:]}"
    names: dict[str | None, str] = {release: name for name, release in on.what.releases.items()}
    ends = names.get(device.current()), names.get(device.previous())
    if ends not in command.ends:
        yield f"stuck: current and previous are {ends}"
    for fault in replay.inspected(device.root, on.what, set()):
        yield f"rerun: {fault.kind}: {fault.message}"
    for fault in replay.checked_by_agent(device.root, set()):
        yield f"rerun: {fault.kind}: {fault.message}"
    left = sorted(str(path.relative_to(device.root)) for path in device.root.rglob(".new-*"))
    if left:
        yield f"rerun: left over: {left}"


def _placed(command: Command, work: Path) -> Path:
    place = work / "place"
    place.mkdir()
    releases.copied(command.before, place)
    return place.resolve()


def _argv(on: Stage, command: Command, place: Path) -> Sequence[str]:
    words = [word.replace("{folder}", str(place)) for word in command.words]
    return [sys.executable, "-I", "-S", str(on.agent), "--root", str(place / "store"), *words]
