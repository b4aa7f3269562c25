"""agent.pyz with real releases: a good one stays, bad ones go back by themselves, and systemd can read its units."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import bundle as bundles
from edgepack import check, enrolled, hub, modelspec, pipeline, selftest, toolchain
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import convert, gguf
from edgepack.bundle import sign
from edgepack.device import installer
from edgepack.memory import MemoryEstimate
from edgepack.plan import Plan, Request
from edgepack.progress import Silent
from edgepack.units import MIB, Bytes
from tests import releases
from tests.plans import broken, this_machine
from tests.releases import Device

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import random_model

pytestmark = pytest.mark.integration


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Three releases for this machine, signed by one key."""

    plan: Plan
    signers: str
    good: Path
    promises_too_little: Path
    answers_wrong: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("releases")
    key = root / "key"
    sign.new_key(key)
    checkpoint, artifact = built(root / "model", seed=0)
    request = Request(profile=this_machine(), context=256, slots=1, kv_type="f16", scheme="Q8_0", force=True)
    plan = pipeline.make_plan(request, [pipeline.named(str(root / "model"))])
    server = toolchain.static_runtime(plan.profile.arch, Silent())
    answers = selftest.record(artifact, plan, server, root, Silent())

    def written(name: str, number: int, plan: Plan, artifact: Artifact) -> Path:
        out = root / f"{name}.tar"
        bundles.write(
            plan, artifact, out, checkpoint=checkpoint, selftest=answers, key=key, runtime=server, sequence=number
        )  # fmt: skip
        return out

    return Made(
        plan=plan,
        signers=sign.allowed_signer(key),
        good=written("good", 1, plan, artifact),
        promises_too_little=written("little", 2, replace(plan, memory=smaller(plan.memory)), artifact),
        answers_wrong=written("wrong", 3, plan, built(root / "other", seed=1)[1]),
    )


def built(folder: Path, *, seed: int) -> tuple[Checkpoint, Artifact]:
    random_model.write(random_model.SHAPES["tiny"], folder, seed=seed)
    checkpoint = hub.resolve(str(folder), revision=None, offline=True, progress=Silent())
    spec = replace(modelspec.read(folder), header_bytes=convert.header_size(folder))
    artifact = gguf.build(
        checkpoint, spec, "Q8_0", folder.parent / f"artifact-{seed}", imatrix=None, toolchain=toolchain.find(),
        progress=Silent(),
    )  # fmt: skip
    return checkpoint, artifact


def smaller(memory: MemoryEstimate) -> MemoryEstimate:
    """An estimate that leaves out most of what the process takes beside the model."""
    parts = tuple(
        replace(part, bytes=Bytes(MIB), low=Bytes(MIB), high=Bytes(MIB)) if part.name == "process" else part
        for part in memory.parts
    )
    return replace(memory, parts=parts)


class Enrolled:
    """A device with agent.pyz in a folder of this machine, run as its own process."""

    def __init__(self, root: Path, signers: str) -> None:
        self.root = root
        root.mkdir()
        (root / "agent.pyz").write_bytes(enrolled.zipapp())
        assert self.run("enroll", "--mode", "none", stdin=signers.encode())[0] == 0

    def argv(self, *words: str | Path) -> list[str]:
        return [
            sys.executable,
            "-I",
            str(self.root / "agent.pyz"),
            "--root",
            str(self.root),
            *map(str, words),
        ]

    def run(self, *words: str | Path, stdin: bytes = b"") -> tuple[int, dict[str, Any]]:
        done = subprocess.run(self.argv(*words), input=stdin, capture_output=True, check=False)
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done.returncode, json.loads(done.stdout or b"{}")

    def release(self, link: str) -> str | None:
        path = self.root / link
        return path.readlink().name if path.is_symlink() else None


