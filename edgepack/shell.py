"""The only place that starts processes: argument lists, never a shell string."""

from __future__ import annotations

import fcntl
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgepack.errors import BuildFailed, MissingTool

TimedOut = subprocess.TimeoutExpired
"""What ``run`` raises when a program takes longer than its ``timeout``; the program is ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that ended: its exit status and what it printed."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    check: bool = True,
    timeout: float | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Finished:
    """Runs a program to its end and returns what it printed.

    ``env`` is added to the environment. With ``on_line`` stdout and stderr are merged and handed over
    line by line while it runs. Raises MissingTool when the program is not installed and, with ``check``,
    BuildFailed with the last lines when it fails.
    """
    words = _installed(argv)
    environment = {**os.environ, **env} if env else None
    if on_line is not None:
        finished = _stream(words, cwd, environment, on_line)
    else:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        finished = Finished(argv=words, returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)
    if check and finished.returncode != 0:
        tail = "\n".join((finished.stderr or finished.stdout).strip().splitlines()[-12:])
        raise BuildFailed(f"{Path(words[0]).name} ended with status {finished.returncode}:\n{tail}")
    return finished


ANSWER_LIMIT = 64 << 20
"""Bytes that a program may answer in an exchange."""
_LINE_LIMIT = 2000
"""Bytes of a line that are shown."""
_LAST_LINES = 50
_READ = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """A process that was fed bytes and ended: its exit status, its answer, and the last lines of its stderr."""

    returncode: int
    stdout: bytes
    stderr: tuple[str, ...]


def exchange(
    argv: Sequence[str | Path],
    *,
    stdin: Iterable[bytes] = (),
    on_line: Callable[[str], None] | None = None,
    timeout: float | None = None,
) -> Exchanged:
    """Feeds a program while it answers, so that neither waits for the other; ``on_line`` gets its stderr by lines.

    ``stdin`` is asked for its next piece when the one before has left. A program that ends before all was fed is no
    failure here: its status and words say why. Lines hold nothing that a terminal would obey. Raises MissingTool,
    TimedOut, and BuildFailed for an answer above ANSWER_LIMIT; whatever stops this ends the program.
    """
    words = _installed(argv)
    lines = _Lines(on_line)
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as process:
        try:
            answer = _pumped(process, stdin, lines, timeout)
            status = process.wait(timeout)
        except BaseException:
            process.terminate()
            raise
    return Exchanged(returncode=status, stdout=answer, stderr=lines.last())


def detach(argv: Sequence[str | Path]) -> int:
    """Waits for a program that goes on in the background; returns its exit status, its streams lead nowhere.

    Raises MissingTool.
    """
    words = _installed(argv)
    nowhere = subprocess.DEVNULL
    return subprocess.run(words, stdin=nowhere, stdout=nowhere, stderr=nowhere, check=False).returncode


def _pumped(
    process: subprocess.Popen[bytes], pieces: Iterable[bytes], lines: _Lines, timeout: float | None
) -> bytes:
    """Moves bytes through the three pipes until both that are read have ended; returns what came out of stdout."""
    stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
    if stdin is None or stdout is None or stderr is None:
        raise BuildFailed(f"{process.args!r} has no pipes")
    end = None if timeout is None else time.monotonic() + timeout
    answer = bytearray()
    left, piece = iter(pieces), memoryview(b"")
    with selectors.DefaultSelector() as ready:
        os.set_blocking(stdin.fileno(), False)
        _widen(stdin)
        for stream, event in (
            (stdin, selectors.EVENT_WRITE),
            (stdout, selectors.EVENT_READ),
            (stderr, selectors.EVENT_READ),
        ):
            ready.register(stream, event)
        reading = {stdout, stderr}
        while reading:
            events = ready.select(None if end is None else max(0.0, end - time.monotonic()))
            if not events and end is not None and time.monotonic() >= end:
                raise TimedOut(process.args, timeout or 0.0)
            for key, _ in events:
                if key.fileobj is stdin:
                    try:
                        piece = piece or memoryview(next(left))
                        piece = piece[stdin.write(piece) or 0 :]
                    except (StopIteration, BrokenPipeError):
                        ready.unregister(stdin)
                        stdin.close()
                    continue
                stream = stdout if key.fileobj is stdout else stderr
                found = os.read(stream.fileno(), _READ)
                if not found:
                    ready.unregister(stream)
                    reading.remove(stream)
                if stream is stderr:
                    lines.add(found)
                    continue
                answer += found
                if len(answer) > ANSWER_LIMIT:
                    raise BuildFailed(f"a program answered more than {ANSWER_LIMIT} bytes")
    stdin.close()
    return bytes(answer)


_PIPE = 1 << 18


def _widen(stream: IO[bytes]) -> None:
    """Lets a pipe hold more than its 64 KiB, for fewer turns; where the system allows no more, it stays."""
    with suppress(OSError, AttributeError):
        fcntl.fcntl(stream.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)


class _Lines:
    """Bytes of a stream as lines for people, each given on as it ends; the last ones are kept."""

    def __init__(self, on_line: Callable[[str], None] | None) -> None:
        self._on_line = on_line
        self._begun = bytearray()
        self._last: deque[str] = deque(maxlen=_LAST_LINES)

    def add(self, found: bytes) -> None:
        """The next bytes; none at the end of the stream."""
        *whole, rest = (self._begun + found).replace(b"\r", b"\n").split(b"\n")
        if not found or len(rest) > _LINE_LIMIT:
            whole, rest = [*whole, rest], bytearray()
        self._begun = bytearray(rest)
        for line in filter(None, whole):
            self._tell(line[:_LINE_LIMIT].decode("utf-8", errors="replace"))

    def last(self) -> tuple[str, ...]:
        return tuple(self._last)

    def _tell(self, text: str) -> None:
        line = "".join(letter if letter.isprintable() else "?" for letter in text.replace("\t", " "))
        self._last.append(line)
        if self._on_line is not None:
            self._on_line(line)


class Dialog:
    """A running program that is asked line by line and answers in lines and bytes."""

    def __init__(self, process: subprocess.Popen[bytes], heard: IO[bytes]) -> None:
        self._process, self._heard = process, heard

    def send(self, line: str) -> None:
        """One line to its stdin. Raises BuildFailed when it has ended."""
        stream = self._process.stdin
        try:
            if stream is not None:
                stream.write(line.encode() + b"\n")
                stream.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def line(self) -> bytes:
        """The next line of its stdout. Raises BuildFailed when it ended instead."""
        found = self._process.stdout.readline() if self._process.stdout is not None else b""
        if not found.endswith(b"\n"):
            raise self._ended()
        return found

    def read(self, size: int) -> bytes:
        """The next so many bytes of its stdout. Raises BuildFailed when it ended before."""
        found = self._process.stdout.read(size) if self._process.stdout is not None else b""
        if len(found) != size:
            raise self._ended()
        return found

    def _ended(self) -> BuildFailed:
        status = self._process.wait()
        self._heard.seek(0)
        said = self._heard.read().decode("utf-8", errors="replace").strip()
        tail = "\n".join(said.splitlines()[-12:])
        return BuildFailed(f"{' '.join(_shown(self._process))} ended with status {status}:\n{tail}")


@contextmanager
def dialog(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> Iterator[Dialog]:
    """Starts a program to talk to, in an empty folder; it ends with the block. Its stderr is kept for when it fails."""
    words = tuple(str(word) for word in argv)
    with (
        tempfile.TemporaryFile() as heard,
        tempfile.TemporaryDirectory(prefix="edgepack-") as place,
        subprocess.Popen(
            words,
            cwd=place,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=heard,
        ) as process,
    ):
        try:
            yield Dialog(process, heard)
        finally:
            process.terminate()
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # what a program that has ended did not read
                    process.stdin.close()


def _installed(argv: Sequence[str | Path]) -> tuple[str, ...]:
    words = tuple(str(word) for word in argv)
    if shutil.which(words[0]) is None:
        raise MissingTool(f"{words[0]} is not installed", hint=f"install {Path(words[0]).name} and try again")
    return words


def _shown(process: subprocess.Popen[bytes]) -> Sequence[str]:
    """A program's words without its data: a module is named by what follows -m."""
    words = [str(word) for word in process.args] if isinstance(process.args, (list, tuple)) else []
    return words[2:3] if words[1:2] == ["-m"] else words[:1]


def _stream(
    words: tuple[str, ...],
    cwd: Path | None,
    environment: Mapping[str, str] | None,
    on_line: Callable[[str], None],
) -> Finished:
    lines: list[str] = []
    with subprocess.Popen(
        words,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        if process.stdout is None:
            raise BuildFailed(f"{words[0]} has no output stream")
        try:
            for line in process.stdout:
                lines.append(line)
                on_line(line.rstrip("\n"))
        except BaseException:
            process.terminate()
            raise
        returncode = process.wait()
    return Finished(argv=words, returncode=returncode, stdout="".join(lines), stderr="")
