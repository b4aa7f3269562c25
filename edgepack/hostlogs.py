"""What a device says of itself: its installer's journal, its service's log and its kernel's, read over one login.

Of each only what tells of the release that is current, and of what was tried after it: an older fault has been mended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgepack import devices
from edgepack.device import installer
from edgepack.devices import Mode, NotEnrolled, Status, Where
from edgepack.faults import Section
from edgepack.remote import Connection

LINES = 2000
"""Of the service's log, and of the kernel's, at most; the last."""
SECONDS = 120.0
"""That one log may take to be read: journals on cards are slow."""
Event = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLogs:
    """What was read of a device."""

    name: str
    enrolled: bool
    logs: Mapping[Section, str]
    """Each with a line end after its last line; empty where there is nothing in it."""
    notes: tuple[str, ...]
    """What could not be read, and why."""


def read(connection: Connection, where: Where) -> HostLogs:
    """Asks a device for all of it; a machine that is not enrolled for the logs that it has all the same.

    Raises what logging in and the agent's answers raise, and NotEnrolled for a folder; what a log's reader says is a
    note.
    """
    try:
        device = devices.find(connection, where)
    except NotEnrolled as error:
        if connection.folder is not None:
            raise
        logs, notes = _system_logs(connection, where, mode=None, since=None)
        return HostLogs(
            name=connection.name,
            enrolled=False,
            logs={"journal": "", **logs},
            notes=(f"{error.message} (there is no journal of an installer)", *notes),
        )
    status, journal = device.status(), device.journal()
    told = "".join(f"{line}\n" for line in told_journal(status, journal))
    untested = untested_note(status, connection.name)
    if connection.folder is not None:
        logs, notes = (
            {},
            (f"{connection.name} is a folder: the logs of service and kernel are on its device",),
        )
    else:
        logs, notes = _system_logs(connection, where, mode=status.store.mode, since=switched(status, journal))
    return HostLogs(
        name=connection.name, enrolled=True, logs={"journal": told, **logs}, notes=(*untested, *notes)
    )


# ── the installer's journal: pure ────────────────────────────────────────────────────────────────────


def told_journal(status: Status, journal: Sequence[Event]) -> Iterator[str]:
    """What is wrong by the journal: how the last install or test ended, if not well, and what the store lacks."""
    for event in unsettled(journal):
        release, reasons = _short(event.get("release")), _texts(event.get("reasons"))
        when = f"{devices.moment(event)} UTC"
        if event.get("event") == "tested":
            yield from (f"{when} release {release} failed its test: {reason}" for reason in reasons)
        else:
            why = f": {'; '.join(reasons)}" if reasons else ""
            yield f"{when} went back from release {release} to {_short(event.get('back'))}{why}"
            yield from (f"{when} {trouble}" for trouble in _texts(event.get("trouble")))
    for one in status.store.releases:
        if not one.whole:
            yield f"release {one.digest[:12]} is not whole there"
    if status.store.free < installer.MARGIN:
        yield f"machine: {installer.MARGIN} bytes of disk are needed and {status.store.free} are free"


def unsettled(journal: Sequence[Event]) -> tuple[Event, ...]:
    """Failed tests and ways back of the last attempt; none of before the last release that was good.

    A test of the same release that passed later takes the place of one that failed. A way back has the reasons of its
    release's test where it has none of its own, as agents wrote it that did not note them.
    """
    kinds = [event.get("event") for event in journal]
    begins = [at + 1 for at, kind in enumerate(kinds) if kind in ("good", "rolled-back")]
    begins += [at for at, kind in enumerate(kinds) if kind == "switching"]
    last = journal[max(begins, default=0) :]
    tests = {str(event.get("release")): event for event in last if event.get("event") == "tested"}
    found: list[Event] = []
    for event in last:
        if event.get("event") == "tested" and event is tests[str(event.get("release"))]:
            found.append(event)
        elif event.get("event") == "went-back" and event.get("release") is not None:
            why = _texts(event.get("reasons")) or _starts(event)
            why = why or _texts(tests.get(str(event.get("release")), {}).get("reasons"))
            found.append({**event, "reasons": why})
    return tuple(event for event in found if event.get("event") != "tested" or _texts(event.get("reasons")))


def switched(status: Status, journal: Sequence[Event]) -> int | None:
    """When the release that is current was switched to, in seconds since 1970 by the device's clock."""
    times = [
        event.get("at")
        for event in journal
        if event.get("event") == "switching" and event.get("release") == status.store.current
    ]
    return next((at for at in reversed(times) if isinstance(at, int)), None)


