"""The agent and runtimes beside llama.cpp: what a bundle may start, what it may hold, and what servers say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from edgepack.device import agent
from edgepack.runtimes import NAMES
from tests import served
from tests.unit.test_check_served import plan_of

LOGS = Path(__file__).parents[1] / "cases" / "logs"
GOLDEN = Path(__file__).parents[1] / "golden" / "transformers"
CORES = len(os.sched_getaffinity(0))

APP = ["--engine", "onnx-genai", "--alias", "owner/demo", "--ctx-size", "512", "--parallel", "2", "--ubatch-size",
       "128", "--cache-type-k", "f32", "--threads", "1", "--provider", "cpu", "--queue-size", "32", "--timeout",
       "600.5"]  # fmt: skip
VLLM = ["--served-model-name", "owner/demo", "--load-format", "safetensors", "--dtype", "bfloat16",
        "--generation-config", "vllm", "--max-model-len", "4096", "--max-num-seqs", "4",
        "--max-num-batched-tokens", "512", "--enable-chunked-prefill", "--enable-prefix-caching", "--block-size", "16",
        "--kv-cache-dtype", "fp8", "--kv-cache-memory-bytes", "537395200", "--gpu-memory-utilization", "0.62",
        "--compilation-config.cudagraph_mode", "FULL_DECODE_ONLY", "--cudagraph-capture-sizes", "1", "2", "4",
        "--max-logprobs", "40", "--enable-prompt-tokens-details", "--no-enable-log-requests"]  # fmt: skip


def document(runtime: str, args: list[str], env: dict[str, str] | None = None) -> dict[str, object]:
    return {"schema_version": 1, "runtime": runtime, "args": args, "env": env or {}}


# ── what a bundle may start ──


def test_the_agent_knows_every_runtime_that_is_planned_for() -> None:
    assert set(agent.RUNTIMES) == set(NAMES)


@pytest.mark.parametrize(("runtime", "args"), [("onnx-genai", APP), ("vllm", VLLM)])
def test_flags_that_bound_memory_and_time_are_kept_as_they_are(runtime: str, args: list[str]) -> None:
    assert agent.server_arguments(document(runtime, args), None) == (args, {})


HOSTILE = [
    ("onnx-genai", ["--model", "x"]),
    ("onnx-genai", ["--engine", "front"]),
    ("onnx-genai", ["--engine", "transformers"]),
    ("onnx-genai", ["--upstream", "http://10.0.0.1:80"]),
    ("onnx-genai", ["--upstream-key-file", "key"]),
    ("onnx-genai", ["--plan", "plan.json"]),
    ("onnx-genai", ["--host", "0.0.0.0"]),
    ("onnx-genai", ["--api-key-file", "x"]),
    ("onnx-genai", ["--provider", "/tmp/x.so"]),
    ("onnx-genai", ["--alias", "../../etc/passwd"]),
    ("onnx-genai", ["--alias", "/etc/passwd"]),
    ("onnx-genai", ["--threads", "1;reboot"]),
    ("onnx-genai", ["--timeout", "inf"]),
    ("vllm", ["--trust-remote-code"]),
    ("vllm", ["--trust_remote_code"]),
    ("vllm", ["--trust-remote-code=true"]),
    ("vllm", ["--model", "evil/model"]),
    ("vllm", ["--tokenizer", "evil/model"]),
    ("vllm", ["--tokenizer-mode", "custom"]),
    ("vllm", ["--hf-config-path", "evil/model"]),
    ("vllm", ["--hf-overrides", '{"architectures": ["X"]}']),
    ("vllm", ["--load-format", "tensorizer"]),
    ("vllm", ["--load-format", "runai_streamer"]),
    ("vllm", ["--load-format", "pt"]),
    ("vllm", ["--model-loader-extra-config", "{}"]),
    ("vllm", ["--generation-config", "folder"]),
    ("vllm", ["--config", "x.yaml"]),
    ("vllm", ["--download-dir", "x"]),
    ("vllm", ["--middleware", "os.system"]),
    ("vllm", ["--logits-processors", "a:b"]),
    ("vllm", ["--worker-cls", "a.b"]),
    ("vllm", ["--worker-extension-cls", "a.b"]),
    ("vllm", ["--scheduler-cls", "a.b"]),
    ("vllm", ["--io-processor-plugin", "a"]),
    ("vllm", ["--reasoning-parser-plugin", "a.py"]),
    ("vllm", ["--tool-parser-plugin", "a.py"]),
    ("vllm", ["--enable-lora"]),
    ("vllm", ["--lora-modules", "a=b"]),
    ("vllm", ["--speculative-config", "{}"]),
    ("vllm", ["--compilation-config", '{"backend": "a.b"}']),
    ("vllm", ["--compilation-config.backend", "a"]),
    ("vllm", ["-cc.cache_dir", "x"]),
    ("vllm", ["--additional-config", "{}"]),
    ("vllm", ["--kv-transfer-config", "{}"]),
    ("vllm", ["--kv-offloading-backend", "lmcache"]),
    ("vllm", ["--quantization", "a.b"]),
    ("vllm", ["--otlp-traces-endpoint", "http://10.0.0.1"]),
    ("vllm", ["--allowed-local-media-path", "/"]),
    ("vllm", ["--chat-template", "x"]),
    ("vllm", ["--api-key", "x"]),
    ("vllm", ["--ssl-keyfile", "x"]),
    ("vllm", ["--uds", "x"]),
    ("vllm", ["--log-config-file", "x"]),
    ("vllm", ["--master-addr", "10.0.0.1"]),
    ("vllm", ["--data-parallel-address", "10.0.0.1"]),
    ("vllm", ["--distributed-executor-backend", "a.b"]),
    ("vllm", ["--enable-sleep-mode"]),
    ("vllm", ["/etc"]),
    ("vllm", ["--max-model-len", "--trust-remote-code"]),
    ("vllm", ["--cudagraph-capture-sizes"]),
    ("vllm", ["--cudagraph-capture-sizes", "1", "x"]),
    ("vllm", ["--max-num-seqs", "1", "2"]),
    ("transformers", ["-m", "x"]),
    ("none", []),
    (7, []),
]  # fmt: skip


@pytest.mark.parametrize(("runtime", "args"), HOSTILE)
def test_no_flag_of_a_bundle_names_a_file_a_host_or_code(runtime: str, args: list[str]) -> None:
    with pytest.raises(agent.Refused, match=r"server\.json"):
        agent.server_arguments(document(runtime, args), None)


@pytest.mark.parametrize("runtime", list(agent.RUNTIMES))
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LD_PRELOAD", "x"),
        ("PYTHONPATH", "x"),
        ("PYTHONSTARTUP", "x"),
        ("PATH", "x"),
        ("HF_ENDPOINT", "x"),
        ("HF_HUB_OFFLINE", "/0"),
        ("VLLM_PLUGINS", "x"),
        ("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.rtld.nns=1"),
        ("VLLM_API_KEY", "x"),
        ("VLLM_CONFIG_ROOT", "x"),
        ("VLLM_RPC_BASE_PATH", "x"),
        ("VLLM_CPU_OMP_THREADS_BIND", "/x"),
        ("OMP_NUM_THREADS", "$(reboot)"),
        ("OMP_TOOL_LIBRARIES", "x.so"),
        ("CUDA_INJECTION64_PATH", "x.so"),
        ("GGML_BACKEND_PATH", "x.so"),
        ("OMP_NUM_THREADS", "2\n"),
    ],
)
def test_no_variable_of_a_bundle_names_a_path_or_code(runtime: str, name: str, value: str) -> None:
    with pytest.raises(agent.Refused, match="in the environment"):
        agent.server_arguments(document(runtime, [], {name: value}), None)


def test_threads_and_cores_are_those_of_this_machine() -> None:
    env = {"OMP_NUM_THREADS": "999", "VLLM_CPU_OMP_THREADS_BIND": "0-998", "MALLOC_ARENA_MAX": "2"}

    _, environment = agent.server_arguments(document("vllm", [], env), None)
    args, _ = agent.server_arguments(document("transformers", ["--threads", "999"]), None)

    assert environment == {
        "OMP_NUM_THREADS": str(CORES),
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
        "MALLOC_ARENA_MAX": "2",
    }
    assert args == ["--threads", str(CORES)]
    assert agent.with_cores({"VLLM_CPU_OMP_THREADS_BIND": "0,2-3|5"}, {0, 2, 3, 5}) == {
        "VLLM_CPU_OMP_THREADS_BIND": "0,2-3|5"
    }
    assert agent.with_cores({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, {0}) == {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind"
    }


def started(runtime: str, program: str) -> list[str]:
    how = agent.RUNTIMES[runtime]
    return agent.command(how, program, ["--x"], model="/m", port=7, key_file="/k")


def test_each_server_is_started_in_its_own_words() -> None:
    listen = ["--host", "127.0.0.1", "--port", "7"]

    assert started("llama.cpp", "llama-server") == [
        "llama-server", "--x", "-m", "/m", *listen, "--api-key-file", "/k", "--log-verbosity", "4",
    ]  # fmt: skip
    assert started("transformers", "python3") == [
        "python3", "-m", "edgepack_server", "--x", "--model", "/m", *listen, "--api-key-file", "/k",
    ]  # fmt: skip
    assert started("vllm", "/v/bin/python") == [
        "/v/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "/m", "--x", *listen,
    ]  # fmt: skip
    assert started("vllm", "/v/bin/vllm") == ["/v/bin/vllm", "serve", "/m", "--x", *listen]


def test_the_device_neither_changes_a_bundles_flags_nor_is_made_to_fetch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setenv("LLAMA_ARG_HOST", "0.0.0.0")
    monkeypatch.setenv("PYTHONPATH", "/theirs")

    vllm = agent._environment(
        agent.RUNTIMES["vllm"], {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}, "k", None, os.environ
    )
    app = agent._environment(agent.RUNTIMES["transformers"], {}, "k", "/app", os.environ)
    llama = agent._environment(agent.RUNTIMES["llama.cpp"], {}, "k", None, os.environ)

    assert "VLLM_CPU_KVCACHE_SPACE" not in vllm
    assert (vllm["HF_HUB_OFFLINE"], vllm["OMP_NUM_THREADS"], vllm["VLLM_API_KEY"]) == ("1", "1", "k")
    assert app["PYTHONPATH"] == f"/app{os.pathsep}/theirs"
    assert "VLLM_API_KEY" not in app
    assert "LLAMA_ARG_HOST" not in llama
    assert "HF_HUB_OFFLINE" not in llama or os.environ.get("HF_HUB_OFFLINE")


@pytest.mark.parametrize("runtime", ["vllm", "transformers"])
def test_what_vllm_compiles_is_kept_beside_its_log_and_not_in_a_folder_of_everybody(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/theirs")
    program = tmp_path / "python3"
    program.write_text("#!/bin/sh\nenv\n", encoding="utf-8")
    program.chmod(0o755)
    server = agent.running_server(
        str(program), [], model=str(tmp_path), folder=str(tmp_path), environment={}, runtime=runtime,
        limit=agent.Limit(None, "none", None),
    )  # fmt: skip

    with server as started:
        started.process.wait(timeout=10)

    said = (tmp_path / "server.log").read_text(encoding="utf-8").splitlines()
    kept = [f"VLLM_CACHE_ROOT={tmp_path}/vllm", f"TORCHINDUCTOR_CACHE_DIR={tmp_path}/vllm/inductor"]
    assert [line in said for line in kept] == [runtime == "vllm"] * 2


def test_a_vllm_that_waits_for_an_engine_that_failed_has_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "LAST_SECONDS", 0.1)
    recorded = LOGS.parents[1] / "data" / "logs" / "compiler-missing--inductor.txt"
    program = tmp_path / "python3"
    program.write_text(f"#!/bin/sh\ncat {recorded}\nexec sleep 300\n", encoding="utf-8")
    program.chmod(0o755)
    server = agent.running_server(
        str(program), [], model=str(tmp_path), folder=str(tmp_path), environment={}, runtime="vllm",
        limit=agent.Limit(None, "none", None),
    )  # fmt: skip

    with (
        server as started,
        pytest.raises(agent.Failed, match=r"did not start: .*No working C\+\+ comp") as failed,
    ):
        started.wait_healthy(60)

    assert (failed.value.kind, failed.value.stage) == ("did-not-start", "load")


# ── which Python ──


def test_the_python_that_can_import_what_is_needed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has = agent.RUNTIMES["transformers"]._replace(modules=("json",))
    lacking = has._replace(modules=("json", "no_such_module"))
    monkeypatch.delenv(agent.PYTHON_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert agent.find_python(has, None) == (sys.executable, "path")
    assert agent.find_python(has, sys.executable) == (sys.executable, "option")
    with pytest.raises(
        agent.MissingProgram, match=rf"no Python here has json, no_such_module \({sys.executable}\)"
    ):
        agent.find_python(lacking, None)
    with pytest.raises(
        agent.MissingProgram, match="has no no_such_module: install the bundle's requirements"
    ):
        agent.find_python(lacking, sys.executable)
    monkeypatch.setenv(agent.PYTHON_VARIABLE, "/bin/true")
    with pytest.raises(agent.MissingProgram, match="/bin/true is not a Python"):
        agent.find_python(has, None)


STATES: list[dict[str, str]] = [
    {"HOME": "/home/pi"},
    {"HOME": "/home/pi", "XDG_STATE_HOME": "/home/pi/state"},
    {"HOME": "/home/pi", "STATE_DIRECTORY": "/var/lib/edgepack-server"},
    {"HOME": "/home/pi", "STATE_DIRECTORY": "/var/lib/edgepack-server", "EDGEPACK_STATE": "/srv/state"},
    {"HOME": "/home/pi", "EDGEPACK_VENV": "/srv/venv"},
    {},
]


@pytest.mark.parametrize("user", [0, 1000])
@pytest.mark.parametrize("environment", STATES)
def test_the_agent_looks_for_a_python_where_the_start_file_does(
    environment: dict[str, str], user: int, tmp_path: Path
) -> None:
    text = next(GOLDEN.rglob("start.sh")).read_text(encoding="utf-8")
    folders, search = (
        text[text.index("\nstate=") : text.index("\ndie()")],
        between(text, "find_python() {", "\n}\n"),
    )
    script = f'id() {{ echo {user}; }}\nhas() {{ echo "$1"; return 1; }}\ndie() {{ exit 0; }}\n{folders}\n{search}\n'

    asked = subprocess.run(
        ["/bin/sh", "-eu", "-c", f"{script}find_python json"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )

    assert asked.stdout.splitlines() == agent.pythons(environment, user)


def between(text: str, begin: str, end: str) -> str:
    """The part of a text from one mark on, up to and with another."""
    start = text.index(begin)
    return text[start : text.index(end, start) + len(end)]


def test_a_bundles_own_environment_is_tested_since_it_is_what_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "venv" / "bin" / "python3"
    made.parent.mkdir(parents=True)
    made.symlink_to(sys.executable)
    monkeypatch.delenv(agent.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(agent, "VENV", str(tmp_path / "venv"))
    monkeypatch.setenv("EDGEPACK_VENV", str(tmp_path / "none"))
    needs = agent.RUNTIMES["transformers"]._replace(modules=("json",))

    assert agent.find_python(needs, None) == (str(made), "path")


def test_vllms_own_program_is_not_asked_for_modules(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.touch(mode=0o755)

    assert agent.find_python(agent.RUNTIMES["vllm"], str(program)) == (str(program), "option")
    with pytest.raises(agent.MissingProgram, match="none is not a program"):
        agent.find_python(agent.RUNTIMES["vllm"], str(tmp_path / "none"))


# ── what a bundle may hold ──


def bundle(folder: Path, **files: str) -> agent.Bundle:
    model = folder / "in" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"w" * 9000)
    for name, text in files.items():
        (model / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return agent.read_bundle(str(served.bundle(plan_of("onnx-genai"), model, folder / "b.tar", args=APP)))


def test_a_models_folder_is_unpacked_whole_and_kept_for_the_next_check(tmp_path: Path) -> None:
    found = bundle(
        tmp_path, config__json="{}", genai_config__json='{"model": {"decoder": {"filename": "m.onnx"}}}'
    )

    first = Path(agent.unpack_weights(found, "onnx-genai", str(tmp_path / "work")))
    stamps = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    again = Path(agent.unpack_weights(found, "onnx-genai", str(tmp_path / "work")))

    assert first == again
    assert set(stamps) == {"model.safetensors", "config.json", "genai_config.json"}
    assert {path.name: path.stat().st_mtime_ns for path in again.iterdir()} == stamps
    assert agent.weights_bytes(str(first)) == sum(path.stat().st_size for path in first.iterdir())


def test_disk_is_asked_for_all_that_is_unpacked(tmp_path: Path) -> None:
    found = bundle(tmp_path, config__json="{}")
    plan = {
        "runtime": "onnx-genai",
        "budget": {"unified": True},
        "memory": {"parts": [{"high": 7, "place": "host"}]},
    }

    needs = agent.preflight(found, plan, str(tmp_path), None)

    assert needs["disk_needed"] == 9000 + 2
    assert needs["memory_needed"] == 7


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"modeling__py": "x"}, "model/modeling.py"),
        ({"pytorch_model__bin": "x"}, "which no model needs"),
        ({"adapter__pt": "x"}, "which no model needs"),
        ({"custom__so": "x"}, "which no model needs"),
        ({"model__onnx__so": "x"}, "which no model needs"),
        (
            {"genai_config__json": '{"session_options": {"custom_ops_library": "model.onnx"}}'},
            "custom_ops_library",
        ),
        ({"genai_config__json": '{"p": [{"QNN": {"backend_path": "x"}}]}'}, "backend_path"),
        ({"genai_config__json": '{"a": [[{"ep_library": "x"}]]}'}, "ep_library"),
        ({"genai_config__json": '{"a": {"filename": "../x.onnx"}}'}, "names the path"),
        ({"genai_config__json": '{"a": [{"ep.context": ["C:\\\\x"]}]}'}, "names the path"),
        ({"genai_config__json": '{"session_options": {"enable_profiling": "x"}}'}, "enable_profiling"),
        ({"genai_config__json": '{"cuda": {"cache_dir": "x"}}'}, "cache_dir"),
    ],
)
def test_a_model_that_could_make_its_runtime_run_code_is_refused(
    files: dict[str, str], why: str, tmp_path: Path
) -> None:
    found = bundle(tmp_path, **files)

    with pytest.raises(agent.Refused, match=why):
        agent.unpack_weights(found, "onnx-genai", str(tmp_path / "work"))

    assert not (tmp_path / "work").exists()


def test_a_file_that_somebody_laid_beside_the_weights_is_refused(tmp_path: Path) -> None:
    found = bundle(tmp_path)
    model = Path(agent.unpack_weights(found, "onnx-genai", str(tmp_path / "work")))
    (model / "adapter_config.json").write_text("{}", encoding="utf-8")

    with pytest.raises(agent.Refused, match=r"holds model/adapter_config\.json, which is not the bundle's"):
        agent.unpack_weights(found, "onnx-genai", str(tmp_path / "work"))


def test_a_bundle_without_weights_of_its_runtime_is_refused(tmp_path: Path) -> None:
    found = bundle(tmp_path)

    with pytest.raises(agent.Refused, match=r"the bundle has no model\.gguf"):
        agent.unpack_weights(found, "llama.cpp", str(tmp_path / "work"))


# ── what servers say ──


def test_the_start_of_a_vllm_says_what_its_pool_is() -> None:
    text = (LOGS / "vllm-0.32.0-cpu.log").read_text(encoding="utf-8")

    said = agent.parse_vllm_log(text)

    assert said == {
        "device": "CPU", "tokens": 640, "length": 256, "concurrency": 2.5, "blocks": None, "weights": None,
    }  # fmt: skip
    assert agent.error_lines(text, agent.RUNTIMES["vllm"]) == []


def test_what_a_program_says_last_is_told_where_no_error_is_known() -> None:
    lost = (
        "llama-server: error while loading shared libraries: libcudart.so.12: cannot open shared object file"
    )

    assert agent.error_lines(lost, agent.RUNTIMES["llama.cpp"]) == []
    assert agent.last_line(f"usage: x\n{lost}\n\n") == lost
    assert agent.last_line("x" * 1000) == "x" * 300
    assert agent.last_line(" \n") == ""


def test_the_words_of_older_vllms_and_of_cards_are_known_too() -> None:
    text = (
        "INFO 11-26 17:46:00 [gpu_model_runner.py:5150] Model loading took 1.23 GiB memory and 4.500000 seconds\n"
        "INFO 11-26 17:46:00 [kv_cache_utils.py:864] GPU KV cache size: 16,384 tokens\n"
        "INFO 11-26 17:46:00 [kv_cache_utils.py:868] Maximum concurrency for 4,096 tokens per request: 4.00x\n"
        "INFO 11-26 17:46:00 [loggers.py:351] Engine 000: vllm cache_config_info with initialization after "
        "num_gpu_blocks is: 1024\n"
    )

    assert agent.parse_vllm_log(text) == {
        "device": "GPU", "tokens": 16384, "length": 4096, "concurrency": 4.0, "blocks": 1024,
        "weights": round(1.23 * (1 << 30)),
    }  # fmt: skip


def test_metrics_are_read_by_name_with_their_labels() -> None:
    text = (
        "# HELP a b\n# TYPE a gauge\n"
        'a{part="x",said="q\\"uoted} 1"} 12.0\n'
        'a 3\nab 4\na{part="y"} NaN\na broken\n'
        'vllm:cache_config_info{num_gpu_blocks="5",kv_cache_size_tokens="None"} 1.0\n'
    )

    assert agent.samples(text, "a")[:2] == [({"part": "x", "said": 'q\\"uoted} 1'}, 12.0), ({}, 3.0)]
    assert len(agent.samples(text, "a")) == 3
    account = {"version": "0.32.0", "max_model_len": 256, "metrics": text}
    log = "CPU KV cache size: 640 tokens, Maximum concurrency for 256 tokens per request: 2.50x"
    facts = agent.served_facts(agent.RUNTIMES["vllm"], [], log, account)
    assert facts is not None
    assert (facts["pool_blocks"], facts["pool_tokens"], facts["concurrency"]) == (5, 640, 2.5)
    assert agent.served_facts(agent.RUNTIMES["llama.cpp"], [], log, None) is None


TRACE = "Traceback (most recent call last):\n"


@pytest.mark.parametrize(
    ("log", "last"),
    [
        (f"{TRACE}torch.OutOfMemoryError: CUDA out of memory\n", "torch.OutOfMemoryError: CUDA out of memory"),
        (f"{TRACE}MemoryError\n", "MemoryError"),
        ("(EngineCore pid=7) ERROR 11-26 17:46:01 [core.py:9] ValueError: To serve\n", "ValueError: To serve"),
        (
            "(EngineCore pid=7) ValueError: the cause\n"
            "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: the cause",
        ),
        ("edgepack_server: error: --model x is not a folder\n", "edgepack_server: error: --model x is not a folder"),
        ("__main__.py: error: --threads 0 is too few\n", "__main__.py: error: --threads 0 is too few"),
        ('{"time": "t", "event": "cannot_load", "message": "no weights", "hint": "x"}\n', "no weights"),
        ('{"time": "t", "event": "failed", "error": "KeyError: 1", "trace": "long"}\n', "KeyError: 1"),
        ("\x1b[1;31m2026 [E:onnxruntime:g, s.cc:1 operator()] std::bad_alloc\x1b[m\n", "std::bad_alloc"),
        ("terminate called after throwing\n  what():  std::bad_alloc\n", "what():  std::bad_alloc"),
    ],
)  # fmt: skip
def test_the_line_that_says_why_is_found_among_the_others(log: str, last: str) -> None:
    around = 'INFO 11-26 17:46:01 [x.py:1] an Error may follow\n{"event": "ready", "message": "fine"}\n'

    found = agent.error_lines(around + log + around, agent.RUNTIMES["vllm"])

    assert found[-1] == last


# ── several processes ──


@contextmanager
def family(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, once it says that it is ready."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


HELD = 64 << 20
FORKED = f"""
import os, sys, time
held = bytearray(b"x") * {HELD}
if os.fork() == 0:
    time.sleep(600)
