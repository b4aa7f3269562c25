"""Commands of an enrolled agent, what each may leave behind when it is cut off, and what it left."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from unittest import mock

import psutil

from edgepack import enrolled
from edgepack.bundle import sign
from edgepack.device import agent, installer
from edgepack.units import MIB
from tests import releases, services
from tests.managed import PATIENCE, PLACED, Served, anywhere, changed
from tests.powercut import replay
from tests.powercut.scenario import Flash
from tests.releases import Answer, Device
from tests.sysfaults.strace import Fault, Point, counted, first_beside, injected

FAULTS: tuple[Fault, ...] = ("KILL", "ENOSPC", "EIO")
STATUS: Mapping[Fault, int] = {"ENOSPC": 10, "EIO": 2}
"""Exit status of a command that such an error ended."""
Mode = Literal["none", "user", "system"]
MODES: tuple[Mode, ...] = ("none", "user", "system")

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
    again: Callable[[Stage, Device], Answer]
    """What a user does who does not know how far it came."""
    ends: Links
    """What `current` and `previous` may name when it is done."""
    serves: bool = True
    """The server runs before it, where there is one, and so it does after a fault."""
    enrolls: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    what: Flash
    commands: tuple[Command, ...]
    agent: Path
    newer: Path
    """An agent that takes the place of the other one."""
    other: str
    """Another signer."""
    mode: Mode = "none"
    programs: Path | None = None
    """A folder with systemctl and loginctl; None in mode none."""
    units: Mapping[str, frozenset[str]]
    """What the file of each unit may hold, in which SITE stands for the folder around the store."""


SITE = "/the/folder/around/the/store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One fault at one call."""

    command: str
    point: Point
    fault: Fault | services.Fault
    faults: tuple[str, ...]
    """What was wrong; nothing as a rule."""


def stage(
    folder: Path,
    *,
    mode: Mode = "none",
    weights: int = MIB,
    code: Callable[[bytes], bytes] = lambda zipapp: zipapp,
) -> Stage:
    """Two signed releases, stores in all states of a flash from one to the other; ``code`` may change the agent."""
    what = _flash(folder, weights, other_units=mode != "none")
    second = what.releases["second"]
    place, newer = folder / "agent.pyz", folder / "newer.pyz"
    place.write_bytes(changed(*(PLACED if mode != "none" else ()))(code(enrolled.zipapp())))
    newer.write_bytes(changed(("SCHEMA_VERSION = 1\n", "SCHEMA_VERSION = 1  # newer\n"))(place.read_bytes()))
    names = iter(f"state-{number}" for number in range(20))
    sign.new_key(folder / "other")
    other = sign.allowed_signer(folder / "other")
    on = Stage(
        what=what, commands=(), agent=place, newer=newer, other=other, mode=mode, units={},
        programs=None if mode == "none" else services.programs(folder / "programs"),
    )  # fmt: skip

    def state(after: Path | None, *acts: Callable[[Device], Answer | None]) -> Path:
        made = folder / next(names)
        made.mkdir()
        if after is None:
            shutil.copyfile(what.second, made / "bundle.tar")
        else:
            releases.copied(after, made)
        for act in acts:
            answer = act(device_of(on, made))
            assert answer is None or answer.status == 0, answer
        return made

    offered = releases.offer_frames(what.second)
    frames = b"".join(releases.blob_frames(what.second, _lacking(what)))
    empty = state(None)
    one = state(
        empty,
        lambda device: _enroll(on, device, mode),
        lambda device: device.run("install", what.first, "--no-self-test"),
    )
    head = state(one, lambda device: device.run("offer", stdin=offered))
    blobs = state(head, lambda device: device.run("receive", second, stdin=frames))
    both = state(blobs, lambda device: device.run("install", second, "--no-self-test"))
    back = state(both, lambda device: device.run("rollback"))
    starting = state(both, _never_good(second), _powered_off)

    signers = what.signers.encode()
    install = ("install", second, "--force-device")
    enroll = ("enroll", "--mode", mode, "--agent", str(newer))
    installed = Command(
        name="install", before=blobs, words=(*install, "--no-self-test"), again=_flashed, ends=NEW
    )
    bad = Command(name="bad release", before=blobs, words=install, status=5, again=_refused, ends=ALONE)
    rolled = Command(name="rollback", before=both, words=("rollback",), again=_rolled_back, ends=ALONE)
    # A boot is over when current is right; that previous names the same does no harm.
    booted = Command(name="boot", before=starting, words=("boot",), again=_booted, serves=False,
                     ends={*ALONE, ("first", "first")})  # fmt: skip
    renewed = Command(name="enroll again", before=both, words=(*enroll, "--replace-signers"), enrolls=True,
                      stdin=signers + other.encode(), again=_enrolled_with_another, ends=NEW)  # fmt: skip
    first = Command(name="enroll", before=empty, words=enroll, stdin=signers, enrolls=True, serves=False,
                    again=_enrolled, ends={(None, None)})  # fmt: skip
    made: tuple[Command, ...]
    if mode == "none":
        made = (
            Command(name="offer", before=one, words=("offer", "--force-device"), stdin=offered, again=_flashed,
                    ends=NEW),
            Command(name="receive", before=head, words=("receive", second), stdin=frames, again=_flashed, ends=NEW),
            installed,
            Command(name="bundle", before=one, again=_consumed, ends=NEW, words=(
                "install", "{folder}/bundle.tar", "--consume", "--force-device", "--no-self-test")),
            bad,
            rolled,
            booted,
            Command(name="gc", before=state(back, _unneeded), words=("gc", "--keep", "1"), again=_collected,
                    ends=ALONE),
            Command(name="fsck", before=state(back, _flipped(what)), hurt=frozenset({what.damaged}),
                    words=("fsck", "--repair-from", "{folder}/bundle.tar"), again=_mended, ends=ALONE),
            first,
            renewed,
        )  # fmt: skip
    else:
        broken = state(blobs, lambda device: services_of(device).breaks(second))
        lying = state(empty, lambda device: _enroll(on, device, "none"),
                      lambda device: device.run("install", what.first, "--no-self-test"))  # fmt: skip
        made = (
            installed,
            bad,
            Command(name="does not start", before=broken, words=(*install, "--no-self-test"), status=5,
                    again=_flashed, ends=ALONE),
            Command(name="self-test", before=both, words=("self-test", "--force-device"), status=5,
                    again=_tested, ends=NEW),
            rolled,
            booted,
        )  # fmt: skip
        if mode == "user":  # the units of mode system have no other store than the machine's
            found = Command(name="enroll what lies there", before=lying, words=enroll, stdin=signers, enrolls=True,
                            serves=False, again=_enrolled, ends=ALONE)  # fmt: skip
            made = (*made, first, renewed, found)
    return replace(on, commands=made, units=_units(both, one))


