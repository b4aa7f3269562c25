"""Processes run from argument lists and fail with what they said."""

from __future__ import annotations

import os
import sys

import pytest

from edgepack.errors import BuildFailed, MissingTool
from edgepack.shell import run


def test_output_and_status_come_back() -> None:
    done = run(
        [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"],
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_failure_shows_the_last_lines() -> None:
    with pytest.raises(BuildFailed, match="the reason"):
        run([sys.executable, "-c", "import sys; sys.exit('the reason')"])


def test_a_missing_program_is_named() -> None:
    with pytest.raises(MissingTool, match="no-such-program"):
        run(["no-such-program"])


def test_lines_arrive_while_it_runs() -> None:
    seen: list[str] = []

    run([sys.executable, "-c", "print('a'); print('b')"], on_line=seen.append)

    assert seen == ["a", "b"]


def test_a_child_does_not_outlive_an_interrupted_parent() -> None:
    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        raise Stop(line)

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(Stop) as caught:
        run([sys.executable, "-c", code], on_line=stop)

    with pytest.raises(ProcessLookupError):
        os.kill(int(str(caught.value)), 0)
