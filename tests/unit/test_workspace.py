"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack import workspace
from edgepack.errors import NoSpace
from edgepack.workspace import require_space, whole_dir, whole_file, write_text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    write_text(target, "old")

    with pytest.raises(ValueError, match="stop"), whole_file(target) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")

    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_full_disk_is_named_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(NoSpace) as caught, whole_file(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert "resumes" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "release"

    with whole_dir(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()

    assert (target / "a").read_text() == "1"


def test_what_a_killed_process_left_of_a_folder_is_removed_and_a_living_ones_part_is_not(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, other = (
        tmp_path / f".release.part{os.uname().nodename}-{pid}" for pid in (ended.pid, os.getppid())
    )
    for folder in (left, other):
        folder.mkdir()

    with whole_dir(tmp_path / "release"):
        assert not left.exists()

    assert other.exists()


def test_a_killed_run_leaves_its_scratch_folder_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed check left the gigabytes that it had unpacked in the cache for good."""
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    script = "import os; from edgepack import workspace\n"
    script += (
        "with workspace.scratch('check') as place: (place / 'model').write_text('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    assert list((tmp_path / "cache").rglob("model"))

    with workspace.scratch("other"):
        assert list((tmp_path / "cache").rglob("model"))
    with workspace.scratch("check") as first, workspace.scratch("check") as second:
        assert not list((tmp_path / "cache").rglob("model"))
        assert first != second
        assert first.stat().st_mode & 0o777 == 0o700

    assert not list((tmp_path / "cache").iterdir())


def test_a_write_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(NoSpace) as caught:
        require_space(tmp_path / "deep" / "down", 2**62)

    assert "must be written" in caught.value.message


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, living = (
        tmp_path / f".a.gguf.part{os.uname().nodename}-{number}" for number in (ended.pid, os.getppid())
    )
    for part in (left, living):
        part.write_text("half")

    with whole_file(tmp_path / "a.gguf") as temporary:
        temporary.write_text("whole")

    assert not left.exists() and living.exists()
    assert (tmp_path / "a.gguf").read_text() == "whole"
