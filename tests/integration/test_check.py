"""A bundle that really runs: measured against its plan, on too little memory, thrashing, killed, tampered with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import bundle as bundles
from edgepack import check, hub, modelspec, pipeline, selftest, toolchain
from edgepack.artifact import Artifact
from edgepack.builders import convert, gguf
from edgepack.bundle import sign
from edgepack.device import agent
from edgepack.errors import Untrusted
from edgepack.plan import Plan, Request
from edgepack.progress import Silent
from edgepack.units import MIB
from tests.plans import broken, this_machine

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import random_model

pytestmark = pytest.mark.integration

SHAPE = {
    **random_model.SHAPES["tiny"],
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
}
"""48 million parameters: large enough that 8-bit weights (51 MB) and the rest of the process can be told apart."""
CONTEXT = 1024
SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    bundle: Path
    plan: Plan
    artifact: Artifact
    signers: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A signed bundle of a random model, planned for this very machine."""
    root = tmp_path_factory.mktemp("check")
    random_model.write(SHAPE, root / "model", seed=0)
    checkpoint = hub.resolve(str(root / "model"), revision=None, offline=True, progress=Silent())
    spec = replace(modelspec.read(checkpoint.path), header_bytes=convert.header_size(checkpoint.path))
    request = Request(
        profile=this_machine(), context=CONTEXT, slots=SLOTS, kv_type="f16", scheme="Q8_0", force=True
    )
    plan = pipeline.make_plan(request, [pipeline.named(str(root / "model"))])
    tools = toolchain.find()
    artifact = gguf.build(
        checkpoint, spec, "Q8_0", root / "artifacts", imatrix=None, toolchain=tools, progress=Silent()
    )
    answers = selftest.record(artifact, plan, tools.server, root, Silent())
    key = root / "key"
    sign.new_key(key)
    signers = root / "allowed_signers"
    signers.write_text(sign.allowed_signer(key), encoding="ascii")
    out = root / "bundle.tar"
    bundles.write(plan, artifact, out, checkpoint=checkpoint, selftest=answers, key=key)
    return Built(bundle=out, plan=plan, artifact=artifact, signers=signers)


def items(report: check.CheckReport) -> dict[str, check.Item]:
    return {item.name: item for item in report.items}


