"""Files and folders that appear whole or not at all, and the cache where stages resume."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgepack.errors import Busy, NoSpace
from edgepack.units import show


def cache_root() -> Path:
    """$EDGEPACK_CACHE, else $XDG_CACHE_HOME/edgepack, else ~/.cache/edgepack."""
    if "EDGEPACK_CACHE" in os.environ:
        return Path(os.environ["EDGEPACK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgepack"


@contextmanager
def cache_used() -> Iterator[None]:
    """While the block runs nothing is taken out of the cache; it waits for who is taking something out now."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def cache_alone() -> Iterator[None]:
    """Holds the cache while no other process is in `cache_used`. Raises Busy when one is."""
    root = cache_root()
    if not root.is_dir():
        yield
        return
    with (root / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"another edgepack works with {root}; nothing was removed", hint="wait until it has ended"
            ) from None
        yield


_LOCK = ".lock"


def sha256_file(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file, read once in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return digest.hexdigest()


def fsync_dir(folder: Path) -> None:
    """Makes renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is fsynced and renamed, else removed.

    Raises NoSpace when the disk fills up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary = part(path)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_dir(path.parent)
    except OSError as error:
        _raise_if_full(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_dir(path: Path) -> Iterator[Path]:
    """Like whole_file for a folder: it appears under its name only when the block completed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary = part(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        fsync_dir(temporary)
        temporary.rename(path)
        fsync_dir(path.parent)
    except OSError as error:
        _raise_if_full(error, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """A folder of one run in the cache, gone when the block ends; what killed runs left of this kind goes first."""
    place = part(cache_root() / kind)
    place.mkdir(parents=True, exist_ok=True)
    sweep(place.parent, kind)
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            yield Path(folder)
    finally:
        with suppress(OSError):  # another of this kind, in this process, is not done yet
            place.rmdir()


def part(path: Path) -> Path:
    """The name of ``path`` while this process writes or removes it; with the machine's, for some share a cache."""
    return path.with_name(f".{path.name}.part{os.uname().nodename}-{os.getpid()}")


def is_part(path: Path) -> bool:
    """Whether it has a name that `part` gives."""
    return path.name.startswith(".") and ".part" in path.name


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes the parts, of ``name`` or of all, that killed processes of this machine left in a folder."""
    for left in folder.glob(f".{'*' if name is None else glob.escape(name)}.part*"):
        machine, _, owner = left.name.rpartition(".part")[2].rpartition("-")
        if machine != os.uname().nodename or not owner.isdecimal() or _runs(int(owner)):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def copy_files(source: Path, folder: Path, *, link: bool = False) -> None:
    """The files of a folder, and of those below it, into another; ``link``: as hard links on the same disk.

    Raises OSError as it is, where shutil.copytree hides that the disk is full.
    """
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if link:
                os.link(path, target)
            else:
                shutil.copyfile(path, target)


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock that one process of this machine has at a time; ``waiting`` is called when another has it now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text so that the file is either the old one or the new one."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written where ``folder`` is or will be."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    return shutil.disk_usage(probe).free


def require_space(folder: Path, need: int) -> None:
    """Raises NoSpace before a long write that could not complete."""
    free = free_bytes(folder)
    if free < need:
        raise NoSpace(
            f"{folder} has {show(free)} free and {show(need)} must be written",
            hint=f"free {show(need - free)} or choose another folder with -o or EDGEPACK_CACHE",
        )


def is_full(error: OSError) -> bool:
    """Whether the disk, or what this user may fill of it, was the reason."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _raise_if_full(error: OSError, path: Path) -> None:
    if is_full(error):
        raise NoSpace(
            f"the disk is full while writing {path}; nothing was kept",
            hint="free some space or choose another folder with -o; the same command resumes",
        ) from error
