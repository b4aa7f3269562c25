"""What is read of a device and what the doctor makes of it, against scripted devices and journals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgepack import doctor, hostlogs, remote, serde
from edgepack.cli import cli
from edgepack.device import installer
from edgepack.devices import NotEnrolled, Where
from edgepack.doctor import Report
from edgepack.errors import BadInput
from edgepack.remote import Answer, Dropped
from tests import releases
from tests.documents import obeys
from tests.plans import example_plan
from tests.unit.test_flash import ROOT, SEEN, Reply, Scripted, fails, says, store

OLD, NEW = "a" * 64, "b" * 64
EXITED = "did-not-start (start): llama-server ended with status 1: error: invalid argument: --no-mmap"
SWITCHED = 1_700_000_000
SERVED = (
    "Started edgepack.service - The language model of this release.\nmain: server is listening on http://x\n"
)
HINT = (
    "Hint: You are currently not seeing messages from other users and the system.",
    "      Users in groups 'adm', 'systemd-journal' can see all messages.",
)


def release(digest: str, **changes: Any) -> dict[str, Any]:
    return {
        "digest": digest, "name": "demo", "sequence": 1, "bytes": 9, "whole": True, "good": True, "current": True,
        "previous": False, **changes,
    }  # fmt: skip


def event(kind: str, release: str | None = NEW, **facts: Any) -> dict[str, Any]:
    return {"at": SWITCHED, "event": kind, "release": release, **facts}


GOOD = [
    event("switching", OLD, back=None),
    event("tested", OLD, reasons=[]),
    event("good", OLD, sequence=1, tested=True),
]
WENT_BACK = [
    event("offered"),
    event("laid-out"),
    event("switching", back=OLD, at=SWITCHED + 60),
    event("tested", reasons=[EXITED]),
    event("went-back", back=OLD, reasons=[EXITED], trouble=[]),
]


class Journalled(Scripted):
    """A device with logs of the system; its journalctl says what it hides only where it is not asked for `-o cat`."""

    def __init__(self, service: Answer, kernel: Answer, **replies: Reply | list[Reply]) -> None:
        super().__init__(**replies)
        self._logs = {False: service, True: kernel}

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: Iterable[bytes] = (),
        on_line: Callable[[str], None] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        if "journalctl" not in argv:
            return super().run(argv, stdin=stdin, on_line=on_line, timeout=timeout)
        self.asked.append(list(argv))
        found = self._logs["-k" in argv]
        return replace(found, said=()) if "cat" in argv and found.status == 0 else found


def device(
    *,
    journal: Sequence[dict[str, Any]] = GOOD,
    service: Answer | None = None,
    kernel: Answer | None = None,
    **changes: Any,
) -> Journalled:
    held = store(**{"current": OLD, "releases": [release(OLD)], **changes})
    return Journalled(
        service or logged(SERVED),
        kernel or logged("x\n"),
        look=says(SEEN),
        status=says({"schema_version": 1, "store": held, "journal": []}),
        journal=says({"schema_version": 1, "journal": journal}),
    )


def logged(text: str, *said: str, status: int = 0) -> Answer:
    return Answer(status=status, stdout=text.encode(), said=said)


def examined(target: remote.Connection, where: Where | None = None) -> Report:
    return doctor.examine_host(hostlogs.read(target, where or Where()))


def told(report: Report) -> list[tuple[str, str | None, int | None]]:
    return [(one.rule, one.section, one.line) for one in report.diagnoses]


# ── what is asked for ──


def test_a_healthy_device_has_nothing_wrong() -> None:
    target = device()

    report = examined(target)

    assert (report.kind, report.name, report.lines, report.diagnoses, report.notes) == (
        "host",
        "pi",
        3,
        (),
        (),
    )
    assert doctor.table(report) == "pi: nothing wrong that is known in 3 lines\n"


@pytest.mark.parametrize(
    ("mode", "sudo", "unit"), [("system", True, "--unit"), ("system", False, "--unit"), ("user", False, "--user-unit")]
)  # fmt: skip
def test_logs_are_read_from_when_the_current_release_was_switched_to(
    mode: str, sudo: bool, unit: str
) -> None:
    target = device(journal=[*GOOD, *WENT_BACK], mode=mode)

    examined(target, Where(sudo=sudo))

    as_root = ["sudo", "-n"] if sudo else []
    end = ["--no-pager", "-n", "2000", "-o", "cat", f"--since=@{SWITCHED}"]
    assert target.asked[-2:] == [
        [*as_root, "journalctl", unit, "edgepack.service", *end],
        [*as_root, "journalctl", "-k", *end],
    ]


def test_where_nobody_starts_what_is_installed_there_is_no_service_to_read() -> None:
    target = device(mode="none", kernel=logged("Out of memory: Killed process 7 (llama-server)\n"))

    report = examined(target)

    assert told(report) == [("kernel-oom", "kernel", 1)]
    assert report.notes == ("there is no log of a service: in mode none nobody starts what is installed",)


def test_a_disk_in_a_reader_has_its_journal_and_this_machine_s_logs_are_not_its(tmp_path: Path) -> None:
    signer = releases.signer(tmp_path)
    there = releases.Device(tmp_path / "card")
    there.enroll(signer.signers.read_text(encoding="utf-8"))
    target = device(mode="none", journal=[*GOOD, *WENT_BACK])
    target.folder = there.root

    report = examined(target)

    assert [one.section for one in report.diagnoses] == ["journal"] * 3
    assert not any("journalctl" in argv for argv in target.asked)
    assert report.notes == ("pi is a folder: the logs of service and kernel are on its device",)


# ── the journal ──


def test_a_release_that_failed_its_test_is_named_with_the_cause() -> None:
    report = examined(device(journal=[*GOOD, *WENT_BACK]))

    assert told(report) == [
        ("llama-flag-refused", "journal", None),
        ("server-ended", "journal", None),
        ("rolled-back", "journal", None),
    ]
    assert [one.follows for one in report.diagnoses] == [None, None, "server-ended"]
    assert report.diagnoses[0].seen == f"2023-11-14 22:13:20 UTC release {NEW[:12]} failed its test: {EXITED}"
    assert report.diagnoses[2].cause == (
        f"release {NEW[:12]} was not good on the device ({EXITED}); release {OLD[:12]} runs there again"
    )
    shown = doctor.table(report)
    assert f"  journal: 2023-11-14 22:13:20 UTC release {NEW[:12]} failed" in shown


REASONS = [
    ("oom-killed (fill): the kernel killed llama-server", "check-killed"),
    ("allocation-refused (start): llama-server was refused memory", "check-refused"),
    ("thrash (run): 1200 major faults in 20 s: its memory is not there", "memory-thrash"),
    ("timeout (start): llama-server was not ready after 1800 s", "server-ended"),
    ("it has slots of [256] tokens, the plan says 1 of 512", "context-not-held"),
    ("of 512 tokens the context held [12]", "context-not-held"),
    ("its memory peaked at 2147483648 bytes, the plan says up to 1073741824", "check-peak"),
    ("its memory peaked at 2147483648 bytes, the device has 1073741824 to give", "check-peak"),
    (
        "its answers are not those recorded at build: drift 1.500 nats, 2 of 24 first choices the same",
        "answers-differ",
    ),
]


@pytest.mark.parametrize(("reason", "rule"), REASONS)
def test_what_the_installer_gives_as_a_reason_is_known(reason: str, rule: str) -> None:
    journal = [*GOOD, event("switching", back=OLD), event("tested", reasons=[reason])]
    journal.append(event("went-back", back=OLD, reasons=[reason], trouble=[]))

    report = examined(device(journal=journal))

    assert [(one.rule, one.follows) for one in report.diagnoses] == [(rule, None), ("rolled-back", rule)]


def test_the_installer_s_own_verdict_is_what_is_read() -> None:
    """Its words and the rules' are in two modules: this holds them together."""
    plan = json.loads(serde.to_json(example_plan(releases.PROFILE)))
    facts = {
        **releases.passing(),
        "slots": {"slots": 9, "tokens": [1]},
        "quality": {"probes": 10, "agree": 1, "ties": 0, "mean_drift": 2.0},
    }
    facts["memory"] = {**facts["memory"], "peak_rss": 1 << 40}
    facts["fill"] = {**facts["fill"], "held_tokens": [3]}

    reasons = installer.verdict(plan, facts)
    broken = installer.verdict(
        plan, {**facts, "failure": {"kind": "crashed", "stage": "run", "message": "it ended"}}
    )

    assert len(reasons) == 5
    for reason in (*reasons, *broken):
        report = examined(device(journal=[*GOOD, event("tested", OLD, reasons=[reason])]))
        assert report.diagnoses, reason


