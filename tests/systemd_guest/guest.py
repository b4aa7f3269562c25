"""A Debian with systemd, sshd and Python in QEMU, whose power can be cut; its one user beside root is pi.

debootstrap makes its root, mkfs.ext4 lays that onto a disk, and a few lines of busybox in front of it load what the
cloud kernel of Debian has as modules. QEMU emulates the processor (TCG), so that no KVM is needed; its network ends at
this machine's loopback.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgepack import workspace
from tests.powercut.guest import KERNEL, archive, load_order
from tests.powercut.scenario import memory_folder
from tests.sshd import free_port

SUITE = "bookworm"
PACKAGES = ("dbus", "libpam-systemd", "openssh-server", "python3", "systemd", "systemd-sysv")
MODULES = ("virtio_pci", "virtio_blk", "virtio_net")
MEMORY = 1024
"""MiB of the guest."""
DISK = "1G"
BOOT_SECONDS = 600.0
"""Until sshd answers; a busy machine emulates slowly."""
UNWANTED = ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists")
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "getty@tty1.service", "serial-getty@ttyS0.service")
"""Nobody sits before it, and it reaches no archive of packages."""

INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /disk
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec >/dev/console 2>&1 </dev/console
for module in $(cat /modules/order); do insmod /modules/$module; done
ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up
mount -t ext4 /dev/vda /disk
mount --move /dev /disk/dev; mount --move /sys /disk/sys; mount --move /proc /disk/proc
exec switch_root /disk /sbin/init
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What every guest begins as, and the keys to it."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "root.ext4"

    def key(self, name: str) -> Path:
        return self.folder / name


def image() -> Image:
    """The image; the first time it is made out of Debian's packages, which takes root and some minutes."""
    made_from = repr((SUITE, PACKAGES, MODULES, DISK, UNWANTED, MASKED, INIT, 1))
    name = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    folder = workspace.cache_root() / "systemd-guest" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work,
            tempfile.TemporaryDirectory(
                dir=memory_folder()
            ) as root,  # dpkg flushes every file that it writes
        ):
            _make(Path(work), Path(root))
            (Path(work) / "made").rename(folder)
    return Image(folder=folder)


