"""Verdicts on recorded runs: what a promise broken looks like, and what is only said."""

from __future__ import annotations

import copy
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgepack import check, serde
from edgepack.errors import BadInput, MissingTool
from edgepack.memory import MemoryEstimate, Part
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.schemes import Provenance
from edgepack.units import MIB, Bytes
from tests.plans import example_plan
from tests.scorers import measured
from tests.unit.test_bundle import write

CASES = Path(__file__).parents[1] / "cases"
RECORDED = json.loads((CASES / "check" / "qwen2.5-0.5b-q8_0.facts.json").read_text(encoding="utf-8"))
TABLE = yaml.safe_load((CASES / "check.yaml").read_text(encoding="utf-8"))
AT_REST = {"signature": "warn", "decode": "warn"}


def part(name: str, size: int, low: int | None = None, high: int | None = None) -> Part:
    provenance: Provenance = "exact" if low is None else "fitted"
    return Part(
        name=name,
        bytes=Bytes(size),
        low=Bytes(size if low is None else low),
        high=Bytes(size if high is None else high),
        provenance=provenance,
        place="host",
    )


def recorded_plan() -> Plan:
    """The plan of the recorded run: Qwen2.5-0.5B's shape, Q8_0, 1024 tokens, on a CPU."""
    plan = example_plan("raspberry-pi-5-8gb")
    return replace(
        plan,
        settings=replace(plan.settings, context=1024, slots=1, kv_type="f16"),
        memory=MemoryEstimate(
            parts=(
                part("weights", 525_120_000),
                part("kv_cache", 12_582_912),
                part("compute", 38_285_344),
                part("output", 607_744),
                part("process", 65_431_000, 49_100_000, 88_000_000),
            ),
            file_bytes=Bytes(529_600_000),
            file_provenance="exact",
            bits_per_weight=8.5,
        ),
        speed=replace(plan.speed, decode=12.1, decode_low=8.6, decode_high=16.9, decode_full=11.8),
    )


def offloaded_plan(device: str) -> Plan:
    """The recorded model planned for a device with CUDA."""
    plan = example_plan(device)
    return replace(
        plan,
        settings=replace(plan.settings, context=1024),
        memory=MemoryEstimate(
            parts=(
                replace(part("weights", 525_120_000), place="device"),
                replace(part("host_copy", 144_000_000), place="host"),
                replace(part("kv_cache", 12_582_912), place="device"),
                replace(part("compute", 38_285_344, 37_000_000, 40_000_000), place="device"),
                part("output", 607_744),
                part("process", 60 * MIB, 40 * MIB, 90 * MIB),
            ),
            file_bytes=Bytes(529_600_000),
            file_provenance="exact",
            bits_per_weight=8.5,
        ),
    )


