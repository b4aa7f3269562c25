"""A small x86-64 Linux that runs the agent on disks whose every write and flush QEMU records.

Kernel, Python, ssh-keygen and busybox are Debian's; their packages are unpacked, not installed. QEMU emulates the
processor (TCG), so that no KVM is needed. Between the guest's file system and the disk stands QEMU's blklogwrites,
which appends each request to a log of the format of the kernel's dm-log-writes.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack import workspace

PACKAGES = (
    "busybox-static", "libc6", "libexpat1", "libffi8", "libpcre2-8-0", "libpython3.11-minimal", "libpython3.11-stdlib",
    "libselinux1", "libssl3", "openssh-client", "python3.11-minimal", "zlib1g",
)  # fmt: skip
"""Debian 12's; the kernel is whatever linux-image-cloud-amd64 stands for."""
KERNEL = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_blk", "xfs", "btrfs")
"""What the cloud kernel has as modules; ext4 is in it."""
USELESS = re.compile(
    r"usr/share|usr/lib/systemd|.*/gconv/|.*_test[a-z]*\.|.*/(lib2to3|pydoc_data|idlelib|ensurepip|unittest)/"
)
MEMORY = 448
"""MiB of the guest, which holds its files and the frames in them."""

WITHOUT_FSYNC = """\
# What a program without fsync would have left: os.fsync and its like do nothing, for files, folders or both.
import os, stat
which = os.environ.get("POWERCUT_WITHOUT_FSYNC")
def only_some(call):
    def fsync(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        kind = "folders" if stat.S_ISDIR(os.fstat(number).st_mode) else "files"
        if which not in ("all", kind):
            call(number)
    return fsync
if which:
    os.fsync, os.fdatasync, os.sync = only_some(os.fsync), only_some(os.fdatasync), lambda: None
"""

INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec >/dev/console 2>&1 </dev/null
export PATH=/usr/bin:/bin PYTHONPATH=/powercut HOME=/tmp
for module in $(cat /modules/order); do insmod /modules/$module; done
sh -eu /powercut/job && echo powercut: done || echo powercut: failed
poweroff -f
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """What QEMU starts: Debian's kernel, and an archive of files that the kernel unpacks into memory."""

    kernel: Path
    files: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk of the guest, and where its record goes."""

    image: Path
    log: Path


def guest() -> Guest:
    """The guest; the first time its packages are fetched with apt-get, and nothing is installed."""
    made_from = repr((PACKAGES, KERNEL, MODULES, USELESS.pattern))
    folder = workspace.cache_root() / "powercut" / hashlib.sha256(made_from.encode()).hexdigest()[:16]
    made = Guest(kernel=folder / "vmlinuz", files=folder / "initramfs")
    if not made.files.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            root = _unpacked(Path(work))
            kernel = next((root / "boot").glob("vmlinuz-*"))
            with workspace.whole_file(made.kernel) as out:
                out.write_bytes(kernel.read_bytes())
            with workspace.whole_file(made.files) as out:
                out.write_bytes(archive(_guest_files(root)))
    return made


def record(
    machine: Guest, disks: Sequence[Disk], files: Mapping[str, bytes], job: str, *, timeout: float
) -> str:
    """Boots the guest with disks (vda, vdb, …) and files (/powercut/…), runs a shell script; returns what it said.

    Raises RuntimeError when the script fails.
    """
    inside = {f"powercut/{name}": (0o644, content) for name, content in files.items()}
    inside["powercut/job"] = (0o755, job.encode())
    inside["powercut/sitecustomize.py"] = (0o644, WITHOUT_FSYNC.encode())
    inside["init"] = (0o755, INIT.encode())
    with tempfile.TemporaryDirectory() as work:
        more = Path(work) / "initramfs"
        with more.open("wb") as out:
            out.write(machine.files.read_bytes())
            out.write(archive(inside))
        argv: list[str | Path] = [
            "setpriv", "--pdeathsig", "KILL",  # it ends with whoever started it
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-smp", "2", "-m", str(MEMORY),
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel",
            machine.kernel, "-initrd", more, "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
        ]  # fmt: skip
        for disk in disks:
            argv += _drive(disk)
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
    if "powercut: done" not in done.stdout:
        raise RuntimeError(
            f"the guest did not finish (status {done.returncode}):\n{done.stdout[-4000:]}{done.stderr}"
        )
    return done.stdout


def _drive(disk: Disk) -> list[str | Path]:
    """A virtio disk with a volatile write cache: the guest must flush, and its flushes are in the log.

    Only the log counts, so that the files on this side need no flush (no-flush); the log then is in the order in which
    requests were completed for the guest.
    """
    below = {"driver": "file", "cache": {"no-flush": True}}
    name = disk.log.stem
    node = {
        "driver": "blklogwrites",
        "node-name": name,
        "file": {"driver": "raw", "file": {**below, "filename": str(disk.image)}},
        "log": {**below, "filename": str(disk.log)},
        "log-sector-size": 512,
    }
    disk.log.write_bytes(b"")
    return [
        "-blockdev",
        json.dumps(node),
        "-device",
        f"virtio-blk-pci,drive={name},write-cache=on,discard=off",
    ]


def _unpacked(work: Path) -> Path:
    depends = subprocess.run(
        ["apt-cache", "depends", KERNEL], capture_output=True, text=True, check=True
    ).stdout
    kernel = re.search(r"Depends: (linux-image-\S+)", depends)
    if kernel is None:
        raise RuntimeError(f"apt knows no {KERNEL}: the guest is made of Debian 12 (amd64)")
    subprocess.run(
        ["apt-get", "download", "-qq", *PACKAGES, kernel[1]], cwd=work, check=True, capture_output=True
    )
    for package in sorted(work.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, work / "root"], check=True)
    root = work / "root"
    # Under emulation Python takes 15 seconds to compile what it imports: its own compiler does it here, once.
    libraries = f"{root}/lib/x86_64-linux-gnu:{root}/usr/lib/x86_64-linux-gnu"
    argv: list[str | Path] = [
        root / "lib64/ld-linux-x86-64.so.2", "--library-path", libraries, root / "usr/bin/python3.11", "-I",
        "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", root, root / "usr/lib/python3.11",
    ]  # fmt: skip
    subprocess.run(argv, env={"PYTHONHOME": str(root / "usr")}, check=True, capture_output=True)
    return root


Files = Mapping[str, tuple[int, bytes]]
"""Mode and content of each file by its path; a link has its target as content."""


def _guest_files(root: Path) -> Files:
    found: dict[str, tuple[int, bytes]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("boot/", "lib/modules/")) or USELESS.match(name):
            continue
        if path.is_symlink():
            found[name] = (stat.S_IFLNK | 0o777, str(path.readlink()).encode())
        elif path.is_file():
            found[name] = (path.stat().st_mode & 0o777, path.read_bytes())
    modules = {path.stem.replace("-", "_"): path for path in (root / "lib/modules").rglob("*.ko")}
    order = list(dict.fromkeys(name for wanted in MODULES for name in load_order(modules, wanted)))
    found |= {f"modules/{name}": (0o644, modules[name].read_bytes()) for name in order}
    found["modules/order"] = (0o644, "\n".join(order).encode())
    found["etc/passwd"] = (0o644, b"root:x:0:0:root:/tmp:/bin/sh\n")  # ssh-keygen asks who it is
    return found


def load_order(modules: Mapping[str, Path], name: str) -> Iterator[str]:
    """A module after those that it needs, as its own .modinfo names them; what is in the kernel has no file."""
    text = modules[name].read_bytes()
    needs = b"".join(re.findall(rb"\0depends=([^\0]*)", text)).decode().split(",")
    needs += [
        word for soft in re.findall(rb"\0softdep=pre: ([^\0]*)", text) for word in soft.decode().split()
    ]
    for need in needs:
        if need.replace("-", "_") in modules:
            yield from load_order(modules, need.replace("-", "_"))
    yield name


def archive(files: Files) -> bytes:
    """A cpio archive of the "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    folders = sorted({parent.as_posix() for name in files for parent in Path(name).parents} - {"."})
    out = bytearray()
    for name in folders:
        out += _member(name, stat.S_IFDIR | 0o755, b"")
    for name, (mode, content) in files.items():
        out += _member(name, mode if stat.S_IFMT(mode) else stat.S_IFREG | mode, content)
    return bytes(out + _member("TRAILER!!!", 0, b""))


def _member(name: str, mode: int, content: bytes) -> bytes:
    named = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(named), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + named
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
