"""The same Debian in namespaces of this machine, at its own speed: its systemd is the first process there.

A cut of its power is the end of all its processes at once; what the kernel had in memory then still gets to the disk.
What a real cut leaves on a disk is what the guest in QEMU loses, and what tests/powercut replays. Controllers of memory
and tasks are those that this machine gives to cgroup v2, which may be none.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.systemd_guest import guest

START = """\
set -eu
echo $$ >"$group/cgroup.procs"
exec unshare --mount --propagation private --pid --fork --kill-child=KILL --uts --ipc --net --cgroup sh -eu -c "$inside"
"""
INSIDE = """\
mount -t ext4 -o loop "$disk" "$root"
cd "$root"
mount -t proc proc proc; mount --bind proc/sys proc/sys; mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev; mount -t tmpfs -o mode=755 tmpfs run
mkdir dev/pts dev/shm; mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts; mount -t tmpfs tmpfs dev/shm
for device in null:3 console:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "dev/${device%:*}" c 1 "${device#*:}"
done
mknod -m 666 dev/tty c 5 0; ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd; ln -s fd/0 dev/stdin; ln -s fd/1 dev/stdout; ln -s fd/2 dev/stderr
hostname device; busybox ip link set lo up
pivot_root . mnt
umount -l /mnt
exec /usr/bin/env -i container=edgepack PATH=/usr/sbin:/usr/bin:/sbin:/bin /sbin/init
"""


def cgroup_root() -> Path:
    """Where cgroup v2 is mounted. Raises RuntimeError when it is nowhere."""
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise RuntimeError("cgroup v2 is mounted nowhere")


@dataclass(slots=True, kw_only=True)
class Container(guest.Guest):
    """The guest as processes of this machine."""

    def power_on(self) -> None:
        environment = {
            **os.environ,
            "group": str(self.group),
            "inside": INSIDE,
            "disk": str(self.folder / "disk"),
            "root": str(self.folder / "root"),
        }
        self.group.mkdir()
        with (self.folder / "console").open("ab") as console:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "sh", "-c", START],
                env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            )  # fmt: skip
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (first := children.read_text(encoding="ascii").split()):
            time.sleep(0.05)
        (self.folder / "pid").write_text(first[0], encoding="ascii")
        self._booted(None)

    def reboot(self) -> None:
        assert self.process is not None
        self.run("root", "systemctl reboot")
        self.process.wait(timeout=guest.BOOT_SECONDS)
        self._forget()
        self.power_on()

    def cut_power(self) -> None:
        guest.Guest.cut_power(self)
        self._forget()

    def _forget(self) -> None:
        """Removes its cgroups, once the last of its processes is gone."""
        while "populated 1" in (self.group / "cgroup.events").read_text(encoding="ascii"):
            time.sleep(0.05)
        for folder, _, _ in os.walk(self.group, topdown=False):
            Path(folder).rmdir()

    @property
    def group(self) -> Path:
        """Its cgroup, in which its systemd makes others."""
        return cgroup_root() / f"edgepack-guest-{self.folder.name}"

    def _greets(self) -> bool:
        return True  # ssh itself fails at once while nobody listens


@contextmanager
def container(folder: Path) -> Iterator[Container]:
    """A fresh one, switched off; its disk and all else of it lie in ``folder``."""
    with guest.guest(folder) as made:
        (folder / "root").mkdir()
        with (folder / "ssh_config").open("a", encoding="ascii") as config:
            config.write(f"  ProxyCommand nsenter -t $(cat {folder}/pid) -n busybox nc 127.0.0.1 22\n")
        one = Container(image=made.image, folder=folder, port=made.port)
        try:
            yield one
        finally:
            if one.process is not None:
                one.cut_power()
