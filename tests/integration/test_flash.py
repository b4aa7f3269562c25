"""Flashing over a real sshd: cuts at random offsets, a release tested there, and what little an update moves."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

from edgepack import devices, flash, probe, remote, workspace
from edgepack import enrolled as enrolled_agent
from edgepack.bundle import server_document
from edgepack.cli import cli
from edgepack.devices import Where
from edgepack.errors import MissingTool, Offline, Untrusted
from edgepack.flash import Asked
from edgepack.progress import Silent
from edgepack.remote import Answer, Dropped
from edgepack.units import KIB, MIB
from tests import releases
from tests.documents import obeys
from tests.managed import changed
from tests.plans import example_plan
from tests.releases import Signer
from tests.sshd import HOST, Line, Sshd, serving

pytestmark = pytest.mark.integration

CUTS = 20
AGAIN = 4 * MIB
"""Bytes that a cut may cost."""


def enrolled(connection: remote.Connection, signers: Path, root: Path) -> devices.Device:
    where = Where(root=str(root), mode="none")
    devices.enroll(
        connection, where, signers=signers, server=None, keep=None, replace_signers=False, progress=Silent()
    )
    return devices.find(connection, where)


# ── cuts ──


@dataclass(slots=True)
class Watched:
    """A connection that counts what each transfer is given, and what the device says is left after it."""

    line: remote.Connection
    given: list[int] = field(default_factory=list)
    """Bytes that were handed to each transfer, cut or not."""
    left: list[int] = field(default_factory=list)
    """Bytes that were missing before each, and at the end."""
    cuts: int = 0
    """Transfers that were cut."""
    on_bytes: Callable[[int], None] = lambda _: None
    folder: Path | None = None
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.line.name

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: Iterable[bytes] = (),
        on_line: Callable[[str], None] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        if "receive" not in argv:
            answer = self.line.run(argv, stdin=stdin, on_line=on_line, timeout=timeout)
            if "offer" in argv and answer.status == 0:
                self._learn(answer)
            return answer
        self.given.append(0)
        try:
            answer = self.line.run(argv, stdin=self._counted(stdin), on_line=on_line, timeout=timeout)
        except Dropped:
            self.cuts += 1
            raise
        self._learn(answer)
        return answer

    def _learn(self, answer: Answer) -> None:
        self.left.append(sum(one["bytes"] - one["have"] for one in json.loads(answer.stdout)["missing"]))

    def _counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self.given[-1] += len(piece)
            self.on_bytes(self.given[-1])
            yield piece

    def close(self) -> None:
        self.line.close()


def cut_upload(sshd: Sshd, signer: Signer, folder: Path, *, size: int, cuts: int) -> list[int]:
    """Bytes that travel again after each cut of an upload, whose every part is longer than what may travel again.

    Every other cut ends the line, the others kill every ssh of this login with SIGKILL.
    """
    cargo = flash.load(releases.bundle(folder / "big.tar", signer.key, weights=os.urandom(size)), None)
    chance = random.Random(7)
    with Line(sshd.port) as line:
        link = remote.connect(HOST, ssh=sshd.through(line.port), interactive=False)
        assert isinstance(link, remote.Ssh)
        watched = Watched(link)
        target = enrolled(watched, signer.signers, folder / "store")
        told = [-1]

        def aim(_: float = 0.0) -> None:
            """Has the next transfer cut, after a random number of bytes."""
            if told[-1] == watched.cuts:  # it was the offer that met the end of the cut transfer
                return
            told.append(watched.cuts)
            after = chance.randint(AGAIN + 256 * KIB, AGAIN + 2 * MIB)
            watched.on_bytes = lambda given: killed(link) if watched.cuts % 2 and given >= after else None
            line.cut_after(after if watched.cuts % 2 == 0 and watched.cuts < cuts else 1 << 40)
            if watched.cuts == cuts:
                watched.on_bytes = lambda _: None

        aim()
        offer = flash._offered(cargo, target, Asked(force=True))
        flash.send(offer, cargo, target, Asked(force=True), progress=Silent(), sleep=aim)
        watched.close()
    weights_file = max(cargo.files, key=lambda digest: cargo.files[digest][1])
    arrived = folder / "store" / "blobs" / "sha256" / weights_file.removeprefix("sha256:")
    again = [
        given - (before - after)
        for given, (before, after) in zip(watched.given, pairwise(watched.left), strict=True)
    ]

    assert watched.cuts == cuts
    assert min(watched.given[:cuts]) > AGAIN
    assert workspace.sha256_file(arrived) == weights_file.removeprefix("sha256:")
    assert again[cuts] < KIB  # of the transfer that was not cut: the frames' own lines
    return again[:cuts]


def test_twenty_cuts_at_random_offsets_cost_little_and_lose_nothing(
    sshd: Sshd, signer: Signer, tmp_path: Path
) -> None:
    again = cut_upload(sshd, signer, tmp_path, size=112 * MIB, cuts=CUTS)

    print(f"bytes sent again, by cut: {again}; together {sum(again)} of {112 * MIB}")
    assert max(again) <= AGAIN, again


def test_a_device_that_forgets_what_came_is_found_out(
    sshd: Sshd, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgets = changed(("    return found if found <= size else 0\n", "    return 0\n"))(
        enrolled_agent.zipapp()
    )
    monkeypatch.setattr(enrolled_agent, "zipapp", lambda: forgets)

    again = cut_upload(sshd, signer, tmp_path, size=8 * MIB, cuts=2)

    assert min(again) > AGAIN, again


def killed(link: remote.Ssh) -> None:
    """Ends every ssh of a login as the kernel does, when memory runs out."""
    place = str(link._place)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[:1] == ["ssh"] and any(place in word for word in words):
            process.send_signal(signal.SIGKILL)


# ── a real release ──


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The built-in model for this very machine, twice: with another context in the second release."""

    first: Path
    second: Path


