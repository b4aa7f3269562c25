"""Flashing over a real sshd: cuts at random offsets, a release that is tested there, and what little an update moves."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from edgepack import devices, flash, pipeline, probe, profile, remote, workspace
from edgepack.bundle import sign
from edgepack.cli import cli
from edgepack.devices import Where
from edgepack.errors import MissingTool, Offline, Untrusted
from edgepack.flash import Asked, Cargo
from edgepack.plan import Request
from edgepack.progress import Silent
from edgepack.remote import Answer, Dropped
from edgepack.units import KIB, MIB
from tests import releases
from tests.sshd import HOST, Line, Sshd, serving

pytestmark = pytest.mark.integration

CUTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    key: Path
    signers: Path


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    key = tmp_path_factory.mktemp("key") / "key"
    sign.new_key(key)
    signers = key.with_suffix(".allowed_signers")
    signers.write_text(sign.allowed_signer(key), encoding="utf-8")
    return Signed(key=key, signers=signers)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serving(tmp_path_factory.mktemp("sshd") / "of") as found:
        yield found


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

    @property
    def name(self) -> str:
        return self.line.name

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


def test_twenty_cuts_at_random_offsets_cost_little_and_lose_nothing(
    sshd: Sshd, signed: Signed, tmp_path: Path
) -> None:
    """Every other cut ends the line, the others kill every ssh of this login with SIGKILL."""
    weights = os.urandom(40 * MIB)
    cargo = flash.load(releases.bundle(tmp_path / "big.tar", signed.key, weights=weights), None)
    chance = random.Random(7)
    with Line(sshd.port) as line:
        link = remote.connect(HOST, ssh=sshd.through(line.port), interactive=False)
        assert isinstance(link, remote.Ssh)
        watched = Watched(link)
        target = enrolled(watched, signed.signers, tmp_path / "store")
        told = [-1]

        def aim(_: float = 0.0) -> None:
            """Has the next transfer cut, after a random share of it."""
            if told[-1] == watched.cuts:  # it was the offer that met the end of the cut transfer
                return
            told.append(watched.cuts)
            after = chance.randint(50 * KIB, 3500 * KIB)
            watched.on_bytes = lambda given: killed(link) if watched.cuts % 2 and given >= after else None
            line.cut_after(after if watched.cuts % 2 == 0 and watched.cuts < CUTS else 1 << 40)
            if watched.cuts == CUTS:
                watched.on_bytes = lambda _: None

        aim()
        offer = flash._offered(cargo, target, Asked(force=True))
        flash.send(offer, cargo, target, Asked(force=True), progress=Silent(), sleep=aim)
        watched.close()
    weights_file = max(cargo.files, key=lambda digest: cargo.files[digest][1])
    arrived = tmp_path / "store" / "blobs" / "sha256" / weights_file.removeprefix("sha256:")
    again = [
        given - (before - after)
        for given, (before, after) in zip(watched.given, pairwise(watched.left), strict=True)
    ]

    assert watched.cuts == CUTS
    assert workspace.sha256_file(arrived) == weights_file.removeprefix("sha256:")
    assert max(again) <= 4 * MIB, again
    print(f"bytes sent again, by cut: {again[:-1]}; together {sum(again)} of {len(weights)}")


def killed(link: remote.Ssh) -> None:
    """Ends every ssh of a login as the kernel does, when memory runs out."""
    place = str(link._place)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[:1] == ["ssh"] and any(place in word for word in words):
            process.send_signal(signal.SIGKILL)
