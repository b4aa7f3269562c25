"""File systems in files: made, mounted through a loop device, copied without their holes. Needs root on Linux."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgepack.units import MIB

OPTIONS = {"ext4": "loop", "xfs": "loop,nouuid", "btrfs": "loop"}


class Unmountable(Exception):
    """The kernel does not mount it."""


def make(filesystem: str, image: Path, size: int) -> None:
    """A file system of so many bytes in a file that has 1 MiB more."""
    with image.open("wb") as out:
        out.truncate(size + MIB)
    argv: list[str | Path]
    if (
        filesystem == "ext4"
    ):  # not lazy: a kernel thread would write tables of inodes for seconds after the first mount
        lazy = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        argv = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", lazy, image, f"{size // 1024}k"]
    elif filesystem == "xfs":
        argv = ["mkfs.xfs", "-q", "-f", "-K", "-d", f"size={size}", image]
    else:
        argv = ["mkfs.btrfs", "-q", "-f", "-K", "-b", str(size), image]
    subprocess.run(argv, check=True, capture_output=True)
    subprocess.run(["fallocate", "--dig-holes", image], check=True)


@contextmanager
def mounted(filesystem: str, image: Path) -> Iterator[Path]:
    """The file system's root, its journal replayed. Raises Unmountable."""
    with tempfile.TemporaryDirectory() as folder:
        argv: list[str | Path] = ["mount", "-t", filesystem, "-o", OPTIONS[filesystem], image, folder]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unmountable(done.stderr.strip())
        temporary = tempfile.tempdir
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = (
                temporary  # an installer that ran in this process has left its own, on the disk
            )
            subprocess.run(["umount", folder], check=True)


def consistent(filesystem: str, image: Path) -> bool:
    """Whether an unmounted file system is whole by its own checker, which changes nothing."""
    checker = {
        "ext4": ("e2fsck", "-f", "-n"),
        "xfs": ("xfs_repair", "-n", "-f"),
        "btrfs": ("btrfs", "check", "--readonly"),
    }[filesystem]
    return subprocess.run([*checker, image], capture_output=True, check=False).returncode == 0


def copy(source: Path, target: Path) -> None:
    """Copies a file and leaves out its holes."""
    with source.open("rb") as read, target.open("wb") as written:
        size = os.fstat(read.fileno()).st_size
        written.truncate(size)
        end = 0
        while (begin := _data(read.fileno(), end)) is not None:
            end = os.lseek(read.fileno(), begin, os.SEEK_HOLE)
            os.lseek(written.fileno(), begin, os.SEEK_SET)
            while begin < end:
                begin += os.sendfile(written.fileno(), read.fileno(), begin, end - begin)


def _data(handle: int, begin: int) -> int | None:
    try:
        return os.lseek(handle, begin, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole until the end
        return None
