"""Checkpoints, artifacts, a signer and an sshd that several tests share; each is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from edgepack import modelspec
from edgepack.artifact import Artifact
from edgepack.builders import quantizers
from edgepack.builders.quantizers import Job
from edgepack.progress import Silent
from tests import releases
from tests.releases import Signer
from tests.sshd import Sshd, serving


@pytest.fixture
def own_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer works in a folder of its own (quantizers.Quantizer.quantize)."""
    monkeypatch.chdir(tmp_path_factory.mktemp("working"))


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """Who signs what devices are flashed with."""
    return releases.signer(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serving(tmp_path_factory.mktemp("sshd") / "of") as found:
        yield found


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One and two layers of the built-in model, and a random Qwen2 with biases and an untied head."""
    from tests import checkpoints  # here, for most tests of this folder do without torch

    folder = tmp_path_factory.mktemp("sources")
    return {
        "one layer": checkpoints.first_layers(folder / "one-layer", 1),
        "two layers": checkpoints.first_layers(folder / "two-layers", 2),
        "qwen": checkpoints.qwen(folder / "qwen"),
    }


@pytest.fixture(scope="session")
def job(sources: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Job]:
    """The job of a scheme on one of the sources, with 5120 tokens of calibration."""
    from tests import checkpoints

    folder = tmp_path_factory.mktemp("windows")
    given = {
        name: checkpoints.windows(source, folder / f"{source.name}.npy", 40, 128)
        for name, source in sources.items()
    }

    def made(source: str, scheme: str) -> Job:
        return Job(
            source=sources[source], out=Path(), scheme=scheme, windows=given[source], backend="cpu", context=512,
            threads=1, seed=0,
        )  # fmt: skip

    return made


@pytest.fixture(scope="session")
def artifact(
    job: Callable[[str, str], Job], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Artifact]:
    """The artifact of a scheme, built as the command line builds it, in a process of its own."""
    folder = tmp_path_factory.mktemp("artifacts")
    built: dict[tuple[str, str], Artifact] = {}

    def made(source: str, scheme: str) -> Artifact:
        if (source, scheme) not in built:
            built[source, scheme] = build(job(source, scheme), folder)
        return built[source, scheme]

    return made


def build(job: Job, folder: Path) -> Artifact:
    from tests import checkpoints

    spec = modelspec.read(job.source)
    checkpoint = checkpoints.checkpoint(job.source)
    return quantizers.build(checkpoint, spec, job, folder, calibration="test", progress=Silent())
