"""Other machines: one login over the system's own ssh, or a folder of this one, behind the same few words.

OpenSSH is run as a program, so that the user's configuration, keys, agent, jump hosts and known hosts are what they
are for `ssh HOST`. A master connection in a private folder serves all calls of one session.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgepack import shell
from edgepack.errors import BadInput, EdgepackError, Offline, Untrusted

SOCKET_PATH = 80
"""Longest path of a control socket: 104 bytes on BSD, less the 17 that ssh adds while it makes one."""
LOST = 255
"""ssh's own exit status, where others are the program's."""
_UNREAD = "ssh does not take its command-line, and ended before it opened its log"
PATIENCE = {"connecttimeout": ("none", "30"), "serveraliveinterval": ("0", "15")}
"""What ssh says (`ssh -G`) of an option nobody set, by which a dead line hangs for ever, and what is set instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a program said that ran there."""

    status: int
    stdout: bytes
    said: tuple[str, ...]
    """The last lines of its stderr."""


class Connection(Protocol):
    """A machine that programs can be run on."""

    name: str
    folder: Path | None
    """The folder that stands for a whole device; None for a machine, where it is to be looked for."""

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: Iterable[bytes] = (),
        on_line: Callable[[str], None] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Runs a program there to its end. Raises Dropped when the line is cut meanwhile, and what `refused` is."""
        ...

    def close(self) -> None:
        """Logs out."""
        ...


class Dropped(Offline):
    """The line to a device was cut or could not be had; the same again may succeed."""


def connect(host: str, *, ssh: Sequence[str] = ("ssh",), interactive: bool = True) -> Connection:
    """A connection to "user@host", a name in ssh's configuration, "ssh://user@host:port", or a path with a slash.

    Nothing is sent before the first call. ``ssh``: the program and options of its own. Unless ``interactive``, ssh
    asks nothing. Raises BadInput for a name that ssh would take for an option.
    """
    if "/" in host and not host.startswith("ssh://"):
        return Local(Path(host))
    if not host or host.startswith("-") or any(letter.isspace() for letter in host):
        raise BadInput(f"{host!r} is no host", hint="name it user@host, or as in your ssh configuration")
    return Ssh(host, program=ssh, interactive=interactive)


class Local:
    """A folder of this machine: a device's disk in a card reader, or the device that this runs on."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.folder: Path | None = folder.absolute()

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: Iterable[bytes] = (),
        on_line: Callable[[str], None] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        found = shell.exchange(argv, stdin=stdin, on_line=on_line, timeout=timeout)
        return Answer(status=found.returncode, stdout=found.stdout, said=found.stderr)

    def close(self) -> None:
        return


class Ssh:
    """A machine behind ssh. The first call logs in, and so does the first one after the line was cut."""

    folder: Path | None = None

    def __init__(self, host: str, *, program: Sequence[str], interactive: bool) -> None:
        self.name = host
        self._program = tuple(program)
        self._interactive = interactive
        self._place: Path | None = None
        """Folder of the control socket; None when not logged in."""

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: Iterable[bytes] = (),
        on_line: Callable[[str], None] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        place = self._place or self._log_in()
        words = [*self._words(place), "-o", "ControlMaster=no", "-T", "--", self.name, shlex.join(argv)]
        try:
            found = shell.exchange(words, stdin=stdin, on_line=on_line, timeout=timeout)
        except shell.TimedOut as late:
            self.close()
            raise cut(self.name, (f"it did not answer within {late.timeout:.0f} s",)) from late
        if found.returncode == LOST or found.returncode < 0:
            self.close()
            raise cut(self.name, found.stderr)
        return Answer(status=found.returncode, stdout=found.stdout, said=found.stderr)

    def close(self) -> None:
        place, self._place = self._place, None
        if place is None:
            return
        # Where the line is dead the master ends by itself, with its ServerAliveInterval.
        with suppress(shell.TimedOut):
            shell.exchange([*self._words(place), "-O", "exit", "--", self.name], timeout=30)
        _clear(place)

    def _log_in(self) -> Path:
        """Starts the master connection, which asks for what it needs on the terminal."""
        place = _socket_folder()
        log = place / "log"
        patience = (word for name, value in self._unset().items() for word in ("-o", f"{name}={value}"))
        master = ("-o", "ControlMaster=yes", "-o", "ControlPersist=60", "-f", "-N", "-E", log)
        try:
            status = shell.detach([*self._words(place), *master, *patience, "--", self.name])
            if status != 0:
                said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else _UNREAD
                raise refused(self.name, said.splitlines())
        except BaseException:
            _clear(place)
            raise
        self._place = place
        return place

    def _unset(self) -> Mapping[str, str]:
        """The options of PATIENCE that the user's configuration leaves as they are."""
        told = shell.run([*self._program, "-G", "--", self.name], check=False).stdout.splitlines()
        known = dict(line.split(" ", 1) for line in told if " " in line)
        return {name: value for name, (unset, value) in PATIENCE.items() if known.get(name, unset) == unset}

    def _words(self, place: Path) -> list[str]:
        """ssh as the user has it, less what would meddle with a stream of bytes."""
        options = [
            f"ControlPath={place / 's'}",
            "Compression=no",  # weights have no slack left, and a small processor would be the brake
            "ClearAllForwardings=yes",
            "RemoteCommand=none",
            *(() if self._interactive else ("BatchMode=yes",)),
        ]
        return [*self._program, *(word for option in options for word in ("-o", option))]


