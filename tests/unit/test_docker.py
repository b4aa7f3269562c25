"""The Dockerfiles build what the planner counts with; they are not built here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgepack.bundle.render import CONTAINER_UID
from edgepack.bundle.sbom import commit
from edgepack.runtimes import llama_cpp

DOCKER = Path(__file__).parents[2] / "docker"


def test_the_cuda_server_is_built_from_the_pinned_commit() -> None:
    text = (DOCKER / "llama-server-cuda.Dockerfile").read_text()

    found = re.search(r"^ARG COMMIT=([0-9a-f]{40})$", text, flags=re.MULTILINE)

    assert found is not None
    pinned = commit(llama_cpp.VERSION)
    assert pinned is not None
    assert found.group(1).startswith(pinned)


def test_the_build_host_installs_extras_that_exist() -> None:
    project = (DOCKER.parent / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = re.findall(r"^([\w-]+) = \[", section, flags=re.MULTILINE)

    asked = re.findall(r"/src\[([\w,-]+)\]", (DOCKER / "build-host.Dockerfile").read_text())

    assert asked
    assert {name for names in asked for name in names.split(",")} <= set(known)


@pytest.mark.parametrize("name", ["build-host.Dockerfile", "llama-server-cuda.Dockerfile"])
def test_no_image_runs_as_root_or_swallows_a_failure(name: str) -> None:
    text = (DOCKER / name).read_text()

    users = re.findall(r"^USER (\S+)$", text, flags=re.MULTILINE)
    assert users in (["edgepack"], [f"{CONTAINER_UID}:{CONTAINER_UID}"])
    assert "|| true" not in text
    assert not re.search(r"^FROM \S+:latest", text, flags=re.MULTILINE)
