"""Long work says something even where there is no terminal, and results stay alone on stdout."""

from __future__ import annotations

import pytest

from edgepack import progress


def test_without_a_terminal_a_bar_is_lines_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)

    with progress.Terminal().bar("compiling", 4) as advance:
        advance(1)
        advance(2)

    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["compiling", "compiling: 25%", "compiling: 75%"]


def test_a_transfer_says_how_fast_it_is_and_how_long_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 40.0))
    monkeypatch.setattr("edgepack.progress.time.monotonic", lambda: next(clock))

    with progress.Terminal().bar("sending", 100 << 20, rate=True) as advance:
        advance(20 << 20)

    assert capsys.readouterr().err.splitlines()[1] == "sending: 20%, 512.0 KiB/s, 160 s left"


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = progress.Silent()

    quiet.step("never")
    with quiet.bar("never", 3) as advance:
        advance(3)

    assert capsys.readouterr() == ("", "")
