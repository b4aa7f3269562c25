"""Keeps releases on a device: receives them, switches between whole ones, tests them, goes back. Stdlib, Python >= 3.8.

    agent.pyz facts                               this machine, and what its store holds
    agent.pyz enroll --mode system|user|none      makes the store; who may sign comes on stdin
    agent.pyz offer                               head of a release on stdin: may it be installed, what is missing
    agent.pyz receive RELEASE                     missing blobs on stdin, each from where it stopped
    agent.pyz install RELEASE|BUNDLE.tar [...]    switch, test, and stay or go back
    agent.pyz self-test | rollback | gc | status | fsck | boot | journal

All take --root ROOT. One JSON document on stdout, progress on stderr. Exit status: 0 done, 2 bad usage, 5 the release
failed its test and the one before it runs, 6 refused, 7 a program is missing, 10 no space, 11 another installer is
at work, 130 interrupted.

After a power cut or a kill at any moment the same command goes on, and until then ``current`` names the release that
it named before or the new one, both whole: bytes are on the disk before a name says that they are there.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
)

from edgepack.device import agent
from edgepack.device.agent import BadUsage, Failed, MissingProgram, NoSpace, Refused, say

SCHEMA_VERSION = 1
SYSTEM_ROOT = "/var/lib/edgepack"
USER_ROOT = "~/.local/share/edgepack"
MARGIN = 16 * agent.MIB
"""Bytes of the disk that stay free: the journal and the next change need some."""
FLUSH = 16 * agent.MIB
"""Bytes of a blob after which they are made durable, so that a power cut costs no more."""
HEX = re.compile(r"[0-9a-f]{64}\Z")


class Busy(Exception):
    """Another installer changes this store."""


# ── every change of the disk ─────────────────────────────────────────────────────────────────────────
# Whatever is written goes through these, in an order in which nothing has a name before it is on the disk.


def fsync(handle: int) -> None:
    os.fsync(handle)


def fsync_folder(path: str) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fsync(handle)
    finally:
        os.close(handle)


def rename(old: str, new: str) -> None:
    """Gives what is durable its name, which then is durable too."""
    os.replace(old, new)
    fsync_folder(os.path.dirname(new))


def write_all(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def write_new(path: str, content: bytes, mode: int = 0o644) -> None:
    """A durable file under a name that nobody reads yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, mode)
    try:
        write_all(handle, content)
        os.fchmod(handle, mode)
        fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: str, content: bytes, mode: int = 0o644) -> None:
    """A file that is the old one or the new one, whole."""
    new = fresh(path)
    write_new(new, content, mode)
    rename(new, path)


def point(link: str, target: str) -> None:
    """A symbolic link that names the old target or the new one."""
    new = fresh(link)
    os.symlink(target, new)
    rename(new, link)


def hard_link(source: str, target: str) -> None:
    """Another name for a file; `fsync_folder` makes it durable."""
    os.link(source, target, follow_symlinks=False)


def seal(path: str, mode: int) -> None:
    """Makes a file's bytes and mode durable."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(handle, mode)
        fsync(handle)
    finally:
        os.close(handle)


def new_folder(path: str, mode: int = 0o755) -> None:
    """A folder; `fsync_folder` of the one around it makes its name durable."""
    os.mkdir(path, mode)
    os.chmod(path, mode)


def make_folder(path: str, mode: int = 0o755) -> None:
    """A folder with a durable name; one that is there already stays. Raises Refused for what is none."""
    if not is_folder(path):
        new_folder(path, mode)
        fsync_folder(os.path.dirname(path))


def make_folders(path: str) -> None:
    """A folder, and those around it that are not there either, each with a durable name."""
    if not os.path.isdir(path):
        make_folders(os.path.dirname(path))
        make_folder(path)


def remove(path: str) -> None:
    """Removes the name of a file or link, durable; nothing there is no error."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        fsync_folder(os.path.dirname(path))


def clear(path: str) -> None:
    """Removes whatever has this name, with all that is in it; links are removed, never followed."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        os.unlink(path)
        return
    for name in os.listdir(path):
        clear(os.path.join(path, name))
    os.rmdir(path)


def discard(path: str) -> None:
    """Removes a folder that is read by its name: that goes first, so that no kill leaves half of it."""
    if os.path.lexists(path):
        gone = fresh(path)
        rename(path, gone)
        clear(gone)


def fresh(path: str) -> str:
    """The name of something beside ``path`` while it is made; what a killed installer left there is gone."""
    new = os.path.join(os.path.dirname(path), ".new-" + os.path.basename(path))
    clear(new)
    return new


def is_folder(path: str) -> bool:
    """Whether there is a folder; no link to one passes for it. Raises Refused for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        raise Refused("%s is not a folder" % path)
    return True


def file_size(path: str) -> Optional[int]:
    """Bytes of a file; None where there is none. Raises Refused for what is no file."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise Refused("%s is not a file" % path)
    return found.st_size


def read_whole(path: str, limit: int = agent.JSON_LIMIT) -> Optional[bytes]:
    """A small file of the store, no link followed; None when it is not there. Raises Refused beyond the limit."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise Refused("%s has more than %d bytes" % (path, limit))
    return content


def hash_on_disk(path: str) -> str:
    """Hex sha256 of a file as the disk gives it back: what the page cache holds of it is dropped first."""
    digest = hashlib.sha256()
    read_back(path, digest, 0, os.lstat(path).st_size)
    return digest.hexdigest()


def read_back(path: str, digest: Any, begin: int, end: int) -> None:
    """Hashes bytes of a file as the disk gives them back; a file that ends before gives fewer."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError, AttributeError):  # a hint: where it is refused, the cache is read
            os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_DONTNEED)
        while begin < end:
            piece = os.pread(handle, min(agent.PIECE, end - begin), begin)
            if not piece:
                return
            digest.update(piece)
            begin += len(piece)
    finally:
        os.close(handle)


# ── what the installer acts through ──────────────────────────────────────────────────────────────────


def run_program(argv: List[str]) -> Tuple[int, str]:
    """Exit status and output of a program, stderr with it. Raises MissingProgram."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=3600,
            check=False,
        )
    except FileNotFoundError:
        raise MissingProgram("%s is not installed" % argv[0]) from None
    except subprocess.TimeoutExpired:
        return 124, "no answer within an hour"
    return done.returncode, done.stdout.decode("utf-8", "replace")


_GUARD = "import os, sys; sys.stdin.buffer.read() == b'done' or os.execvp(sys.argv[1], sys.argv[1:])"