def device_of(on: Stage, place: Path) -> Device:
    """The store in a place, for commands in this process."""
    return Device(place / "store") if on.mode == "none" else Served(place)


def services_of(device: Device) -> services.Manager:
    assert isinstance(device, Served)
    return device.manager


def _enroll(on: Stage, device: Device, mode: Mode) -> Answer:
    """Mode system, too: the units of a bundle name the machine's own store, which is no test's."""
    with anywhere():
        return device.enroll(on.what.signers, "--agent", str(on.agent), mode=mode)


def _units(*stores: Path) -> Mapping[str, frozenset[str]]:
    """The units that there are in these places."""
    found: dict[str, set[str]] = {}
    for place in stores:
        for path in (place / "units").rglob("*"):
            if path.is_file():
                text = path.read_text(encoding="utf-8").replace(_enrolled_at(place), SITE)
                found.setdefault(str(path.relative_to(place / "units")), set()).add(text)
    return {name: frozenset(texts) for name, texts in found.items()}


def _enrolled_at(place: Path) -> str:
    """The folder whose store the boot unit of a place names: places are copied."""
    boot = place / "units" / services.BOOT
    found = (
        re.search(r" (\S+)/store/agent\.pyz ", boot.read_text(encoding="utf-8")) if boot.exists() else None
    )
    return str(place) if found is None else found[1]


