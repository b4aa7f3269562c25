"""Flashing decided and done against scripted devices, and for real into a folder of this machine."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import devices, flash, remote
from edgepack.cli import cli
from edgepack.device import agent, installer
from edgepack.devices import Device, Missing, Offer, Release, State, Store, Where
from edgepack.errors import (
    BadInput,
    Busy,
    CheckFailed,
    EdgepackError,
    MissingTool,
    NoSpace,
    NotFound,
    Unsupported,
    Untrusted,
)
from edgepack.flash import Asked, Cargo, Facts
from edgepack.progress import Silent
from edgepack.remote import Answer, Dropped
from tests import releases
from tests.plans import example_plan
from tests.releases import Signer

RECORDED = json.loads(
    (Path(__file__).parents[1] / "cases" / "check" / "qwen2.5-0.5b-q8_0.facts.json").read_text(
        encoding="utf-8"
    )
)
Reply = Answer | Exception | Callable[[Iterable[bytes]], Answer]
ROOT = "/var/lib/edgepack"
SEEN = {
    "python": [3, 11, 2],
    "administrator": True,
    "systemd": True,
    "home": "/home/pi/.local/share/edgepack",
    "stores": [
        {"root": ROOT, "enrolled": True, "ours": True},
        {"root": "/home/pi/.local/share/edgepack", "enrolled": False, "ours": False},
    ],
}


class Scripted:
    """A device that gives the replies it was handed, by sub-command, and keeps what it was asked and sent."""

    name = "pi"
    folder: Path | None = None

    def __init__(self, **replies: Reply | list[Reply]) -> None:
        self._replies = {
            name: reply if isinstance(reply, list) else [reply] for name, reply in replies.items()
        }
        self.asked: list[list[str]] = []
        self.sent: list[bytes] = []

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: Iterable[bytes] = (),
        on_line: Callable[[str], None] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        self.asked.append(list(argv))
        words = [word.replace("-", "_") for word in argv]
        command = next((word for word in words if word in self._replies and word != "look"), "look")
        replies = self._replies["enroll" if "__mode" in words else command]
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, Answer):
            self.sent.append(b"".join(stdin))
            return reply
        return reply(stdin)

    def close(self) -> None:
        return

    def commands(self) -> list[str]:
        return [argv[argv.index("--root") + 2] for argv in self.asked if "--root" in argv]


def says(document: object, status: int = 0) -> Answer:
    return Answer(status=status, stdout=json.dumps(document).encode(), said=())


def fails(status: int, *said: str) -> Answer:
    return Answer(status=status, stdout=b"", said=said)


def store(**changes: Any) -> dict[str, Any]:
    return {
        "root": ROOT, "enrolled": True, "mode": "system", "keep": 2, "server": None, "current": None, "previous": None,
        "good": [], "sequence": 0, "releases": [], "free": 10**9, "agent": "sha256:" + "0" * 64, **changes,
    }  # fmt: skip


def status(**changes: Any) -> Answer:
    return says({"schema_version": 1, "store": store(**changes), "journal": []})


def offer(cargo: Cargo, state: str, missing: Sequence[Missing] = (), *, good: bool = False) -> dict[str, Any]:
    return {
        "schema_version": 1, "release": cargo.release, "name": cargo.name, "sequence": 1, "state": state, "good": good,
        "missing": [{"digest": m.digest, "bytes": m.bytes, "have": m.have} for m in missing], "match": [],
        "disk": {"needed": 0, "free": 1}, "memory": {},
    }  # fmt: skip


def installed(outcome: str, **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1, "outcome": outcome, "release": "a" * 64, "current": "a" * 64, "previous": None,
        "seconds_to_switch": 0.5, "selftest": None, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return releases.signer(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def key(signer: Signer) -> Path:
    return signer.key


@pytest.fixture(scope="module")
def signers(signer: Signer) -> Path:
    return signer.signers


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Cargo:
    """A bundle with weights that travel in several pieces."""
    path = tmp_path_factory.mktemp("big") / "big.tar"
    releases.bundle(path, key, weights=os.urandom(3 * flash.PIECE + flash.SMALL + 17))
    return flash.load(path, None)


def all_of(cargo: Cargo) -> list[Missing]:
    return [Missing(digest=digest, bytes=size, have=0) for digest, (_, size) in cargo.files.items()]


def wanting(cargo: Cargo, missing: Iterable[Missing]) -> Offer:
    """A device's answer to a bundle that it has not, or not all of."""
    return Offer(
        release=cargo.release, name=cargo.name, sequence=1, state="new", missing=tuple(missing), good=False
    )


