"""`edgepack cache`: what is counted, what goes, and that nothing goes from under who works with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgepack import cache, workspace
from edgepack.cli import cli
from edgepack.screen import Screen
from tests.documents import obeys

KIB = 1024
DAYS = 24 * 60 * 60


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("EDGEPACK_CACHE", str(place))
    return place


def put(path: Path, *, kib: int, days: int = 0) -> Path:
    """A file of so many KiB that was last written and read so many days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(kib * KIB))
    then = time.time() - days * DAYS
    for place in (path, path.parent):
        os.utime(place, (then, then))
    return path


def edgepack(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def test_what_is_there_is_told_by_kind_with_its_size_and_last_use(root: Path) -> None:
    put(root / "artifacts" / "a.gguf", kib=64, days=40)
    put(root / "artifacts" / "b" / "model.safetensors", kib=32, days=3)
    put(root / "measured" / "q.json", kib=4, days=9)

    found = obeys("cache", edgepack("cache", "list", "--json").stdout)
    assert [(one["kind"], Path(one["path"]).name) for one in found["kept"]] == [
        ("artifacts", "a.gguf"), ("artifacts", "b"), ("measured", "q.json"),
    ]  # fmt: skip
    assert found["bytes"] == sum(one["bytes"] for one in found["kept"]) >= 100 * KIB
    assert found["kept"][0]["bytes"] == (root / "artifacts" / "a.gguf").stat().st_blocks * 512
    assert found["kept"][0]["used"] == time.strftime("%Y-%m-%d", time.gmtime(time.time() - 40 * DAYS))

    told = edgepack("cache", "list").stdout
    assert [line.split()[:2] for line in told.splitlines()[1:3]] == [["artifacts", "2"], ["measured", "1"]]
    assert str(root) in told.splitlines()[-1]
    each = edgepack("cache", "list", "artifacts").stdout
    assert "artifacts/a.gguf" in each and "q.json" not in each


def test_reading_a_thing_is_a_use_and_listing_the_cache_is_none(root: Path) -> None:
    file = put(root / "artifacts" / "b" / "model.safetensors", kib=4, days=40)
    assert len(cache.contents(unused=30).kept) == len(cache.contents(unused=30).kept) == 1

    os.utime(file, (time.time(), file.stat().st_mtime))  # what relatime does when it is read
    assert not cache.contents(unused=30).kept


def test_what_has_a_name_elsewhere_frees_nothing(root: Path, tmp_path: Path) -> None:
    file = put(root / "distilled" / "s" / "model", kib=64)
    os.link(file, root / "distilled" / "s" / "again")
    alone = cache.contents().bytes
    os.link(file, tmp_path / "published")

    assert alone - cache.contents().bytes == file.stat().st_blocks * 512


def test_only_what_was_named_and_is_old_goes(root: Path) -> None:
    old = put(root / "artifacts" / "old" / "model", kib=8, days=40)
    new = put(root / "artifacts" / "new.gguf", kib=8, days=2)
    other = put(root / "run" / "x" / "model", kib=8, days=40)
    words = ("cache", "remove", "artifacts", "--unused", "30", "--json")

    assert not obeys("cache", edgepack(*words, "--dry-run").stdout)["removed"]
    assert old.exists()
    gone = obeys("cache", edgepack(*words).stdout)
    assert gone["removed"] and [Path(one["path"]).name for one in gone["kept"]] == ["old"]
    assert not old.parent.exists() and new.exists() and other.exists()

    assert edgepack("cache", "remove", "--all").exit_code == 0
    assert sorted(path.name for path in root.iterdir() if any(path.iterdir() if path.is_dir() else ())) == []


def test_nothing_goes_while_another_works_and_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    kept = put(tmp_path / "outside" / "model", kib=8)
    file = put(root / "artifacts" / "a.gguf", kib=8)
    (root / "artifacts" / "link").symlink_to(kept.parent)

    with workspace.cache_used(), workspace.cache_used():
        refused = edgepack("cache", "remove", "--all")
        assert refused.exit_code == 13 and "works with" in refused.stderr
        assert file.exists()
    assert edgepack("cache", "remove", "--all").exit_code == 0
    assert not list((root / "artifacts").iterdir()) and kept.exists()


def test_what_a_killed_removal_left_goes_with_the_next_and_living_parts_stay(root: Path) -> None:
    dead = root / "artifacts" / f".a.part{os.uname().nodename}-{2**22 + 1}"
    living = root / "artifacts" / f".b.part{os.uname().nodename}-{os.getppid()}"
    for path in (dead, living):
        put(path / "model", kib=4)

    assert not cache.contents().kept
    assert edgepack("cache", "remove", "--all").exit_code == 0
    assert not dead.exists() and living.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cache", "remove"), "name what is to go"),
        (("cache", "remove", "run", "--all"), "name what is to go"),
        (("cache", "list", "artefacts"), "did you mean 'artifacts'?"),
    ],
)
def test_what_is_not_clear_is_refused(root: Path, words: tuple[str, ...], said: str) -> None:
    refused = edgepack(*words)
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert not root.exists()


def test_an_empty_cache_is_no_error(root: Path) -> None:
    for words in (("list",), ("remove", "--all")):
        done = edgepack("cache", *words)
        assert done.exit_code == 0, done.stderr
    assert not root.exists()


def test_the_table_keeps_to_the_width(root: Path) -> None:
    for kind in cache.KINDS:
        put(root / kind / ("a" * 60), kib=4)
    for each in (False, True):
        told = cache.table(cache.contents(), each=each, screen=Screen(width=60))
        *table, _ = told.splitlines()
        assert table and max(map(len, table)) <= (80 if each else 60)
