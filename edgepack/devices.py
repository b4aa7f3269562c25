"""A device and the agent that was enrolled on it: how it is found, put there, and asked.

The agent (device/installer.py) is the only thing of edgepack that runs there. It comes from this installation, never
out of a bundle, and refuses on its own whatever it must refuse; here its documents become values, and its exit status
errors.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgepack import enrolled, serde
from edgepack.device import agent, installer
from edgepack.errors import (
    BadInput,
    Busy,
    CheckFailed,
    EdgepackError,
    Interrupted,
    MissingTool,
    NoSpace,
    NotFound,
    Unsupported,
    Untrusted,
)
from edgepack.progress import Progress
from edgepack.remote import Answer, Connection

Mode = Literal["system", "user", "none"]
"""Whose services run a release: the system's, the user's, or nobody's."""
State = Literal["new", "received", "installed", "current"]
"""How far a release has come on a device; ``current`` runs there, where a service is to run it."""
Outcome = Literal["good", "rolled-back", "installed", "current"]
"""``good``: switched to and kept. ``installed``: laid out only. ``current``: it was so before."""

SCHEMA_VERSION = 1
"""Of the agent's documents that are understood here."""
PYTHON = (3, 8)
"""Oldest Python that the agent runs on."""
SYSTEM_ROOT = installer.SYSTEM_ROOT
LOOK_SECONDS = 120.0


class NotEnrolled(Untrusted):
    """A machine without a store; its logs can be read all the same."""


# ── finding and asking it ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which store of a machine is meant, and as whom it is entered."""

    root: str | None = None
    mode: Mode | None = None
    sudo: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An enrolled store, and its agent. Every call raises what its exit status stands for, and Dropped."""

    connection: Connection
    root: str
    sudo: bool = False

    @property
    def name(self) -> str:
        return self.connection.name

    def offer(
        self,
        head: Iterable[bytes],
        allowances: Sequence[str],
        *,
        keep: int | None = None,
        dry_run: bool = False,
    ) -> Offer:
        """What it says to the head of a bundle, which it remembers unless ``dry_run``.

        Where the disk is too full it makes room for the rest, down to ``keep`` good releases.
        """
        words = ["offer", *allowances, *(["--dry-run"] if dry_run else [])]
        words += ["--keep", str(keep)] if keep is not None else []
        return _of(Offer, self._ask(*words, stdin=head), self.name, missing=Missing)

    def receive(self, release: str, pieces: Iterable[bytes]) -> Offer:
        """Hands it files of a release that it was offered; what it then says to the release."""
        return _of(Offer, self._ask("receive", release, stdin=pieces), self.name, missing=Missing)

    def install(self, release: str, words: Sequence[str], on_line: Callable[[str], None]) -> Installed:
        """Has it switch, test, and stay or go back; a release that it went back from is a value."""
        return _of(
            Installed, self._ask("install", release, *words, on_line=on_line, accept=(0, 5)), self.name
        )

    def self_test(
        self, release: str, words: Sequence[str], on_line: Callable[[str], None]
    ) -> dict[str, object]:
        """The facts of check, with the agent's own verdict; the verdict alone when it did not get to facts."""
        return self._ask("self-test", release, *words, on_line=on_line, accept=(0, 5))

    def rollback(self, on_line: Callable[[str], None]) -> Installed:
        """Has it go back to the release before; with reasons when that one does not start."""
        return _of(Installed, self._ask("rollback", on_line=on_line, accept=(0, 5)), self.name)

    def collect(self, keep: int) -> None:
        """Has it remove all but ``keep`` good releases."""
        self._ask("gc", "--keep", str(keep))

    def status(self) -> Status:
        """Its store and the last lines of its journal. Raises Unsupported for an agent that speaks another language."""
        return _status(self._ask("status"), self.name)

    def journal(self) -> tuple[dict[str, object], ...]:
        """All that its journal still has, the oldest first."""
        return _events(self._ask("journal"))

    def fsck(self, on_line: Callable[[str], None]) -> Fsck:
        """Has it hash every file again, set aside what is bad, and mend what it can."""
        return _of(Fsck, self._ask("fsck", on_line=on_line), self.name, missing=Damage, bad=Bad)

    def _ask(
        self,
        *words: str,
        stdin: Iterable[bytes] = (),
        on_line: Callable[[str], None] | None = None,
        accept: Sequence[int] = (0,),
    ) -> dict[str, Any]:
        argv = [*as_whom(self.sudo), "python3", "-I", f"{self.root}/agent.pyz", "--root", self.root, *words]
        tell = None if on_line is None else _reports(on_line)
        answer = self.connection.run(argv, stdin=stdin, on_line=tell)
        if answer.status not in accept or not answer.stdout:
            raise failure(self.name, answer)
        return _document(self.name, answer)