def device(**replies: Reply | list[Reply]) -> Device:
    return Device(connection=Scripted(**replies), root=ROOT)


def said(target: Device) -> Scripted:
    assert isinstance(target.connection, Scripted)
    return target.connection


# ── deciding ──


def steps(
    cargo: Cargo, state: State, asked: Asked, missing: Sequence[Missing] = (), **changes: Any
) -> list[str]:
    good = bool(changes.pop("good", False))
    known = Facts(
        store=Store(
            enrolled=True, mode="system", current=None, previous=None, sequence=0, free=1, agent=None,
            releases=changes.get("releases", ()),
        ),
        offer=replace(wanting(cargo, missing), state=state, good=good),
    )  # fmt: skip
    return [step.text for step in flash.steps(known, cargo, asked)]


def test_a_new_release_is_sent_and_switched_to(big: Cargo) -> None:
    weights = max(all_of(big), key=lambda one: one.bytes)

    found = steps(big, "new", Asked(), [replace(weights, have=weights.bytes - 2048)])

    assert found == [
        f"send 1 files, 2.0 KiB ({len(big.files) - 1} are there already)",
        "switch to tiny; self-test, and back if it fails",
    ]


def test_what_runs_there_and_is_good_needs_nothing(big: Cargo) -> None:
    assert steps(big, "current", Asked(), good=True) == []


def test_what_runs_there_untested_is_tested(big: Cargo) -> None:
    assert steps(big, "current", Asked(), good=False) == ["switch to tiny; self-test, and back if it fails"]


def test_beside_what_runs_nothing_is_switched(big: Cargo) -> None:
    asked = Asked(switch=False)

    assert steps(big, "received", asked) == ["lay tiny out beside what runs"]
    assert steps(big, "installed", asked) == []


def running(digest: str, name: str) -> Release:
    """A good release that is the current one."""
    return Release(
        digest=digest, name=name, sequence=1, bytes=9, whole=True, good=True, current=True, previous=False
    )


def test_a_switch_names_what_runs_now(big: Cargo) -> None:
    now = running("b" * 64, "older")

    assert steps(big, "received", Asked(self_test=False), releases=(now,)) == [
        "switch from older to tiny; no self-test"
    ]


def test_what_is_current_and_does_not_run_is_switched_to_anew(big: Cargo) -> None:
    now = running(big.release, "tiny")

    assert steps(big, "installed", Asked(), good=True, releases=(now,)) == [
        "switch to tiny; self-test, and back if it fails"
    ]


def test_releases_are_collected_last(big: Cargo) -> None:
    assert steps(big, "received", Asked(keep=1))[-1] == "keep 1 good releases and remove the others"


# ── sending ──


def unframed(stream: bytes) -> dict[str, tuple[int, bytes]]:
    """What the device's own reader makes of frames."""
    source: Any = io.BufferedReader(io.BytesIO(stream))
    return {
        frame.name: (frame.offset, b"".join(installer.content_of(source, frame)))
        for frame in installer.frames(source)
    }


def test_the_agent_reads_what_is_sent(big: Cargo) -> None:
    weights = max(all_of(big), key=lambda one: one.bytes)
    wanted = [one if one != weights else replace(one, have=1000) for one in all_of(big)]
    counted: list[int] = []

    found = unframed(b"".join(flash.frames(big, wanted, counted.append)))

    content = big.path.read_bytes()
    for one in wanted:
        place, size = big.files[one.digest]
        assert found[one.digest] == (one.have, content[place + one.have : place + size])
    assert sum(counted) == sum(one.bytes - one.have for one in wanted)


def test_the_head_is_what_was_signed(big: Cargo) -> None:
    found = unframed(b"".join(flash.packed(name, content) for name, content in big.head))

    assert [name for name in found if not name.startswith("sha256:")] == ["index", "signature", "manifest"]
    assert hashlib.sha256(found["manifest"][1]).hexdigest() == big.release
    assert all(hashlib.sha256(found[n][1]).hexdigest() == n[7:] for n in found if n.startswith("sha256:"))