@pytest.fixture(scope="module")
def built(signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    here = folder / "here.yaml"
    here.write_text(probe.to_yaml(probe.probe(Path("/"))), encoding="utf-8")
    made = []
    for sequence, context in ((1, 512), (2, 384)):
        done = command(
            "build", "--profile", here, "--model", "demo", "--with-runtime", "--context", context, "--key", signer.key,
            "--release-sequence", sequence, "-o", folder / str(context), "--json",
        )  # fmt: skip
        made.append(Path(json.loads(done.stdout)["path"]))
    return Built(first=made[0], second=made[1])


def command(*words: object, status: int = 0) -> Result:
    done = CliRunner().invoke(cli, ["-q", *map(str, words)])
    assert done.exit_code == status, done.output
    return done


def test_a_device_is_flashed_updated_checked_and_mended(
    sshd: Sshd, signer: Signer, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    where = ("--root", root)
    with Line(sshd.port) as line:
        monkeypatch.setenv("EDGEPACK_SSH", " ".join(sshd.through(line.port)))
        command("flash", "--enroll", "--mode", "none", "--signers", signer.signers, *where, HOST)
        first = obeys("flash", command("flash", built.first, HOST, *where, "--json").stdout)

        assert (first["outcome"], first["report"]["verdict"]) == ("good", "passed")
        assert (root / "current" / "model.gguf").is_file()

        before = line.sent + line.received
        plain = json.loads(command("flash", built.second, HOST, *where, "--dry-run", "--json").stdout)
        asked = line.sent + line.received - before
        second = json.loads(command("flash", built.second, HOST, *where, "--no-self-test", "--json").stdout)
        moved = line.sent + line.received - before - asked

        assert plain["outcome"] == "planned"
        assert sum(step["bytes"] for step in plain["steps"]) < 64 * KIB
        assert (second["outcome"], second["previous"]) == ("good", first["release"])
        assert moved <= 64 * KIB, moved
        print(
            f"another context: {moved} bytes on the wire both ways, logins included; "
            f"{second['seconds_to_switch']} s to switch; asking alone: {asked}"
        )

        flip(root / "current" / "model.gguf")
        damaged = command("flash", "--fsck", HOST, *where, status=6)
        mended = obeys("flash-fsck", command("flash", "--fsck", built.second, HOST, *where, "--json").stdout)
        whole = json.loads(command("flash", "--fsck", HOST, *where, "--json").stdout)

        assert "1 bad" in damaged.output
        assert mended["sent"] > 6 * MIB
        assert (whole["bad"], whole["missing"]) == ([], [])

        command("flash", "--rollback", HOST, *where)
        report = obeys("check", command("check", built.second, "--on", HOST, *where, "--json").stdout)

        assert report["verdict"] == "passed"
        assert report["facts"]["bundle"]["manifest_digest"] == f"sha256:{second['release']}"
        assert (root / "current").readlink().name == first["release"]


def flip(path: Path) -> None:
    """Changes one bit in the middle, as worn flash does."""
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


# ── a release that is not good there ──

REFUSING = b"#!/bin/sh\necho 'error: invalid argument: --no-mmap' >&2\nexit 1\n"


def test_the_doctor_reads_on_the_device_why_a_release_was_rolled_back(
    sshd: Sshd, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enrolled, flashed, tested and rolled back by the agent itself; its kernel is this machine's, and may say more."""
    store = ("--root", tmp_path / "store")
    where = (*store, HOST)
    here = example_plan("x86-laptop-ddr5")
    started = {"server.json": server_document(here)}
    good = releases.bundle(tmp_path / "1.tar", signer.key, plan=here, files=started)
    bad = releases.bundle(
        tmp_path / "2.tar", signer.key, plan=here, files=started, sequence=2, server=REFUSING
    )
    monkeypatch.setenv("EDGEPACK_SSH", " ".join(sshd.ssh))
    before = command("doctor", "--on", HOST, *store, status=6)
    command("flash", "--enroll", "--mode", "none", "--signers", signer.signers, *where)
    command("flash", good, "--force", "--no-self-test", *where)
    healthy = json.loads(command("doctor", "--on", HOST, *store, "--json").stdout)
    command("flash", bad, "--force", *where, status=5)

    found = obeys("doctor", command("doctor", "--on", HOST, *store, "--json").stdout)

    assert "device is not enrolled" in before.output
    assert [one for one in healthy["diagnoses"] if one["section"] == "journal"] == []
    journal = [one for one in found["diagnoses"] if one["section"] == "journal"]
    assert [one["rule"] for one in journal] == ["llama-flag-refused", "server-ended", "rolled-back"]
    assert "--load-mode none" in journal[0]["cure"]
    assert releases.release_of(bad)[:12] in journal[2]["cause"]
    assert f"{releases.release_of(good)[:12]} runs there again" in journal[2]["cause"]


# ── machines that cannot be flashed ──


def test_an_unknown_host_key_is_not_taken(sshd: Sshd, tmp_path: Path) -> None:
    empty = tmp_path / "known_hosts"
    empty.touch()
    link = remote.connect(HOST, ssh=(*sshd.ssh, "-o", f"UserKnownHostsFile={empty}"), interactive=False)

    with pytest.raises(Untrusted, match="host key of device is not known here"):
        devices.find(link, Where())


def test_another_host_key_than_before_is_not_taken(sshd: Sshd, tmp_path: Path) -> None:
    other = (sshd.folder / "user_key.pub").read_text(encoding="ascii")
    known = tmp_path / "known_hosts"
    known.write_text(f"{HOST} {other}", encoding="ascii")
    link = remote.connect(HOST, ssh=(*sshd.ssh, "-o", f"UserKnownHostsFile={known}"), interactive=False)

    with pytest.raises(Untrusted, match="another host key"):
        devices.find(link, Where())


def test_a_key_that_may_not_log_in_is_told(sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "ssh_config"
    text = (sshd.folder / "ssh_config").read_text(encoding="utf-8")
    config.write_text(text.replace("user_key", "host_key"), encoding="utf-8")
    link = remote.connect(HOST, ssh=("ssh", "-F", str(config)), interactive=False)

    with pytest.raises(Offline, match="refused the login"):
        devices.find(link, Where())


def test_a_device_without_python_is_told(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "sshd", environment={"PATH": str(tmp_path)}) as found,
        pytest.raises(MissingTool, match="python3"),
    ):
        devices.find(remote.connect(HOST, ssh=found.ssh, interactive=False), Where())