print("ready", flush=True)
time.sleep(600)
"""
"""A child that has all of its parent's memory, and none of its own."""
SPAWNED = f"""
import subprocess, sys, time
held = bytearray(b"x") * {HELD}
subprocess.Popen([sys.executable, "-c", "import time; held = bytearray(b'x') * {HELD}; time.sleep(600)"])
time.sleep(1)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("code", "times"), [(FORKED, 1), (SPAWNED, 2)])
def test_what_several_processes_hold_is_counted_once_where_they_share_it(code: str, times: int) -> None:
    with family(code) as process:
        meter = agent.Meter(process, 1, tree=True)

        meter.take_together()

        assert meter.most_processes == 2
        assert meter.peak_together is not None
        assert times * HELD < meter.peak_together < times * HELD + (32 << 20)
        assert meter.now()["VmRSS"] > 2 * HELD


def test_a_lone_process_and_llama_server_are_read_as_ever() -> None:
    with family("import time; print('ready', flush=True); time.sleep(600)") as process:
        meter = agent.Meter(process, 1, tree=True)
        meter.take_together()
        assert (meter.most_processes, meter.peak_together, meter.shared) == (1, None, None)
    with family(FORKED) as process:
        llama = agent.Meter(process, 1)
        llama.take_together()
        assert llama.members() == [process.pid]
        assert llama.peak_together is None
        assert llama.now() == {**agent._reading(process.pid), "cpu_ticks": llama.now()["cpu_ticks"]}


@pytest.mark.parametrize(
    ("tree", "weights", "read", "thrashes"),
    [(True, 1, 109, False), (True, 1, 111, True), (False, 100, 999, False), (False, 100, 1001, True)],
)
def test_what_is_first_read_after_the_load_is_no_thrashing(
    tree: bool, weights: int, read: int, thrashes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 MiB of files are resident: a Python server's libraries, or llama-server's mapped weights. MiB each."""
    seen = {"VmHWM": 0, "VmRSS": 0, "RssFile": 100 << 20, "major_faults": 0, "read_bytes": 7 << 20}
    with family("import time; print('ready', flush=True); time.sleep(600)") as process:
        meter = agent.Meter(process, weights << 20, tree=tree)
        monkeypatch.setattr(meter, "now", lambda: dict(seen))
        meter.loaded()
        seen["read_bytes"] += read << 20

        meter.start()
        time.sleep(0.5)
        meter.stop()

        assert (meter.thrashing is not None) is thrashes
        assert (process.poll() is not None) is thrashes