OFFLOADED: dict[str, Any] = {
    "log.buffers": [
        {"kind": "model", "name": "CUDA0", "bytes": 525_116_375},
        {"kind": "model", "name": "CPU", "bytes": 144_000_000},
        {"kind": "kv", "name": "CUDA0", "bytes": 12_582_912},
        {"kind": "compute", "name": "CUDA0", "bytes": 38_283_510},
        {"kind": "output", "name": "CPU", "bytes": 608_174},
    ],
    "log.lines": {"model": 2, "kv": 1, "compute": 1, "output": 1},
}
CARD: dict[str, Any] = {
    "preflight.device_memory_needed": 577_702_912,
    "machine.gpus": [
        {
            "name": "NVIDIA GeForce RTX 4060",
            "memory_total": 8188 * MIB,
            "memory_used": 16 * MIB,
            "driver": "570.1",
            "compute_capability": "8.9",
        }
    ],
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = copy.deepcopy(RECORDED)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place: Any = document
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place[name]
        assert last in place
        place[last] = value
    return document


def judged(changes: dict[str, Any], *, strict: bool = False, device: str | None = None) -> check.CheckReport:
    """The recorded run with changes, on this CPU or as a CUDA device would report it."""
    if device is None:
        facts = check.facts_from(changed(changes), source="the case")
        return check.evaluate(recorded_plan(), facts, strict_device=strict)
    plan = offloaded_plan(device)
    on_card = {} if plan.budget.unified else CARD
    facts = check.facts_from(changed({**OFFLOADED, **on_card, **changes}), source="the case")
    return check.evaluate(plan, facts, strict_device=strict)


@pytest.mark.parametrize("case", TABLE, ids=[case["name"] for case in TABLE])
def test_verdicts(case: dict[str, Any]) -> None:
    report = judged(case["change"], strict=case.get("strict", False), device=case.get("device"))

    found = {item.name: item.status for item in report.items}
    absent = case.get("absent", [])
    special = {
        name: status
        for name, status in found.items()
        if status not in ("pass", "note") or name in case["expect"]
    }
    expected = {name: status for name, status in {**AT_REST, **case["expect"]}.items() if name in found}
    assert special == expected
    assert not set(absent) & set(found)
    assert report.passed == ("fail" not in found.values())
    assert case["why"]


def test_residuals_are_kept_with_their_sign_and_provenance() -> None:
    report = judged({"log.caches.0.bytes": 12_582_912 + 4096})

    residuals = {r.part: r for r in report.residuals}
    assert set(residuals) == {"weights", "kv_cache", "compute", "output"}
    assert residuals["kv_cache"].bytes == 4096
    assert residuals["kv_cache"].provenance == "exact"
    assert residuals["kv_cache"].relative == pytest.approx(4096 / 12_582_912)


def test_the_report_goes_to_json_whole() -> None:
    report = judged({})

    document = json.loads(serde.to_json(check.to_document(report)))

    assert document["schema_version"] == 1
    assert document["passed"] is True
    assert document["verdict"] == "passed"
    assert document["emulated"] is None
    assert document["plan"] == recorded_plan().digest
    assert document["facts"] == RECORDED
    assert [item["name"] for item in document["items"]] == [item.name for item in report.items]
    assert document["residuals"][0].keys() == {
        "part", "predicted", "measured", "provenance", "bytes", "relative",
    }  # fmt: skip


def test_the_table_says_what_failed_and_why() -> None:
    text = check.table(judged({"memory.major_faults_run": 40_000}))

    assert "FAILED: paging" in text
    assert "the memory is not enough" in text
    assert check.table(judged({})).endswith("\npassed\n")
    elsewhere = next(case["change"] for case in TABLE if case["name"] == "another machine")
    assert check.table(judged(elsewhere)).endswith("\npassed, on another machine than it was planned for\n")


EMULATED: dict[str, Any] = next(case["change"] for case in TABLE if case["name"] == "under an emulator")


def test_what_passes_under_an_emulator_does_not_look_like_a_pass_on_the_device() -> None:
    report = judged(EMULATED)

    document = check.to_document(report)
    text = check.table(report)
    assert (document["verdict"], document["same_device"]) == ("passed under emulation", False)
    assert document["emulated"] == "qemu-aarch64-static 7.2.22"
    assert text.endswith("\npassed under emulation: speed and peak memory were not comparable\n")
    assert "\npassed\n" not in text
    assert "under qemu-aarch64-static 7.2.22, cortex-a76" in text
    assert all(item.message for item in report.items if item.status == "not-comparable")


def test_what_fails_under_an_emulator_fails() -> None:
    report = judged({**EMULATED, "log.caches.0.bytes": 25_165_824})

    assert report.verdict == "failed"
    assert check.table(report).endswith("\nFAILED under emulation: kv_cache\n")


def test_a_machine_that_emulates_is_judged_as_an_emulator_is() -> None:
    report = judged({"machine.emulated": True})

    under = judged(EMULATED)
    assert (report.verdict, report.same_device) == ("passed under emulation", False)
    assert report.emulated == "a machine that emulates x86_64"
    assert {i.name for i in report.items if i.status == "not-comparable"} == {
        i.name for i in under.items if i.status == "not-comparable"
    }
    assert "on a machine that emulates x86_64" in check.table(report)


def test_a_machine_that_emulates_is_never_the_very_device() -> None:
    report = judged({"machine.emulated": True}, strict=True)

    assert report.verdict == "failed"
    assert [item.name for item in report.items if item.status == "fail"] == ["device"]


def test_a_card_of_its_own_is_not_comparable_either() -> None:
    report = judged({**EMULATED, "memory.gpu": 838_132_256}, device="rtx-4060-8gb")

    found = {item.name: item.status for item in report.items}
    assert found["free card memory"] == found["host budget"] == found["budget"] == "not-comparable"


def test_a_server_of_another_architecture_was_not_run_for_that_reason() -> None:
    match = [{"fact": "architecture", "status": "fail", "expected": "aarch64", "measured": "x86_64"}]
    foreign = {"bundle.server": "sha256:00", "match": match, "signature.state": "verified"}

    item = next(item for item in judged(foreign).items if item.name == "server")

    assert item.message == "the bundle's own was not run: it is for aarch64"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_limit": 1 << 30}, "--memory-limit and --emulate"),
        ({"strict_device": True}, "--strict-device and --emulate"),
    ],
)
def test_what_an_emulator_makes_meaningless_is_refused_before_the_work(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        check.check(Path("none.tar"), progress=Silent(), emulate=True, **options)


def test_an_emulator_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MissingTool, match="neither qemu-aarch64-static nor qemu-aarch64") as caught:
        check._emulator("aarch64", "x86_64")

    assert caught.value.hint == "apt install qemu-user-static"


def test_the_static_emulator_is_taken_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qemu-aarch64", "qemu-aarch64-static"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert check._emulator("aarch64", "x86_64") == tmp_path / "qemu-aarch64-static"


