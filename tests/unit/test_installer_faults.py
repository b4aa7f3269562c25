"""Every call of the installer that changes the disk fails once, and is the last one once: nothing whole is lost."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgepack.bundle import sign
from edgepack.device import agent, installer
from tests import releases, services
from tests.managed import Served, anywhere
from tests.releases import Device

CHANGES = (
    "write", "fsync", "replace", "link", "symlink", "unlink", "mkdir", "rmdir", "chmod", "fchmod", "ftruncate",
    "pwrite", "open", "makedirs",
)  # fmt: skip
"""Functions of os that the installer changes the disk with; of open only what may create a file."""


EVERY = bool(os.environ.get("EDGEPACK_EVERY_FAULT"))
"""All calls take minutes; without this one of several is tried."""


class Killed(BaseException):
    """The process is gone: nothing that runs after it reaches the disk."""


class Disk:
    """The os module, in which the call of a number fails: once with an error, or for good with a kill."""

    def __init__(self, at: int | None = None, failure: int | None = None) -> None:
        self.at = at
        self.failure = failure
        self.calls = 0
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(name, real) if name in CHANGES else real

    def counts(self, name: str) -> None:
        """One more call, which may be the one that fails. A program that is asked does not fail with the disk."""
        if self.dead:
            raise Killed
        self.calls += 1
        if self.calls == self.at and self.failure is None:
            self.dead = True
            raise Killed
        if self.calls == self.at and name != "systemctl":
            assert self.failure is not None
            raise OSError(self.failure, os.strerror(self.failure))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            self.counts(name)
            return None if name == "fsync" else real(*args, **options)  # the power stays on in these tests

        return call


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    sign.new_key(path)
    return path


@pytest.fixture(scope="module")
def paths(key: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Three releases: the second shares the weights of the first, the third shares none."""
    folder = tmp_path_factory.mktemp("bundles")
    return (
        releases.bundle(folder / "1.tar", key, sequence=1),
        releases.bundle(folder / "2.tar", key, sequence=2, files={"notes.txt": "2"}),
        releases.bundle(folder / "3.tar", key, sequence=3, weights=b"GGUF" + b"3" * 6000),
    )


