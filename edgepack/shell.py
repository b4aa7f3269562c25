"""The only place that starts processes: argument lists, never a shell string."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    words = tuple(str(word) for word in argv)
    if shutil.which(words[0]) is None:
        raise MissingTool(f"{words[0]} is not installed", hint=f"install {Path(words[0]).name} and try again")
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