@pytest.mark.parametrize(
    "content",
    [b"", b"x", os.urandom(flash.SMALL), bytes(flash.SMALL), bytes(5 * flash.SMALL)],
    ids=["empty", "a byte", "noise", "zeros", "many zeros"],
)
def test_a_part_arrives_whether_it_deflates_or_not(content: bytes) -> None:
    assert unframed(flash.packed("sha256:" + "a" * 64, content)) == {"sha256:" + "a" * 64: (0, content)}


@pytest.mark.parametrize("says_bytes", [1000, 4999, 5001])
def test_a_frame_that_inflates_to_something_else_is_refused(says_bytes: int) -> None:
    line, _, rest = flash.packed("sha256:" + "a" * 64, bytes(5000)).partition(b"\n")
    changed = json.dumps({**json.loads(line), "bytes": says_bytes}).encode() + b"\n"

    with pytest.raises(agent.Refused, match="does not inflate to the"):
        unframed(changed + rest)


def test_a_frame_that_would_inflate_without_end_is_refused() -> None:
    line = json.dumps({"name": "index", "offset": 0, "bytes": 1 << 40, "zlib": 100}).encode() + b"\n"

    with pytest.raises(agent.Refused, match="deflated frame has 100 bytes"):
        unframed(line + bytes(100))


def test_a_line_that_is_cut_is_taken_up_where_it_stopped(big: Cargo) -> None:
    weights = max(all_of(big), key=lambda one: one.bytes)
    came = flash.PIECE + 5
    waits: list[float] = []
    sent: list[bytes] = []

    def cut(stdin: Iterable[bytes]) -> Answer:
        pieces = iter(stdin)
        sent.extend(next(pieces) for _ in range(3))
        raise Dropped("the connection to pi was lost")

    target = device(
        receive=[cut, says(offer(big, "received"))],
        offer=[fails(11, "busy: another installer is at work here"),
               says(offer(big, "new", [replace(weights, have=came)]))],
    )  # fmt: skip
    first = wanting(big, [weights])

    total = flash.send(first, big, target, Asked(), progress=Silent(), sleep=waits.append)

    place, size = big.files[weights.digest]
    assert unframed(said(target).sent[-1]) == {
        weights.digest: (came, big.path.read_bytes()[place + came : place + size])
    }
    assert total == sum(map(len, sent)) + len(said(target).sent[-1])
    assert waits == list(flash.PATIENCE[:2])


def test_a_line_that_stays_cut_is_given_up(big: Cargo) -> None:
    target = device(receive=Dropped("lost"), offer=Dropped("unreachable"))
    waits: list[float] = []
    first = wanting(big, all_of(big))

    with pytest.raises(Dropped, match="unreachable"):
        flash.send(first, big, target, Asked(), progress=Silent(), sleep=waits.append)

    assert waits == list(flash.PATIENCE)


def test_another_installer_is_not_waited_for(big: Cargo) -> None:
    target = device(receive=fails(11, "busy: another installer is at work here: process 7"))
    first = wanting(big, all_of(big))

    with pytest.raises(Busy, match="pi: another installer is at work here: process 7"):
        flash.send(first, big, target, Asked(), progress=Silent(), sleep=lambda _: None)


def test_a_device_that_takes_nothing_is_not_sent_to_for_ever(big: Cargo) -> None:
    target = device(receive=says(offer(big, "new", all_of(big))))
    first = wanting(big, all_of(big))

    with pytest.raises(EdgepackError, match="took nothing"):
        flash.send(first, big, target, Asked(), progress=Silent(), sleep=lambda _: None)


def test_a_device_gets_nothing_but_the_bundle(big: Cargo) -> None:
    for asked in (Missing(digest="sha256:" + "e" * 64, bytes=9, have=0), replace(all_of(big)[0], have=10**9)):
        with pytest.raises(EdgepackError, match="asks for"):
            list(flash.frames(big, [asked]))


# ── doing ──


def test_a_dry_run_says_all_and_changes_nothing(big: Cargo) -> None:
    target = device(status=status(), offer=says(offer(big, "new", all_of(big))))

    done = flash.flash(big, target, Asked(), progress=Silent(), dry_run=True)

    assert said(target).commands() == ["status", "offer"]
    assert "--dry-run" in said(target).asked[-1]
    assert (done.outcome, [step.action for step in done.steps]) == ("planned", ["send", "install"])
    assert "would send" in flash.table(done)