def test_a_service_that_does_not_start_after_its_test_is_told_by_the_way_back() -> None:
    why = "systemctl start edgepack.service: Job for edgepack.service failed."
    journal = [*GOOD, event("switching", back=OLD), event("tested", reasons=[])]
    journal.append(event("went-back", back=OLD, reasons=[why], trouble=[]))
    service = f"{SERVED}edgepack.service: Main process exited, code=exited, status=127/n/a\n{SERVED}"

    report = examined(device(journal=journal, service=logged(service)))

    assert told(report) == [("unit-program-missing", "service", 3), ("rolled-back", "journal", None)]
    assert why in report.diagnoses[1].cause


def test_an_agent_that_noted_no_reasons_for_the_way_back_is_read_by_its_test() -> None:
    older = [
        *WENT_BACK[:-1],
        event("went-back", back=None, trouble=["the release before it did not start: x"]),
    ]

    last = examined(device(journal=older)).diagnoses[-1]

    assert last.cause == f"release {NEW[:12]} was not good on the device ({EXITED}); nothing runs there"


@pytest.mark.parametrize(
    "then",
    [
        [event("switching", "c" * 64, back=OLD), event("good", "c" * 64, sequence=3, tested=True)],
        [event("rolled-back", OLD, back="c" * 64)],
        [event("switching", back=OLD), event("tested", reasons=[])],
    ],
    ids=["a later one is good", "gone back by hand", "tried again, and not at its end"],
)
def test_what_was_mended_since_is_not_told(then: list[dict[str, Any]]) -> None:
    assert examined(device(journal=[*GOOD, *WENT_BACK, *then])).diagnoses == ()