def _clear(place: Path) -> None:
    """Removes the folder; a master that ends meanwhile removes its socket itself."""
    for file in list(place.iterdir()):
        file.unlink(missing_ok=True)
    place.rmdir()


def _socket_folder() -> Path:
    """A new folder that only this user enters, with a path short enough for a socket in it."""
    places = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir())
    fits = [
        p
        for p in places
        if p and os.access(p, os.W_OK) and len(p) + len("/edgepack-12345678/s") <= SOCKET_PATH
    ]
    return Path(tempfile.mkdtemp(prefix="edgepack-", dir=fits[0] if fits else "/tmp"))


# ── what ssh says ────────────────────────────────────────────────────────────────────────────────────


def refused(host: str, said: Sequence[str]) -> EdgepackError:
    """Why ssh did not get in, from its own words."""
    text = "\n".join(said)
    last = next((line.strip() for line in reversed(said) if line.strip()), "ssh gave no reason")
    if "HOST IDENTIFICATION HAS CHANGED" in text:
        return Untrusted(
            f"{host} shows another host key than it did before",
            hint=f"if it was installed anew, forget the old one with ssh-keygen -R and log in once with `ssh {host}`; "
            "otherwise somebody may stand in between",
        )
    if "ost key verification failed" in text or "host key is known for" in text:
        return Untrusted(
            f"the host key of {host} is not known here", hint=f"log in once with `ssh {host}` and compare it"
        )
    if "ermission denied" in text or "Too many authentication failures" in text:
        denied = next(line for line in reversed(said) if "ermission denied" in line or "Too many" in line)
        return Offline(
            f"{host} refused the login: {denied.strip()}",
            hint=f"`ssh {host}` must get in; ssh-copy-id brings a key",
        )
    if "Could not resolve hostname" in text:
        return Offline(f"there is no host {host}: {last}", hint=f"a folder is named with a slash: ./{host}")
    if "onfiguration option" in text or "Bad owner or permissions" in text or "command-line" in text:
        return BadInput(f"ssh does not take its configuration: {last}", hint=f"`ssh {host}` says the same")
    return Dropped(f"{host} cannot be reached: {last}", hint=f"`ssh {host}` must get in")


def cut(host: str, said: Sequence[str]) -> Dropped:
    """The line was lost, or the program there was killed: ssh gives both the same status."""
    last = next((line.strip() for line in reversed(said) if line.strip()), "nothing was said")
    return Dropped(
        f"the connection to {host} was lost, or what ran there was killed ({last})",
        hint="the same command goes on where it stopped",
    )