def test_a_dry_run_ends_as_the_flash_would_where_the_disk_is_full(big: Cargo) -> None:
    full = fails(10, "no space: /var/lib/edgepack has 5 bytes free and 9 must be written")
    target = device(status=status(), offer=full)

    with pytest.raises(NoSpace, match="9 must be written") as failure:
        flash.flash(big, target, Asked(), progress=Silent(), dry_run=True)

    assert failure.value.exit_code == 10
    assert said(target).commands() == ["status", "offer"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_device_hears_before_anything_travels_how_many_releases_stay(big: Cargo, dry_run: bool) -> None:
    target = device(status=status(), offer=says(offer(big, "current", good=True)), gc=says({}))

    flash.flash(big, target, Asked(keep=1), progress=Silent(), dry_run=dry_run)

    (asked,) = (argv for argv in said(target).asked if "offer" in argv)
    assert asked[asked.index("--keep") + 1] == "1"


def test_a_release_that_failed_there_is_told_as_rolled_back(big: Cargo) -> None:
    answer = installed(
        "rolled-back", current="b" * 64, reasons=["oom-killed (run): the kernel killed it"],
        selftest={"verdict": {"passed": False, "reasons": ["oom-killed"]}},
    )  # fmt: skip
    target = device(status=status(), offer=says(offer(big, "received")), install=says(answer, 5))

    done = flash.flash(big, target, Asked(force=True, allow_downgrade=True), progress=Silent())

    assert done.outcome == "rolled-back"
    failure = flash.shortfall(done)
    assert isinstance(failure, CheckFailed)
    assert "rolled back: tiny failed on pi: oom-killed (run): the kernel killed it" in failure.message
    assert "bbbbbbbbbbbb runs there as before" in str(failure.hint)
    assert said(target).asked[-1][-2:] == ["--allow-downgrade", "--force-device"]


def test_a_self_test_comes_home_and_is_judged_by_the_plan(big: Cargo) -> None:
    passing = {**RECORDED, "verdict": {"passed": True, "reasons": []}}
    target = device(
        status=status(), offer=says(offer(big, "received")), install=says(installed("good", selftest=passing))
    )

    done = flash.flash(big, target, Asked(), progress=Silent())

    assert done.report is not None
    assert done.report.plan == example_plan(releases.PROFILE).digest
    assert "check" in flash.table(done)
    assert json.dumps(flash.to_document(done))


def test_an_agent_of_another_edgepack_is_told_and_works(big: Cargo) -> None:
    done = flash.flash(
        big, device(status=status(), offer=says(offer(big, "current", good=True))), Asked(), progress=Silent()
    )

    assert done.outcome == "current"
    assert "another edgepack's agent" in done.notes[0]


def test_an_agent_that_speaks_another_language_is_refused(big: Cargo) -> None:
    with pytest.raises(Unsupported, match="speaks version 2"):
        flash.flash(big, device(status=says({"schema_version": 2})), Asked(), progress=Silent())


def test_fields_that_a_newer_agent_adds_do_no_harm(big: Cargo) -> None:
    target = device(status=status(moon="full"), offer=says({**offer(big, "current", good=True), "tide": 3}))

    assert flash.flash(big, target, Asked(), progress=Silent()).outcome == "current"


def test_damage_is_mended_from_the_bundle(big: Cargo) -> None:
    lost = all_of(big)[0]
    missing = [
        {"release": big.release, "path": "plan.json", "digest": lost.digest, "bytes": 1},
        {"release": "c" * 64, "path": "model.gguf", "digest": None, "bytes": None},
    ]
    report = {"checked": 9, "bad": [{"path": "blobs/x", "bytes": 4, "digest": "y", "quarantined": True}], "mended": 0,
              "quarantined": 1, "missing": missing}  # fmt: skip
    after = {**report, "bad": [], "missing": missing[1:]}
    target = device(
        fsck=[says(report), says(after)],
        offer=says(offer(big, "new", [lost])),
        receive=says(offer(big, "installed")),
    )

    found, sent = flash.fsck(big, target, Asked(), progress=Silent())

    assert (found.mended, len(found.bad), [one.release[:1] for one in found.missing], sent > 0) == (
        1,
        1,
        ["c"],
        True,
    )
    assert isinstance(flash.damage(found, "pi"), Untrusted)
    assert flash.damage(replace(found, missing=()), "pi") is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "set aside"),
        ({"restarts": True}, "set aside"),
        ({"restarts": False}, "does not start again before they are back"),
        ({"restarts": False, "back": "b" * 64}, "what runs there runs on, and starts bbbbbbbbbbbb next"),
    ],
)
def test_damage_to_what_runs_is_told(changes: dict[str, object], told: str) -> None:
    missing = [{"release": "c" * 64, "path": "model.gguf", "digest": None, "bytes": None}]
    report = {"checked": 9, "bad": [], "mended": 0, "quarantined": 1, "missing": missing, **changes}

    found = device(fsck=says(report)).fsck(lambda _: None)

    failure = flash.damage(found, "pi")
    assert isinstance(failure, Untrusted)
    assert failure.message.endswith(told)
    assert "edgepack flash --fsck BUNDLE pi" in str(failure.hint)
    assert (
        flash.fsck_table(found).rstrip().endswith(told if "runs" in told or "again" in told else "model.gguf")
    )