def _make(work: Path, root: Path) -> None:
    made = work / "made"
    made.mkdir(mode=0o700)
    root.chmod(0o755)
    _run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, root)
    for key in ("host", "user"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", made / key)
    _settle(root, made)
    _run("mkfs.ext4", "-q", "-d", root, made / "root.ext4", DISK)
    depends = subprocess.run(
        ["apt-cache", "depends", KERNEL], capture_output=True, text=True, check=True
    ).stdout
    kernel = re.search(r"Depends: (linux-image-\S+)", depends)
    if kernel is None:
        raise RuntimeError(f"apt knows no {KERNEL}: the guest is made of Debian 12 (amd64)")
    subprocess.run(["apt-get", "download", "-qq", kernel[1], "busybox-static"], cwd=work, check=True)
    for package in work.glob("*.deb"):
        _run("busybox", "dpkg-deb", "-x", package, work / "unpacked")
    (made / "vmlinuz").write_bytes(next((work / "unpacked/boot").glob("vmlinuz-*")).read_bytes())
    modules = {path.stem.replace("-", "_"): path for path in (work / "unpacked/lib/modules").rglob("*.ko")}
    order = list(dict.fromkeys(name for wanted in MODULES for name in load_order(modules, wanted)))
    files = {f"modules/{name}": (0o644, modules[name].read_bytes()) for name in order}
    files["modules/order"] = (0o644, "\n".join(order).encode())
    files["bin/busybox"] = (0o755, (work / "unpacked/bin/busybox").read_bytes())
    files["init"] = (0o755, INIT.encode())
    (made / "initramfs").write_bytes(archive(files))


def _settle(root: Path, keys: Path) -> None:
    """A name, two users with one key, and nothing that would run beside what is tested."""
    _run("chroot", root, "useradd", "--create-home", "--uid", "1000", "--shell", "/bin/bash", "pi")
    _run("chroot", root, "systemctl", "mask", *MASKED)
    (root / "etc/hostname").write_text("device\n", encoding="ascii")
    (root / "etc/hosts").write_text("127.0.0.1 localhost device\n", encoding="ascii")
    # An empty one would make every start of a fresh disk the first, on which systemd enables what it finds.
    (root / "etc/machine-id").write_text(hashlib.md5(b"device").hexdigest() + "\n", encoding="ascii")
    for name in ("rsa", "ecdsa", "ed25519"):
        for suffix in ("", ".pub"):
            (root / f"etc/ssh/ssh_host_{name}_key{suffix}").unlink()
    shutil.copy2(keys / "host", root / "etc/ssh/ssh_host_ed25519_key")
    for home, owner in ((root / "root", 0), (root / "home/pi", 1000)):
        (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
        shutil.copy2(keys / "user.pub", home / ".ssh/authorized_keys")
        for path in (home / ".ssh", home / ".ssh/authorized_keys"):
            shutil.chown(path, owner, owner)
    for left in UNWANTED:
        shutil.rmtree(root / left)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)


@dataclass(slots=True, kw_only=True)
class Guest:
    """A guest with a disk of its own, on or off."""

    image: Image
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    boots: list[float] = field(default_factory=list)
    """Seconds until sshd let somebody in, of each start."""

    @property
    def ssh(self) -> tuple[str, ...]:
        return ("ssh", "-F", str(self.folder / "ssh_config"))

    def run(self, user: str, script: str, *, timeout: float = 600.0) -> tuple[int, str]:
        """Exit status and output, stderr with it, of a shell script in the guest."""
        done = subprocess.run(
            [*self.ssh, f"{user}@device", "/bin/sh", "-s"], input=script.encode(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=timeout, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout.decode("utf-8", "replace").strip()

    def power_on(self) -> None:
        """Starts it and waits until somebody may log in. Raises RuntimeError with what its console said."""
        argv: list[str | Path] = [
            "setpriv", "--pdeathsig", "KILL",  # it ends with whoever started it
            "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", str(MEMORY),
            "-nodefaults", "-no-user-config", "-display", "none",
            "-serial", f"file:{self.folder / 'console'}",
            "-kernel", self.image.folder / "vmlinuz", "-initrd", self.image.folder / "initramfs",
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0 systemd.show_status=0",
            # What a cut loses is what the guest had in memory: this machine goes on, and need not flush for it.
            "-drive", f"file={self.folder / 'disk'},format=raw,if=virtio,cache=unsafe",
            "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22",
            "-device", "virtio-net-pci,netdev=net,romfile=",
        ]  # fmt: skip
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        self._booted(None)

    def reboot(self) -> None:
        """Reboots it in an orderly way, as its administrator would."""
        before = self._boot_id()
        self.run("root", "systemctl reboot")
        self._booted(before)

    def cut_power(self) -> None:
        """Ends it at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def _boot_id(self) -> str | None:
        try:
            status, said = self.run("root", "cat /proc/sys/kernel/random/boot_id", timeout=60)
        except subprocess.TimeoutExpired:
            return None
        return said if status == 0 else None

    def _booted(self, before: str | None) -> None:
        began = time.monotonic()
        while time.monotonic() - began < BOOT_SECONDS:
            if self.process is None or self.process.poll() is not None:
                break
            if self._greets() and self._boot_id() not in (None, before):
                self.boots.append(time.monotonic() - began)
                return
            time.sleep(2)
        console = (self.folder / "console").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the guest did not start:\n{console[-4000:]}")

    def _greets(self) -> bool:
        """Whether sshd says who it is; QEMU takes the connection long before that."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as line:
                return line.recv(4) == b"SSH-"
        except OSError:
            return False


@contextmanager
def guest(folder: Path) -> Iterator[Guest]:
    """A fresh guest, switched off; its disk and all else of it lie in ``folder``."""
    made = image()
    _run("cp", "--sparse=always", made.disk, folder / "disk")
    port = free_port()
    host = made.key("host.pub").read_text(encoding="ascii")
    (folder / "known_hosts").write_text(f"device {host}", encoding="ascii")
    (folder / "ssh_config").write_text(
        f"Host device\n  HostName 127.0.0.1\n  Port {port}\n  User root\n  HostKeyAlias device\n"
        f"  IdentityFile {made.key('user')}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n"
        f"  ConnectTimeout 60\n",
        encoding="ascii",
    )
    one = Guest(image=made, folder=folder, port=port)
    try:
        yield one
    finally:
        if one.process is not None:
            one.cut_power()


def _run(*words: str | Path) -> None:
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stdout[-2000:]}")


def missing_programs() -> Sequence[str]:
    """Programs that it needs and that are not here."""
    needed = (
        "apt-get",
        "busybox",
        "debootstrap",
        "dpkg-deb",
        "mkfs.ext4",
        "qemu-system-x86_64",
        "setpriv",
        "ssh",
        "ssh-keygen",
    )
    return [name for name in needed if shutil.which(name) is None]