@pytest.fixture(scope="module")
def device(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Enrolled:
    """A device on which the good release passed its test."""
    device = Enrolled(tmp_path_factory.mktemp("device") / "store", made.signers)
    status, answer = device.run("install", made.good)
    assert (status, answer["outcome"]) == (0, "good"), answer
    return device


def test_a_good_release_passes_the_same_check_as_on_the_workstation(device: Enrolled, made: Made) -> None:
    before = sorted(path.name for path in device.root.rglob("*") if path.name != "lock")
    status, found = device.run("self-test")

    verdict = found.pop("verdict")
    report = check.evaluate(made.plan, check.facts_from(found, source="agent.pyz"))
    assert (status, verdict) == (0, {"passed": True, "reasons": []})
    assert not broken(check.to_document(report)), check.table(report)
    assert report.facts.signature.state == "verified"
    assert report.facts.server.source == "bundle"
    assert report.facts.preflight.disk_needed == 0
    assert sorted(path.name for path in device.root.rglob("*") if path.name != "lock") == before
    assert {oct(path.stat().st_mode & 0o777) for path in (device.root / "blobs/sha256").iterdir()} == {
        "0o444",
        "0o555",
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [("promises_too_little", "the plan says up to"), ("answers_wrong", "not those recorded")],
)
def test_a_bad_release_goes_back_by_itself(device: Enrolled, made: Made, name: str, told: str) -> None:
    bad: Path = getattr(made, name)
    offered = device.run("offer", stdin=releases.offer_frames(bad))[1]
    sent = b"".join(releases.blob_frames(bad, offered["missing"]))
    assert device.run("receive", offered["release"], stdin=sent)[1]["state"] == "received"

    status, answer = device.run("install", offered["release"])

    assert (status, answer["outcome"]) == (5, "rolled-back")
    assert any(told in reason for reason in answer["reasons"]), answer["reasons"]
    assert device.release("current") == releases.release_of(made.good)
    assert device.run("status")[1]["store"]["sequence"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_test_that_is_stopped_goes_back_and_leaves_no_server(
    device: Enrolled, made: Made, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        device.argv("install", made.answers_wrong),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for said in process.stderr:
        if said.startswith("starting llama-server"):
            break
    unpacked = (device.root / "releases/.new-self-test/model.gguf").stat()
    process.send_signal(number)
    said = process.stderr.read()

    assert process.wait(timeout=60) == 130, said
    assert unpacked.st_nlink == 3  # the blob, the release, the test: one file
    assert device.release("current") == releases.release_of(made.good)
    assert not (device.root / "releases/.new-self-test").exists()
    assert servers(device.root) == []


def test_a_kill_in_the_middle_of_the_test_is_gone_back_from_at_boot(made: Made, tmp_path: Path) -> None:
    device = Enrolled(tmp_path / "store", made.signers)
    assert device.run("install", made.good, "--no-self-test")[1]["outcome"] == "good"
    process = subprocess.Popen(
        device.argv("install", made.answers_wrong),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for said in process.stderr:
        if said.startswith("starting llama-server"):
            break
    process.kill()
    process.wait()
    process.stderr.close()

    outcomes = [device.run("boot")[1]["outcome"] for _ in range(5)]

    assert outcomes == ["trying", "trying", "trying", "went-back", "good"]
    assert device.release("current") == releases.release_of(made.good)
    until(lambda: servers(device.root) == [])


@pytest.mark.parametrize("ends", ["by a kill", "done"])
def test_a_guard_runs_its_program_only_after_a_kill(tmp_path: Path, ends: str) -> None:
    mark = tmp_path / "mark"
    code = (
        "import os, sys; from edgepack.device import installer; done = installer.guard(['touch', sys.argv[1]]); "
        "done() if sys.argv[2] == 'done' else os.kill(os.getpid(), 9)"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code, mark, ends], check=False, cwd=Path(__file__).parents[2]
    )

    if ends == "done":
        assert ended.returncode == 0
        assert not mark.exists()
    else:
        assert ended.returncode == -9
        until(mark.exists)


def until(claim: Any) -> None:
    for _ in range(100):
        if claim():
            return
        time.sleep(0.1)
    assert claim()


def servers(root: Path) -> list[str]:
    """Processes that run a program out of a store."""
    found = []
    for link in Path("/proc").glob("[0-9]*/exe"):
        try:
            target = str(link.readlink())
        except OSError:  # ended meanwhile
            continue
        if target.startswith(str(root)):
            found.append(target)
    return found


def test_a_flipped_byte_is_mended_with_the_one_blob_that_has_it(device: Enrolled, made: Made) -> None:
    weights = device.root / "current/model.gguf"
    weights.chmod(0o644)
    with weights.open("r+b") as stream:
        stream.seek(weights.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    weights.chmod(0o444)

    assert device.run("self-test")[0] == 5
    found = device.run("fsck")[1]
    offered = device.run("offer", stdin=releases.offer_frames(made.good))[1]
    sent = b"".join(releases.blob_frames(made.good, offered["missing"]))
    device.run("receive", offered["release"], stdin=sent)

    assert found["quarantined"] == 1
    assert [entry["digest"] for entry in offered["missing"]] == [found["bad"][0]["digest"]]
    assert device.run("self-test")[0] == 0


@pytest.fixture(scope="module")
def signers(made: Made) -> str:
    return made.signers


@pytest.mark.parametrize("mode", ["system", "user"])
@pytest.mark.parametrize("server", [None, "/bin/sh", "/usr/bin/env"])
def test_systemd_reads_the_units_of_an_enrolled_device(
    tmp_path: Path, signers: str, mode: str, server: str | None
) -> None:
    device = Device(tmp_path / "store")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 0)
        patched.setattr(installer, "SYSTEM_ROOT", str(tmp_path / "store"))
        words = ("--server", server) if server else ()
        assert device.enroll(signers, *words, mode=mode).status == 0
    units = tmp_path / "units"
    if mode == "system":
        (units / "edgepack.service").write_text("[Service]\nExecStart=/bin/sh\n")

    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:", "XDG_RUNTIME_DIR": str(tmp_path)}
    names = [units / "edgepack-boot.service", units / "edgepack.service"]
    done = subprocess.run(
        ["systemd-analyze", f"--{mode}", "verify", *names],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    drop_in = (units / "edgepack.service.d/50-boot.conf").read_text()
    assert (f"Environment=EDGEPACK_LLAMA_SERVER={server}\n" in drop_in) == (server is not None)