def test_a_rollback_to_what_does_not_start_is_a_failure() -> None:
    answer = installed("rolled-back", current="b" * 64, reasons=["systemctl start edgepack.service: failed"])

    back = device(rollback=says(answer, 5)).rollback(lambda _: None)

    failure = flash.unstarted(back, "pi")
    assert isinstance(failure, CheckFailed)
    assert "release bbbbbbbbbbbb, which does not start: systemctl start" in failure.message
    assert flash.unstarted(replace(back, reasons=()), "pi") is None


# ── finding and enrolling ──


def test_the_enrolled_store_is_found() -> None:
    found = devices.find(Scripted(look=says(SEEN)), Where(sudo=True))

    assert (found.root, found.sudo) == (ROOT, True)
    assert said(found).asked[0][:3] == ["sudo", "-n", "python3"]


@pytest.mark.parametrize(
    ("stores", "error", "told"),
    [
        ([(ROOT, False, True)], Untrusted, "not enrolled"),
        ([(ROOT, True, False)], BadInput, "belongs to another user"),
        ([(ROOT, True, True), ("/home/pi/e", True, True)], BadInput, "two stores"),
    ],
)
def test_a_store_that_cannot_be_meant_is_named(
    stores: list[tuple[str, bool, bool]], error: type[EdgepackError], told: str
) -> None:
    rows = [{"root": root, "enrolled": enrolled, "ours": ours} for root, enrolled, ours in stores]

    with pytest.raises(error, match=told) as failure:
        devices.find(Scripted(look=says({**SEEN, "stores": rows})), Where())

    assert failure.value.hint


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (fails(127, "bash: line 1: python3: command not found"), MissingTool, "python3: command not found"),
        (fails(1, "sudo: a password is required"), BadInput, "asks for a password"),
        (says({**SEEN, "python": [3, 6, 9]}), Unsupported, "Python 3.6.9, and the agent needs 3.8"),
        (Answer(status=0, stdout=b"Welcome to this device!\n{}", said=()), EdgepackError, "no document"),
    ],
)
def test_a_machine_that_cannot_be_flashed_says_why(
    answer: Answer, error: type[EdgepackError], told: str
) -> None:
    with pytest.raises(error, match=told):
        devices.find(Scripted(look=answer), Where())


@pytest.mark.parametrize(
    ("status", "error", "line"),
    [
        (2, BadInput, "bad usage: release abc was not offered here"),
        (5, CheckFailed, "failed: it did not start"),
        (6, Untrusted, "refused: the signature does not belong to this manifest"),
        (7, MissingTool, "missing: ssh-keygen is not installed"),
        (10, NoSpace, "no space: /var/lib/edgepack has 5 bytes free and 9 must be written"),
        (11, Busy, "busy: another installer is at work here"),
        (1, EdgepackError, "MemoryError"),
    ],
)
def test_an_exit_status_becomes_the_error_it_stands_for(
    status: int, error: type[EdgepackError], line: str
) -> None:
    found = devices.failure("pi", fails(status, "something before", line))

    assert type(found) is error
    assert found.message == f"pi: {line.partition(': ')[2] or line}"