def find(connection: Connection, where: Where) -> Device:
    """The enrolled store that is meant. Raises NotEnrolled when there is none, and what `look` raises."""
    seen = look(connection, where)
    found = [
        place
        for place in seen.stores
        if place.enrolled and (where.mode != "user" or place.root == seen.home or where.root is not None)
    ]
    if not found:
        raise NotEnrolled(
            f"{connection.name} is not enrolled: nothing there says who may sign",
            hint=f"edgepack flash --enroll --signers FILE {connection.name}",
        )
    ours = [place for place in found if place.ours]
    if not ours:
        raise BadInput(
            f"{found[0].root} on {connection.name} belongs to another user",
            hint="use --sudo, or log in as that user",
        )
    if len(ours) > 1:
        names = " and ".join(place.root for place in ours)
        raise BadInput(f"{connection.name} has two stores, {names}", hint="name one with --root")
    return Device(connection=connection, root=ours[0].root, sudo=where.sudo)


def is_ours(store: Store) -> bool:
    """Whether the agent there is this edgepack's."""
    return store.agent == f"sha256:{hashlib.sha256(enrolled.zipapp()).hexdigest()}"


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A bundle as it lies on a device."""

    digest: str
    name: str | None
    """None, as sequence and bytes, where what describes it is damaged."""
    sequence: int | None
    bytes: int | None
    whole: bool
    good: bool
    current: bool
    previous: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """What an enrolled agent says of what it keeps."""

    enrolled: bool
    mode: Mode | None
    current: str | None
    previous: str | None
    sequence: int
    """Highest that was ever good."""
    releases: tuple[Release, ...]
    free: int
    agent: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A file of a bundle that a device has not whole."""

    digest: str
    bytes: int
    have: int
    """Its first bytes that are there already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """How a device answers to the head of a bundle."""

    release: str
    name: str
    sequence: int
    state: State
    missing: tuple[Missing, ...]
    good: bool
    """Whether its self-test passed there."""

    @property
    def left(self) -> int:
        """Bytes that must still travel."""
        return sum(one.bytes - one.have for one in self.missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """An agent's account of a switch."""

    outcome: Outcome
    release: str
    current: str | None
    previous: str | None
    seconds_to_switch: float | None
    selftest: dict[str, object] | None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file of a release that is missing there, since its bytes were not its own."""

    release: str
    path: str
    digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """What was found with other bytes than it must have."""

    path: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fsck:
    """What reading every byte of a store showed."""

    checked: int
    """Files, each of them hashed."""
    bad: tuple[Bad, ...]
    mended: int
    """Files that were put back from what the store has."""
    missing: tuple[Damage, ...]
    restarts: bool = True
    """Whether the current release has all its files; one that has not runs on, and does not start again."""
    back: str | None = None
    """The release that its next start goes back to by itself; None where nothing does, or none is whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What an agent says of its store, and the last lines of its journal."""

    store: Store
    journal: tuple[dict[str, object], ...]


def _status(document: Mapping[str, Any], host: str) -> Status:
    return Status(store=_of(Store, document.get("store"), host, releases=Release), journal=_events(document))


def _events(document: Mapping[str, Any]) -> tuple[dict[str, object], ...]:
    lines = document.get("journal")
    return tuple(line for line in lines if isinstance(line, dict)) if isinstance(lines, list) else ()


def moment(event: Mapping[str, object]) -> str:
    """When a line of a journal was written, in UTC by the device's clock; "-" where it does not say."""
    at = event.get("at")
    if not isinstance(at, int) or not 0 <= at < 1 << 33:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


T = TypeVar("T")


def _of(cls: type[T], document: object, source: str, **lists: type[Any]) -> T:
    """A document of an agent as a value; fields that a newer agent added are passed over. Raises BadInput."""
    if not isinstance(document, dict):
        raise BadInput(f"{source} answered what is no document")
    kept = _only(cls, document)
    for name, kind in lists.items():
        rows = kept.get(name)
        kept[name] = (
            [_only(kind, row) if isinstance(row, dict) else row for row in rows]
            if isinstance(rows, list)
            else rows
        )
    return serde.load(cls, kept, source=source)


def _only(cls: type[Any], document: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in document.items() if name in names}