def test_a_bundle_without_a_server_has_nothing_to_emulate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write(tmp_path, tmp_path / "b.tar")
    (tmp_path / "qemu-aarch64").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    with pytest.raises(BadInput, match=r"b\.tar carries no llama-server to emulate") as caught:
        check.check(written.path, progress=Silent(), emulate=True)

    assert caught.value.hint == "build it --with-runtime, or give one for its device with --server PATH"


def test_a_bundle_for_this_machine_needs_no_emulator() -> None:
    with pytest.raises(BadInput, match="nothing to emulate"):
        check._emulator("aarch64", "aarch64")


def test_what_was_measured_at_build_stands_above_the_drift_that_comes_on_top() -> None:
    facts = check.facts_from(changed({}), source="facts")

    report = check.evaluate(recorded_plan(), facts, measured=measured(kl=(0.02, 0.018, 0.022)))

    names = [item.name for item in report.items]
    row = report.items[names.index("quality at build")]
    assert row.expected == "KL 0.0200 nats to the parent, perplexity 12.00 (+1.01%)"
    assert row.status == "note"
    assert names[names.index("quality at build") + 1 :] == ["quality"]
    assert "quality at build" not in {item.name for item in check.evaluate(recorded_plan(), facts).items}


def test_facts_of_another_shape_are_refused() -> None:
    document = changed({})
    document["memory"]["peak_rss"] = "many"
    document["surprise"] = 1

    with pytest.raises(BadInput, match="surprise") as caught:
        check.facts_from(document, source="the case")
    assert "peak_rss" in caught.value.message


@pytest.mark.parametrize(
    ("memory", "how"),
    [
        ({"peak_rss": 220_000_000, "nvmap": 580_000_000}, "VmHWM and nvmap"),
        ({"peak_rss": 220_000_000, "gpu": 580_000_000}, "VmHWM and the GPU's own count"),
        ({"peak_rss": 220_000_000, "system_drop": 800_000_000}, "what the whole system lost"),
    ],
)
def test_memory_of_an_accelerator_is_added_to_what_the_process_holds(
    memory: dict[str, int], how: str
) -> None:
    changes = {f"memory.{name}": size for name, size in memory.items()}
    report = judged(changes, device="jetson-orin-nano-8gb")

    items = {item.name: item for item in report.items}
    assert items["peak memory"].status == "pass"
    assert how in items["peak memory"].message
    assert items["weights"].status == "pass"


def test_a_plan_that_takes_the_whole_budget_keeps_it_with_its_context() -> None:
    """The budget has the context subtracted already: it is not counted a second time."""
    plan = offloaded_plan("jetson-orin-nano-8gb")
    plan = replace(plan, budget=replace(plan.budget, device=Bytes(plan.memory.total)))
    status = {}
    for beside in (500 * MIB, 501 * MIB):
        held = plan.memory.total - 207_522_304 + beside
        changes = {**OFFLOADED, "memory.peak_rss": 207_522_304, "memory.nvmap": held}
        facts = check.facts_from(changed(changes), source="the case")
        items = {item.name: item for item in check.evaluate(plan, facts).items}
        status[beside // MIB] = items["budget"].status

    assert status == {500: "pass", 501: "fail"}


def names_with(report: check.CheckReport, words: str) -> set[str]:
    return {item.name for item in report.items if words in item.expected}


def test_rows_say_what_is_allowed_for_the_context() -> None:
    changes = {"memory.peak_rss": 207_522_304, "memory.nvmap": 890_561_056}
    rows = {"peak memory", "unexplained rest", "budget"}

    shared = judged(changes, device="jetson-orin-nano-8gb")
    card = judged({"memory.gpu": 890_561_056}, device="rtx-4060-8gb")

    assert names_with(shared, "+ up to 500.0 MiB accelerator context") == {*rows, "free memory"}
    assert names_with(card, "+ up to 300.0 MiB accelerator context") == {*rows, "free card memory"}
    assert not names_with(judged({}), "accelerator context")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("unsigned", "it is not signed"),
        ("unenrolled", "--allowed-signers"),
        ("unverified", "not be verified"),
    ],
)
def test_a_carried_server_that_was_not_run_is_said_with_the_reason(state: str, reason: str) -> None:
    report = judged({"bundle.server": "sha256:00", "signature.state": state})

    item = next(item for item in report.items if item.name == "server")
    assert reason in item.message
    assert item.measured == "option: llama-server (0c1e57098)"
    assert item.expected == "llama.cpp 0.5.0-dev (0c1e57098)"


@pytest.mark.parametrize(("status", "code"), [(1, 1), (2, 1), (-9, 1), (6, 6), (7, 7), (10, 10), (130, 130)])
def test_an_agent_that_breaks_is_no_failed_check(status: int, code: int) -> None:
    error = check._broken(status, "Traceback (most recent call last):\nKeyError: 'plan'\n")

    assert error.exit_code == code
    assert "KeyError: 'plan'" in error.message
