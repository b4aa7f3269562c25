"""A Python process of edgepack's own for heavy work: it says how far it is, and hands over the errors it raises.

A crash, Ctrl-C, memory and environment of a library are then that process's own, and it dies with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from edgepack import errors
from edgepack.errors import BuildFailed, EdgepackError, NoSpace
from edgepack.progress import Progress
from edgepack.shell import run as run_program
from edgepack.units import MIB
from edgepack.workspace import free_bytes, write_text

_PROGRESS = re.compile(r"^progress (\d+) (\d+)$")
_REFUSED = "refused "
"""Start of the line with which a process hands an EdgepackError over: its class, message and hint."""
_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def run(
    module: str,
    words: Sequence[str | Path],
    *,
    title: str,
    cwd: Path,
    log: Path,
    threads: int,
    progress: Progress,
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str | Path] = (),
) -> None:
    """Runs ``python -m module words…`` in ``cwd`` to its end, under a bar called ``title``.

    ``launcher``: a program and its options that start the module instead of Python itself (accelerate launch), followed
    by ``-m module words…``. ``log``: where all that it printed goes when it fails without an EdgepackError. Raises that
    error, NoSpace when the disk of ``cwd`` or ``log`` is full, and BuildFailed with its last line.
    """
    tail: list[str] = []
    with progress.bar(title, 100) as advance:
        ended = run_program(
            [*(launcher or (sys.executable,)), "-m", module, *words],
            cwd=cwd,
            env=environment_of(threads) | dict(environment or {}),
            on_line=listener(_PROGRESS, advance, tail),
            check=False,
        )
    if ended.returncode == 0:
        return
    said = [line for line in tail if line.strip()]
    for line in said:
        if line.startswith(_REFUSED):
            raise _refusal(line)
    full = next((place for place in (cwd, log.parent) if free_bytes(place) < MIB), None)
    if full is not None:
        raise NoSpace(
            f"the disk is full while {title}: {full}",
            hint="free some space or set EDGEPACK_CACHE to another disk; the same command resumes",
        )
    if ended.returncode == -signal.SIGKILL:
        raise BuildFailed(
            f"{title} was killed, most likely because memory ran out",
            hint="give the machine more memory or swap, or take a smaller model",
        )
    write_text(log, "\n".join(said) + "\n")
    raise BuildFailed(
        f"{title} ended with status {ended.returncode}: {said[-1] if said else 'it said nothing'}",
        hint=f"what it printed is in {log}",
    )


def environment_of(threads: int) -> dict[str, str]:
    """For libraries of this field: nothing is fetched, and no more threads than these."""
    return {
        **own_code(), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)
    }  # fmt: skip


def own_code() -> dict[str, str]:
    """For `python -m edgepack…`: this very edgepack, and nothing from the folder where the user stands.

    Python puts that folder first otherwise, and a downloaded model may bring a numpy.py. Before 3.11 Python has no such
    switch, so such processes are also started in a folder of edgepack's own.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def listener(line: re.Pattern[str], advance: Callable[[int], None], tail: list[str]) -> Callable[[str], None]:
    """Hears a child process: lines with what is done and of how much go to a bar of 100, all others to ``tail``."""
    done = 0

    def on_line(text: str) -> None:
        nonlocal done
        match = line.match(text)
        if match is None:
            tail.append(text)
            return
        percent = 100 * int(match.group(1)) // max(1, int(match.group(2)))
        advance(percent - done)
        done = percent

    return on_line


def _refusal(line: str) -> EdgepackError:
    kind, message, hint = json.loads(line.removeprefix(_REFUSED))
    return cast(EdgepackError, getattr(errors, kind)(message, hint=hint))


# ── the other process ──


def main(work: Callable[..., None], words: Sequence[str]) -> None:
    """What a module that `run` starts does: ``work(*words)``, with its EdgepackError handed to the parent."""
    end_with_parent()
    try:
        work(*words)
    except EdgepackError as error:
        _say(_REFUSED + json.dumps([type(error).__name__, error.message, error.hint]))
        raise SystemExit(error.exit_code) from error


def report(done: int, total: int) -> None:
    """Tells the parent how far this process is."""
    _say(f"progress {done} {total}")


def end_with_parent() -> None:
    """Makes this process die with the one that started it, and at once on Ctrl-C, also inside llama.cpp."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(line: str) -> None:
    """On a line of its own whatever a library printed."""
    sys.stdout.write(f"\n{line}\n")
    sys.stdout.flush()