_RAISES: Mapping[int, tuple[type[EdgepackError], str | None]] = {
    2: (BadInput, None),
    5: (CheckFailed, "edgepack check BUNDLE --on HOST says which part"),
    6: (Untrusted, None),
    7: (MissingTool, "install it there"),
    10: (
        NoSpace,
        "free some space there; --keep 1 removes good releases that are neither current nor previous",
    ),
    11: (Busy, "wait until it has ended; --status shows what it does"),
    130: (Interrupted, "the same command goes on where it stopped"),
}
_WORDS = (
    "bad usage: ",
    "failed: ",
    "refused: ",
    "missing: ",
    "no space: ",
    "busy: ",
    "cannot read or write: ",
)
"""What an agent's last line begins with when it gives up."""


def _reports(on_line: Callable[[str], None]) -> Callable[[str], None]:
    """Hands on what an agent says while it works; why it gives up is told as the error."""
    return lambda line: None if line.startswith(_WORDS) else on_line(line)


def failure(host: str, answer: Answer) -> EdgepackError:
    """What an agent's exit status stands for, in its own words."""
    said = [line.strip() for line in answer.said if line.strip()] or [f"ended with status {answer.status}"]
    text = said[-1]
    for line in said:
        if "sudo: " in line and "password" in line:
            return BadInput(
                f"sudo on {host} asks for a password",
                hint="let this user run python3 without one, log in as root, or use --mode user",
            )
    if answer.status == 127 and "sudo" in text:
        return MissingTool(f"{host}: {text}", hint="install sudo there, log in as root, or use --mode user")
    if answer.status == 127:
        return MissingTool(f"{host}: {text}", hint="install python3 there, 3.8 or newer")
    raises, hint = _RAISES.get(answer.status, (EdgepackError, None))
    for word in _WORDS:
        text = text.removeprefix(word)
    if raises is Untrusted and "--force-device" in text:
        text, hint = text.replace(" (--force-device)", ""), "--force does it all the same"
    if "unrecognized arguments" in text:
        hint = f"its agent is another edgepack's: edgepack flash --enroll {host} brings this one's"
    return raises(f"{host}: {text}", hint=hint)


def _printable(value: Any) -> Any:
    """A document without characters that would make a terminal do something."""
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in value)
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(inner) for name, inner in value.items()}
    return value


def _document(host: str, answer: Answer) -> dict[str, Any]:
    try:
        found = agent.parse_json(answer.stdout, "the answer")
    except agent.Refused as error:
        raise EdgepackError(f"{host} answered what is no document: {error}") from error
    if not isinstance(found, dict):
        raise EdgepackError(f"{host} answered what is no document")
    found = {str(name): value for name, value in _printable(found).items()}
    version = found.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise Unsupported(
            f"{host} speaks version {version} of the agent's language, and this edgepack version {SCHEMA_VERSION}",
            hint=f"edgepack flash --enroll {host} brings this edgepack's agent",
        )
    return found


def as_whom(sudo: bool) -> tuple[str, ...]:
    """What stands before a program that is run there."""
    return ("sudo", "-n") if sudo else ()


# ── before there is one: what this edgepack runs there itself ────────────────────────────────────────

LOOK = """\
import json, os, sys
home = os.path.expanduser({user!r})
roots = [os.path.abspath(os.path.expanduser(root)) for root in sys.argv[1:]] or [{system!r}, home]
json.dump(
    {{
        "python": list(sys.version_info[:3]),
        "administrator": os.geteuid() == 0,
        "systemd": os.path.isdir("/run/systemd/system"),
        "home": home,
        "stores": [
            {{"root": root, "enrolled": os.path.exists(os.path.join(root, "enrolled.json")),
              "ours": os.path.isdir(root) and os.stat(root).st_uid == os.geteuid()}}
            for root in roots
        ],
    }},
    sys.stdout,
)
"""
"""Runs on every Python 3: an old one is to be named, not to break on the agent's syntax."""

ENROLL = """\
import base64, os, subprocess, sys, tempfile
AGENT = base64.b64decode({agent!r})
SIGNERS = base64.b64decode({signers!r})
with tempfile.TemporaryDirectory(prefix="edgepack-enroll-") as folder:
    path = os.path.join(folder, "agent.pyz")
    with open(path, "wb") as out:
        out.write(AGENT)
    words = [sys.executable, "-I", path, "--root", sys.argv[1], "enroll", "--agent", path] + sys.argv[2:]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        process.communicate(SIGNERS)
sys.exit(process.returncode)
"""
"""Runs the agent from a folder that nobody else uses; the agent puts itself into the store, under its lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder that is a store, or may become one."""

    root: str
    enrolled: bool
    ours: bool
    """Whether it belongs to who looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a look at a machine shows, before any agent is there."""

    python: tuple[int, ...]
    administrator: bool
    systemd: bool
    home: str
    stores: tuple[Place, ...]