def test_a_check_that_failed_is_told_until_one_passes() -> None:
    failed, passed = event("tested", OLD, reasons=[EXITED]), event("tested", OLD, reasons=[])

    assert [one.rule for one in examined(device(journal=[*GOOD, failed])).diagnoses] == [
        "llama-flag-refused",
        "server-ended",
    ]
    assert examined(device(journal=[*GOOD, failed, passed])).diagnoses == ()


def test_a_start_of_the_system_that_went_back_says_why() -> None:
    back = [event("started", tries=1), event("went-back", back=OLD, tries=3, whole=True)]

    (one,) = examined(device(journal=[*GOOD, event("switching", back=OLD), *back])).diagnoses

    assert one.rule == "rolled-back"
    assert "it was started 3 times and never was good" in one.cause


def test_a_damaged_release_and_a_full_disk_are_told() -> None:
    report = examined(device(releases=[release(OLD, whole=False)], free=4096))

    assert told(report) == [("release-damaged", "journal", None), ("disk-full", "journal", None)]


def test_a_switch_that_was_cut_off_is_a_note() -> None:
    report = examined(device(releases=[release(OLD, good=False)], journal=GOOD[:1]))

    assert report.diagnoses == ()
    assert report.notes == (
        "demo is current and was not tested to the end: `edgepack flash BUNDLE pi` does it",
    )


# ── the system's logs ──


