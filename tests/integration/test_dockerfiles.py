"""The Dockerfiles and the scripts beside them, as their linters read them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

DOCKER = Path(__file__).parents[2] / "docker"


def lint(name: str, *files: Path) -> str:
    """What a linter of this Python environment or of PATH says; its exit status when it says nothing."""
    program = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program is not None, f"{name} is not installed"
    done = subprocess.run([program, *map(str, files)], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    return said or ("" if done.returncode == 0 else f"status {done.returncode}")


def test_hadolint_has_nothing_to_say_about_the_images() -> None:
    assert lint("hadolint", *sorted(DOCKER.glob("*.Dockerfile"))) == ""


def test_hadolint_would_say_it(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN apt-get install curl\n", encoding="utf-8")

    said = lint("hadolint", bad)

    assert {"DL3007", "DL3008"} <= set(said.split())


def test_shellcheck_has_nothing_to_say_about_the_images_scripts() -> None:
    assert lint("shellcheck", *sorted(DOCKER.glob("*.sh"))) == ""
