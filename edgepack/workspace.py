"""Files and folders that appear whole or not at all, and the cache where stages resume."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgepack.errors import NoSpace
from edgepack.units import show


def cache_root() -> Path:
    """$EDGEPACK_CACHE, else $XDG_CACHE_HOME/edgepack, else ~/.cache/edgepack."""
    if "EDGEPACK_CACHE" in os.environ:
        return Path(os.environ["EDGEPACK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgepack"


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
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.part{os.getpid()}")
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
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.part{os.getpid()}")
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


def _remove_leftovers(path: Path) -> None:
    """Removes what processes that were killed had written of ``path``; one that still runs keeps its own."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.part*"):
        owner = part.name.rpartition(".part")[2]
        if not owner.isdecimal() or _runs(int(owner)):
            continue
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


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