def test_a_refusal_names_the_option_of_this_side() -> None:
    found = devices.failure(
        "pi", fails(6, "refused: it was built for another device: arch is x (--force-device)")
    )

    assert (found.message, found.hint) == (
        "pi: it was built for another device: arch is x",
        "--force does it all the same",
    )


def enroll(connection: remote.Connection, where: Where, signers: Path | None) -> devices.Status:
    return devices.enroll(
        connection, where, signers=signers, server=None, keep=None, replace_signers=False, progress=Silent()
    )


@pytest.mark.parametrize(
    ("where", "changes", "root", "mode"),
    [
        (Where(), {}, ROOT, "system"),
        (Where(), {"administrator": False}, "/home/pi/.local/share/edgepack", "user"),
        (Where(mode="none"), {}, ROOT, "none"),
        (
            Where(root="/srv/e"),
            {"stores": [{"root": "/srv/e", "enrolled": False, "ours": True}]},
            "/srv/e",
            "user",
        ),
    ],
)
def test_the_mode_follows_from_who_enrolls(
    where: Where, changes: dict[str, Any], root: str, mode: str, signers: Path
) -> None:
    target = Scripted(
        look=says({**SEEN, **changes}), enroll=says({"schema_version": 1, "store": store(), "notes": []})
    )

    enroll(target, where, signers)

    words = target.asked[-1]
    assert words[words.index("-") + 1 :] == [root, "--mode", mode]


def test_without_systemd_a_service_mode_is_refused(signers: Path) -> None:
    with pytest.raises(BadInput, match="does not run systemd") as failure:
        enroll(Scripted(look=says({**SEEN, "systemd": False})), Where(), signers)

    assert "--mode none" in str(failure.value.hint)


def test_a_first_enrolling_names_who_may_sign() -> None:
    fresh = {**SEEN, "stores": [{"root": ROOT, "enrolled": False, "ours": False}]}

    with pytest.raises(BadInput, match="say who may sign"):
        enroll(Scripted(look=says(fresh)), Where(), None)


def test_a_private_key_never_travels(key: Path, tmp_path: Path) -> None:
    target = Scripted(look=says(SEEN))

    for wrong in (key, key.with_suffix(".pub")):
        with pytest.raises(BadInput, match="no allowed_signers file"):
            enroll(target, Where(), wrong)
    with pytest.raises(NotFound):
        enroll(target, Where(), tmp_path / "none")

    assert target.asked == []


BARE: Mapping[str, object] = {
    "enrolled": True, "mode": "none", "current": None, "previous": None, "sequence": 0, "free": 1, "agent": None,
    "releases": [],
}  # fmt: skip


def test_what_a_device_says_does_nothing_to_a_terminal() -> None:
    journal = [{"at": 10**12, "event": "\x1b[2Jgone", "who\x07": "\x1b]0;x\x07"}]
    target = device(status=says({"store": BARE, "journal": journal}))

    shown = flash.status_table(target.status(), "kiosk")

    assert shown.splitlines()[-1] == "-  ?[2Jgone  who? ?]0;x?"
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_a_journal_that_is_none_is_empty() -> None:
    target = device(status=says({"store": BARE, "journal": None}))

    assert target.status().journal == ()


# ── for real, in a folder ──


def test_a_folder_is_enrolled_flashed_and_rolled_back(tmp_path: Path, key: Path, signers: Path) -> None:
    connection = remote.connect(f"{tmp_path}/store")
    asked = Asked(force=True, self_test=False)
    bundles = [
        flash.load(releases.bundle(tmp_path / f"{n}.tar", key, sequence=n, files={"note": str(n)}), signers)
        for n in (1, 2)
    ]

    enroll(connection, Where(), signers)
    target = devices.find(connection, Where())
    done = [flash.flash(cargo, target, asked, progress=Silent()) for cargo in bundles]
    again = flash.flash(bundles[1], target, asked, progress=Silent())
    back = target.rollback(lambda _: None)

    current = tmp_path / "store" / "current"
    assert [one.outcome for one in (*done, again)] == ["good", "good", "current"]
    assert (current / "note").read_text(encoding="utf-8") == "1"
    assert back.current == bundles[0].release
    assert done[1].steps[0].text.startswith("send 1 files")
    assert "was there" not in flash.status_table(target.status(), "here")
    found, _ = flash.fsck(None, target, asked, progress=Silent())
    assert (found.bad, found.missing) == ((), ())