@pytest.fixture
def device(tmp_path: Path, key: Path, paths: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device with two good releases, whose signatures were verified often enough."""
    monkeypatch.setattr(agent, "verify_signature", lambda *_: {"state": "verified"})
    made = Device(tmp_path / "pristine")
    made.enroll(sign.allowed_signer(key))
    for path in paths[:2]:
        assert made.run("install", path).document["outcome"] == "good"
    return made


Act = Callable[[Device, tuple[Path, ...]], releases.Answer]


def install(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    return device.run("install", paths[2])


def received(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """An upload and the install after it, as flash does them."""
    offered = device.run("offer", stdin=releases.offer_frames(paths[2]))
    if offered.status != 0:
        return offered
    sent = b"".join(releases.blob_frames(paths[2], offered.document["missing"]))
    taken = device.run("receive", offered.document["release"], stdin=sent)
    return device.run("install", offered.document["release"]) if taken.status == 0 else taken


def fails(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """An install whose self-test fails."""
    failure = {"kind": "oom-killed", "stage": "fill", "message": "out of memory"}
    failing = Device(device.root, check=lambda _: {**releases.passing(), "failure": failure})
    return failing.run("install", paths[2])


def consumed(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """An install that eats a copy of the bundle, which is still there when it is run again."""
    copy = device.root.parent / "copy.tar"
    if not copy.exists():
        shutil.copyfile(paths[2], copy)
    return device.run("install", copy, "--consume")


def rollback(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """Back to the first release, once."""
    if device.current() == releases.release_of(paths[0]) != device.previous():
        return device.run("status")
    return device.run("rollback")


def gc(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """A release that nothing names any more, with a file of its own."""
    (device.root / "previous").unlink(missing_ok=True)
    (device.root / "blobs/sha256" / ("a" * 64)).write_bytes(b"left by an upload")
    return device.run("gc", "--keep", "1")


def boot(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """A start of the server when the current release has lost a file."""
    (device.root / "releases" / releases.release_of(paths[1]) / "start.sh").unlink(missing_ok=True)
    return device.run("boot")


def fsck(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """A flipped byte in the weights that both releases share, and the bundle that has them."""
    weights = device.root / "releases" / releases.release_of(paths[1]) / "model.gguf"
    if weights.exists():
        weights.chmod(0o644)
        with weights.open("r+b") as stream:
            stream.write(b"X")
    return device.run("fsck", "--repair-from", paths[1])


ENDS: dict[Act, tuple[int, int, int | None]] = {
    install: (0, 2, 1), received: (0, 2, 1), consumed: (0, 2, 1), fails: (5, 1, 0), rollback: (0, 0, None),
    gc: (0, 1, None), boot: (0, 0, None), fsck: (0, 1, 0),
}  # fmt: skip
"""What each comes to: exit status, and which of the three releases are current and previous then."""


def struck(
    act: Callable[[], releases.Answer], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> releases.Answer | None:
    """What the installer answers on that disk; None where it is killed."""
    with monkeypatch.context() as patched:
        patched.setattr(installer, "os", disk)
        try:
            return act()
        except Killed:
            return None


def whole(device: Device, link: str = "current") -> str | None:
    """The release that a link names, every byte of it hashed."""
    release = device.store.target(link)
    if release is not None:
        found = agent.read_bundle(str(device.root / "releases" / release))
        assert found["manifest_digest"] == f"sha256:{release}"
    return release


@pytest.mark.parametrize("failure", [None, errno.ENOSPC, errno.EIO], ids=["kill", "ENOSPC", "EIO"])
@pytest.mark.parametrize("act", ENDS, ids=[act.__name__ for act in ENDS])
def test_at_each_call_that_changes_the_disk(
    device: Device,
    paths: tuple[Path, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Act,
    failure: int | None,
) -> None:
    names = [releases.release_of(path) for path in paths]
    status, current, previous = ENDS[act]
    points = 0
    step = 1 if EVERY else 11 if act in (install, received, consumed, fails) else 3
    for at in itertools.count(1 + random.Random(f"{act.__name__} {failure}").randrange(step), step):
        root = tmp_path / "root"
        releases.copied(device.root, root)
        victim = Device(root)
        disk = Disk(at, failure)
        answer = struck(partial(act, victim, paths), disk, monkeypatch)
        if disk.calls < at:
            assert (answer and answer.status) == status
            break
        points += 1
        if answer is not None:
            assert answer.status in (0, status, {errno.ENOSPC: 10, errno.EIO: 2}[failure or 0]), (
                at,
                answer.said,
            )

        with monkeypatch.context() as patched:
            patched.setattr(installer, "os", Disk())
            if act not in (boot, fsck):
                assert whole(victim) in names, at
            again = act(victim, paths)

        assert again.status == status, (at, again.said)
        assert whole(victim) == names[current], at
        if act is not boot:  # which is over when current is right
            assert whole(victim, "previous") == (None if previous is None else names[previous]), at
        assert [path.name for path in root.rglob(".new-*")] == [], at
        assert installer.journal_lines(victim.store, 1000), at
        shutil.rmtree(root)
        (tmp_path / "copy.tar").unlink(missing_ok=True)
    assert points > 0
    print(f"{act.__name__}: {points} points")


# ── beside a service manager ──


class Watched(Served):
    """A device whose service manager is asked no more once it is killed, and whose guard then starts the server."""

    def __init__(self, place: Path, disk: Disk, **device: Any) -> None:
        super().__init__(place)
        self._disk = disk
        self._waits = False
        self.world = self.world._replace(run=self._asked, guard=self._guards, **device)

    def _asked(self, argv: list[str]) -> tuple[int, str]:
        self._disk.counts("systemctl")
        return self.manager.call(argv)

    def _guards(self, argv: list[str]) -> Callable[[], None]:
        assert argv[-2:] == ["start", services.SERVER]
        self._waits = True

        def done() -> None:
            self._waits = False

        return done

    def ends(self) -> None:
        """The installer's process is gone, however it ended."""
        if self._waits:
            beside = Served(self.root.parent)
            beside.manager.call(["systemctl", "start", services.SERVER])


ServedAct = Callable[[Device, tuple[Path, ...]], releases.Answer]


def does_not_start(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """An install whose server does not start."""
    assert isinstance(device, Served)
    if releases.release_of(paths[2]) not in device.manager.state["broken"]:
        device.manager.breaks(releases.release_of(paths[2]))
    return device.run("install", paths[2])


def failed(device: Device, paths: tuple[Path, ...]) -> releases.Answer:
    """An install whose self-test fails."""
    failure = {"kind": "oom-killed", "stage": "fill", "message": "out of memory"}
    device.world = device.world._replace(check=lambda _: {**releases.passing(), "failure": failure})
    return device.run("install", paths[2])


SERVED_ENDS: dict[ServedAct, tuple[int, int]] = {
    install: (0, 2),
    failed: (5, 1),
    does_not_start: (5, 1),
    rollback: (0, 0),
}
"""What each comes to: exit status, and which of the three releases runs then."""


@pytest.mark.parametrize("failure", [None, errno.ENOSPC, errno.EIO], ids=["kill", "ENOSPC", "EIO"])
@pytest.mark.parametrize("act", SERVED_ENDS, ids=[act.__name__ for act in SERVED_ENDS])
def test_whatever_ends_the_installer_the_server_runs_from_a_whole_release_with_its_units(
    key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: ServedAct, failure: int | None
) -> None:
    monkeypatch.setattr(agent, "verify_signature", lambda *_: {"state": "verified"})
    monkeypatch.setattr(installer, "os", Disk())  # without fsync
    paths = tuple(
        releases.bundle(
            tmp_path / f"{n}.tar", key, sequence=n, files={services.SERVER: f"# {n}\n", "n.txt": str(n)}
        )
        for n in (1, 2, 3)
    )
    pristine = Served(tmp_path / "pristine")
    with anywhere():
        assert pristine.enroll(sign.allowed_signer(key), mode="system").status == 0
    for path in paths[:2]:
        assert pristine.run("install", path).document["outcome"] == "good"
    status, runs = SERVED_ENDS[act]
    names = [releases.release_of(path) for path in paths]
    step = 1 if EVERY else 25
    points = 0
    for at in itertools.count(1 + random.Random(f"{act.__name__} {failure}").randrange(step), step):
        place = tmp_path / "place"
        releases.copied(tmp_path / "pristine", place)
        disk = Disk(at, failure)
        victim = Watched(place, disk)
        answer = struck(partial(act, victim, paths), disk, monkeypatch)
        if disk.calls < at:
            assert (answer and answer.status) == status
            break
        points += 1
        victim.ends()

        again = Served(place)
        again.manager.time_passes()
        starts = again.manager.state["starts"]
        assert all(start["whole"] for start in starts), at
        assert [start["unit"] for start in starts] == [
            f"# {1 + names.index(s['release'])}\n" for s in starts
        ], at
        assert again.manager.state["running"]["release"] == whole(again), at
        told = act(again, paths)
        again.manager.time_passes()

        assert told.status == status, (at, told.said)
        assert whole(again) == again.manager.state["running"]["release"] == names[runs], at
        assert (place / "units" / services.SERVER).read_text() == f"# {runs + 1}\n", at
        assert [path.name for path in place.rglob(".new-*")] == [], at
        shutil.rmtree(place)
    assert points > 0
    print(f"{act.__name__}: {points} points")


@pytest.mark.parametrize("failure", [None, errno.ENOSPC, errno.EIO], ids=["kill", "ENOSPC", "EIO"])
def test_enrolling_goes_on_where_it_failed(
    key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int | None
) -> None:
    signers = sign.allowed_signer(key)
    brought = tmp_path / "agent.pyz"
    brought.write_bytes(b"agent")
    words = (signers, "--agent", str(brought))
    for at in itertools.count(1):
        device = Device(tmp_path / str(at))
        with monkeypatch.context() as patched:
            disk = Disk(at, failure)
            patched.setattr(installer, "os", disk)
            try:
                status = device.enroll(*words).status
            except Killed:
                status = -1
        if disk.calls < at:
            break

        assert status in (-1, 0, 2, 10), at
        kept = device.root / "agent.pyz"
        assert not kept.exists() or kept.read_bytes() == b"agent", at
        assert device.enroll(*words).status == 0, at
        assert kept.read_bytes() == b"agent", at
        assert (device.root / "allowed_signers").read_text() == signers
        assert [path.name for path in device.root.rglob(".new-*")] == [], at
    assert at > 20
