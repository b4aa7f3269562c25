"""Verdicts on recorded runs of servers beside llama.cpp: the built-in model on two x86 cores, 512 tokens in 2 slots."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import check, toolchain
from edgepack.device import agent
from edgepack.errors import BadInput, MissingTool
from edgepack.memory import MemoryEstimate
from edgepack.parts import Part, exact, fitted
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.units import MIB, Bytes
from tests import served
from tests.plans import example_plan

FACTS = Path(__file__).parents[1] / "cases" / "check"
PARTS: Mapping[str, tuple[Part, ...]] = {
    "onnx-genai": (
        exact("weights", 4_803_584, "host", ""),
        fitted("host_copy", 606_208, (0, 606_208), "host", ""),
        exact("rope_cache", 131_072, "host", ""),
        exact("kv_cache", 3_145_728, "host", ""),
        fitted("compute", 12_163_481, (8_388_608, 14_260_633), "host", ""),
        exact("output", 4_194_304, "host", ""),
        fitted("process", 90 * MIB, (50 * MIB, 250 * MIB), "host", ""),
    ),
    "transformers": (
        exact("weights", 12_851_712, "host", ""),
        exact("kv_cache", 1_572_864, "host", ""),
        fitted("process", 420 * MIB, (380 * MIB, 500 * MIB), "host", ""),
    ),
    "vllm": (
        exact("weights", 12_851_712, "host", ""),
        exact("kv_cache", 1_966_080, "host", ""),
        fitted("process", 1500 * MIB, (1400 * MIB, 1600 * MIB), "host", ""),
    ),
}
VERSIONS = {"onnx-genai": "0.18.0", "transformers": "5.17.0", "vllm": "0.32.0"}
START_UP = {"num_blocks": 5, "kv_cache_tokens": 640, "max_concurrency": 2.5}
"""What edgepack.runtimes.vllm.start_up says of this plan."""


def plan_of(runtime: str) -> Plan:
    plan = example_plan("raspberry-pi-5-8gb")
    return replace(
        plan,
        runtime=runtime,
        runtime_version=VERSIONS[runtime],
        settings=replace(plan.settings, context=512, slots=2),
        start_up=START_UP if runtime == "vllm" else {},
        memory=MemoryEstimate(
            parts=PARTS[runtime],
            file_bytes=Bytes(1),
            file_provenance="exact",
            bits_per_weight=16.0,
        ),
    )


def recorded(runtime: str, changes: Mapping[str, Any] | None = None) -> check.Facts:
    path = FACTS / f"demo-{runtime}.facts.json"
    document: Any = copy.deepcopy(json.loads(path.read_text(encoding="utf-8")))
    for name, value in (changes or {}).items():
        *parents, last = name.split(".")
        place = document
        for parent in parents:
            place = place[parent]
        place[last] = value
    return check.facts_from(document, source=str(path))


def judged(
    runtime: str, changes: Mapping[str, Any] | None = None
) -> tuple[check.CheckReport, dict[str, check.Item]]:
    report = check.evaluate(plan_of(runtime), recorded(runtime, changes))
    return report, {item.name: item for item in report.items}


@pytest.mark.parametrize("runtime", list(PARTS))
def test_a_recorded_run_keeps_its_plan(runtime: str) -> None:
    report, items = judged(runtime)

    assert report.passed, check.table(report)
    assert items["server"].expected == f"{runtime} {VERSIONS[runtime]}"
    assert items["server"].status == "pass"
    assert items["peak memory"].status == items["budget"].status == "pass"
    assert items["second turn"].status == "pass"
    assert items["quality"].status == "note"
    assert "llama" not in check.table(report)


@pytest.mark.parametrize("runtime", ["onnx-genai", "transformers"])
def test_tensors_that_edgepacks_server_counts_are_the_plans_to_the_byte(runtime: str) -> None:
    report, items = judged(runtime)

    assert {residual.part: residual.bytes for residual in report.residuals} == {"kv_cache": 0, "weights": 0}
    assert items["weights"].measured.endswith("(equal, to the byte)")
    for part in ("weights", "kv_cache"):
        more = recorded(runtime).served
        assert more is not None
        _, changed = judged(runtime, {f"served.parts.{part}": more.parts[part] - 1})
        assert changed[part].status == "fail"


def test_a_server_that_tells_its_tables_apart_is_held_to_each() -> None:
    report, items = judged("onnx-genai", {"served.parts": {"weights": 4_803_584, "rope_cache": 131_072}})

    assert {residual.part: residual.bytes for residual in report.residuals} == {"weights": 0, "rope_cache": 0}
    assert items["rope_cache"].status == "pass"


@pytest.mark.parametrize(
    ("fact", "value", "name"),
    [("pool_blocks", 6, "KV blocks"), ("pool_tokens", 512, "KV pool"), ("concurrency", 2.0, "concurrency")],
)
def test_vllms_pool_is_the_plans_or_the_check_fails(fact: str, value: float, name: str) -> None:
    _, before = judged("vllm")
    report, after = judged("vllm", {f"served.{fact}": value})

    assert before[name].status == "pass"
    assert after[name].status == "fail"
    assert not report.passed


def test_what_vllm_did_not_say_is_not_judged() -> None:
    _, items = judged("vllm", {"served.pool_blocks": None})

    assert "KV blocks" not in items
    assert "KV pool" in items


def test_vllms_weights_are_compared_to_the_digit_of_its_log() -> None:
    near, far = 12_851_712 + int(check.VLLM_ROUNDING) - 1, 12_851_712 + int(check.VLLM_ROUNDING) + 1
    _, inside = judged("vllm", {"served.parts": {"weights": near}})
    _, outside = judged("vllm", {"served.parts": {"weights": far}})

    assert inside["weights"].measured.endswith("(equal, to the log's digit)")
    assert (inside["weights"].status, outside["weights"].status) == ("pass", "fail")


@pytest.mark.parametrize(
    ("read", "faults", "status"),
    [
        (100_000_000, 2000, "pass"),
        (118_611_968 + 1_285_171, 2000, "pass"),
        (118_611_968 + 1_285_172, 2000, "fail"),
        (4_096_000, 1000 + 63, "fail"),
        (0, 63, "fail"),
    ],
)
def test_code_that_is_first_needed_after_the_load_is_no_paging(read: int, faults: int, status: str) -> None:
    """Read once from a cold disk: as much as is resident of files, a page a fault; then a tenth of the weights, and a
    fault a second, of 62.5 seconds."""
    _, items = judged("transformers", {"memory.read_bytes_run": read, "memory.major_faults_run": faults})

    assert items["paging"].status == status


def test_memory_is_that_of_all_processes_and_never_less_than_of_one() -> None:
    _, together = judged("vllm")
    _, alone = judged("vllm", {"memory.processes.peak": 1})

    assert together["peak memory"].measured.startswith("1.48 GiB")
    assert alone["peak memory"].measured.startswith("625.8 MiB")
    assert "4 processes, shared pages counted once" in together["peak memory"].message


def test_more_than_the_parts_explain_fails() -> None:
    _, items = judged("transformers", {"memory.peak_rss": 700 * MIB})

    assert items["peak memory"].status == items["unexplained rest"].status == "fail"


def test_pages_of_libraries_explain_what_is_more_than_planned_and_no_more() -> None:
    """Where the page cache holds a library in large folios each is mapped whole: nobody can tell how much is used."""
    planned = plan_of("transformers").memory.total
    known = agent.RUNTIMES["transformers"].libraries
    much = {"memory.peak_rss": planned + 200 * MIB}
    _, none = judged("transformers", {**much, "memory.code": known})
    _, some = judged("transformers", {**much, "memory.code": known + 40 * MIB})
    _, all_ = judged("transformers", {**much, "memory.code": known + 300 * MIB})
    _, less = judged("transformers", {"memory.code": known + 40 * MIB, "memory.peak_rss": planned - MIB})

    assert none["peak memory"].status == some["peak memory"].status == "fail"
    assert none["peak memory"].message == less["peak memory"].message == "by VmHWM"
    assert "less 40.0 MiB of libraries that may be mapped without being used" in some["peak memory"].message
    assert all_["peak memory"].status == "pass"
    assert all_["peak memory"].measured.endswith("(+0.00%)")
    assert "less 200.0 MiB" in all_["peak memory"].message


def test_another_version_is_said_but_not_another_build_of_the_same() -> None:
    _, other = judged("vllm", {"served.version": "0.31.0"})
    _, same = judged("vllm", {"served.version": "0.32.0+cpu"})

    assert other["server"].status == "warn"
    assert other["server"].message == "version 0.31.0 is not the planned 0.32.0, so what it takes may differ"
    assert same["server"].status == "pass"


def test_code_that_was_not_run_is_said_unless_it_is_the_same() -> None:
    mine = recorded("onnx-genai").server.code
    _, same = judged("onnx-genai", {"bundle.code": mine})
    _, other = judged("onnx-genai", {"bundle.code": "sha256:00"})

    assert same["server"].status == "pass"
    assert other["server"].message == "the bundle's own was not run: it is not signed"
    assert same["server"].measured == "option: edgepack_server, python3 (0.18.0)"


def test_a_server_on_a_card_is_not_judged_as_one_on_a_cpu() -> None:
    report, items = judged("vllm", {"served.backend": "cuda"})

    assert items["peak memory"].message.startswith("by what the whole system lost")
    assert items["decode"].status == "note"
    assert {item.status for item in report.items if item.name == "budget"} <= {"pass", "warn"}


def test_facts_of_an_older_agent_are_still_read() -> None:
    path = FACTS / "qwen2.5-0.5b-q8_0.facts.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for place, name in (
        (document, "served"),
        (document["memory"], "processes"),
        (document["memory"], "code"),
        (document["server"], "code"),
    ):
        del place[name]

    facts = check.facts_from(document, source=str(path))

    assert facts.served is None
    assert facts.memory is not None
    assert facts.memory.peak == facts.memory.peak_rss


# ── edgepack check itself ──


def bundle(folder: Path, runtime: str, config: str = "{}") -> Path:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(config, encoding="utf-8")
    (model / "model.safetensors").write_bytes(b"weights")
    return served.bundle(plan_of(runtime), model, folder / "bundle.tar", args=())


def test_what_only_llama_cpp_has_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"--emulate is for llama\.cpp bundles, and this is one for onnx-genai"
    ):
        check.check(bundle(tmp_path, "onnx-genai"), progress=Silent(), emulate=True)


def test_without_a_python_that_has_it_what_to_install_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "lacks", lambda program, modules: list(modules))

    with pytest.raises(MissingTool, match=r"no Python here has fastapi, uvicorn, jinja2, torch") as caught:
        check.check(bundle(tmp_path, "transformers"), progress=Silent())

    assert caught.value.hint is not None
    assert "pip install 'edgepack[serve,torch]'" in caught.value.hint


def test_our_own_server_has_the_name_that_bundles_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "APP", tmp_path / "server")
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__main__.py").write_text("", encoding="utf-8")

    folder = toolchain.app_in(tmp_path / "app")

    assert (folder / "edgepack_server" / "__main__.py").is_file()


def test_a_program_that_is_missing_on_the_device_is_a_python_here() -> None:
    error = check._broken(7, "missing: python3 has no torch", "transformers")

    assert isinstance(error, MissingTool)
    assert error.hint == "name a Python that can run it with --server PATH"
    assert "toolchain" in (check._broken(7, "missing: no llama-server").hint or "")