def _flash(folder: Path, size: int, *, other_units: bool) -> Flash:
    """The second release has the server and the plan of the first, perhaps its units, other weights and a file more."""
    key = folder / "key"
    sign.new_key(key)
    first = releases.bundle(folder / "first.tar", key, sequence=1)
    weights = b"GGUF" + bytes(range(256)) * (size // 256)
    units = {"edgepack.service": "# the second one's\n", services.POWER: "# power\n"} if other_units else {}
    second = releases.bundle(
        folder / "second.tar", key, sequence=2, weights=weights, files={"notes.txt": "2\n", **units}
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


def _powered_off(device: Device) -> None:
    """The machine starts, and no server runs yet."""
    if isinstance(device, Served):
        device.manager.stopped()


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


def _flashed(on: Stage, device: Device) -> Answer:
    sent = device.run("offer", stdin=releases.offer_frames(on.what.second))
    frames = releases.blob_frames(on.what.second, sent.document["missing"])
    device.run("receive", on.what.releases["second"], stdin=b"".join(frames))
    return device.run("install", on.what.releases["second"], "--no-self-test")


def _consumed(_: Stage, device: Device) -> Answer:
    bundle = device.root.parent / "bundle.tar"
    if not bundle.exists():
        return device.run("status")
    return device.run("install", bundle, "--consume", "--no-self-test")


def _refused(on: Stage, device: Device) -> Answer:
    """It fails its test again."""
    failure = {"kind": "exited", "stage": "start", "message": "it ended"}
    device.world = device.world._replace(check=lambda _: {**releases.passing(), "failure": failure})
    return device.run("install", on.what.releases["second"])


def _rolled_back(on: Stage, device: Device) -> Answer:
    """Once; whoever asks again after it was done is refused."""
    done = (device.current(), device.previous()) == (on.what.releases["first"], None)
    return device.run("status" if done else "rollback")


def _booted(_: Stage, device: Device) -> Answer:
    """By the service manager, where there is one."""
    if isinstance(device, Served):
        device.manager.power_on()
        return device.run("status")
    return device.run("boot")


def _tested(_: Stage, device: Device) -> Answer:
    return device.run("self-test")


def _collected(_: Stage, device: Device) -> Answer:
    return device.run("gc", "--keep", "1")


def _mended(_: Stage, device: Device) -> Answer:
    return device.run("fsck", "--repair-from", device.root.parent / "bundle.tar")


def _enrolled(on: Stage, device: Device) -> Answer:
    return device.enroll(on.what.signers, "--agent", str(on.newer), "--replace-signers", mode=on.mode)


def _enrolled_with_another(on: Stage, device: Device) -> Answer:
    signers = on.what.signers + on.other
    return device.enroll(signers, "--agent", str(on.newer), "--replace-signers", mode=on.mode)


# ── faults ──


def trial(
    on: Stage, folder: Path, *, each: int = 1, names: Collection[str] | None = None
) -> Iterator[Result]:
    """Every fault at every point of the commands; with ``each`` at one of so many, another one for each fault."""
    commands = [command for command in on.commands if names is None or command.name in names]
    with _workers() as pool:
        calls = pool.map(points, repeat(on), commands, repeat(folder))
        todo = [
            (command, point, fault)
            for command, found in zip(commands, calls, strict=True)
            for shift, fault in enumerate(FAULTS)
            for point in found[shift * each // len(FAULTS) :: each]
        ]
        yield from pool.map(tried, repeat(on), *zip(*todo, strict=True), repeat(folder))


def managed(
    on: Stage,
    folder: Path,
    *,
    each: int = 1,
    names: Collection[str] | None = None,
    faults: Sequence[services.Fault] = services.FAULTS,
    at: int | None = None,
) -> Iterator[Result]:
    """Every fault of the service manager at every call of it; with ``each`` at one of so many, or only one call."""
    commands = [command for command in on.commands if names is None or command.name in names]
    with _workers() as pool:
        counts = pool.map(manager_calls, repeat(on), commands, repeat(folder))
        todo = [
            (command, call, fault)
            for command, count in zip(commands, counts, strict=True)
            for shift, fault in enumerate(faults)
            for call in range(1 + shift * each // len(faults), count + 1, each)
            if at in (None, call)
        ]
        yield from pool.map(tried_manager, repeat(on), *zip(*todo, strict=True), repeat(folder))


def _workers() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=_adopts)


PR_SET_CHILD_SUBREAPER = 36


def _adopts() -> None:
    """What a killed agent leaves running, its guard, becomes this process's child: it can be waited for (prctl(2))."""
    assert ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


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
        with _environment(on, place):
            run, found = counted(_argv(on, command, place), command.stdin, place, Path(work) / "log")
        assert run.status == command.status, run.stderr
        assert found
        return found


def manager_calls(on: Stage, command: Command, folder: Path) -> int:
    """How often the service manager is asked in a run without a fault."""
    with TemporaryDirectory(dir=folder) as work:
        place = _placed(command, Path(work))
        done = _run(on, command, place)
        assert done.returncode == command.status, done.stderr
        return int(services.Manager(place, lambda: None).state["calls"])


def tried(on: Stage, command: Command, point: Point, fault: Fault, folder: Path) -> Result:
    """One fault; then what is left, and a rerun. Raises Missed where the fault did not come about."""
    with TemporaryDirectory(dir=folder) as work:
        place = _placed(command, Path(work))
        with _environment(on, place):
            run = injected(_argv(on, command, place), command.stdin, place, Path(work) / "log", point, fault)
        found = []
        if "Traceback" in run.stderr:
            found.append(f"traceback: {run.stderr[-300:]}")
        if fault != "KILL" and run.status not in (0, command.status, STATUS[fault]):
            found.append(f"status {run.status}: {run.stderr[-300:]}")
        found += _left(on, command, place)
        if fault == "KILL" and point.when % 2:
            found += _power_on(on, place)
        found += _rerun(on, command, place)
    return Result(command=command.name, point=point, fault=fault, faults=tuple(found))


def tried_manager(on: Stage, command: Command, at: int, fault: services.Fault, folder: Path) -> Result:
    """One call of the service manager that fails, hangs, or is the last thing that the agent does."""
    with TemporaryDirectory(dir=folder) as work:
        place = _placed(command, Path(work))
        patience = {PATIENCE: "10"} if fault == "hangs" else {}
        done = _run(on, command, place, {services.FAULT: f"{at} {fault}", **patience})
        found = []
        if "Traceback" in done.stderr:
            found.append(f"traceback: {done.stderr[-300:]}")
        allowed = (
            (0, command.status, 5) if fault in ("fails", "hangs") else (0, command.status, -signal.SIGKILL)
        )
        if done.returncode not in allowed:
            found.append(f"status {done.returncode}: {done.stderr[-300:]}")
        found += _left(on, command, place)
        if fault == "killed-after":
            found += _power_on(on, place)
        found += _rerun(on, command, place)
    point = Point(call="systemctl", when=at, what=())
    return Result(command=command.name, point=point, fault=fault, faults=tuple(found))


# ── what holds ──


def _left(on: Stage, command: Command, place: Path) -> Iterator[str]:
    """What is wrong after a fault, when all that the agent left running has ended."""
    orphans = psutil.Process().children(recursive=True)
    _, there = psutil.wait_procs(orphans, timeout=120)
    yield from (f"still runs: {process}" for process in there)
    if command.enrolls:
        yield from _enrolling(on, command, place)
    if (place / "store/current").is_symlink() or not command.enrolls:
        found = replay.inspected(place / "store", on.what, set(command.hurt))
        yield from (f"{fault.kind}: {fault.message}" for fault in found)
    device = device_of(on, place)
    if isinstance(device, Served):
        device.manager.time_passes()
        yield from _services(on, place)
        if command.serves:
            yield from _serves(place)


def _power_on(on: Stage, place: Path) -> Iterator[str]:
    """What is wrong when the machine starts again. Without the units there is nothing that starts."""
    device = device_of(on, place)
    if not isinstance(device, Served):
        return
    enabled = services.SERVER in device.manager.state["enabled"]
    if not (device.root / "current").is_symlink():  # nothing to start from
        return
    device.manager.power_on()
    yield from (f"after a start of the machine: {fault}" for fault in _services(on, place))
    if enabled:
        yield from (f"after a start of the machine: {fault}" for fault in _serves(place))


def _enrolling(on: Stage, command: Command, place: Path) -> Iterator[str]:
    """A device is not enrolled, or whole; one that was stays so, with the agent and the signers of before or after."""
    device = device_of(on, place)
    facts = device.run("facts")
    if facts.status != 0:
        yield f"enrolled: facts ends with {facts.status}: {facts.said}"
        return
    if not facts.document["store"]["enrolled"]:
        if (command.before / "store").exists():
            yield "enrolled: it was, and is no more"
        return
    agents = {path.read_bytes() for path in (on.agent, on.newer)}
    if (device.root / "agent.pyz").read_bytes() not in agents:
        yield "enrolled: its agent is none of the two"
    signers = {on.what.signers, on.what.signers + on.other}
    if (device.root / "allowed_signers").read_text(encoding="utf-8") not in signers:
        yield "enrolled: its signers are none of the two"
    argv = [sys.executable, "-I", "-S", str(device.root / "agent.pyz"), "--root", str(device.root)]
    argv += ["offer", "--dry-run", "--force-device"]
    head = releases.offer_frames(on.what.second)
    with _environment(on, place):
        done = subprocess.run(argv, input=head, capture_output=True, check=False)
    if done.returncode != 0:
        yield f"enrolled: its agent takes no release: {done.stderr.decode()[-300:]}"
    if facts.document["store"]["mode"] != "none":
        needed = (services.BOOT, services.DROP_IN)
        yield from (f"enrolled: without {n}" for n in needed if not (place / "units" / n).exists())


def _services(on: Stage, place: Path) -> Iterator[str]:
    """No release was started that is not whole, or with another's units; each unit is an old or a new one, or none."""
    for start in services.Manager(place, lambda: None).state["starts"]:
        if not start["whole"]:
            yield f"service: {start['release']} was started and is not whole"
        elif on.mode == "system" and start["unit"] != _brought(place, start["release"]):
            yield f"service: {start['release'][:12]} was started by {start['unit']!r}"
    for path in (place / "units").rglob("*"):
        name = str(path.relative_to(place / "units"))
        if not path.is_file() or path.name.startswith("."):  # hidden ones are no units
            continue
        text = path.read_text(encoding="utf-8").replace(_enrolled_at(place), SITE).replace(str(place), SITE)
        if text not in on.units.get(name, ()):
            yield f"unit: {name} has {len(text)} characters, and is none of those that there are: {text[:60]!r}"


def _serves(place: Path) -> Iterator[str]:
    """The server runs from the current release."""
    running = services.Manager(place, lambda: None).state["running"]
    current = (place / "store/current").readlink().name
    if running is None or running["release"] != current:
        yield f"service: {running and running['release']} runs, and {current[:12]} is current"


def _brought(place: Path, release: str) -> str:
    return (place / "store/releases" / release / services.SERVER).read_text(encoding="utf-8")


def _settled(on: Stage, place: Path) -> Iterator[str]:
    """When all is done the server runs with the units of the current release, which are what systemd knows."""
    state = services.Manager(place, lambda: None).state
    on_disk = {
        str(path.relative_to(place / "units")): path.read_text(encoding="utf-8")
        for path in (place / "units").rglob("*")
        if path.is_file()
    }
    if state["loaded"] != on_disk:
        yield f"service: the units that are loaded are not those on the disk: {[*on_disk]}, {[*state['loaded']]}"
    if {*state["enabled"]} != {services.SERVER, services.BOOT}:
        yield f"service: enabled are {state['enabled']}"
    yield from _serves(place)
    if on.mode == "system":
        release = place / "store/current"
        for name in installer.UNITS:
            brought = (release / name).read_text(encoding="utf-8") if (release / name).exists() else None
            if on_disk.get(name) != brought:
                yield f"service: {name} is not that of the current release"


def _rerun(on: Stage, command: Command, place: Path) -> Iterator[str]:
    """What is wrong after the command was given again, without a fault."""
    device = device_of(on, place)
    answer = command.again(on, device)
    if answer.status not in (0, command.status):
        yield f"stuck: the rerun ended with {answer.status}: {answer.said[-300:]}"
    names: dict[str | None, str] = {release: name for name, release in on.what.releases.items()}
    current, previous = device.current(), device.previous()
    ends = names.get(current), names.get(previous)
    if ends not in command.ends:
        yield f"stuck: current and previous are {ends}"
    if command.enrolls:
        yield from (f"rerun: {fault}" for fault in _enrolling(on, command, place))
        if (device.root / "agent.pyz").read_bytes() != on.newer.read_bytes():
            yield "rerun: the agent is not that which was brought"
    if current is not None:
        for fault in replay.inspected(device.root, on.what, set()):
            yield f"rerun: {fault.kind}: {fault.message}"
        if on.programs is not None:
            yield from (f"rerun: {fault}" for fault in (*_services(on, place), *_settled(on, place)))
    for fault in replay.checked_by_agent(device.root, set()):
        yield f"rerun: {fault.kind}: {fault.message}"
    left = sorted(str(path.relative_to(place)) for path in place.rglob(".new-*"))
    if left:
        yield f"rerun: left over: {left}"


# ── a run ──


def _placed(command: Command, work: Path) -> Path:
    place = work / "place"
    place.mkdir()
    releases.copied(command.before, place)
    return place.resolve()


def _argv(on: Stage, command: Command, place: Path) -> Sequence[str]:
    words = [word.replace("{folder}", str(place)) for word in command.words]
    return [sys.executable, "-I", "-S", str(on.agent), "--root", str(place / "store"), *words]


@contextmanager
def _environment(on: Stage, place: Path, more: Mapping[str, str] | None = None) -> Iterator[None]:
    """What the agent sees: the service manager of its place."""
    seen = (
        {}
        if on.programs is None
        else {services.PLACE: str(place), "PATH": f"{on.programs}:{os.environ['PATH']}"}
    )
    with mock.patch.dict(os.environ, {**seen, **(more or {})}):
        yield


def _run(
    on: Stage, command: Command, place: Path, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    with _environment(on, place, more):
        done = subprocess.run(
            _argv(on, command, place), input=command.stdin, capture_output=True, check=False
        )
    told = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, *told)