def untested_note(status: Status, host: str) -> tuple[str, ...]:
    """That a switch was cut off: the release runs, and is neither good nor gone back from yet."""
    current = next((one for one in status.store.releases if one.current), None)
    if current is None or current.good:
        return ()
    name = current.name or current.digest[:12]
    return (f"{name} is current and was not tested to the end: `edgepack flash BUNDLE {host}` does it",)


def _starts(event: Event) -> tuple[str, ...]:
    """Why a start of the system went back: from a release that was never good, or that lost files."""
    if event.get("whole") is False:
        return ("it is not whole",)
    tries = event.get("tries")
    return () if tries is None else (f"it was started {tries} times and never was good",)


def _texts(value: object) -> tuple[str, ...]:
    """Each on one line."""
    return tuple(" ".join(str(text).split()) for text in value) if isinstance(value, (list, tuple)) else ()


def _short(release: object) -> str:
    return release[:12] if isinstance(release, str) else "none"


# ── the system's logs ────────────────────────────────────────────────────────────────────────────────


def _system_logs(
    connection: Connection, where: Where, *, mode: Mode | None, since: int | None
) -> tuple[dict[Section, str], tuple[str, ...]]:
    """Service and kernel; ``mode`` None: whose service it is, is not known."""
    units = {"system": ("--unit",), "user": ("--user-unit",), None: ("--unit", "--user-unit")}
    logs: dict[Section, str] = {}
    notes: list[str] = []
    if mode == "none":
        notes.append("there is no log of a service: in mode none nobody starts what is installed")
    else:
        # Not `--user`: where no journal is kept over a reboot, a user's service writes into the system's.
        words = [word for option in units[mode] for word in (option, "edgepack.service")]
        logs["service"], note = _journalctl(connection, where, "service", words, since)
        notes += note
        if not (logs["service"] or note or mode is None):
            began = "" if since is None else f" since {devices.moment({'at': since})} UTC"
            notes.append(f"edgepack.service has logged nothing{began}")
    logs["kernel"], note = _journalctl(connection, where, "kernel", ["-k"], since)
    return logs, (*notes, *note)


def _journalctl(
    connection: Connection, where: Where, section: Section, words: Sequence[str], since: int | None
) -> tuple[str, tuple[str, ...]]:
    """The last lines that match, as they were logged, and a note where they could not be read."""
    argv = [*devices.as_whom(where.sudo), "journalctl", *words, "--no-pager"]
    begin = [] if since is None else [f"--since=@{since}"]
    answer = connection.run([*argv, "-n", str(LINES), "-o", "cat", *begin], timeout=SECONDS)
    lines = answer.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    # "-- " begins journalctl's own: where it begins, a reboot, that there are none.
    text = "".join(f"{line}\n" for line in lines if line and not line.startswith("-- "))
    if answer.status == 0 and not text:
        # With "-o cat" it says nothing of what it may not read.
        answer = connection.run([*argv, "-n", "1"], timeout=SECONDS)
    hidden = next((line for line in answer.said if any(words in line for words in _HIDDEN)), None)
    if answer.status == 0 and (text or hidden is None):
        return text, ()
    said = [line.strip() for line in answer.said if line.strip()]
    why = (hidden or (said[-1] if said else f"journalctl ended with status {answer.status}")).strip()
    cure = "; --sudo reads it, or a user of the group systemd-journal" if hidden and not where.sudo else ""
    return "", (f"the {section}'s log may not be read by this login: {why.removeprefix('Hint: ')}{cure}",)


_HIDDEN = ("insufficient permissions", "not seeing messages from other users")
"""What journalctl says of what it leaves out, with exit status 0 where it can read anything else."""