def test_an_enrolling_while_another_installer_is_at_work_changes_nothing(
    tmp_path: Path, signers: Path
) -> None:
    connection = remote.connect(f"{tmp_path}/store")
    enroll(connection, Where(), signers)
    kept = tmp_path / "store/agent.pyz"
    ours = kept.read_bytes()
    kept.write_bytes(b"older")

    with installer.locked(str(tmp_path / "store"), "install"), pytest.raises(Busy, match="install"):
        enroll(connection, Where(), None)

    assert kept.read_bytes() == b"older"
    enroll(connection, Where(), None)
    assert kept.read_bytes() == ours


def test_an_older_release_is_refused_and_says_what_would_let_it(
    tmp_path: Path, key: Path, signers: Path
) -> None:
    connection = remote.connect(f"{tmp_path}/store")
    older, newer = (
        flash.load(releases.bundle(tmp_path / f"{n}.tar", key, sequence=n, files={"note": str(n)}), None)
        for n in (1, 2)
    )
    enroll(connection, Where(), signers)
    target = devices.find(connection, Where())
    asked = Asked(force=True, self_test=False)
    flash.flash(newer, target, asked, progress=Silent())

    with pytest.raises(Untrusted, match="--allow-downgrade"):
        flash.flash(older, target, asked, progress=Silent())

    assert (
        flash.flash(older, target, replace(asked, allow_downgrade=True), progress=Silent()).outcome == "good"
    )


def test_an_unsigned_bundle_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(Untrusted, match="is not signed"):
        flash.load(releases.bundle(tmp_path / "unsigned.tar", None), None)


# ── the command ──


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name the host"),
        (["--status", "--rollback", "pi"], "--rollback goes alone"),
        (["--status", "--dry-run", "pi"], "--status goes alone"),
        (["a.tar", "b.tar", "pi"], "2 bundles for one host"),
        (["--status", "a.tar", "pi"], "--status takes a host alone"),
        (["pi"], "no bundle for pi"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_login(words: list[str], told: str) -> None:
    from click.testing import CliRunner

    done = CliRunner().invoke(cli, ["flash", *words])

    assert done.exit_code == 2
    assert told in done.output


def test_the_command_flashes_a_folder(tmp_path: Path, key: Path, signers: Path) -> None:
    from click.testing import CliRunner

    path = releases.bundle(tmp_path / "b.tar", key)
    where = f"{tmp_path}/store"
    words = [
        "flash",
        "--enroll",
        "--signers",
        str(signers),
        "--force",
        "--no-self-test",
        "--json",
        str(path),
        where,
    ]

    done = CliRunner().invoke(cli, ["-q", *words])

    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["outcome"], told["schema_version"], told["report"]) == ("good", 1, None)
    shown = CliRunner().invoke(cli, ["flash", "--status", where])
    assert "tiny, current, good" in shown.output
    read = CliRunner().invoke(cli, ["flash", "--fsck", where])
    assert (read.exit_code, "0 bad" in read.output) == (0, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "b.tar", "--on", "pi", "--emulate"], "--emulate is for a check here"),
        (["check", "b.tar", "--on", "pi", "--server", "x"], "--server is for a check here"),
        (["check", "b.tar", "--sudo"], "--root, --sudo and --force are for a device"),
        (["check", "b.tar", "--force"], "--root, --sudo and --force are for a device"),
        (
            ["calibrate", "--profile", "raspberry-pi-5-8gb", "--on", "pi", "bench.json"],
            "no bundle to measure on pi",
        ),
        (["calibrate", "--profile", "raspberry-pi-5-8gb", "--root", "/x", "b.json"], "are for a device"),
        (["calibrate", "--profile", "raspberry-pi-5-8gb", "--force", "b.json"], "are for a device"),
    ],
)
def test_what_runs_on_a_device_is_told_from_what_runs_here(words: list[str], told: str) -> None:
    from click.testing import CliRunner

    done = CliRunner().invoke(cli, words)

    assert done.exit_code == 2
    assert told in done.output


