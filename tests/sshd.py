"""A real sshd on loopback for one test: own host key, own port, one key that may log in, as the current user.

`Line` stands between ssh and sshd where a test wants to count what travels, or to cut it.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "/usr/sbin/sshd"
START_SECONDS = 30.0
HOST = "device"
"""The name in the client's configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sshd:
    """A running sshd and how to reach it."""

    folder: Path
    port: int
    ssh: tuple[str, ...]
    """The client with a configuration of its own, in which HOST is this sshd."""
    home: Path
    """Whoever logs in is at home here."""

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text(encoding="utf-8", errors="replace")

    def through(self, port: int) -> tuple[str, ...]:
        """The client, on another port: that of a Line."""
        return (*self.ssh, "-p", str(port))


@contextmanager
def serving(folder: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[Sshd]:
    """Runs an sshd out of ``folder``; ``environment`` is what programs see that are run through it."""
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "home"
    home.mkdir()
    for name in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name], check=True
        )
    shutil.copyfile(folder / "user_key.pub", folder / "authorized_keys")
    port = free_port()
    public = (folder / "host_key.pub").read_text(encoding="ascii")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port},{HOST} {public}", encoding="ascii")
    told = " ".join(f'"{name}={value}"' for name, value in {"HOME": str(home), **(environment or {})}.items())
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"KbdInteractiveAuthentication no\nMaxStartups 100\nSetEnv {told}\n"
        f"Subsystem sftp /usr/lib/openssh/sftp-server\n",
        encoding="utf-8",
    )
    client = folder / "ssh_config"
    client.write_text(
        f"Host {HOST}\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  HostKeyAlias {HOST}\n"
        f"  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n",
        encoding="utf-8",
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it locks its unprivileged half in
    with subprocess.Popen(
        [PROGRAM, "-D", "-f", folder / "sshd_config", "-E", folder / "sshd.log"]
    ) as process:
        try:
            _answers(port, process)
            yield Sshd(folder=folder, port=port, ssh=("ssh", "-F", str(client)), home=home)
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, "sshd ended at once; read sshd.log"
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        assert time.monotonic() < end, "sshd does not listen"
        time.sleep(0.05)


class Line:
    """A TCP line to a port of this machine that counts what travels and can be cut; use it as a context manager."""

    def __init__(self, to: int, *, rate: float | None = None) -> None:
        """``rate``: bytes a second towards the device, of each connection; None for as fast as it goes."""
        self._to = to
        self._rate = rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.sent = 0
        """Bytes towards the device."""
        self.received = 0
        self.cuts = 0
        self._left: int | None = None
        self._lock = threading.Lock()

    def cut_after(self, count: int) -> None:
        """Cuts every connection as soon as ``count`` more bytes have gone towards the device."""
        with self._lock:
            self._left = count

    def __enter__(self) -> Line:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed: the test is over
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for ends in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket, forth: bool) -> None:
        free = time.monotonic()
        with suppress(OSError):  # the other direction was cut
            while piece := source.recv(1 << 16):
                if forth and self._rate is not None:
                    free = max(free, time.monotonic() - 0.05) + len(piece) / self._rate
                    time.sleep(max(0.0, free - time.monotonic()))
                with self._lock:
                    whole = True
                    if forth and self._left is not None:
                        whole = len(piece) < self._left
                        piece = piece[: self._left]
                        self._left = self._left - len(piece) if whole else None
                    self.sent += len(piece) if forth else 0
                    self.received += 0 if forth else len(piece)
                to.sendall(piece)
                if not whole:
                    self.cuts += 1
                    break
        for end in (source, to):
            with suppress(OSError):  # closed already
                end.shutdown(socket.SHUT_RDWR)