def guard(argv: List[str]) -> Callable[[], None]:
    """Runs a program should this process be killed before it calls what is returned."""
    waiting = subprocess.Popen(
        [sys.executable, "-I", "-c", _GUARD, *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def done() -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody ended it
            waiting.communicate(b"done")

    return done


class World(NamedTuple):
    """What lies beyond the store; a test hands in another."""

    run: Callable[[List[str]], Tuple[int, str]] = run_program
    guard: Callable[[List[str]], Callable[[], None]] = guard
    check: Callable[[argparse.Namespace], Dict[str, Any]] = agent.check
    machine: Callable[[], Dict[str, Any]] = agent.machine_facts
    clock: Callable[[], float] = time.time
    system_units: str = "/etc/systemd/system"
    passing_units: str = "/run/systemd/system"
    user_units: str = "~/.config/systemd/user"


# ── the store ────────────────────────────────────────────────────────────────────────────────────────

FOLDERS = ("blobs", "blobs/sha256", "incoming", "quarantine", "releases")


KEEP = 2
"""Good releases that stay where nobody said how many."""


class Settings(NamedTuple):
    """How a store was enrolled."""

    mode: str
    keep: int
    server: Optional[str]
    tries: int


class Store:
    """A root folder with one owner, into which nobody else writes. Raises Refused when it is not that.

    Any user may be told of root's, which only root may change (``reading``).
    """

    def __init__(self, root: str, world: World, *, reading: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.world = world
        self.signers = self.path("allowed_signers")
        for folder in ("", *FOLDERS):
            _own_folder(self.path(folder) if folder else self.root, reading=reading)
        self.settings = _settings(self.path("enrolled.json"))

    def path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    def blob(self, digest: str) -> str:
        return self.path("blobs", "sha256", _hex(digest))

    def part(self, digest: str) -> str:
        return self.path("incoming", _hex(digest) + ".part")

    def offer(self, release: str) -> str:
        return self.path("incoming", release + ".offer")

    def release(self, release: str) -> str:
        return self.path("releases", release)

    def good(self, release: str) -> Optional[int]:
        """Which of the good releases it is, by the order in which their tests passed; None when it is not good."""
        content = read_whole(self.release(release) + ".good")
        if content is None:
            return None
        found = re.search(rb'"order": ?(\d{1,9})\b', content)
        return int(found.group(1)) if found else 0

    def tries(self, release: str) -> int:
        content = read_whole(self.release(release) + ".tries")
        return int(content) if content is not None and re.match(rb"\d{1,6}\n\Z", content) else 0

    def target(self, link: str) -> Optional[str]:
        """The release that ``current`` or ``previous`` names, whether it is there or not; None without a link."""
        try:
            found = re.match(r"releases/([0-9a-f]{64})\Z", os.readlink(self.path(link)))
        except FileNotFoundError:
            return None
        except OSError:
            raise Refused("%s is no link" % self.path(link)) from None
        if found is None:
            raise Refused("%s does not name a release" % self.path(link))
        return found.group(1)

    def releases(self) -> List[str]:
        names = os.listdir(self.path("releases"))
        return sorted(name for name in names if HEX.match(name))

    def sequence(self) -> Tuple[int, Optional[str]]:
        """The highest sequence that was ever good, and the release that had it; it outlives its release.

        Where a failing disk lost the file or left it unreadable, the journal and the good releases tell: neither may a
        downgrade pass then, nor every release be refused.
        """
        told = _sequence(self.path("sequence.json"))
        return told or max(_told_sequences(self), default=(0, None), key=lambda told: told[0])

    def free(self) -> int:
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def note(self, event: str, **facts: Any) -> None:
        """A line of the journal, durable before the next step."""
        line = dict(facts, event=event, at=int(self.world.clock()))
        _append_line(self.path("journal.jsonl"), json.dumps(line, sort_keys=True).encode("ascii") + b"\n")


def _own_folder(path: str, *, reading: bool = False) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise BadUsage("%s is no store: enroll this device first" % path) from None
    if not stat.S_ISDIR(found.st_mode):
        raise Refused("%s is not a folder" % path)
    if found.st_uid != os.geteuid() and not (reading and found.st_uid == 0):
        raise Refused("%s belongs to user %d, and this is user %d" % (path, found.st_uid, os.geteuid()))
    if found.st_mode & 0o022:
        raise Refused("%s can be written by others (mode %o)" % (path, stat.S_IMODE(found.st_mode)))


def _settings(path: str) -> Settings:
    content = read_whole(path)
    if content is None:
        raise BadUsage("%s is missing: enroll this device first" % path)
    found = _object(content, path)
    try:
        mode, keep, server, tries = (found[name] for name in Settings._fields)
    except KeyError as error:
        raise Refused("%s has no %s" % (path, error)) from None
    if mode not in SERVICES or not isinstance(keep, int) or not isinstance(tries, int):
        raise Refused("%s was not written by enroll" % path)
    return Settings(mode, keep, server, tries)


UNREADABLE = (errno.EIO, errno.ELOOP, errno.EISDIR)
"""What the disk answers for a file that it damaged; the store goes on without it."""


def _sequence(path: str) -> Optional[Tuple[int, Optional[str]]]:
    """What sequence.json says; None when it is not there or cannot be read."""
    try:
        content = read_whole(path)
        found = {} if content is None else _object(content, "sequence.json")
    except Refused:
        return None
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        return None
    number, release = found.get("sequence"), found.get("release")
    if not isinstance(number, int) or not (release is None or isinstance(release, str)):
        return None
    return number, release


def _told_sequences(store: Store) -> Iterator[Tuple[int, Optional[str]]]:
    """Sequences of releases that were good, with their releases: by the journal, and by what is installed."""
    for line in journal_lines(store, JOURNAL_LIMIT):
        number, release = line.get("sequence"), line.get("release")
        if line["event"] == "good" and isinstance(number, int) and isinstance(release, str):
            yield number, release
    for release in good_releases(store):
        head = _readable_head(store, release)
        if head is not None:
            yield release_sequence(agent.head_of(head)), release


def _object(content: bytes, what: str) -> Dict[str, Any]:
    value = agent.parse_json(content, what)
    if not isinstance(value, dict):
        raise Refused("%s is not a JSON object" % what)
    return value


def _hex(digest: str) -> str:
    found = digest.rpartition(":")[2]
    if not HEX.match(found):
        raise BadUsage("%s is no sha256 digest" % agent._shown(digest))
    return found


JOURNAL_LIMIT = agent.MIB


def _append_line(path: str, line: bytes) -> None:
    """Appends a line, durable; half a line that a power cut left is cut, and an old journal's first half too."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o644)
    try:
        size = os.fstat(handle).st_size
        tail = os.pread(handle, JOURNAL_LIMIT, max(0, size - JOURNAL_LIMIT // 2))
        whole = tail[: tail.rfind(b"\n") + 1]
        if len(whole) != len(tail):
            os.ftruncate(handle, size - len(tail) + len(whole))
        if size <= JOURNAL_LIMIT:
            write_all(handle, line)
            fsync(handle)
    finally:
        os.close(handle)
    if size > JOURNAL_LIMIT:
        write_whole(path, whole[whole.find(b"\n") + 1 :] + line)
    elif size == 0:
        fsync_folder(os.path.dirname(path))


def journal_lines(store: Store, count: int) -> List[Dict[str, Any]]:
    """The last lines of the journal; half a line at its end is none."""
    content = read_whole(store.path("journal.jsonl"), 4 * JOURNAL_LIMIT) or b""
    return [_event(line) for line in content[: content.rfind(b"\n") + 1].splitlines()[-count:]]


def _event(line: bytes) -> Dict[str, Any]:
    try:
        found = _object(line, "journal.jsonl")
    except Refused:  # what a power cut made of it; the lines around it still tell
        found = {}
    return dict({"event": "unreadable"}, **found)


@contextlib.contextmanager
def locked(root: str, command: str) -> Iterator[None]:
    """Holds the store for one installer. Raises Busy with who has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(os.path.join(os.path.realpath(root), "lock"), flags, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode("ascii", "replace").strip()
            raise Busy("another installer is at work here: %s" % (holder or "it has just begun")) from None
        with contextlib.suppress(
            OSError
        ):  # only for whoever meets the lock: a full disk does not stop a rollback
            os.ftruncate(handle, 0)
            os.pwrite(handle, b"process %d, %s\n" % (os.getpid(), command.encode("ascii", "replace")), 0)
        yield
    finally:
        os.close(handle)


def sweep(store: Store) -> None:
    """Removes what a killed installer left: everything that was being made, and markers of releases that are gone.

    Only under the lock, like all that makes such things: what another installer is making looks the same.
    """
    for path in leftovers(store):
        clear(path)
    there = set(store.releases())
    for name in os.listdir(store.path("releases")):
        owner, _, kind = name.partition(".")
        if kind in ("good", "tries") and owner not in there:
            remove(store.path("releases", name))


def leftovers(store: Store) -> List[str]:
    """What was being made."""
    return [
        store.path(folder, name)
        for folder in (".", "blobs/sha256", "incoming", "quarantine", "releases")
        for name in os.listdir(store.path(folder))
        if name.startswith((".new-", "edgepack-sig-")) or (folder, name) == ("incoming", "self-test")
    ]


# ── enrolling ────────────────────────────────────────────────────────────────────────────────────────

SIGNERS_LIMIT = 1 << 16
AGENT_LIMIT = 16 * agent.MIB
_SIGNER = re.compile(r"^[^#\s]\S*\s.*?\b(?:ssh|ecdsa|sk)-\S+ [A-Za-z0-9+/]{40,}={0,3}", re.M)
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./@+-]*\Z")
HIDDEN = re.compile(r"/(?:home|root|run/user|tmp|var/tmp)/")
"""What ProtectHome= and PrivateTmp= of a release's unit hide from its server (systemd.exec)."""


def enroll(options: argparse.Namespace, world: World) -> Dict[str, Any]:
    """Makes the store and says who may sign; from then on nothing else can be installed.

    The agent that was brought becomes the store's own after all that can be refused: then the one before stays.
    Raises Refused when others are named than those before, BadUsage for a root that cannot be one.
    """
    brought = None if options.agent is None else read_whole(options.agent, AGENT_LIMIT)
    if options.agent is not None and not brought:
        raise BadUsage("--agent %s is no file with an agent in it" % options.agent)
    given = options.input.read(SIGNERS_LIMIT + 1)
    root = os.path.realpath(options.root)
    _may_enroll(root, options)
    make_folders(root)
    _own_folder(root)
    with locked(root, "enroll"):
        content = read_whole(os.path.join(root, "enrolled.json"))
        before = {} if content is None else _object(content, "enrolled.json")
        if before.get("mode", "none") not in ("none", options.mode):  # mode none has no units
            raise Refused(
                "%s is enrolled in another mode, whose units would stay: choose another --root" % root
            )
        keep = options.keep if options.keep is not None else int(before.get("keep", KEEP))
        server = options.server if options.server is not None else before.get("server")
        _require_server(server, options.mode)  # one that is remembered of mode none too
        for folder in FOLDERS:
            make_folder(os.path.join(root, folder), 0o700 if folder in ("incoming", "quarantine") else 0o755)
        _require_links(root)
        _write_signers(os.path.join(root, "allowed_signers"), given, replace=options.replace_signers)
        settings = {
            "schema_version": SCHEMA_VERSION,
            "mode": options.mode,
            "keep": keep,
            "server": server,
            "tries": 3,
        }
        notes = SERVICES[options.mode](root, server, world).enroll()
        if brought is not None:
            write_whole(os.path.join(root, "agent.pyz"), brought)
        write_whole(os.path.join(root, "enrolled.json"), _json(settings))
        store = Store(root, world)
        sweep(store)
        store.note("enrolled", mode=options.mode, signers=hash_on_disk(store.signers))
        notes += start_current(store)
    return {"schema_version": SCHEMA_VERSION, "store": store_facts(options.root, world), "notes": notes}


def start_current(store: Store) -> List[str]:
    """Starts the release that a store had before it had a service, as of a card that was written elsewhere.

    Returns what the user should know: that it runs now, or why it does not.
    """
    service, current = service_of(store), store.target("current")
    if current is None or not service.runs:
        return []
    if not is_whole_release(store, current):
        return ["release %s lacks files and is not started: edgepack flash --fsck" % current[:12]]
    settle(store, current)
    if service.active():
        return []
    say("starting release %s" % current[:12])
    reasons = start(service)
    if reasons:
        return ["release %s does not start: %s" % (current[:12], "; ".join(reasons))]
    return ["release %s, which lay here, is started" % current[:12]]


def _may_enroll(root: str, options: argparse.Namespace) -> None:
    if options.mode != "none" and not _PLAIN_PATH.match(root):
        raise BadUsage("%s has characters that a unit cannot name: choose another --root" % root)
    if options.mode == "system" and os.geteuid() != 0:
        raise BadUsage("mode system installs units in /etc/systemd/system and needs root")
    if options.mode == "system" and root != os.path.realpath(SYSTEM_ROOT):
        raise BadUsage("the units of a bundle name %s: mode system has no other root" % SYSTEM_ROOT)
    if options.server is not None and not os.path.isabs(options.server):
        raise BadUsage("--server %s is not a whole path" % options.server)
    if options.server is not None and not os.access(options.server, os.X_OK):
        raise MissingProgram("--server %s cannot be run" % options.server)
    _require_server(options.server, options.mode)
    ours = {"agent.pyz", "allowed_signers", "enrolled.json", "lock", "journal.jsonl", "sequence.json"}
    ours |= {"blobs", "incoming", "quarantine", "releases", "current", "previous", "lost+found"}
    names = os.listdir(root) if os.path.isdir(root) else []
    foreign = sorted(name for name in names if name not in ours and not name.startswith("."))
    if foreign:
        raise BadUsage("%s holds %s, which is not a store's: choose another --root" % (root, foreign[0]))


def _require_server(server: Optional[str], mode: str) -> None:
    """Raises BadUsage for a server, asked for now or remembered, that the units of this mode cannot start."""
    if server is None or mode == "none":
        return
    if not _PLAIN_PATH.match(server):
        raise BadUsage("--server %s has characters that a unit cannot name" % server)
    if mode == "system" and any(HIDDEN.match(place) for place in (server, os.path.realpath(server))):
        raise BadUsage(
            "--server %s lies where the units of a release cannot look: put it into /usr/local/bin or /opt"
            % server
        )


def _require_links(root: str) -> None:
    """Raises BadUsage on a file system that cannot hold a store (FAT, most network and shared folders)."""
    one, other = fresh(os.path.join(root, "one")), fresh(os.path.join(root, "other"))
    try:
        write_new(one, b"")
        hard_link(one, other)
        clear(other)
        os.symlink("one", other)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise BadUsage("the file system of %s has no links: %s" % (root, error.strerror)) from None
    finally:
        clear(one)
        clear(other)


def _write_signers(path: str, given: bytes, *, replace: bool) -> None:
    before = read_whole(path, SIGNERS_LIMIT)
    if not given.strip() and before is not None:
        return
    text = given.decode("utf-8", "replace")
    if len(given) > SIGNERS_LIMIT or not _SIGNER.search(text):
        raise BadUsage("stdin names no signer: a line of allowed_signers is 'edgepack ssh-ed25519 AAAA…'")
    if before is not None and before != given and not replace:
        raise Refused("other signers are enrolled here already: --replace-signers puts yours in their place")
    if before != given:
        write_whole(path, given)


# ── services: three modes ────────────────────────────────────────────────────────────────────────────

POWER = "edgepack-power.service"
"""Selects the power mode of a release's plan, on a Jetson."""
CHAT = "edgepack-chat.service"
"""The front of a release's server; it starts with that where somebody enabled it."""
UNITS = ("edgepack.service", "edgepack-health.service", "edgepack-health.timer", POWER, CHAT)
"""The units that a release brings for the system."""

BOOT_UNIT = """\
# Counts the starts of a release that has not passed its test yet, and goes back to the one before it.
[Unit]
Description=The release that edgepack starts
Before=edgepack.service
RequiresMountsFor={root}

[Service]
Type=oneshot
ExecStart={python} {root}/agent.pyz --root {root} boot
TimeoutStartSec=600
NoNewPrivileges=yes

[Install]
WantedBy={target}
"""

DROP_IN = """\
# Each start of the server asks first which release it may be.
[Unit]
Wants=edgepack-boot.service
After=edgepack-boot.service

[Service]
{environment}"""

USER_UNIT = """\
# The release that ROOT/current names; its own start file knows how it is started.
[Unit]
Description=The language model that edgepack installed
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
Type=exec
# A release that carries a server was tested with that; the enrolled one is for those that carry none.
ExecStart=/bin/sh -c 'test -e {root}/current/{server} && unset EDGEPACK_LLAMA_SERVER; exec sh {root}/current/start.sh'
ExecStartPost=/bin/sh {root}/current/start.sh ready
TimeoutStartSec=3600
Restart=on-failure
RestartSec=5
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


TEST_UNIT = "edgepack-self-test.service"
TEST_FOLDER = "/run/edgepack-self-test"
TEST_SERVICE = """\
# The server of a release while it is tested: with all that its own unit allows and forbids, started by the agent.
[Unit]
Description=The release that edgepack tests
# Whatever starts the service ends the test before it: there is no memory for both.
Conflicts=edgepack.service
Before=edgepack.service
StartLimitIntervalSec=0

[Service]
{service}

# What is otherwise than in the release's unit.
Type=exec
RemainAfterExit=yes
Restart=no
TimeoutStartSec=300
RuntimeDirectory=edgepack-self-test
RuntimeDirectoryMode=0700
WorkingDirectory={cwd}
EnvironmentFile={folder}/server.env
StandardInput=null
StandardOutput=append:{folder}/server.log
StandardError=inherit
ExecStartPre=
ExecStartPre=/bin/sh -c 'umask 077; printf %%s "$$EDGEPACK_TEST_KEY" >{test_folder}/key'
ExecStart=
ExecStart={command}
ExecStartPost=
ExecReload=
ExecStop=
ExecStopPost=
{limit}"""

ACTIVE = re.compile(r"^(?:SubState=(?:running|start\S*|reload\S*)|Job=[1-9]\d*)$", re.M)
"""A service whose server runs, or is on its way: it starts, or waits for its turn. One that fails again and again waits
in auto-restart."""


class Service:
    """Mode none: nobody starts the server; the self-test is all that runs."""

    def __init__(self, root: str, server: Optional[str], world: World) -> None:
        self.root = root
        self.server = server
        self.world = world

    def enroll(self) -> List[str]:
        """Puts in place what outlives releases; returns what the user should know."""
        return []

    def apply(self, release: Optional[str]) -> None:
        """Makes the service manager know the units of this folder of a release; None: of no release."""

    def differs(self, release: str) -> bool:
        """Whether the service manager has other units than those of this folder of a release."""
        return False

    def active(self) -> bool:
        """Whether the server runs, or is on its way; where nobody starts it, none is missed."""
        return True

    def stop(self) -> None:
        """Ends the server. Raises Failed."""

    def start(self) -> None:
        """Starts the server and waits until it answers. Raises Failed."""

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """The server is stopped, and whoever has it so starts it again; after a kill or an error a guard does."""
        yield

    def launcher(self, folder: str) -> Optional[agent.Launcher]:
        """Who starts the server of this folder of a release for its test; None: the agent, with its own rights."""
        return None

    runs = False
    needs: Optional[str] = None
    """The file that starts a release."""


class Systemd(Service):
    """What the two modes with systemd have in common."""

    runs = True
    words: Sequence[str] = ()
    target = "multi-user.target"
    down = False
    """It was stopped here, and not started since."""

    def units(self) -> str:
        return self.world.system_units

    def active(self) -> bool:
        told = self._systemctl("show", "--property=SubState,Job", "edgepack.service", check=False)
        return ACTIVE.search(told) is not None

    def stop(self) -> None:
        loaded = self._systemctl("show", "--property=LoadState", "edgepack.service", check=False)
        if "not-found" not in loaded:
            self._systemctl("stop", "edgepack.service")
        self.down = True

    def start(self) -> None:
        self._systemctl("reset-failed", "edgepack.service", check=False)
        self._systemctl("start", "edgepack.service")
        self.down = False

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        done = self.world.guard(["systemctl", *self.words, "start", "edgepack.service"])
        self.stop()
        yield
        # After an error it is started as after a kill, when this process ends; so is one that did not start.
        if not self.down or not os.path.lexists(os.path.join(self.root, "current")):
            done()

    def enroll(self) -> List[str]:
        folder = self.units()
        make_folders(os.path.join(folder, "edgepack.service.d"))
        boot = BOOT_UNIT.format(python=sys.executable, root=self.root, target=self.target)
        write_whole(os.path.join(folder, "edgepack-boot.service"), boot.encode("ascii"))
        drop_in = DROP_IN.format(environment=self._environment())
        write_whole(os.path.join(folder, "edgepack.service.d", "50-boot.conf"), drop_in.encode("ascii"))
        self._systemctl("daemon-reload")
        self._systemctl("enable", "edgepack-boot.service")
        return []

    def _environment(self) -> str:
        if self.server is None:
            return ""
        python = os.path.basename(self.server).startswith("python")
        return "Environment=%s=%s\n" % ("EDGEPACK_PYTHON" if python else "EDGEPACK_LLAMA_SERVER", self.server)

    def _systemctl(self, *words: str, check: bool = True) -> str:
        status, said = self.world.run(["systemctl", *self.words, *words])
        if check and status != 0:
            why = (said.strip().splitlines() or ["no message"])[0]  # below it: where to read more
            raise Failed("did-not-start", "service", "systemctl %s: %s" % (" ".join(words), why))
        return said


class SystemService(Systemd):
    """Mode system: the units that the release brings, in /etc/systemd/system."""

    needs = UNITS[0]

    def launcher(self, folder: str) -> Optional[agent.Launcher]:
        return AsService(self.world, self._systemctl, folder)

    def differs(self, release: str) -> bool:
        brought = ((name, read_whole(os.path.join(release, name))) for name in UNITS)
        if any(content != read_whole(os.path.join(self.units(), name)) for name, content in brought):
            return True
        # They were put in place by an installer that ended before systemd read them.
        told = self._systemctl("show", "--property=NeedDaemonReload", "edgepack.service", check=False)
        return "=yes" in told

    def apply(self, release: Optional[str]) -> None:
        if release is None:
            self._systemctl("disable", "edgepack.service", check=False)
        for name in UNITS:
            content = None if release is None else read_whole(os.path.join(release, name))
            place = os.path.join(self.units(), name)
            if content is None:
                remove(place)
            elif content != read_whole(place):
                write_whole(place, content)
        self._systemctl("daemon-reload")
        if release is not None:
            self._systemctl("enable", "edgepack.service")
            if os.path.lexists(os.path.join(release, POWER)):
                self._select_power_mode()

    def _select_power_mode(self) -> None:
        """Now, since the test that follows is held against the plan; a server in another mode is slower, no worse."""
        try:
            # Not start: to systemd the unit has run, that of the release before.
            self._systemctl("restart", POWER)
        except Failed as error:
            say("the plan's power mode is not set: %s" % error)


class AsService:
    """Starts a server for its test as the unit of its release would, as a unit that is gone at the next boot."""

    key_file = TEST_FOLDER + "/key"

    def __init__(self, world: World, systemctl: Callable[..., str], release: str) -> None:
        self._world = world
        self._systemctl = systemctl
        self._release = release

    @contextlib.contextmanager
    def start(self, launch: agent.Launch) -> Iterator[Tuple[agent.Process, agent.Limit]]:
        """See `agent.Launcher`. The key goes through a file that only root and systemd read: any user sees a unit."""
        folder, systemctl = launch.folder, self._systemctl
        unit = os.path.join(self._world.passing_units, TEST_UNIT)
        environment = dict(launch.environment, EDGEPACK_TEST_KEY=launch.key)
        lines = ["%s=%s\n" % (name, _quoted(text)) for name, text in sorted(environment.items())]
        write_whole(os.path.join(folder, "server.env"), "".join(lines).encode("utf-8"), 0o600)
        write_whole(os.path.join(folder, agent.LOG_FILE), b"")
        os.makedirs(os.path.dirname(unit), mode=0o755, exist_ok=True)
        done = self._world.guard(["systemctl", "stop", TEST_UNIT])
        try:
            write_whole(unit, self._text(launch).encode("utf-8"))
            systemctl("daemon-reload")
            systemctl("start", TEST_UNIT)
            process = UnitProcess(systemctl)
            yield process, agent.limit_of(process.pid, launch.limit.bytes)
        finally:
            systemctl("stop", TEST_UNIT, check=False)
            systemctl("reset-failed", TEST_UNIT, check=False)
            remove(unit)
            systemctl("daemon-reload", check=False)
            done()

    def _text(self, launch: agent.Launch) -> str:
        """The unit: what the release's own says, and the device's additions to that, then what is otherwise here."""
        own = os.path.join(self._release, UNITS[0])
        additions = os.path.join(self._world.system_units, UNITS[0] + ".d")
        names = sorted(os.listdir(additions)) if os.path.isdir(additions) else []
        places = [own, *(os.path.join(additions, name) for name in names if name.endswith(".conf"))]
        found = [read_whole(place) for place in places]
        if found[0] is None:
            raise Failed("did-not-start", "service", "the release has no %s" % UNITS[0])
        size = launch.limit.bytes
        return TEST_SERVICE.format(
            service="\n".join(service_section((text or b"").decode("utf-8", "replace")) for text in found),
            cwd=launch.cwd or launch.folder,
            folder=launch.folder,
            test_folder=TEST_FOLDER,
            command=" ".join(_quoted(word).replace("%", "%%").replace("$", "$$") for word in launch.argv),
            limit="" if size is None else "MemoryMax=%d\nMemorySwapMax=0\n" % size,
        )


def _quoted(word: str) -> str:
    """A word as unit and environment files have it (systemd.syntax)."""
    return '"%s"' % word.replace("\\", "\\\\").replace('"', '\\"')


def service_section(unit: str) -> str:
    """The lines of a unit's [Service] sections, without comments."""
    kept: List[str] = []
    inside = continued = False
    for line in unit.splitlines():
        if line.lstrip()[:1] in ("#", ";"):
            continue
        if line.startswith("[") and not continued:
            inside = line.rstrip() == "[Service]"
        elif inside:
            kept.append(line)
        continued = line.endswith("\\")
    return "\n".join([*kept, ""])  # a last line that would go on ends here


class UnitProcess:
    """The process that systemd started for TEST_UNIT (agent.Process)."""

    def __init__(self, systemctl: Callable[..., str]) -> None:
        self._systemctl = systemctl
        self._status: Optional[int] = None
        self.pid = self._told()["ExecMainPID"]
        if not self.pid:
            raise Failed("did-not-start", "service", "systemd tells no process of %s" % TEST_UNIT)

    def poll(self) -> Optional[int]:
        if self._status is None and not agent.is_alive(self.pid):
            told = self._told()
            if told["MainPID"] != self.pid:  # else systemd has not noticed yet
                by_signal = told["ExecMainCode"] in (os.CLD_KILLED, os.CLD_DUMPED)
                self._status = -told["ExecMainStatus"] if by_signal else told["ExecMainStatus"]
        return self._status

    def wait(self, timeout: Optional[float] = None) -> int:
        began = time.monotonic()
        while True:
            status = self.poll()
            if status is not None:
                return status
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(TEST_UNIT, timeout)
            time.sleep(0.05)

    def _told(self) -> Dict[str, int]:
        names = ("MainPID", "ExecMainPID", "ExecMainCode", "ExecMainStatus")
        said = self._systemctl("show", "--property=" + ",".join(names), TEST_UNIT)
        told = {name: int(value) for name, value in re.findall(r"^(\w+)=(\d+)$", said, re.M)}
        return dict(dict.fromkeys(names, 0), **told)


class UserService(Systemd):
    """Mode user: one unit of ours, which runs whatever ``current`` names."""

    needs = "start.sh"
    words = ("--user",)
    target = "default.target"

    def units(self) -> str:
        return os.path.expanduser(self.world.user_units)

    def enroll(self) -> List[str]:
        make_folders(self.units())
        unit = USER_UNIT.format(root=self.root, server=agent.SERVER).encode("ascii")
        write_whole(os.path.join(self.units(), "edgepack.service"), unit)
        super().enroll()
        self._systemctl("enable", "edgepack.service")
        name = str(os.geteuid())
        status, said = self.world.run(["loginctl", "show-user", name, "--property=Linger"])
        if status != 0 or "Linger=yes" not in said:
            return ["the server ends with your session: loginctl enable-linger lets it run from boot on"]
        return []

    def _systemctl(self, *words: str, check: bool = True) -> str:
        if "XDG_RUNTIME_DIR" not in os.environ:  # as in a login without PAM's systemd module
            os.environ["XDG_RUNTIME_DIR"] = "/run/user/%d" % os.geteuid()
        return super()._systemctl(*words, check=check)


SERVICES = {"system": SystemService, "user": UserService, "none": Service}


def service_of(store: Store) -> Service:
    return SERVICES[store.settings.mode](store.root, store.settings.server, store.world)


# ── what may be installed ────────────────────────────────────────────────────────────────────────────


class Admission(NamedTuple):
    """A release that may be installed here, and why."""

    bundle: agent.Bundle
    plan: Dict[str, Any]
    sequence: int
    match: List[Dict[str, str]]
    memory: Dict[str, Any]


def admit(
    store: Store, bundle: agent.Bundle, plan_json: bytes, options: argparse.Namespace, machine: Dict[str, Any]
) -> Admission:
    """Holds a release's head against signers, sequence and this machine; nothing is written. Raises Refused."""
    release = _hex(bundle["manifest_digest"])
    agent.verify_signature(bundle, store.signers)
    sequence = release_sequence(bundle)
    highest, holder = store.sequence()
    runs_here = store.target("current") == release and store.good(release) is not None  # it may be mended
    may_be_lower = options.allow_downgrade or runs_here
    if not may_be_lower and sequence < highest:
        raise Refused(
            "its release sequence %d is below %d, which ran here: --allow-downgrade" % (sequence, highest)
        )
    if not may_be_lower and sequence == highest and release != holder:
        raise Refused(
            "another release ran here with the sequence %d: edgepack build --release-sequence %d, or --allow-downgrade"
            % (sequence, highest + 1)
        )
    plan_file = agent.find_file(bundle, "plan.json")
    if plan_file is None:
        raise Refused("the release has no plan.json")
    if plan_file["digest"] != "sha256:" + hashlib.sha256(plan_json).hexdigest():
        raise Refused("plan.json has another sha256 than the manifest says")
    plan = _object(plan_json, "plan.json")
    with plan_read():
        match = agent.match_device(plan["profile"], machine)
        memory = memory_need(bundle, plan, machine, store.root)
        _is_tested_here(plan)
        promise_of(plan)
    if not (options.force_device or options.other_device):
        _is_the_planned_device(match)
    if not options.force_device:
        _has_the_memory(memory)
    return Admission(bundle, plan, sequence, match, memory)


def _is_tested_here(plan: Dict[str, Any]) -> None:
    """Refuses what the self-test could not begin with: it is not to be found out after the switch."""
    runtime = plan["runtime"]
    if runtime not in agent.RUNTIMES:
        raise Refused("plan.json is for the runtime %s, which is unknown here" % agent._shown(repr(runtime)))
    for name in ("context", "slots"):
        value = plan["settings"][name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refused("plan.json has the %s %s" % (name, agent._shown(repr(value))))
    each = plan["settings"]["context"] // plan["settings"]["slots"]
    if each < agent.LEAST_TOKENS:
        raise Refused(
            "plan.json has slots of %d tokens, and the test needs %d in each" % (each, agent.LEAST_TOKENS)
        )


def judge(
    store: Store,
    admission: Admission,
    read: Callable[[agent.File], Optional[bytes]],
    *,
    note: bool = True,
) -> None:
    """Refuses a release whose self-test could not begin, for what its small files say.

    ``read`` gives the verified bytes of a file, None while it is not here: then it is judged once that has come.
    ``note``: the journal tells why it was refused.
    """
    bundle = admission.bundle
    try:
        found = {file["path"]: read(file) for file in agent.start_files(bundle)}
        content = {path: text for path, text in found.items() if text is not None}
        if len(content) == len(found):
            with plan_read():
                runtime = agent.start_of(bundle, admission.plan, content.__getitem__).runtime
            _carries_its_server(bundle, runtime)
        needed = service_of(store).needs
        if needed is not None and agent.find_file(bundle, needed) is None:
            raise Refused("the bundle has no %s, which starts it in mode %s" % (needed, store.settings.mode))
    except Refused as refused:
        if note:
            store.note("refused", release=_hex(bundle["manifest_digest"]), reason=str(refused))
        raise


def _carries_its_server(bundle: agent.Bundle, runtime: agent.Runtime) -> None:
    """A device has no code of edgepack's server but what a release brings."""
    if agent.has_app(runtime) and agent.find_file(bundle, agent.APP + "__main__.py") is None:
        raise Refused("the bundle has no %s, which %s is" % (agent.APP, runtime.title))


def here(store: Store) -> Callable[[agent.File], Optional[bytes]]:
    """Reads small files out of the store's blobs. Raises Refused for one that is too large."""

    def read(file: agent.File) -> Optional[bytes]:
        if not is_whole(store, file["digest"], file["size"]):
            return None
        return read_whole(store.blob(file["digest"]))

    return read


@contextlib.contextmanager
def plan_read() -> Iterator[None]:
    """A plan that has not the shape of one is refused, whoever signed it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Refused("plan.json is no plan that this agent reads: %r" % error) from None


def release_sequence(bundle: agent.Bundle) -> int:
    """The release's number, which never falls on a device. Raises Refused."""
    text = bundle["annotations"].get("org.edgepack.release-sequence", "")
    if not re.match(r"[1-9][0-9]{0,17}\Z", text):
        raise Refused("the release has no sequence (annotation org.edgepack.release-sequence)")
    return int(text)


def memory_need(
    bundle: agent.Bundle, plan: Dict[str, Any], machine: Dict[str, Any], work: str
) -> Dict[str, Any]:
    """Bytes that the release needs at most, and what this machine has in all and now."""
    found = agent.preflight(bundle, plan, work, None)
    cards = [gpu["memory_total"] for gpu in machine["gpus"] or [] if gpu["memory_total"] is not None]
    return {
        "needed": int(found["memory_needed"]),
        "available": machine["memory_available"],
        "total": machine["memory_total"],
        "device_needed": None
        if found["device_memory_needed"] is None
        else int(found["device_memory_needed"]),
        "device_total": max(cards) if cards else None,
    }


def _is_the_planned_device(match: List[Dict[str, str]]) -> None:
    wrong = [row for row in match if row["status"] == "fail"]
    if wrong:
        told = ["%s is %s, not %s" % (row["fact"], row["measured"], row["expected"]) for row in wrong]
        raise Refused("it was built for another device: %s (--force-device)" % "; ".join(told))


def _has_the_memory(memory: Dict[str, Any]) -> None:
    for need, total, what in (
        (memory["needed"], memory["total"], "memory"),
        (memory["device_needed"], memory["device_total"], "memory on the card"),
    ):
        if need is not None and total is not None and need > total:
            raise Refused(
                "it needs %d bytes of %s and this device has %d (--force-device)" % (need, what, total)
            )


def blobs_of(bundle: agent.Bundle) -> Dict[str, int]:
    """Digest and size of every blob of a release but the manifest, each once; the last are the weights."""
    return {file["digest"]: file["size"] for file in bundle["files"]}


def is_whole(store: Store, digest: str, size: int) -> bool:
    """Whether a blob is in the store; its bytes were hashed before it got its name."""
    return file_size(store.blob(digest)) == size


def missing(store: Store, bundle: agent.Bundle) -> List[Dict[str, Any]]:
    """The blobs that are not there yet, each with how much of it is."""
    return [
        {"digest": digest, "bytes": size, "have": _have(store, digest, size)}
        for digest, size in blobs_of(bundle).items()
        if not is_whole(store, digest, size)
    ]


def _have(store: Store, digest: str, size: int) -> int:
    """Bytes of a blob that came so far; more than it has are none of it."""
    found = file_size(store.part(digest)) or 0
    return found if found <= size else 0


def room(store: Store, bundle: agent.Bundle, consumed: Optional[int] = None) -> Dict[str, int]:
    """Bytes of a release that are yet to be written, and bytes that are free.

    ``consumed``: so many bytes of the bundle's file are yet to come onto this disk, and are given back as they are
    written into the store, but for a window.
    """
    needed = sum(entry["bytes"] - entry["have"] for entry in missing(store, bundle))
    if consumed is not None:
        needed = consumed + min(needed, 2 * FLUSH)
    return {"needed": needed, "free": store.free()}


def kept(store: Store, options: argparse.Namespace) -> int:
    """Good releases that stay: as asked for now, or when the device was enrolled."""
    return store.settings.keep if options.keep is None else int(options.keep)


def require_space(
    store: Store, bundle: agent.Bundle, keep: int, consumed: Optional[int] = None
) -> Dict[str, int]:
    """Makes `room` out of what nothing needs any more, where there is too little. Raises NoSpace.

    ``keep``: good releases that stay.
    """
    found = room(store, bundle, consumed)
    need = MARGIN + found["needed"]
    if found["free"] < need:
        collect(store, keep, beside=bundle)
        found = room(store, bundle, consumed)
    _enough(store, found["free"], need)
    return found


def could_have_space(
    store: Store, bundle: agent.Bundle, keep: int, consumed: Optional[int] = None
) -> Dict[str, int]:
    """What `require_space` would find, without making any. Raises NoSpace as that would."""
    found = room(store, bundle, consumed)
    need = MARGIN + found["needed"]
    if found["free"] < need:
        found["free"] += surplus(store, keep, beside=bundle).bytes
    _enough(store, found["free"], need)
    return found


def _enough(store: Store, free: int, need: int) -> None:
    if free < need:
        raise NoSpace("%s has %d bytes free and %d must be written" % (store.root, free, need))


# ── blobs: part, flush, hash, name ───────────────────────────────────────────────────────────────────


class Behind:
    """Work that goes on while more bytes come: the disk and the line are slow at different times."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised where it is waited for
            self._error = error

    def wait(self) -> None:
        """Until it is done. Raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class Incoming:
    """The bytes of one blob on their way into the store; what came stays when the rest does not.

    Every FLUSH bytes are made durable and hashed as the disk gives them back, while the next ones come.
    """

    def __init__(self, store: Store, digest: str, size: int, *, executable: bool) -> None:
        self.store = store
        self.digest = digest
        self.size = size
        self.mode = 0o555 if executable else 0o444
        self.path = store.part(digest)
        self.have = _have(store, digest, size)
        if not self.have:
            remove(self.path)
        self.durable = 0
        """Bytes that the disk has given back, under a name that is durable too: not what a killed installer wrote."""
        self._hashed = 0
        self._found = hashlib.sha256()
        self._flushed = self.have
        self._handle: Optional[int] = None
        self._behind: Optional[Behind] = None

    def write(self, content: bytes) -> None:
        """Appends. Raises what making earlier bytes durable raised."""
        if self._handle is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._handle = os.open(self.path, flags, 0o600)
        write_all(self._handle, content)
        self.have += len(content)
        if self.have - self._flushed >= FLUSH:
            self._wait()  # so that never more than twice FLUSH are on their way to the disk
            self._flushed = end = self.have
            self._behind = Behind(lambda: self._settle(end))

    def _settle(self, end: int) -> None:
        if self._handle is not None:
            fsync(self._handle)
        fsync_folder(os.path.dirname(self.path))
        read_back(self.path, self._found, self._hashed, end)
        self._hashed = self.durable = end

    def _wait(self) -> None:
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.wait()

    def close(self) -> None:
        """Keeps what came, durable."""
        try:
            self._wait()
            if self._handle is not None and self.have > self.durable:
                fsync(self._handle)
        finally:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def commit(self) -> None:
        """Gives a complete blob its name, when the disk gives back the right bytes. Raises Refused."""
        if self.have == 0:
            self.write(b"")
        self.close()
        seal(self.path, self.mode)
        read_back(self.path, self._found, self._hashed, self.size)
        if self._found.hexdigest() != _hex(self.digest):
            remove(self.path)
            self.store.note("blob-refused", digest=self.digest, bytes=self.size)
            raise Refused("%s has another sha256 than its name, read back from the disk" % self.digest)
        rename(self.path, self.store.blob(self.digest))


def incoming(store: Store, bundle: agent.Bundle, digest: str) -> Incoming:
    """The way in for one blob of a release. Raises Refused for any other."""
    size = blobs_of(bundle).get(digest)
    if size is None:
        raise Refused("%s is no blob of this release" % agent._shown(digest))
    executable = any(f["path"] == agent.SERVER and f["digest"] == digest for f in bundle["files"])
    return Incoming(store, digest, size, executable=executable)


# ── offer and receive: frames on stdin ───────────────────────────────────────────────────────────────

HEAD = {
    "index": agent.SMALL_LIMITS["index.json"],
    "signature": agent.SMALL_LIMITS["signature.sshsig"],
    "manifest": agent.MANIFEST_LIMIT,
}
"""Names of the frames that begin an offer, and their limits in bytes."""
FRAME_LIMIT = 512
PACKED_LIMIT = agent.MIB
"""Bytes of a deflated frame: only small files, which are text, are worth it."""


class Frame(NamedTuple):
    """What comes next: ``bytes`` of a blob from ``offset`` on, deflated to ``zlib`` bytes unless that is None."""

    name: str
    offset: int
    bytes: int
    zlib: Optional[int]


IDLE = 120.0
"""Seconds without a byte after which a connection is gone, whether it said so or not: it must not hold the lock."""


class Patient(io.RawIOBase):
    """What comes through a descriptor, until nothing has come for IDLE seconds."""

    def __init__(self, handle: int) -> None:
        super().__init__()
        self._handle = handle

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not select.select([self._handle], [], [], IDLE)[0]:
            say("nothing came for %d seconds" % IDLE)
            return 0
        return os.readv(self._handle, [buffer])


def frames(stream: io.BufferedReader) -> Iterator[Frame]:
    """The frames of a stream; whoever asks for the next has read the bytes of the one before. Raises Refused."""
    while True:
        line = stream.readline(FRAME_LIMIT)
        if not line.endswith(b"\n"):  # the end, or a line that was cut: nothing of its frame came
            if len(line) == FRAME_LIMIT:
                raise Refused("a frame begins with more than %d bytes" % FRAME_LIMIT)
            return
        value = _object(line, "the line before a frame")
        if set(value) - {"zlib"} != {"name", "offset", "bytes"} or type(value["name"]) is not str:
            raise Refused("a frame has not exactly name, offset and bytes, and perhaps zlib")
        for field in sorted(set(value) - {"name"}):
            if type(value[field]) is not int or not 0 <= value[field] < 1 << 50:
                raise Refused("a frame has no usable %s" % field)
        frame = Frame(value["name"], value["offset"], value["bytes"], value.get("zlib"))
        if frame.zlib is not None and (frame.zlib > PACKED_LIMIT or frame.bytes > agent.JSON_LIMIT):
            raise Refused("a deflated frame has %d bytes that become %d" % (frame.zlib, frame.bytes))
        yield frame


def content_of(stream: io.BufferedReader, frame: Frame) -> Iterator[bytes]:
    """A frame's bytes as they come; fewer where the stream ends. Raises Refused for what does not inflate to them."""
    if frame.zlib is None:
        yield from pieces(stream, frame.bytes)
        return
    packed = b"".join(pieces(stream, frame.zlib))
    if len(packed) < frame.zlib:
        return
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(
            packed, frame.bytes + 1
        )  # one more shows what is too long, and no bomb goes off
    except zlib.error as error:
        raise Refused("a frame does not inflate: %s" % error) from None
    if len(content) != frame.bytes or not inflater.eof or inflater.unused_data:
        raise Refused("a frame does not inflate to the %d bytes that it says" % frame.bytes)
    yield content


def pieces(stream: io.BufferedReader, count: int) -> Iterator[bytes]:
    """The next ``count`` bytes as they come; fewer where the stream ends."""
    while count:
        piece = stream.read1(min(agent.PIECE, count))
        if not piece:
            return
        count -= len(piece)
        yield piece


def read_offer(stream: io.BufferedReader) -> Tuple[agent.Head, bytes]:
    """Head and plan.json of a release out of frames. Raises Refused for anything else."""
    found: Dict[str, bytes] = {}
    for frame in frames(stream):
        limit = HEAD.get(frame.name, agent.JSON_LIMIT)
        if frame.name in found or len(found) == 5 or frame.offset != 0 or frame.bytes > limit:
            raise Refused("the frame %s does not belong into an offer" % agent._shown(frame.name))
        content = b"".join(content_of(stream, frame))
        if len(content) != frame.bytes:
            raise Refused("the offer ends within %s" % agent._shown(frame.name))
        if frame.name not in HEAD and frame.name != "sha256:" + hashlib.sha256(content).hexdigest():
            raise Refused("%s has another sha256 than its name" % agent._shown(frame.name))
        found[frame.name] = content
    if "index" not in found or "manifest" not in found:
        raise Refused("an offer is index, signature, manifest, config and plan.json; this one is incomplete")
    index, manifest, signature = found["index"], found["manifest"], found.get("signature")
    described, config = agent.described(index, signature, manifest)
    plan = agent.find_file(described, "plan.json")
    plan_json = None if plan is None else found.get(plan["digest"])
    config_json = found.get(config["digest"])
    if plan_json is None or config_json is None:
        raise Refused("the offer lacks the blob of the config or of plan.json")
    return agent.Head(index, signature, manifest, config_json), plan_json


def offer(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    """Whether a release may be installed, and what is missing of it; remembers it for `receive`. Raises Refused."""
    head, plan_json = read_offer(options.input)
    bundle = agent.head_of(head)
    # A dry run too: another's sweep would take the signature away while it is verified.
    with locked(store.root, "offer"):
        # Where it is there already, nothing new comes in: it may be mended.
        if is_folder(store.release(_hex(bundle["manifest_digest"]))):
            options.allow_downgrade = True
        admission = admit(store, bundle, plan_json, options, store.world.machine())
        keep = kept(store, options)
        judge(store, admission, here(store), note=not options.dry_run)
        if options.dry_run:
            return offer_document(store, admission, could_have_space(store, bundle, keep, options.room))
        sweep(store)
        found = require_space(store, bundle, keep, options.room)
        remember(store, head, plan_json)
        return offer_document(store, admission, found)


def remember(store: Store, head: agent.Head, plan_json: bytes) -> None:
    """Keeps the head of an admitted release in the store, and its plan.json as the blob it is."""
    bundle = agent.head_of(head)
    release = _hex(bundle["manifest_digest"])
    try:
        known = is_folder(store.offer(release)) and agent.release_head(store.offer(release)) == head
    except Refused:  # the disk has lost some of it
        known = False
    if not known:
        discard(store.offer(release))
        new = fresh(store.offer(release))
        new_folder(new)
        write_head(new, head)
        fsync_folder(new)
        rename(new, store.offer(release))
        store.note("offered", release=release)
    plan = agent.find_file(bundle, "plan.json")
    if plan is not None and not is_whole(store, plan["digest"], plan["size"]):
        blob = incoming(store, bundle, plan["digest"])
        blob.write(plan_json[blob.have :])
        blob.commit()


def write_head(folder: str, head: agent.Head) -> None:
    """Writes what describes a release into a folder that has no name yet."""
    inside = os.path.join(folder, agent.RELEASE)
    new_folder(inside)
    for name, content in head_files(head).items():
        write_new(os.path.join(inside, name), content, 0o444)
    fsync_folder(inside)


def head_files(head: agent.Head) -> Dict[str, bytes]:
    found = {"index.json": head.index_json, "manifest.json": head.manifest, "config.json": head.config}
    return found if head.signature is None else dict(found, **{"signature.sshsig": head.signature})


def known_head(store: Store, release: str) -> agent.Head:
    """The head of a release that was offered or is installed. Raises BadUsage."""
    damaged: Optional[Refused] = None
    for folder in (store.offer(release), store.release(release)):
        if not is_folder(folder):
            continue
        try:
            head = agent.release_head(folder)
            if "sha256:" + release == agent.head_of(head)["manifest_digest"]:
                return head
            damaged = Refused("%s describes another release" % folder)
        except Refused as refused:
            damaged = refused
    raise damaged or BadUsage("release %s was not offered here" % release[:12])


def offer_document(store: Store, admission: Admission, room: Dict[str, int]) -> Dict[str, Any]:
    bundle = admission.bundle
    release = _hex(bundle["manifest_digest"])
    lacking = missing(store, bundle)
    if lacking:
        state = "new"
    elif not is_folder(store.release(release)):
        state = "received"
    else:
        runs = store.target("current") == release and service_of(store).active()
        state = "current" if runs else "installed"
    return {
        "schema_version": SCHEMA_VERSION,
        "release": release,
        "name": bundle["name"],
        "sequence": admission.sequence,
        "state": state,
        "good": store.good(release) is not None,
        "missing": lacking,
        "match": admission.match,
        "disk": room,
        "memory": admission.memory,
    }


def receive(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    """Takes blobs of an offered release until the stream ends; what came is kept. Raises Refused."""
    release = _hex(options.release)
    head = known_head(store, release)
    bundle = agent.head_of(head)
    with locked(store.root, "receive"):
        sweep(store)
        judged_at_offer = argparse.Namespace(allow_downgrade=True, force_device=True)
        plan_json = _plan_json(store, bundle)
        admission = admit(store, bundle, plan_json, judged_at_offer, store.world.machine())
        require_space(store, bundle, store.settings.keep)
        judge(store, admission, here(store))
        judged = {file["digest"] for file in agent.start_files(bundle)}
        for frame in frames(options.input):
            _receive_blob(store, bundle, frame, options.input)
            if frame.name in judged:  # the weights are yet to come
                judge(store, admission, here(store))
        if not missing(store, bundle) and is_folder(store.release(release)):
            mend(store, head)
        return offer_document(store, admission, room(store, bundle))


def _receive_blob(store: Store, bundle: agent.Bundle, frame: Frame, stream: io.BufferedReader) -> None:
    blob = incoming(store, bundle, frame.name)
    if is_whole(store, blob.digest, blob.size):
        raise Refused("%s is here already" % blob.digest)
    if frame.offset != blob.have or frame.offset + frame.bytes > blob.size:
        raise Refused(
            "the frame of %s has bytes %d to %d, and %d of %d are here"
            % (blob.digest, frame.offset, frame.offset + frame.bytes, blob.have, blob.size)
        )
    try:
        for piece in content_of(stream, frame):
            blob.write(piece)
    finally:
        blob.close()
    if blob.have == blob.size:
        blob.commit()


def _plan_json(store: Store, bundle: agent.Bundle) -> bytes:
    plan = agent.find_file(bundle, "plan.json")
    content = None if plan is None else read_whole(store.blob(plan["digest"]))
    if content is None:
        raise Refused("plan.json is not in the store: offer the release again")
    return content


# ── a bundle that is here already: one pass, and perhaps its holes ───────────────────────────────────

PUNCH_HOLE, KEEP_SIZE = 2, 1
WORTH_PUNCHING = agent.MIB
"""Smaller files of a consumed bundle keep their bytes, plan.json with them: a rerun reads it again."""


class Puncher:
    """Gives the disk back what was copied out of a bundle. Raises BadUsage where the system cannot."""

    def __init__(self, path: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
        if call is None:
            raise BadUsage("the C library of this system has no fallocate: install without --consume")
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        call.restype = ctypes.c_int
        self._call = call
        self._path = path
        self._handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        size = os.fstat(self._handle).st_size
        self.punch(size - 2 * agent.BLOCK, size)  # the zeros at the end stay what they are

    def punch(self, begin: int, end: int) -> None:
        """Frees bytes, which read as zeros from now on; the file keeps its size."""
        if begin >= end:
            return
        if self._call(self._handle, PUNCH_HOLE | KEEP_SIZE, begin, end - begin) != 0:
            number = ctypes.get_errno()
            if number in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise BadUsage("the file system of %s has no holes: install without --consume" % self._path)
            raise OSError(number, os.strerror(number), self._path)

    def close(self) -> None:
        os.close(self._handle)


class Taker:
    """Takes the blobs that the store lacks out of a bundle as it is read (agent.Sink)."""

    def __init__(
        self, store: Store, bundle: agent.Bundle, wanted: Set[str], puncher: Optional[Puncher]
    ) -> None:
        self._store = store
        self._bundle = bundle
        self._wanted = wanted
        self._puncher = puncher
        self._blob: Optional[Incoming] = None
        self._begin = self._end = self._freed = 0

    def begin(self, digest: str, size: int) -> int:
        file = next((file for file in self._bundle["files"] if file["digest"] == digest), None)
        if file is None or file["size"] != size:
            raise Refused("the bundle changed while it was read")
        self._begin, self._end = file["offset"], file["offset"] + size
        self._blob = None
        if digest not in self._wanted or is_whole(self._store, digest, size):
            return size
        self._blob = incoming(self._store, self._bundle, digest)
        return self._blob.have

    def piece(self, content: bytes, _: int) -> None:
        if self._blob is not None:
            self._blob.write(content)
            self._free(self._begin + self._blob.durable)

    def end(self) -> None:
        if self._blob is not None:
            self._blob.commit()
        self._free(self._end)

    def close(self) -> None:
        if self._blob is not None:
            self._blob.close()

    def _free(self, end: int) -> None:
        """Everything up to ``end`` is durable in the store."""
        if self._puncher is not None and self._end - self._begin >= WORTH_PUNCHING and end > self._freed:
            self._puncher.punch(max(self._begin, self._freed), end)
            self._freed = end


CONSUMED = "consumed"
"""Marks an offer whose bundle has holes: nothing else has its bytes any more."""


def take_bundle(path: str, options: argparse.Namespace, store: Store) -> str:
    """Takes a bundle's blobs into the store and returns the release. Raises Refused, NoSpace, BadUsage."""
    head, found = agent.read_head(path)
    plan_json = agent.read_file(found, "plan.json")
    admission = admit(store, found, plan_json, options, store.world.machine())
    judge(store, admission, lambda file: here(store)(file) or agent.read_file(found, file["path"]))
    release = _hex(found["manifest_digest"])
    same_disk = os.stat(path).st_dev == os.stat(store.root).st_dev
    require_space(store, found, kept(store, options), 0 if options.consume and same_disk else None)
    mark = os.path.join(store.offer(release), CONSUMED)
    if options.consume and not os.path.lexists(mark):
        say("verifying the bundle, which is then consumed")
        agent.read_bundle(path)
    puncher = Puncher(path) if options.consume else None
    taker = Taker(store, found, set(blobs_of(found)), puncher)
    try:
        remember(store, head, plan_json)
        if puncher is not None and not os.path.lexists(mark):
            write_whole(mark, os.fsencode(os.path.abspath(path)))
        say("taking the bundle into the store")
        agent.read_bundle(path, sink=taker)
    finally:
        taker.close()
        if puncher is not None:
            puncher.close()
    return release


# ── releases: folders of hard links ──────────────────────────────────────────────────────────────────


def lay_out(store: Store, head: agent.Head) -> str:
    """The folder of a release whose blobs are all here; it appears whole. Raises Refused."""
    bundle = agent.head_of(head)
    release = _hex(bundle["manifest_digest"])
    lacking = missing(store, bundle)
    if lacking:
        raise Refused("%d blobs of %s are not here yet: receive them first" % (len(lacking), release[:12]))
    if is_folder(store.release(release)):
        mend(store, head)
        return release
    new = fresh(store.release(release))
    new_folder(new)
    write_head(new, head)
    folders = [new]
    for file in bundle["files"]:
        *inside, name = file["path"].split("/")
        folder = new
        for part in inside:
            folder = os.path.join(folder, part)
            if folder not in folders:
                new_folder(folder)
                folders.append(folder)
        _link_blob(store, file, os.path.join(folder, name))
    for folder in reversed(folders):
        fsync_folder(folder)
    rename(new, store.release(release))
    store.note("laid-out", release=release)
    return release


def _link_blob(store: Store, file: agent.File, place: str) -> None:
    blob = store.blob(file["digest"])
    if file["path"] == agent.SERVER and not os.lstat(blob).st_mode & 0o100:  # it came as another file before
        seal(blob, 0o555)
    hard_link(blob, place)


def mend(store: Store, head: agent.Head) -> int:
    """Puts back what an installed release lacks or has otherwise than its blobs; returns how many files."""
    bundle = agent.head_of(head)
    release = _hex(bundle["manifest_digest"])
    folder = store.release(release)
    mended = 0
    make_folder(os.path.join(folder, agent.RELEASE))
    for name, content in head_files(head).items():
        path = os.path.join(folder, agent.RELEASE, name)
        if read_whole(path) != content:
            write_whole(path, content, 0o444)
            mended += 1
    for file in bundle["files"]:
        place = _place(store, release, file["path"], make=True)
        if not is_whole(store, file["digest"], file["size"]) or _same_file(place, store.blob(file["digest"])):
            continue
        new = fresh(store.path("incoming", "link"))
        _link_blob(store, file, new)
        rename(new, place)
        mended += 1
    if mended:
        store.note("mended", release=release, files=mended)
    return mended


def _place(store: Store, release: str, path: str, *, make: bool = False) -> str:
    """Where a file of an installed release lies; no folder on the way is a link. Raises Refused."""
    *inside, name = path.split("/")
    folder = store.release(release)
    for part in inside:
        folder = os.path.join(folder, part)
        if make:
            make_folder(folder)
        else:
            is_folder(folder)
    return os.path.join(folder, name)


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except FileNotFoundError:
        return False


def is_whole_release(store: Store, release: str) -> bool:
    """Whether every file of an installed release is there with its size; nothing is hashed."""
    head = _readable_head(store, release)
    if head is None:
        return False
    files = agent.head_of(head)["files"]
    try:
        return all(file_size(_place(store, release, f["path"])) == f["size"] for f in files)
    except Refused:
        return False


# ── install: switch, test, stay or go back ───────────────────────────────────────────────────────────


def install(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    """Makes a release the current one, if it passes its test here; else the one before it runs again."""
    path = options.release
    with locked(store.root, "install"):
        sweep(store)
        is_bundle = not HEX.match(path.rpartition(":")[2])
        if options.consume and not is_bundle:
            raise BadUsage("--consume is for a bundle's file, and %s is a release" % path[:12])
        release = take_bundle(path, options, store) if is_bundle else _hex(path)
        head = known_head(store, release)
        bundle = agent.head_of(head)
        admission = admit(store, bundle, _plan_json(store, bundle), options, store.world.machine())
        judge(store, admission, here(store))
        lay_out(store, head)
        good = store.good(release) is not None
        if store.target("current") == release and good and service_of(store).active():
            settle(store, release)
            told = outcome(store, "current", release)
        elif options.no_switch:
            told = outcome(store, "installed", release)
        else:
            told = switch(store, release, admission, options)
        if told["outcome"] != "rolled-back":
            if options.consume:
                remove(path)  # before what says that it has holes: without that it is a damaged bundle
            discard(store.offer(release))
    return told


def outcome(store: Store, what: str, release: str) -> Dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "outcome": what,
        "release": release,
        "current": store.target("current"),
        "previous": store.target("previous"),
        "seconds_to_switch": None,
        "seconds_down": None,
        "selftest": None,
    }


def switch(store: Store, release: str, admission: Admission, options: argparse.Namespace) -> Dict[str, Any]:
    """Flips to a release that is laid out, tests it, and flips back unless it is good."""
    service = service_of(store)
    with service.resting():
        return _switch(store, service, release, admission, options)


def _switch(
    store: Store, service: Service, release: str, admission: Admission, options: argparse.Namespace
) -> Dict[str, Any]:
    before, back = store.target("current"), way_back(store, release)
    began = time.monotonic()
    try:
        if not options.force_device:
            _memory_is_free(memory_need(admission.bundle, admission.plan, store.world.machine(), store.root))
        flip(store, release, back)
        service.apply(store.release(release))
        seconds = round(time.monotonic() - began, 3)
        test = None if options.no_self_test else self_test(store, release, options)
        reasons: List[str] = [] if test is None else test["verdict"]["reasons"]
        if not reasons:
            reasons = start(service)
        down = round(time.monotonic() - began, 3) if service.runs else None
        if not reasons:
            approve(
                store, release, admission.sequence, tested=test is not None, lower=options.allow_downgrade
            )
    except BaseException:  # a signal, a full disk, a broken one: what ran before runs again
        go_back(store, service, before if before == store.target("current") else back or before, None)
        raise
    told = {"seconds_to_switch": seconds, "seconds_down": down, "selftest": test}
    if not reasons:
        collect(store, kept(store, options))
        return dict(outcome(store, "good", release), **told)
    trouble = go_back(store, service, back, release, reasons)
    return dict(outcome(store, "rolled-back", release), reasons=reasons + trouble, **told)


def way_back(store: Store, release: str) -> Optional[str]:
    """The release to return to: the current one if it is good, else the newest good one, else the current one."""
    current = store.target("current")
    others = [
        name
        for name in (current, store.target("previous"), *good_releases(store))
        if name not in (None, release)
    ]
    for name in others:
        if name is not None and store.good(name) is not None and is_whole_release(store, name):
            return name
    return (
        current if current != release and current is not None and is_whole_release(store, current) else None
    )


def good_releases(store: Store) -> List[str]:
    """The good ones, the newest first, by the order in which they passed: clocks of devices stand still."""
    found = [(store.good(release), release) for release in store.releases()]
    return [release for order, release in sorted((o, r) for o, r in found if o is not None)][::-1]


def _memory_is_free(memory: Dict[str, Any]) -> None:
    if memory["available"] is not None and memory["needed"] > memory["available"]:
        raise Refused(
            "it needs %d bytes of memory and %d are free (--force-device)"
            % (memory["needed"], memory["available"])
        )


def flip(store: Store, release: str, back: Optional[str]) -> None:
    """``previous`` first, so that at no moment the way back is unknown."""
    remove(store.release(release) + ".tries")
    store.note("switching", release=release, back=back)
    if back is not None and store.target("previous") != back:
        point(store.path("previous"), "releases/" + back)
    if store.target("current") != release:
        point(store.path("current"), "releases/" + release)


def settle(store: Store, current: str) -> None:
    """The units are those of the current release, also after a cut between the link and them."""
    service = service_of(store)
    if service.differs(store.release(current)):
        service.apply(store.release(current))


def start(service: Service) -> List[str]:
    """Starts the server; returns why it did not."""
    try:
        service.start()
    except (Failed, MissingProgram) as error:
        return [str(error)]
    return []


def _write_sequence(store: Store, sequence: int, release: Optional[str]) -> None:
    value = {"schema_version": SCHEMA_VERSION, "sequence": sequence, "release": release}
    write_whole(store.path("sequence.json"), _json(value))


def approve(store: Store, release: str, sequence: int, *, tested: bool, lower: bool = False) -> None:
    """Marks a release as good. Its sequence is written first: a cut between the two forgets no downgrade.

    ``lower``: a downgrade was asked for, and from its sequence the next ones count.
    """
    if sequence > store.sequence()[0] or lower:
        _write_sequence(store, sequence, release)
    orders = [store.good(other) or 0 for other in store.releases()]
    value = {"order": max(orders) + 1, "tested": tested, "at": int(store.world.clock())}
    write_whole(store.release(release) + ".good", _json(value))
    remove(store.release(release) + ".tries")
    store.note("good", release=release, sequence=sequence, tested=tested)


def go_back(
    store: Store, service: Service, back: Optional[str], failed: Optional[str], reasons: Sequence[str] = ()
) -> List[str]:
    """Makes ``back`` the current release and starts it; returns what of that did not work.

    ``failed``: the release that did not pass its test, for ``reasons``; None when it was not tested to the end.
    """
    with undisturbed():
        trouble: List[str] = []
        try:
            flip_back(store, back, failed)
        finally:  # whatever became of the links: what they name is whole, and runs
            current = store.target("current")
            try:
                service.stop()
                service.apply(None if current is None else store.release(current))
                if current is not None:
                    service.start()
            except (Failed, MissingProgram) as error:
                trouble.append("the release before it did not start: %s" % error)
        store.note("went-back", release=failed, back=back, reasons=list(reasons), trouble=trouble)
    return trouble


def flip_back(store: Store, back: Optional[str], failed: Optional[str]) -> None:
    """``current`` first, since everything else can be done again; ``previous`` is then the next good one."""
    if back is None:
        remove(store.path("current"))
    elif store.target("current") != back:
        point(store.path("current"), "releases/" + back)
    if failed is not None:
        remove(store.release(failed) + ".good")
        remove(store.release(failed) + ".tries")
    others = [name for name in good_releases(store) if name != back]
    if not others or back is None:
        remove(store.path("previous"))
    elif store.target("previous") != others[0]:
        point(store.path("previous"), "releases/" + others[0])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that would end this process wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ── the self-test ────────────────────────────────────────────────────────────────────────────────────

DRIFT_WRONG = 0.25
"""Mean drift in nats above which the answers are another model's, or those of damaged weights (edgepack/check.py)."""
AGREEMENT_WRONG = 0.7
"""Share of recorded first choices below which they are."""
UNEXPLAINED = 0.05
"""Share of the plan's total that the peak may lie above it, unless the plan's own interval is wider."""


def self_test(store: Store, release: str, options: argparse.Namespace) -> Dict[str, Any]:
    """The agent's check of an installed release and the verdict on it. Whatever goes wrong in it is its result."""
    launcher = service_of(store).launcher(store.release(release))
    work = fresh(store.path("releases", "self-test"))
    new_folder(work, 0o700 if launcher is None else 0o755)  # the service's user reads what the server loads
    asked = argparse.Namespace(
        bundle=store.release(release),
        allowed_signers=store.signers,
        work=work,
        memory_limit=options.memory_limit,
        limit_by="cgroup",
        server=store.settings.server,
        app=None,
        emulator=None,
        run_unverified=False,
        full=options.full,
        load_mode=None,
        start_timeout=1800.0,
        launcher=launcher,
    )
    say("testing release %s" % release[:12])
    found: Dict[str, Any] = {}
    try:
        found = store.world.check(asked)
        reasons = verdict(agent.read_document(_bundle_in(store, release), "plan.json"), found)
    except Exception as error:
        reasons = ["the test ended with %s: %s" % (type(error).__name__, error)]
    finally:
        clear(work)
    store.note("tested", release=release, reasons=reasons)
    return dict(found, verdict={"passed": not reasons, "reasons": reasons})


def _bundle_in(store: Store, release: str) -> agent.Bundle:
    bundle = agent.head_of(agent.release_head(store.release(release)))
    bundle["path"] = store.release(release)
    return bundle


class Promise(NamedTuple):
    """What a plan says that the test is held against; sizes in bytes."""

    slots: int
    each: int
    """Tokens of a slot."""
    backend: str
    unified: bool
    driver: int
    """What an accelerator's context takes beside the parts."""
    most: int
    """Of all parts at their upper ends, or UNEXPLAINED above their total, with the driver."""
    device: int
    host: int
    """What the device has to give, in the memory that is shared or the accelerator's, and beside that."""


def promise_of(plan: Dict[str, Any]) -> Promise:
    """Reads a plan.json; raises what `plan_read` makes a refusal of where it is none."""
    profile, budget, settings = plan["profile"], plan["budget"], plan["settings"]
    backend = profile["accelerator"]["backend"] if profile["accelerator"] else "cpu"
    driver = 0 if backend == "cpu" else int(profile["reserves"]["accelerator_context"])
    parts = plan["memory"]["parts"]
    high = sum(int(part["high"]) for part in parts)
    total = sum(int(part["bytes"]) for part in parts)
    return Promise(
        slots=settings["slots"],
        each=settings["context"] // settings["slots"],
        backend=backend,
        unified=bool(budget["unified"]),
        driver=driver,
        most=max(high, round(total * (1 + UNEXPLAINED))) + driver,
        device=int(budget["device"]),
        host=0 if budget["unified"] else int(budget["host"]),
    )


def verdict(document: Dict[str, Any], facts: Dict[str, Any]) -> List[str]:
    """Why a release is not good here; nothing when it is. Pure.

    It starts, holds its context, stays within the plan and the device, and answers as it did when it was built; speed
    is no reason to go back. On another device than the plan's, and under emulation, memory is not judged.
    """
    failure, slots, fill, quality = (facts[name] for name in ("failure", "slots", "fill", "quality"))
    if failure is not None:
        return ["%s (%s): %s" % (failure["kind"], failure["stage"], failure["message"])]
    found: List[str] = []
    plan = promise_of(document)
    count, each = plan.slots, plan.each
    if slots["slots"] != count or min(slots["tokens"]) < each:
        found.append("it has slots of %s tokens, the plan says %d of %d" % (slots["tokens"], count, each))
    if any(tokens is None or tokens < fill["target_tokens"] - 2 for tokens in fill["held_tokens"]):
        found.append("of %d tokens the context held %s" % (fill["target_tokens"], fill["held_tokens"]))
    found += _too_much_memory(plan, facts)
    if quality is not None:
        share = (quality["agree"] + quality["ties"]) / quality["probes"]
        if quality["mean_drift"] > DRIFT_WRONG or share < AGREEMENT_WRONG:
            found.append(
                "its answers are not those recorded at build: drift %.3f nats, %d of %d first choices the same"
                % (quality["mean_drift"], quality["agree"], quality["probes"])
            )
    return found


def _too_much_memory(plan: Promise, facts: Dict[str, Any]) -> Iterator[str]:
    memory = facts["memory"]
    elsewhere = any(row["status"] == "fail" for row in facts["match"]) or plan.backend != _backend(
        plan.backend, facts
    )
    emulated = facts["server"]["emulator"] is not None or facts["machine"].get("emulated", False)
    if memory["peak_rss"] is None or emulated or elsewhere:
        return
    resident = memory["peak_rss"]
    if memory["processes"] is not None:
        resident = max(resident, memory["processes"]["peak"])
    # Beyond what the runtime uses, pages of libraries may only be mapped (edgepack/check.py: counted).
    runtime = agent.RUNTIMES[facts["served"]["runtime"] if facts["served"] else agent.LLAMA_CPP]
    beyond = max(0, (memory.get("code") or 0) - runtime.libraries)
    used, card = resident - beyond, None
    if plan.backend != "cpu":
        resident, card = _on_host(memory, resident), memory["gpu"]
        own = [memory[name] for name in ("nvmap", "gpu") if memory[name] is not None]
        lost = memory["system_drop"] if plan.unified else None
        used = resident - beyond + own[0] if own else lost
    if used is not None and used > plan.most:
        yield "its memory peaked at %d bytes, the plan says up to %d" % (used, plan.most)
    if plan.unified and used is not None and used > plan.device + plan.driver:
        yield "its memory peaked at %d bytes, the device has %d to give" % (used, plan.device + plan.driver)
    if not plan.unified and card is not None and card > plan.device + plan.driver:
        yield "its memory on the card peaked at %d bytes, the device has %d to give" % (
            card,
            plan.device + plan.driver,
        )
    if not plan.unified and resident - beyond > plan.host:
        yield "its memory peaked at %d bytes, the device has %d to give" % (resident, plan.host)


def _on_host(memory: Dict[str, Any], resident: int) -> int:
    """What of it counts where the weights went to an accelerator: pages of files that they were read from do not
    (edgepack/check.py: peak_on_host)."""
    file, shared = memory["rss_file"], memory["rss_shared"]
    if file is None or shared is None or memory["processes"] is not None:
        return resident
    return min(resident, int(memory["peak_anonymous"]) + int(file) + int(shared))


def _backend(planned: str, facts: Dict[str, Any]) -> str:
    """What the server really used, by its own word or its buffers' names."""
    if facts["served"] is not None:
        return facts["served"]["backend"] or planned
    names = [b["name"] for b in facts["log"]["buffers"] if b["kind"] in ("model", "kv", "compute")]
    return "cuda" if any(name.startswith("CUDA") for name in names) else "cpu"


def self_test_command(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    """Facts and verdict of an installed release; the server rests meanwhile, since two do not fit.

    Raises Refused for too little memory, as `install` does: beyond it the device may be lost, not only the test.
    """
    with locked(store.root, "self-test"):
        sweep(store)
        release = store.target("current") if options.release is None else _hex(options.release)
        if release is None or not is_folder(store.release(release)):
            raise BadUsage("release %s is not installed here" % (release or "")[:12])
        bundle = _bundle_in(store, release)
        plan = agent.read_document(bundle, "plan.json")
        if not options.force_device:
            _has_the_memory(memory_need(bundle, plan, store.world.machine(), store.root))
        service = service_of(store)
        with service.resting():
            try:
                if not options.force_device:
                    _memory_is_free(memory_need(bundle, plan, store.world.machine(), store.root))
                return self_test(store, release, options)
            finally:
                if store.target("current") is not None:
                    service.start()


# ── rollback, boot ───────────────────────────────────────────────────────────────────────────────────


def rollback(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    """Makes the previous release the current one, for good: what was current counts as good no more. Raises Refused.

    Rolled back once more, the device goes to the good release before that, never to one that it was taken from; to run
    such a one again it is installed, and tested, again.
    """
    with locked(store.root, "rollback"):
        sweep(store)
        current, previous = store.target("current"), store.target("previous")
        if previous is None:
            raise Refused(
                "there is no other good release here; one that was rolled back from is flashed again, with "
                "--allow-downgrade where a newer one ran"
            )
        if not is_whole_release(store, previous):
            raise Refused("release %s is not whole: fsck, then flash it again" % previous[:12])
        service = service_of(store)
        began = time.monotonic()
        with service.resting():
            # They are the same where a rollback was cut off, which then goes on here.
            if current is not None and current != previous:
                # First, so that after a cut it is not what to go back to.
                remove(store.release(current) + ".good")
            flip_back(store, previous, None)
            service.apply(store.release(previous))
            seconds = round(time.monotonic() - began, 3)
            store.note("rolled-back", release=current, back=previous)
            reasons = start(service)
        told = dict(outcome(store, "rolled-back", previous), seconds_to_switch=seconds)
        return dict(told, reasons=reasons)


def boot(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    """Before each start of the server: counts the starts of a release that is not good yet, and goes back at last."""
    try:
        with locked(store.root, "boot"):
            return _boot(store)
    except Busy:
        return {"schema_version": SCHEMA_VERSION, "outcome": "busy", "current": store.target("current")}


def _boot(store: Store) -> Dict[str, Any]:
    current = store.target("current")
    answer = {"schema_version": SCHEMA_VERSION, "outcome": "good", "current": current}
    if current is None:
        return dict(answer, outcome="none")
    whole = is_whole_release(store, current)
    if whole:
        settle(store, current)
    if whole and store.good(current) is not None:
        return answer
    tries = store.tries(current)
    back = way_back(store, current)
    if back is None and not whole:
        return dict(answer, outcome="broken")
    if back is None or (whole and tries < store.settings.tries):
        try:
            write_whole(store.release(current) + ".tries", b"%d\n" % (tries + 1))
            store.note("started", release=current, tries=tries + 1)
            return dict(answer, outcome="trying", tries=tries + 1)
        except OSError:
            if back is None:
                raise
        # A full disk cannot count the tries, and a release that never was good would be started for ever.
    flip_back(store, back, current)
    service_of(store).apply(store.release(back))
    store.note("went-back", release=current, back=back, tries=tries, whole=whole)
    return dict(answer, outcome="went-back", current=back, failed=current)


# ── room: what nothing needs any more ────────────────────────────────────────────────────────────────


class Surplus(NamedTuple):
    """What nothing needs any more: releases, offers that were not taken up, files, and the bytes of these."""

    releases: List[str]
    offers: List[str]
    files: List[str]
    bytes: int


def surplus(
    store: Store, keep: int, *, beside: Optional[agent.Bundle] = None, everything: bool = False
) -> Surplus:
    """All but the current, the previous and the ``keep`` newest good releases, and what only the others need.

    ``beside``: a release that is on its way; what came of it stays, and what fsck set aside of it goes, since it comes
    again. ``everything``: bundles that were consumed half go too, and all that fsck set aside. Nothing is written.
    """
    coming = None if beside is None else _hex(beside["manifest_digest"])
    kept = {store.target("current"), store.target("previous"), coming, *good_releases(store)[:keep]}
    releases = [release for release in store.releases() if release not in kept]
    again = set() if beside is None else {_hex(digest) for digest in blobs_of(beside)}
    needed = set(again)
    offers = []
    for name in os.listdir(store.path("incoming")):
        release, _, kind = name.partition(".")
        if kind == "offer" and release != coming:
            if not everything and _is_consumed(store, name):
                needed |= {_hex(d) for d in blobs_of(agent.head_of(known_head(store, release)))}
            else:
                offers.append(name)
    links = _links([store.release(release) for release in releases] + leftovers(store))
    files: List[str] = []
    size = 0
    for folder, named in (("incoming", ".part"), ("blobs/sha256", "")):
        for name in os.listdir(store.path(folder)):
            path = store.path(folder, name)
            found = os.lstat(path)
            digest = name[: -len(named)] if named and name.endswith(named) else name
            if HEX.match(digest) and digest not in needed and found.st_nlink == 1 + links[found.st_ino]:
                files.append(path)
                size += found.st_size
    for name in os.listdir(store.path("quarantine")):
        if everything or name in again:
            files.append(store.path("quarantine", name))
            size += os.lstat(store.path("quarantine", name)).st_size
    return Surplus(releases, offers, files, size)


def _links(folders: List[str]) -> Dict[int, int]:
    """How many names each file has in these folders of one disk, by its inode; 0 for others."""
    found: Dict[int, int] = collections.Counter()
    for folder in folders:
        for inside, _, names in os.walk(folder):
            for name in names:
                found[os.lstat(os.path.join(inside, name)).st_ino] += 1
    return found


def collect(
    store: Store, keep: int, *, beside: Optional[agent.Bundle] = None, everything: bool = False
) -> Dict[str, Any]:
    """Removes what is `surplus`."""
    found = surplus(store, keep, beside=beside, everything=everything)
    for release in found.releases:
        remove(store.release(release) + ".good")
        remove(store.release(release) + ".tries")
        discard(store.release(release))
    for name in found.offers:
        discard(store.path("incoming", name))
    for path in found.files:
        clear(path)
    if found.releases or found.bytes:
        store.note("collected", removed=found.releases, freed=found.bytes)
    return {"schema_version": SCHEMA_VERSION, "removed": found.releases, "freed": found.bytes}


def _is_consumed(store: Store, offer: str) -> bool:
    """Whether a bundle on this disk was given up in part for what the store has of it; it can be taken on."""
    bundle = read_whole(store.path("incoming", offer, CONSUMED))
    return bundle is not None and os.path.lexists(os.fsdecode(bundle))


def gc(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    with locked(store.root, "gc"):
        sweep(store)
        return collect(store, kept(store, options), everything=True)


# ── fsck ─────────────────────────────────────────────────────────────────────────────────────────────


def fsck(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    """Hashes every blob again, sets bad ones aside, mends what can be mended, and says which releases lack what.

    The server is left alone: it has its files open and goes on. What its next start comes to is told.
    """
    with locked(store.root, "fsck"):
        sweep(store)
        bad: List[Dict[str, Any]] = []
        blobs = sorted(name for name in os.listdir(store.path("blobs", "sha256")) if HEX.match(name))
        for name in blobs:
            bad += _quarantine(store, name)
        for release in store.releases():
            bad += _foreign_files(store, release)
        bad += _mend_sequence(store)
        if bad:
            store.note("fsck", bad=[entry["path"] for entry in bad])
        if options.repair_from is not None:
            _repair(store, options.repair_from)
        lacking: List[Dict[str, Any]] = []
        mended = 0
        for release in store.releases():
            head = _readable_head(store, release)
            if head is None:
                lacking.append({"release": release, "path": agent.RELEASE, "digest": None, "bytes": None})
                continue
            mended += mend(store, head)
            lacking += [
                {"release": release, "path": f["path"], "digest": f["digest"], "bytes": f["size"]}
                for f in agent.head_of(head)["files"]
                if not is_whole(store, f["digest"], f["size"])
            ]
        current = store.target("current")
        restarts, back = True, None
        if current is not None and not is_whole_release(store, current):
            restarts, back = False, way_back(store, current) if service_of(store).runs else None
            say("release %s lacks files and does not start again until they are back" % current[:12])
            store.note("current-damaged", release=current, back=back)
    return {
        "schema_version": SCHEMA_VERSION,
        "current": current,
        "restarts": restarts,
        "back": back,
        "checked": len(blobs),
        "bad": bad,
        "quarantined": sum(entry["quarantined"] for entry in bad),
        "mended": mended,
        "missing": lacking,
    }


def _mend_sequence(store: Store) -> List[Dict[str, Any]]:
    """Writes sequence.json anew where it cannot be read, or is gone though a release was good."""
    path = store.path("sequence.json")
    number, release = store.sequence()
    there = os.path.lexists(path)
    if _sequence(path) is not None or (release is None and not there):
        return []
    size = os.lstat(path).st_size if there else 0
    clear(path)
    _write_sequence(store, number, release)
    return [{"digest": None, "bytes": size, "path": "sequence.json", "quarantined": False}]


def _quarantine(store: Store, name: str) -> List[Dict[str, Any]]:
    """Sets a blob aside when the disk gives back other bytes than its name says, or none."""
    path = store.path("blobs", "sha256", name)
    try:
        good = hash_on_disk(path) == name
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        good = False
    if good:
        return []
    found = os.lstat(path)
    for release in store.releases():
        for folder, _, names in os.walk(store.release(release)):
            for link in names:
                if os.path.samestat(os.lstat(os.path.join(folder, link)), found):
                    remove(os.path.join(folder, link))
    place = store.path("quarantine", name)
    clear(place)
    rename(path, place)
    fsync_folder(os.path.dirname(path))
    return [
        {
            "digest": "sha256:" + name,
            "bytes": found.st_size,
            "path": "blobs/sha256/" + name,
            "quarantined": True,
        }
    ]


def _foreign_files(store: Store, release: str) -> List[Dict[str, Any]]:
    """Files of a release that are not the blobs they should be: wrong ones go, right ones become the blob again."""
    head = _readable_head(store, release)
    bad: List[Dict[str, Any]] = []
    for file in [] if head is None else agent.head_of(head)["files"]:
        place = _place(store, release, file["path"])
        blob = store.blob(file["digest"])
        if not os.path.lexists(place) or _same_file(place, blob):
            continue
        if os.path.islink(place) or not os.path.isfile(place) or hash_on_disk(place) != _hex(file["digest"]):
            clear(place)
            bad.append(
                {
                    "digest": file["digest"],
                    "bytes": file["size"],
                    "path": "releases/%s/%s" % (release, file["path"]),
                    "quarantined": False,
                }
            )
        elif not os.path.lexists(blob):
            hard_link(place, blob)
            fsync_folder(os.path.dirname(blob))
    return bad


def _readable_head(store: Store, release: str) -> Optional[agent.Head]:
    """What describes an installed release; None when that itself is damaged."""
    try:
        head = agent.release_head(store.release(release))
        found = agent.head_of(head)["manifest_digest"]
    except (Refused, OSError):
        return None
    return head if found == "sha256:" + release else None


def _repair(store: Store, path: str) -> None:
    """Takes what releases lack out of a bundle of one of them. Raises Refused for another's."""
    head, bundle = agent.read_head(path)
    release = _hex(bundle["manifest_digest"])
    agent.verify_signature(bundle, store.signers)
    if not is_folder(store.release(release)):
        raise Refused("%s is release %s, which is not installed here" % (path, release[:12]))
    require_space(store, bundle, store.settings.keep)
    taker = Taker(store, bundle, set(blobs_of(bundle)), None)
    try:
        agent.read_bundle(path, sink=taker)
    finally:
        taker.close()
    mend(store, head)


# ── what is here ─────────────────────────────────────────────────────────────────────────────────────


def facts(options: argparse.Namespace, world: World) -> Dict[str, Any]:
    """This machine, and what its store holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": world.machine(),
        "store": store_facts(options.root, world),
    }


def store_facts(root: str, world: World) -> Dict[str, Any]:
    """What a store holds; a root that is none yet is told as such. Nothing is written."""
    place = os.path.realpath(root)
    there = place
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    found = os.statvfs(there)
    empty: Dict[str, Any] = {
        "root": place,
        "enrolled": False,
        "mode": None,
        "current": None,
        "previous": None,
        "good": [],
        "sequence": 0,
        "releases": [],
        "free": found.f_bavail * found.f_frsize,
        "agent": _file_digest(os.path.join(place, "agent.pyz")),
    }
    if not os.path.lexists(os.path.join(place, "enrolled.json")):
        return empty
    store = Store(root, world, reading=True)
    current, previous, good = store.target("current"), store.target("previous"), good_releases(store)
    return dict(
        empty,
        enrolled=True,
        mode=store.settings.mode,
        keep=store.settings.keep,
        server=store.settings.server,
        current=current,
        previous=previous,
        good=good,
        sequence=store.sequence()[0],
        releases=[
            dict(
                _release_facts(store, release),
                good=release in good,
                current=release == current,
                previous=release == previous,
            )
            for release in store.releases()
        ],
    )


def _release_facts(store: Store, release: str) -> Dict[str, Any]:
    head = _readable_head(store, release)
    told: Dict[str, Any] = {"digest": release, "name": None, "sequence": None, "bytes": None, "whole": False}
    if head is None:
        return told
    bundle = agent.head_of(head)
    size = sum(blobs_of(bundle).values())
    whole = is_whole_release(store, release)
    return dict(told, name=bundle["name"], sequence=release_sequence(bundle), bytes=size, whole=whole)


def _file_digest(path: str) -> Optional[str]:
    return "sha256:" + hash_on_disk(path) if os.path.isfile(path) else None


def status(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    """The store, and the last lines of its journal."""
    return {
        "schema_version": SCHEMA_VERSION,
        "store": store_facts(options.root, store.world),
        "journal": journal_lines(store, 20),
    }


def journal(options: argparse.Namespace, store: Store) -> Dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "journal": journal_lines(store, JOURNAL_LIMIT)}


# ── command line ─────────────────────────────────────────────────────────────────────────────────────

STATUS: Dict[Type[Exception], int] = {
    Refused: 6,
    MissingProgram: 7,
    BadUsage: 2,
    NoSpace: 10,
    Busy: 11,
    Failed: 5,
}
"""Exit status of each failure."""
WORDS: Dict[Type[Exception], str] = {
    Refused: "refused",
    MissingProgram: "missing",
    BadUsage: "bad usage",
    NoSpace: "no space",
    Busy: "busy",
    Failed: "failed",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    os.umask(0o022)
    signal.signal(signal.SIGTERM, _interrupted)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # who asked may lose the connection; the work goes on
    return respond(argv, World(), io.BufferedReader(Patient(0)))


def respond(argv: Optional[Sequence[str]], world: World, stdin: io.BufferedReader) -> int:
    """Does what a command line says; returns the exit status, and prints the document."""
    options = _parser().parse_args(argv)
    options.root = os.path.expanduser(options.root or (USER_ROOT if os.geteuid() else SYSTEM_ROOT))
    options.input = stdin
    try:
        document = _act(options, world)
        _print(document)
    except tuple(STATUS) as error:
        kind = next(kind for kind in STATUS if isinstance(error, kind))
        say("%s: %s" % (WORDS[kind], error))
        return STATUS[kind]
    except OSError as error:
        say("cannot read or write: %s" % error)
        return 10 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    except KeyboardInterrupt:
        say("interrupted; what came is kept")
        return 130
    passed = document.get("verdict", {"passed": True})["passed"]
    return 5 if document.get("reasons") or not passed else 0


def _print(document: Dict[str, Any]) -> None:
    """One JSON document on stdout; whoever listened may be gone. Raises OSError for a file that does not take it."""
    try:
        sys.stdout.write(json.dumps(document, indent=2, sort_keys=True) + "\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered would fail again at the end
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "stdout") from None


def _act(options: argparse.Namespace, world: World) -> Dict[str, Any]:
    act: Callable[[argparse.Namespace, Any], Dict[str, Any]] = options.act
    if not options.in_store:
        return act(options, world)
    store = Store(options.root, world, reading=options.act in (status, journal))
    tempfile.tempdir = store.path("incoming")  # what ssh-keygen reads lies in the store, too
    return act(options, store)


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _json(value: Dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode("ascii") + b"\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent.pyz", description="keeps releases on a device")
    parser.add_argument(
        "--root", metavar="DIR", help="the store (default %s, or %s)" % (SYSTEM_ROOT, USER_ROOT)
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = {}
    for name, act, about in (
        ("facts", facts, "this machine, and what its store holds"),
        ("enroll", enroll, "make the store; who may sign comes on stdin"),
        ("offer", offer, "may this release be installed, and what is missing; its head comes on stdin"),
        ("receive", receive, "missing blobs on stdin"),
        ("install", install, "switch to a release, test it, and stay or go back"),
        ("self-test", self_test_command, "test an installed release"),
        ("rollback", rollback, "go back to the previous release"),
        ("gc", gc, "remove what nothing needs any more"),
        ("status", status, "the store, and the last lines of its journal"),
        ("fsck", fsck, "hash everything again"),
        ("boot", boot, "run before each start of the server"),
        ("journal", journal, "what happened here"),
    ):
        made[name] = commands.add_parser(name, help=about)
        made[name].set_defaults(act=act, in_store=name not in ("facts", "enroll"))
        made[name].add_argument("--root", metavar="DIR", default=argparse.SUPPRESS)
    made["enroll"].add_argument("--mode", choices=sorted(SERVICES), required=True)
    made["enroll"].add_argument(
        "--keep", metavar="N", type=_count, help="good releases that stay (%d)" % KEEP
    )
    made["enroll"].add_argument(
        "--server", metavar="PATH", help="llama-server, or a Python, for bundles without"
    )
    made["enroll"].add_argument("--replace-signers", action="store_true")
    made["enroll"].add_argument("--agent", metavar="FILE", help="what becomes the store's agent.pyz")
    made["receive"].add_argument("release", metavar="RELEASE")
    made["install"].add_argument("release", metavar="RELEASE|BUNDLE")
    made["install"].add_argument("--consume", action="store_true", help="free the bundle's file on the way")
    made["install"].add_argument("--no-switch", action="store_true", help="only lay it out")
    made["install"].add_argument("--no-self-test", action="store_true")
    made["self-test"].add_argument("release", metavar="RELEASE", nargs="?")
    for name in ("offer", "install", "gc"):
        made[name].add_argument("--keep", metavar="N", type=_count, help="good releases that stay")
    made["fsck"].add_argument("--repair-from", metavar="BUNDLE")
    made["offer"].add_argument("--dry-run", action="store_true", help="answer, and write nothing")
    made["offer"].add_argument(
        "--room", metavar="BYTES", type=int, help="the bundle's file comes onto this disk, and is consumed"
    )
    for name in ("offer", "install"):
        made[name].add_argument("--allow-downgrade", action="store_true")
        made[name].add_argument("--other-device", action="store_true", help="though it is for another device")
    for name in ("offer", "install", "self-test"):
        made[name].add_argument(
            "--force-device", action="store_true", help="that, and with too little memory"
        )
    for name in ("install", "self-test"):
        made[name].add_argument("--memory-limit", metavar="BYTES", type=int, help="simulate a smaller device")
        made[name].add_argument("--full", action="store_true", help="fill every slot, not one")
    return parser


def _count(text: str) -> int:
    if not re.match(r"[1-9][0-9]{0,2}\Z", text):
        raise argparse.ArgumentTypeError("%s is not a number from 1 to 999" % text)
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
