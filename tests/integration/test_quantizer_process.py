"""What becomes of a quantizer's process that refuses, crashes, or is killed: never half an artifact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

from edgepack.builders import child, quantizers
from edgepack.errors import BuildFailed, MissingTool, NoSpace, Unsupported
from tests import quantized
from tests.quantized import DEMO, build

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "artifacts"
    path.mkdir()
    return path


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, packages: tuple[str, ...] = ()) -> None:
    """Puts a quantizer in the place of all others; ``body`` is what its process does with ``job``."""
    name = f"fake_quantizer_{tmp_path.name.replace('-', '_')}"
    source = f"import json, os\nfrom edgepack import errors\n\ndef quantize(job):\n{textwrap.indent(body, '    ')}\n"
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    module = ModuleType(name)
    module.__dict__.update(PACKAGES=packages, EXTRA="quant", ENVIRONMENT={}, calibrates=lambda scheme: False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(quantizers, "named", lambda scheme: module)


def test_a_refusal_crosses_the_process_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, monkeypatch, "raise errors.Unsupported('no such matrix', hint='take another')")

    with pytest.raises(Unsupported) as refused:
        build("onnx-int8", folder)

    assert (refused.value.message, refused.value.hint) == ("no such matrix", "take another")
    assert visible(folder) == []


def test_a_crash_is_one_line_and_the_rest_is_in_a_log(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(
        tmp_path,
        monkeypatch,
        "print('loading')\n(job.out / 'half').write_text('x')\nraise KeyError('rope_type')",
    )

    with pytest.raises(BuildFailed) as failed:
        build("onnx-int8", folder)

    assert failed.value.message == "quantizing to onnx-int8 ended with status 1: KeyError: 'rope_type'"
    log = folder / "onnx-int8.log"
    assert visible(folder) == [log.name]
    assert str(log) in str(failed.value.hint)
    assert "loading" in log.read_text()
    assert "Traceback" in log.read_text()


def test_a_process_that_the_system_killed_is_told_from_one_that_failed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, monkeypatch, "os.kill(os.getpid(), 9)")

    with pytest.raises(BuildFailed, match="was killed, most likely because memory ran out"):
        build("onnx-int8", folder)

    assert visible(folder) == []


def test_a_full_disk_is_named_and_nothing_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(
        tmp_path,
        monkeypatch,
        "(job.out / 'half').write_text('x')\nraise OSError(28, 'No space left on device')",
    )
    monkeypatch.setattr(child, "free_bytes", lambda folder: 4096)

    with pytest.raises(NoSpace, match="the disk is full while quantizing to onnx-int8"):
        build("onnx-int8", folder)

    assert visible(folder) == []


def test_a_package_that_is_missing_is_named_with_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, monkeypatch, "pass", packages=("no-such-distribution",))

    with pytest.raises(MissingTool, match="no-such-distribution is not installed") as missing:
        build("onnx-int8", folder)

    assert "edgepack[quant]" in str(missing.value.hint)


_BUILD = """
import sys
from contextlib import contextmanager
from pathlib import Path
from edgepack import modelspec
from edgepack.artifact import Checkpoint
from edgepack.builders import child, quantizers

class Told:
    def step(self, text):
        pass
    @contextmanager
    def bar(self, text, total):
        def advance(count):
            if count:
                print("working", flush=True)
        yield advance

scheme, source, folder, windows = sys.argv[1:]
job = quantizers.Job(
    source=Path(source), out=Path(folder), scheme=scheme, windows=Path(windows), backend="cpu", context=256,
    threads=1, seed=0,
)
checkpoint = Checkpoint(path=Path(source), source=source, revision="sha256:test", license="unknown")
quantizers.build(checkpoint, modelspec.read(Path(source)), job, Path(folder), calibration="x", progress=Told())
"""


@pytest.mark.parametrize("scheme", ["onnx-int4", "bnb-nf4", "ct-w4a16-g128"])
def test_killed_in_the_middle_it_leaves_no_artifact_and_no_process(
    scheme: str, folder: Path, tmp_path: Path
) -> None:
    windows = quantized.windows(tmp_path, count=16, tokens=128)
    words = [sys.executable, "-c", _BUILD, scheme, str(DEMO), str(folder), str(windows)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "working\n"
        workers = children(parent.pid)
        parent.send_signal(signal.SIGKILL)

    assert workers
    for _ in range(1200):
        if not any(alive(worker) for worker in workers):
            break
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)
    assert visible(folder) == []


def test_after_a_kill_the_same_job_succeeds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, monkeypatch, "(job.out / 'whole').write_text('x')")
    name = build("onnx-int8", folder).path.name
    (folder / name).rename(folder / f".{name}.part{os.uname().nodename}-1")

    again = build("onnx-int8", folder)

    assert visible(folder) == [name]
    assert [path.name for path in again.path.iterdir()] == ["whole"]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def children(parent: int) -> list[int]:
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in listed]


def alive(process: int) -> bool:
    """Whether it still runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