def test_lines_say_which_log_they_are_of_and_where_in_it() -> None:
    service = "one\ntwo\nsrv  update: saving prompt with length 900, total state size = 512.000 MiB\n"
    kernel = "x\nOut of memory: Killed process 7 (llama-server) total-vm:1kB, anon-rss:1048576kB\n"

    report = examined(device(service=logged(service), kernel=logged(kernel)))

    assert told(report) == [("prompt-cache-oom", "service", 3), ("kernel-oom", "kernel", 2)]
    assert "  service, line 3: srv  update" in doctor.table(report)


def test_a_card_that_the_kernel_knows_is_none_that_the_server_was_meant_to_use() -> None:
    service = "warning: no usable GPU found, --gpu-layers option will be ignored\n"

    report = examined(
        device(service=logged(service), kernel=logged("nvidia: NVIDIA UNIX Open Kernel Module\n"))
    )

    assert report.diagnoses == ()


def test_what_an_older_log_recovered_from_says_nothing_of_another_log() -> None:
    """The release before runs again; that does not undo what the installer says of the new one."""
    failed = (
        "did-not-start (start): ggml_aligned_malloc: insufficient memory (attempted to allocate   512.00 MB)"
    )
    journal = [*GOOD, event("switching", back=OLD), event("tested", reasons=[failed])]

    report = examined(device(journal=journal))

    assert [one.rule for one in report.diagnoses] == ["memory-weights", "server-ended"]


def test_what_clients_did_wrong_comes_after_what_is_wrong_with_the_device() -> None:
    refused = "W srv    operator(): unauthorized: Invalid API Key\n"

    report = examined(device(journal=[*GOOD, *WENT_BACK], service=logged(refused)))

    assert [one.rule for one in report.diagnoses][-2:] == ["rolled-back", "api-key-refused"]


def test_a_service_that_is_down_is_told_and_one_that_is_up_again_is_not() -> None:
    failed = "edgepack.service: Failed with result 'exit-code'.\n"

    assert told(examined(device(service=logged(SERVED + failed)))) == [("unit-failed", "service", 3)]
    assert told(examined(device(service=logged(failed + SERVED)))) == []


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (logged("-- No entries --\n", *HINT), HINT[0][6:]),
        (
            logged("", *HINT, "No journal files were opened due to insufficient permissions.", status=1),
            HINT[0][6:],
        ),
    ],
)
def test_a_log_that_may_not_be_read_is_a_note(kernel: Answer, why: str) -> None:
    report = examined(device(mode="user", kernel=kernel))

    (note,) = report.notes
    assert note.startswith(f"the kernel's log may not be read by this login: {why}; --sudo reads it")
    assert report.diagnoses == ()


def test_a_device_without_journalctl_still_has_its_journal() -> None:
    missing = fails(127, "sh: 1: journalctl: not found")

    report = examined(device(journal=[*GOOD, *WENT_BACK], service=missing, kernel=missing))

    assert [note.partition(" may")[0] for note in report.notes] == ["the service's log", "the kernel's log"]
    assert "journalctl: not found" in report.notes[0]
    assert report.diagnoses[0].section == "journal"


def test_a_hint_beside_lines_that_were_read_is_no_note() -> None:
    assert examined(device(mode="user", service=logged(SERVED, *HINT))).notes == ()


def test_a_service_that_has_logged_nothing_is_a_note() -> None:
    report = examined(device(service=logged("-- No entries --\n")))

    assert report.notes == ("edgepack.service has logged nothing since 2023-11-14 22:13:20 UTC",)


def test_what_a_device_logged_does_nothing_to_a_terminal() -> None:
    report = examined(device(service=logged("\x1b[31merror: invalid\x1b[0m argument: --x\x07\x1b]0;y\n")))

    assert report.diagnoses[0].rule == "llama-flag-refused"
    assert "\x1b" not in doctor.table(report) and "\x07" not in doctor.table(report)


# ── no enrolled device ──


