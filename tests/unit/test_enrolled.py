"""The zipapp that devices are enrolled with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgepack import enrolled
from edgepack.device import agent


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "agent.pyz"
    path.write_bytes(enrolled.zipapp())
    return path


def test_it_is_the_same_bytes_each_time() -> None:
    assert enrolled.zipapp() == enrolled.zipapp()


def test_it_holds_the_two_modules_as_they_are_and_nothing_that_depends_on_the_machine(app: Path) -> None:
    with zipfile.ZipFile(app) as archive:
        members = archive.infolist()
        source = archive.read("edgepack/device/agent.py")

    assert source == Path(agent.__file__).read_bytes()
    assert [member.filename for member in members] == [
        "__main__.py",
        "edgepack/__init__.py",
        "edgepack/device/__init__.py",
        "edgepack/device/agent.py",
        "edgepack/device/installer.py",
    ]
    for member in members:
        assert (member.date_time, member.compress_type) == ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED)
        assert (member.create_system, member.external_attr) == (3, 0o644 << 16)


def test_it_runs_alone_and_says_what_it_is(app: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", app, "--root", tmp_path, "facts"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )

    store = json.loads(done.stdout)["store"]
    assert store["enrolled"] is False
    assert store["agent"] == f"sha256:{hashlib.sha256(app.read_bytes()).hexdigest()}"
    assert list(tmp_path.iterdir()) == [app]
