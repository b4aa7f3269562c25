"""The agent with servers that are not llama.cpp's: played by one of the standard library, in both of their dialects."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import check
from edgepack.bundle import sign
from edgepack.device import agent
from edgepack.memory import MemoryEstimate
from edgepack.parts import exact, fitted
from edgepack.plan import Plan
from edgepack.units import MIB, Bytes
from tests import served
from tests.plans import example_plan

pytestmark = pytest.mark.integration

PLAYER = Path(__file__).parents[1] / "openai_server.py"
CONTEXT, SLOTS = 512, 2
BLOCK = 16
"""Tokens of a block of the player's vLLM."""
KV_BYTES = CONTEXT * 64
WEIGHTS = b"w" * 5000
APP_ARGS = ("--alias", "tiny", "--ctx-size", str(CONTEXT), "--parallel", str(SLOTS), "--threads", "1")
VLLM_ARGS = (
    "--served-model-name", "tiny", "--max-model-len", str(CONTEXT // SLOTS), "--max-num-seqs", str(SLOTS),
    "--kv-cache-memory-bytes", str(KV_BYTES),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _standard_library_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that plays the others needs nothing that a Python does not have."""
    for name in (agent.ONNX_GENAI, agent.TRANSFORMERS):
        monkeypatch.setitem(agent.RUNTIMES, name, agent.RUNTIMES[name]._replace(modules=("json",)))


def model(folder: Path, **told: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def plan_for(runtime: str) -> Plan:
    plan = example_plan("raspberry-pi-5-8gb")
    return replace(
        plan,
        runtime=runtime,
        runtime_version={"vllm": "0.33.0", "onnx-genai": "0.18.0", "transformers": "5.17.0"}[runtime],
        settings=replace(plan.settings, context=CONTEXT, slots=SLOTS),
        memory=MemoryEstimate(
            parts=(
                exact("weights", len(WEIGHTS) + 2, "host", "by hand"),
                exact("kv_cache", KV_BYTES, "host", "by hand"),
                fitted("process", 40 * MIB, (1 * MIB, 400 * MIB), "host", "by hand"),
            ),
            file_bytes=Bytes(len(WEIGHTS)),
            file_provenance="exact",
            bits_per_weight=16.0,
        ),
    )


def app(folder: Path) -> Path:
    """A folder that holds edgepack_server, as the player has it."""
    package = folder / "edgepack_server"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(PLAYER, package / "__main__.py")
    return folder


def vllm(folder: Path) -> Path:
    """A program of vLLM's name."""
    program = folder / "vllm"
    text = PLAYER.read_text(encoding="utf-8")
    program.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    program.chmod(0o755)
    return program


def app_bundle(folder: Path, runtime: str = "onnx-genai", **options: Any) -> Path:
    args = ("--engine", runtime, *APP_ARGS)
    told = options.pop("told", {})
    return served.bundle(
        plan_for(runtime), model(folder / "model", **told), folder / "bundle.tar", args=args, **options
    )


def facts(bundle: Path, work: Path, *words: str) -> dict[str, Any]:
    options = agent._parser().parse_args(["check", str(bundle), "--work", str(work), *words])
    return json.loads(json.dumps(agent.check(options)))  # type: ignore[no-any-return]  # it is an object


def judged(runtime: str, document: Mapping[str, Any], **start_up: float) -> dict[str, check.Item]:
    plan = replace(plan_for(runtime), start_up=start_up)
    report = check.evaluate(plan, check.facts_from(document, source="the agent"))
    assert "llama-server" not in check.table(report)
    return {item.name: item for item in report.items}


@pytest.mark.parametrize("runtime", ["onnx-genai", "transformers"])
def test_edgepacks_own_server_is_measured_part_by_part(runtime: str, tmp_path: Path) -> None:
    bundle = app_bundle(tmp_path, runtime)

    found = facts(bundle, tmp_path / "work", "--app", str(app(tmp_path / "app")), "--full")

    assert found["failure"] is None
    assert found["served"] == {
        "runtime": runtime,
        "version": "0.18.0",
        "max_model_len": CONTEXT // SLOTS,
        "parts": {"weights": len(WEIGHTS) + 2, "kv_cache": KV_BYTES},
        "pool_tokens": None,
        "pool_blocks": None,
        "concurrency": None,
        "backend": None,
    }
    assert found["slots"]["tokens"] == [CONTEXT // SLOTS] * SLOTS
    assert found["fill"]["held_tokens"] == [CONTEXT // SLOTS - 2] * SLOTS
    assert 0 < found["turns"]["reused_tokens"] < found["turns"]["second_turn_tokens"]
    assert found["memory"]["processes"] is None
    assert found["server"]["source"] == "option"
    assert found["server"]["code"] == agent.folder_digest(str(tmp_path / "app" / "edgepack_server"))
    assert not (tmp_path / "work" / "server.key").exists()
    items = judged(runtime, found)
    for name in ("weights", "kv_cache"):
        assert (items[name].status, items[name].measured.partition("(")[2]) == ("pass", "equal, to the byte)")
    assert {items[name].status for name in ("slots", "context filled", "second turn", "run")} == {"pass"}
    assert items["quality"].measured == "no answers were recorded at build"


def test_a_byte_more_than_planned_is_a_failed_part(tmp_path: Path) -> None:
    found = facts(app_bundle(tmp_path), tmp_path / "work", "--app", str(app(tmp_path / "app")))
    found["served"]["parts"]["kv_cache"] += 1

    item = judged("onnx-genai", found)["kv_cache"]

    assert item.status == "fail"
    assert item.message == "+1 bytes from the plan (exact)"


def test_vllm_is_measured_with_its_engine_and_its_pool(tmp_path: Path) -> None:
    bundle = served.bundle(
        plan_for("vllm"), model(tmp_path / "model"), tmp_path / "bundle.tar", args=VLLM_ARGS,
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )  # fmt: skip

    found = facts(bundle, tmp_path / "work", "--server", str(vllm(tmp_path)), "--full")

    assert found["failure"] is None
    assert found["served"] == {
        "runtime": "vllm",
        "version": "0.33.0",
        "max_model_len": CONTEXT // SLOTS,
        "parts": {},
        "pool_tokens": CONTEXT,
        "pool_blocks": CONTEXT // BLOCK,
        "concurrency": float(SLOTS),
        "backend": "cpu",
    }
    together = found["memory"]["processes"]
    assert together["most"] == 2
    assert together["peak"] > max(48 * MIB, found["memory"]["peak_rss"])
    assert together["peak"] + together["shared"] >= found["memory"]["rss"]
    assert found["turns"]["reused_tokens"] > 0
    assert found["server"]["source"] == "option"
    exactly = {"num_blocks": 32, "kv_cache_tokens": CONTEXT, "max_concurrency": 2.0}
    items = judged("vllm", found, **exactly)
    assert [items[name].status for name in ("KV blocks", "KV pool", "concurrency")] == ["pass"] * 3
    assert items["peak memory"].message == "by the RSS of 2 processes, shared pages counted once"
    items = judged("vllm", found, **{**exactly, "kv_cache_tokens": CONTEXT + 16})
    assert items["KV pool"].status == "fail"


def test_answers_recorded_by_the_same_server_are_found_again(tmp_path: Path) -> None:
    prompts = ("It was the best of times", "It was the best of times, it was the worst")
    folder = tmp_path / "record"
    folder.mkdir()
    with (
        agent.memory_limit(None) as limit,
        agent.running_server(
            sys.executable,
            ["--engine", "onnx-genai", *APP_ARGS],
            model=str(model(tmp_path / "model")),
            folder=str(folder),
            environment={},
            limit=limit,
            runtime="onnx-genai",
            app=str(app(tmp_path / "app")),
        ) as server,
    ):
        server.wait_healthy(60)
        answers = agent.record_quality(server, prompts, prompts[1], 8)
    assert [len(probe["top"]) for probe in answers["probes"]] == [agent.TOP] * 2
    assert "".join(map(chr, answers["decode"]["tokens"])) == answers["decode"]["text"]

    found = facts(app_bundle(tmp_path, selftest=answers), tmp_path / "work", "--app", str(tmp_path / "app"))

    quality = found["quality"]
    assert (quality["agree"], quality["missing"], quality["max_drift"]) == (2, 0, 0.0)
    assert quality["decode_same"] == quality["decode_tokens"] == 8
    assert judged("onnx-genai", found)["quality"].status == "pass"


def test_the_bundles_own_code_runs_only_when_somebody_vouches_for_it(tmp_path: Path) -> None:
    code = app(tmp_path / "app") / "edgepack_server"
    key = tmp_path / "key"
    sign.new_key(key)
    signers = tmp_path / "allowed"
    signers.write_text(sign.allowed_signer(key), encoding="ascii")
    signed = app_bundle(tmp_path / "signed", app=code, key=key)
    unsigned = app_bundle(tmp_path / "unsigned", app=code)

    with pytest.raises(agent.MissingProgram, match="--run-unverified, or --app"):
        facts(unsigned, tmp_path / "a")
    assert not list((tmp_path / "a").glob("**/*.py"))
    vouched = facts(signed, tmp_path / "b", "--allowed-signers", str(signers))
    insisted = facts(unsigned, tmp_path / "c", "--run-unverified")
    ours = facts(unsigned, tmp_path / "d", "--app", str(tmp_path / "app"))

    assert [found["server"]["source"] for found in (vouched, insisted, ours)] == [
        "bundle",
        "bundle",
        "option",
    ]
    assert vouched["server"]["code"] == vouched["bundle"]["code"] == ours["server"]["code"]
    assert judged("onnx-genai", ours)["server"].status == "pass"  # ours, and byte for byte the bundle's
    ours["server"]["code"] = "sha256:00"
    assert judged("onnx-genai", ours)["server"].message == "the bundle's own was not run: it is not signed"


TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n'


@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        (
            {"say": f"{TRACE}RuntimeError: DefaultCPUAllocator: not enough memory: 99 bytes", "exit": 1},
            "allocation-refused",
            "the onnx-genai server was refused memory: RuntimeError: DefaultCPUAllocator: not enough memory: 99 bytes",
        ),
        (
            {
                "say": "terminate called after throwing an instance of 'std::bad_alloc'",
                "kill": signal.SIGABRT,
            },
            "allocation-refused",
            "the onnx-genai server was refused memory: terminate called after throwing an instance of "
            "'std::bad_alloc'",
        ),
        (
            {"say": f"if out of memory, lower it\n{TRACE}ImportError: no module named x", "exit": 3},
            "did-not-start",
            "the onnx-genai server ended with status 3: ImportError: no module named x",
        ),
        (
            {"say": '{"event": "cannot_load", "message": "it has \\"no\\" weights"}', "exit": 3},
            "did-not-start",
            'the onnx-genai server ended with status 3: it has \\"no\\" weights',
        ),
        ({"kill": signal.SIGKILL}, "oom-killed", "the kernel killed the onnx-genai server: out of memory"),
    ],
)
def test_why_a_python_server_did_not_start_is_said(
    told: dict[str, object], kind: str, message: str, tmp_path: Path
) -> None:
    found = facts(app_bundle(tmp_path, told=told), tmp_path / "work", "--app", str(app(tmp_path / "app")))

    assert (found["failure"]["kind"], found["failure"]["stage"]) == (kind, "load")
    assert found["failure"]["message"] == message
    assert found["served"]["parts"] == {}
    assert judged("onnx-genai", found)["run"].status == "fail"


def test_of_a_limited_vllm_each_process_is_limited_and_the_failed_pool_is_still_read(tmp_path: Path) -> None:
    said = (
        "INFO 11-26 17:46:00 [kv_cache_utils.py:1] GPU KV cache size: 16,384 tokens\n"
        "INFO 11-26 17:46:00 [kv_cache_utils.py:2] Maximum concurrency for 4,096 tokens per request: 4.00x\n"
        "(EngineCore pid=7) ERROR 11-26 17:46:01 [core.py:9] ValueError: No available memory for the cache blocks.\n"
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above."
    )
    bundle = served.bundle(
        plan_for("vllm"), model(tmp_path / "model", say=said, exit=1), tmp_path / "bundle.tar", args=VLLM_ARGS
    )  # fmt: skip

    words = ("--server", str(vllm(tmp_path)), "--memory-limit", str(900 * MIB), "--limit-by", "address-space")
    found = facts(bundle, tmp_path / "work", *words)

    assert found["failure"]["kind"] == "allocation-refused"
    assert found["failure"]["message"].endswith(": ValueError: No available memory for the cache blocks.")
    assert found["limit"]["mechanism"] == "rlimit-as"
    assert found["limit"]["address_space"] > 900 * MIB + agent.RUNTIMES["vllm"].address_space
    served_facts = found["served"]
    assert (served_facts["pool_tokens"], served_facts["concurrency"], served_facts["backend"]) == (
        16384, 4.0, "cuda",
    )  # fmt: skip


@pytest.mark.parametrize("words", [("--load-mode", "mmap"), ("--emulator", "/bin/true")])
def test_what_only_llama_cpp_has_is_refused_for_others(words: tuple[str, str], tmp_path: Path) -> None:
    bundle = app_bundle(tmp_path)

    with pytest.raises(agent.BadUsage, match=rf"{words[0]} is for llama\.cpp bundles"):
        facts(bundle, tmp_path / "work", *words)

    command = [sys.executable, agent.__file__, "check", str(bundle), "--work", str(tmp_path / "work"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"bad usage: {words[0]} is for")
    assert not (tmp_path / "work").exists()