def agent_facts(built: Built, tmp_path: Path, *words: str) -> tuple[int, dict[str, object]]:
    out = tmp_path / "facts.json"
    command = [sys.executable, agent.__file__, "check", str(built.bundle), "--work", str(tmp_path / "work")]
    command += ["--server", str(toolchain.find_server()), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(out.read_text(encoding="utf-8"))


def test_a_run_keeps_the_plan_part_by_part(built: Built) -> None:
    report = check.check(built.bundle, allowed_signers=built.signers, full=True, progress=Silent())

    found = items(report)
    assert not broken(check.to_document(report)), check.table(report)
    assert report.same_device
    assert found["signature"].status == "pass"
    assert found["context filled"].expected == f"{CONTEXT // SLOTS} tokens in every slot"
    assert report.facts.slots is not None
    assert report.facts.slots.tokens == (CONTEXT // SLOTS,) * SLOTS
    assert {r.part for r in report.residuals} == {"weights", "kv_cache", "compute", "output"}
    for residual in report.residuals:
        assert abs(residual.bytes) <= check.LOG_ROUNDING * 2, residual
    assert found["second turn"].status == "pass"
    assert report.facts.quality is not None
    assert report.facts.quality.mean_drift == 0.0
    assert report.facts.quality.decode_same == report.facts.quality.decode_tokens


def test_another_models_answers_are_noticed(built: Built, tmp_path: Path) -> None:
    """The same bundle with the answers of a model of another seed in its selftest."""
    other = tmp_path / "other"
    random_model.write(SHAPE, other, seed=1)
    checkpoint = hub.resolve(str(other), revision=None, offline=True, progress=Silent())
    spec = replace(modelspec.read(other), header_bytes=convert.header_size(other))
    tools = toolchain.find()
    artifact = gguf.build(
        checkpoint, spec, "Q8_0", tmp_path, imatrix=None, toolchain=tools, progress=Silent()
    )
    wrong = selftest.record(artifact, built.plan, tools.server, tmp_path, Silent())
    out = tmp_path / "bundle.tar"
    bundles.write(built.plan, built.artifact, out, checkpoint=checkpoint, selftest=wrong)

    report = check.check(out, progress=Silent())

    assert items(report)["quality"].status == "fail"
    assert not report.passed


def test_too_little_memory_is_an_honest_failure(built: Built) -> None:
    report = check.check(built.bundle, memory_limit=48 * MIB, progress=Silent())

    assert not report.passed
    assert report.facts.failure is not None
    assert report.facts.failure.kind in ("oom-killed", "allocation-refused")
    assert "48.0 MiB" in items(report)["run"].message
    assert report.facts.log.load_mode in (None, "none")


def test_without_a_cgroup_the_address_space_is_limited(built: Built, tmp_path: Path) -> None:
    status, facts = agent_facts(
        built, tmp_path, "--memory-limit", str(24 * MIB), "--limit-by", "address-space"
    )

    report = check.evaluate(built.plan, check.facts_from(facts, source="the agent"))
    assert status == 5
    assert report.facts.limit.mechanism == "rlimit-as"
    assert report.facts.failure is not None
    assert report.facts.failure.kind == "allocation-refused", report.facts.failure
    assert not report.passed


def test_enough_memory_in_a_limit_still_passes(built: Built) -> None:
    limit = built.plan.memory.high + 16 * MIB

    report = check.check(built.bundle, memory_limit=limit, progress=Silent())

    assert not broken(check.to_document(report)), check.table(report)


def test_weights_that_do_not_stay_in_memory_are_called_thrashing(built: Built, tmp_path: Path) -> None:
    """Mapped weights in a cgroup smaller than they are: it loads and answers, from disk. Where no cgroup can be
    made the address space is limited instead, which mapped weights do not fit in either: an honest failure too.
    """
    beside = built.plan.memory.total - built.plan.memory.part("weights")
    limit = beside + built.plan.memory.part("weights") // 3

    _, facts = agent_facts(built, tmp_path, "--memory-limit", str(limit), "--load-mode", "mmap")

    report = check.evaluate(built.plan, check.facts_from(facts, source="the agent"))
    found = items(report)
    assert not report.passed, check.table(report)
    if report.facts.limit.mechanism == "rlimit-as":
        assert report.facts.failure is not None
    else:
        paging = "paging" in found and found["paging"].status == "fail"
        killed = report.facts.failure is not None and report.facts.failure.kind == "thrash"
        assert paging or killed, check.table(report)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)]
)
def test_the_server_never_outlives_the_agent(
    built: Built, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    work = tmp_path / "work"
    command = [sys.executable, agent.__file__, "check", str(built.bundle), "--work", str(work)]
    command += ["--server", str(toolchain.find_server())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        server = started_server(work / agent.WEIGHTS)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)

    assert process.returncode == status
    assert "Traceback" not in errors
    for _ in range(100):
        if not Path(f"/proc/{server}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{server}").exists()
    if number != signal.SIGKILL:
        assert not (work / "server.key").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_server_is_being_started_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The moment between the child's start and the agent knowing of it: the signal waits until it does."""
    (tmp_path / "weights").write_bytes(b"GGUF")
    children: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def interrupted(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(start(*args, **options))
        signal.pthread_kill(threading.main_thread().ident or 0, number)  # other threads do not block it
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGTERM, agent._interrupted)
    try:
        with (
            agent.memory_limit(None) as limit,
            pytest.raises(KeyboardInterrupt),
            agent.running_server(
                "/bin/sh",
                ("-c", "exec sleep 600"),
                model=str(tmp_path / "weights"),
                folder=str(tmp_path),
                environment={},
                limit=limit,
            ),
        ):
            pytest.fail("the signal came too late")
    finally:
        signal.signal(signal.SIGTERM, before)

    assert [child.poll() for child in children] == [-signal.SIGTERM]
    assert not (tmp_path / "server.key").exists()


def started_server(model: Path) -> int:
    """Pid of the llama-server that has this model on its command line, once it is there."""
    for _ in range(600):
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and commands(entry, os.fsencode(model)):
                return int(entry.name)
        time.sleep(0.05)
    pytest.fail("no llama-server was started")


def commands(entry: Path, model: bytes) -> bool:
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return model in words and b"--api-key-file" in words


def test_a_flipped_byte_in_the_signature_is_refused(built: Built, tmp_path: Path) -> None:
    content = bytearray(built.bundle.read_bytes()[: 1 << 16])
    rest = built.bundle.read_bytes()[1 << 16 :]
    start = content.index(b"-----BEGIN SSH SIGNATURE-----\n") + 30
    end = content.index(b"-----END SSH SIGNATURE-----")
    target = tmp_path / "flipped.tar"

    for at in range(start, end, 7):
        content[at] ^= 1
        target.write_bytes(content + rest)
        with pytest.raises(Untrusted):
            bundles.inspect(target)
        content[at] ^= 1


def test_a_signer_who_is_not_enrolled_is_refused_before_anything_runs(built: Built, tmp_path: Path) -> None:
    other = tmp_path / "other"
    sign.new_key(other)
    signers = tmp_path / "allowed_signers"
    signers.write_text(sign.allowed_signer(other), encoding="ascii")

    with pytest.raises(Untrusted, match="is not in"):
        check.check(built.bundle, allowed_signers=signers, progress=Silent())


@pytest.fixture(scope="module")
def marking(built: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A bundle whose agent leaves a mark when it runs: the bundle, the mark, who may sign."""
    root = tmp_path_factory.mktemp("marking")
    mark, altered, out = root / "mark", root / "agent.py", root / "bundle.tar"
    text = Path(agent.__file__).read_text(encoding="utf-8")
    line = f"import argparse\nopen({str(mark)!r}, 'w').close()\n"
    altered.write_text(text.replace("import argparse\n", line, 1), encoding="utf-8")
    checkpoint = hub.resolve(str(built.artifact.path), revision=None, offline=True, progress=Silent())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "AGENT", altered)
        bundles.write(
            built.plan,
            built.artifact,
            out,
            checkpoint=checkpoint,
            selftest={"probes": []},
            key=built.bundle.parent / "key",
        )
    return out, mark, built.signers


def test_an_agent_that_nobody_vouches_for_does_not_run(marking: tuple[Path, Path, Path]) -> None:
    out, mark, _ = marking

    report = check.check(out, memory_limit=16 * MIB, progress=Silent())

    assert not mark.exists()
    assert any("ours was run" in note for note in report.notes)


def test_an_agent_whose_signer_is_verified_runs(marking: tuple[Path, Path, Path]) -> None:
    out, mark, signers = marking

    report = check.check(out, memory_limit=16 * MIB, allowed_signers=signers, progress=Silent())

    assert mark.exists()
    assert report.notes == ()
