"""Processes run from argument lists and fail with what they said."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from edgepack import shell
from edgepack.errors import BuildFailed, MissingTool
from edgepack.shell import TimedOut, dialog, exchange, run


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


ECHO = """
import sys
for line in sys.stdin:
    text = line.strip().encode()
    sys.stdout.buffer.write(b"%d\\n" % len(text) + text)
    sys.stdout.buffer.flush()
    if text == b"break":
        sys.exit("it broke")
"""


def test_a_dialog_answers_in_lines_and_bytes() -> None:
    with dialog([sys.executable, "-c", ECHO]) as process:
        for word in ("one", "three"):
            process.send(word)
            size = int(process.line())

            assert process.read(size) == word.encode()


def test_a_program_that_ends_within_a_dialog_is_told_with_its_last_words() -> None:
    with dialog([sys.executable, "-c", ECHO]) as process:
        process.send("break")
        process.read(int(process.line()))

        with pytest.raises(BuildFailed, match="ended with status 1:\nit broke"):
            process.line()
        with pytest.raises(BuildFailed, match="it broke"):
            process.send("more")


def test_a_program_that_gives_less_than_it_said_is_an_error() -> None:
    with (
        dialog([sys.executable, "-c", "print('half')"]) as process,
        pytest.raises(BuildFailed, match="ended with status 0"),
    ):
        process.read(100)


def test_a_program_to_talk_to_ends_with_the_block() -> None:
    code = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    with dialog([sys.executable, "-c", code]) as process:
        number = int(process.line())

    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_program_is_fed_while_it_answers() -> None:
    pieces = (bytes([number]) * 100_000 for number in range(40))

    done = exchange(["cat"], stdin=pieces)

    assert done.returncode == 0
    assert done.stdout == b"".join(bytes([number]) * 100_000 for number in range(40))


def test_a_program_that_ends_early_says_why_and_is_fed_no_more() -> None:
    fed: list[int] = []

    def pieces() -> Iterator[bytes]:
        for number in range(1000):
            fed.append(number)
            yield bytes(100_000)

    done = exchange(
        [sys.executable, "-c", "import sys; sys.stdin.read(1); sys.exit('enough')"], stdin=pieces()
    )

    assert (done.returncode, done.stderr) == (1, ("enough",))
    assert len(fed) < 1000


def test_its_words_are_lines_without_what_a_terminal_obeys() -> None:
    seen: list[str] = []
    code = r"import sys; sys.stderr.write('one\x1b[2Jtwo\rthree\n\nfour')"

    done = exchange([sys.executable, "-c", code], on_line=seen.append)

    assert seen == ["one?[2Jtwo", "three", "four"]
    assert done.stderr == tuple(seen)


def test_a_line_without_an_end_is_cut_not_kept() -> None:
    done = exchange([sys.executable, "-c", "import sys; sys.stderr.write('x' * 1_000_000)"])

    assert all(len(line) <= 2000 for line in done.stderr)


def test_an_exchange_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TimedOut):
        exchange(
            [sys.executable, "-c", "import sys; sys.stdin.read(); import time; time.sleep(60)"], timeout=0.5
        )


def test_an_endless_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "ANSWER_LIMIT", 1000)

    with pytest.raises(BuildFailed, match="more than 1000 bytes"):
        exchange([sys.executable, "-c", "import sys\nwhile True: sys.stdout.write('x' * 1000)"])