def test_children_do_not_outlive_the_server_that_started_them() -> None:
    with family(SPAWNED) as process:
        members = agent._session(process.pid)
        assert len(members) == 2

        agent._end(process)

        for _ in range(100):
            if not agent._session(process.pid):
                break
            time.sleep(0.05)
        assert agent._session(process.pid) == []


def test_children_do_not_outlive_an_agent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "agent_of_a_family.py"
    script.write_text(
        f"import subprocess, sys, time\nsys.path.insert(0, {str(Path(agent.__file__).parent)!r})\nimport agent\n"
        f"code = {SPAWNED!r}\n"
        "server = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, start_new_session=True)\n"
        "server.stdout.readline()\n"
        "with agent.guarded(server):\n    print(server.pid, flush=True)\n    time.sleep(600)\n",
        encoding="utf-8",
    )

    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        leader = int(process.stdout.readline())
        assert len(agent._session(leader)) == 2
        process.kill()

    for _ in range(100):
        if not agent._session(leader):
            break
        time.sleep(0.05)
    assert agent._session(leader) == []


def test_facts_are_plain_json() -> None:
    facts = agent.served_facts(agent.RUNTIMES["vllm"], [], "", None)

    assert json.loads(json.dumps(facts)) == {
        "runtime": "vllm", "version": None, "max_model_len": None, "parts": {}, "pool_tokens": None,
        "pool_blocks": None, "concurrency": None, "backend": None,
    }  # fmt: skip