def look(connection: Connection, where: Where) -> Seen:
    """Logs in and looks. Raises what logging in raises, MissingTool without a Python, Unsupported for an old one."""
    roots = () if (root := _named(connection, where)) is None else (root,)
    program = LOOK.format(system=SYSTEM_ROOT, user=installer.USER_ROOT).encode()
    argv = [*as_whom(where.sudo), "python3", "-I", "-", *roots]
    answer = connection.run(argv, stdin=(program,), timeout=LOOK_SECONDS)
    if answer.status != 0:
        raise failure(connection.name, answer)
    seen = serde.load(Seen, _document(connection.name, answer), source=connection.name)
    if seen.python < PYTHON:
        found, needed = (".".join(map(str, version)) for version in (seen.python, PYTHON))
        raise Unsupported(f"{connection.name} has Python {found}, and the agent needs {needed}")
    return seen


def _named(connection: Connection, where: Where) -> str | None:
    """The one folder that can be meant; None when the machine's own places are to be looked at."""
    if connection.folder is not None:
        if where.root is not None or where.mode == "system":
            raise BadInput(
                f"{connection.name} is the store itself, and --root or --mode system names another"
            )
        return str(connection.folder)
    return SYSTEM_ROOT if where.root is None and where.mode == "system" else where.root


def enroll(
    connection: Connection,
    where: Where,
    *,
    signers: Path | None,
    server: str | None,
    keep: int | None,
    replace_signers: bool,
    progress: Progress,
) -> Status:
    """Puts this edgepack's agent and who may sign onto a device; what the agent then says of its store.

    Without ``signers`` those stay that are enrolled there. Raises BadInput, NotFound, and what the agent refuses.
    """
    given = b"" if signers is None else _signers(signers)
    seen = look(connection, where)
    owner: Mode = "system" if seen.administrator and where.root is None else "user"
    mode: Mode = where.mode or ("none" if connection.folder is not None else owner)
    if mode != "none" and not seen.systemd:
        raise BadInput(
            f"{connection.name} does not run systemd, which would start what is installed",
            hint="--mode none installs and tests releases, and leaves starting them to you",
        )
    place = seen.stores[0]  # the one that was named, or the system's
    own = mode == "user" or (mode == "none" and not seen.administrator)
    root = seen.home if _named(connection, where) is None and own else place.root
    if not given and not any(one.enrolled for one in seen.stores if one.root == root):
        raise BadInput(
            f"{connection.name} is not enrolled yet: say who may sign",
            hint="--signers FILE: the allowed_signers that `edgepack key new` wrote",
        )
    words = ["--mode", mode]
    words += ["--keep", str(keep)] if keep is not None else []
    words += ["--server", server] if server is not None else []
    words += ["--replace-signers"] if replace_signers else []
    told = {"agent": enrolled.zipapp(), "signers": given}
    program = ENROLL.format(**{name: base64.b64encode(content).decode() for name, content in told.items()})
    progress.step(f"enrolling {connection.name}: {root}, mode {mode}")
    argv = [*as_whom(where.sudo), "python3", "-I", "-", root, *words]
    answer = connection.run(argv, stdin=(program.encode(),), on_line=_reports(progress.step))
    if answer.status != 0:
        raise failure(connection.name, answer)
    document = _document(connection.name, answer)
    notes = document.get("notes")
    for note in notes if isinstance(notes, list) else ():
        progress.step(str(note))
    return _status(document, connection.name)


def _signers(path: Path) -> bytes:
    """An allowed_signers file; never a private key that was taken for one. Raises NotFound, BadInput."""
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    content = path.read_bytes()
    lines = [
        line for line in content.decode("utf-8", "replace").splitlines() if line and not line.startswith("#")
    ]
    if b"PRIVATE KEY" in content or not all("ssh-" in line.partition(" ")[2] for line in lines) or not lines:
        raise BadInput(
            f"{path} is no allowed_signers file",
            hint="`edgepack key new PATH` writes PATH.allowed_signers; its lines are: edgepack ssh-ed25519 AAAA…",
        )
    return content