def small_device(
    folder: Path, signers: Path, checked: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> releases.Device:
    """An enrolled device of 64 MiB and another architecture that every connection leads to; what its check says."""
    facts = {**releases.machine(), "arch": "x86_64", "memory_total": 64 << 20, "memory_available": 64 << 20}
    there = releases.Device(folder, check=lambda _: copy.deepcopy(dict(checked)), facts=facts)
    there.enroll(signers.read_text(encoding="utf-8"))

    def act(argv: Sequence[str], *, stdin: Iterable[bytes] = (), **_: object) -> Answer:
        if "--root" not in argv:
            store = {"root": str(there.root), "enrolled": True, "ours": True}
            return says({**SEEN, "stores": [store]})
        words = argv[argv.index("--root") + 2 :]
        answer = there.run(*words, stdin=b"".join(stdin))
        return Answer(
            status=answer.status,
            stdout=json.dumps(answer.document).encode() if answer.document else b"",
            said=tuple(answer.said.splitlines()),
        )

    target = Scripted()
    monkeypatch.setattr(target, "run", act)
    monkeypatch.setattr(remote, "connect", lambda *_, **__: target)
    return there


def test_a_check_takes_another_device_and_too_little_memory_only_when_forced(
    tmp_path: Path, key: Path, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    there = small_device(tmp_path / "store", signers, RECORDED, monkeypatch)
    words = ["check", str(releases.bundle(tmp_path / "b.tar", key)), "--on", "pi", "--json"]

    refused = CliRunner().invoke(cli, words)
    took = [path.name for path in (there.root / "blobs/sha256").iterdir()]
    forced = CliRunner().invoke(cli, [*words, "--force"])

    assert (refused.exit_code, took) == (6, [])
    assert "bytes of memory and this device has 67108864" in refused.stderr
    assert "--force does it all the same" in refused.stderr
    assert json.loads(forced.stdout)["facts"]["machine"] == RECORDED["machine"]
    assert there.events()[-1] == "tested"


def test_so_does_a_calibration(
    tmp_path: Path, key: Path, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    there = small_device(tmp_path / "store", signers, measured_at(9.0), monkeypatch)
    bundle = releases.bundle(tmp_path / "b.tar", key)
    words = ["-q", "calibrate", "--profile", releases.PROFILE, "--on", "pi", str(bundle), "--json"]

    refused = CliRunner().invoke(cli, words)
    forced = CliRunner().invoke(cli, [*words, "--force"])

    assert refused.exit_code == 6
    assert "bytes of memory and this device has 67108864" in refused.stderr
    assert "--force does it all the same" in refused.stderr
    assert [row["decode"] for row in json.loads(forced.stdout)["residuals"]] == [9.0]
    assert there.events()[-1] == "tested"


def measured_at(decode: float) -> dict[str, Any]:
    """The recorded run as one of the example plan on its own device, at this speed in tokens a second."""
    facts: dict[str, Any] = copy.deepcopy(RECORDED)
    facts["bundle"]["name"] = f"qwen2.5-1.5b-instruct-q4_k_m-{releases.PROFILE}"
    facts["machine"]["load"] = 0.0
    facts["match"] = []
    facts["speed"]["decode_per_second"] = decode
    return facts


def test_an_option_that_an_agent_does_not_know_says_how_to_bring_a_newer_one() -> None:
    found = devices.failure("pi", fails(2, "agent.pyz: error: unrecognized arguments: --other-device"))

    assert "edgepack flash --enroll pi" in str(found.hint)


def test_a_device_is_calibrated_by_the_checks_of_bundles_on_it(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded run's device, as a scripted one; one model alone calibrates with a warning."""
    from click.testing import CliRunner

    plan = example_plan(releases.PROFILE)
    path = releases.bundle(tmp_path / "b.tar", key, plan=plan)
    release = releases.release_of(path)
    state = {
        "schema_version": 1, "release": release, "name": "tiny", "sequence": 1, "state": "installed", "good": False,
        "missing": [], "match": [],
    }  # fmt: skip
    target = Scripted(
        look=says(SEEN),
        status=status(),
        offer=says(state),
        self_test=says({**measured_at(9.0), "verdict": {"passed": True}}),
    )
    monkeypatch.setattr(remote, "connect", lambda *_, **__: target)

    done = CliRunner().invoke(
        cli, ["-q", "calibrate", "--profile", releases.PROFILE, "--on", "pi", str(path), "--json"]
    )

    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["residuals"]
    assert row["decode"] == 9.0