def stranger(service: str = "", kernel: str = "") -> Journalled:
    stores = [{"root": ROOT, "enrolled": False, "ours": True}]
    return Journalled(logged(service), logged(kernel), look=says({**SEEN, "stores": stores}))


def test_a_machine_that_is_not_enrolled_has_logs_all_the_same() -> None:
    target = stranger(service="error: invalid argument: --no-mmap\n")

    report = examined(target)

    assert told(report) == [("llama-flag-refused", "service", 1)]
    assert report.notes[0].startswith(
        "pi is not enrolled: nothing there says who may sign (there is no journal"
    )
    assert target.asked[1][:5] == [
        "journalctl",
        "--unit",
        "edgepack.service",
        "--user-unit",
        "edgepack.service",
    ]


def test_the_kernel_alone_may_know_why() -> None:
    report = examined(stranger(kernel="Out of memory: Killed process 7 (llama-server)\n"))

    assert told(report) == [("kernel-oom", "kernel", 1)]


def test_a_machine_on_which_nothing_of_edgepack_ever_ran_is_an_error() -> None:
    with pytest.raises(
        NotEnrolled, match="pi is not enrolled, and nothing of edgepack has logged there"
    ) as told:
        examined(stranger(kernel="eth0: link is up\n"))

    assert "flash --enroll" in str(told.value.hint)
    assert told.value.exit_code == 6


def test_a_folder_that_is_no_store_is_an_error_and_this_machine_s_logs_are_not_read(tmp_path: Path) -> None:
    target = stranger(service="error: invalid argument: --no-mmap\n")
    target.folder = tmp_path

    with pytest.raises(NotEnrolled):
        examined(target)

    assert len(target.asked) == 1


def test_a_folder_of_a_good_release_has_nothing_to_read_and_nothing_wrong(tmp_path: Path) -> None:
    target = device(mode="none")
    target.folder = tmp_path

    assert doctor.table(examined(target)).splitlines()[-1] == "pi: nothing wrong that is known"


@pytest.mark.parametrize("value", [None, 7, [], {}, ["x"], "x", True, -1, 1 << 62])
@pytest.mark.parametrize("name", ["at", "release", "reasons", "back", "trouble", "event", "tries", "whole"])
def test_a_journal_of_a_damaged_disk_does_no_harm(name: str, value: object) -> None:
    journal = [{**event, name: value} for event in WENT_BACK]

    report = examined(device(journal=[*GOOD, *journal]))

    assert doctor.table(report)


# ── by the command line ──


def run(*words: str, target: remote.Connection, patch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    patch.setattr(remote, "connect", lambda *_, **__: target)
    done = CliRunner().invoke(cli, ["doctor", *words])
    return done.exit_code, done.stdout, done.stderr


def test_the_document_obeys_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    target = device(journal=[*GOOD, *WENT_BACK])

    status, said, _ = run("--on", "pi", "--json", target=target, patch=monkeypatch)

    document = obeys("doctor", said)
    assert (status, document["kind"], document["diagnoses"][0]["section"]) == (0, "host", "journal")


def test_a_host_that_cannot_be_reached_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Scripted(look=Dropped("pi cannot be reached: timed out", hint="`ssh pi` must get in"))

    status, _, said = run("--on", "pi", target=target, patch=monkeypatch)

    assert (status, said) == (8, "edgepack: pi cannot be reached: timed out\n  hint: `ssh pi` must get in\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["server.log", "--on", "pi"], "--on goes alone, not with server.log too"),
        (["--symptom", "killed", "--on", "pi"], "--on goes alone, not with --symptom too"),
        (["server.log", "--symptom", "killed"], "--symptom goes alone, not with server.log too"),
        (["server.log", "--sudo"], "--root and --sudo are for a device"),
        (["server.log", "--root", "/x"], "--root and --sudo are for a device"),
        ([], "name a bundle, a report, a log or -, a --symptom, or a device with --on HOST"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["doctor", *words])

    assert done.exit_code == BadInput.exit_code
    assert message in done.stderr
