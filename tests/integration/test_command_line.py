"""The whole command line as its users run it: one process per command, real llama.cpp, real mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import random_model

from edgepack import workspace
from tests.documents import obeys
from tests.integration.test_stories import CONTINUATION, PROMPT
from tests.plans import broken

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

WIDE = {**random_model.SHAPES["tiny"], "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 16}  # fmt: skip
"""Large enough (150 M parameters) that a build takes seconds and can be stopped on the way."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_model.write(random_model.SHAPES["tiny"], folder, seed=1)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of its own that shares only the compiled toolchain."""
    return fresh_cache(tmp_path / "cache")


def fresh_cache(folder: Path) -> Path:
    folder.mkdir()
    (folder / "toolchain").symlink_to(workspace.cache_root() / "toolchain")
    return folder


def edgepack(
    *words: object, cache: Path | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(env or {})}
    if cache is not None:
        environment["EDGEPACK_CACHE"] = str(cache)
    command = [sys.executable, "-m", "edgepack", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one message of a command that must fail so: no traceback, and a hint or a clear thing to mend."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("edgepack: ")]
    assert len(lines) == 1, done.stderr
    return done.stderr


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_loop_closes_on_this_machine(tiny: Path, cache: Path, tmp_path: Path) -> None:
    """probe -> plan -> build -> inspect -> check -> run, signed, with the server inside."""
    key, out = tmp_path / "key", tmp_path / "out"
    succeeded(edgepack("key", "new", key))
    succeeded(edgepack("probe", "-o", tmp_path / "here.yaml"))
    planned = (
        "--profile",
        tmp_path / "here.yaml",
        "--model",
        tiny,
        "--context",
        1024,
        "--min-tokens-per-second",
        0,
    )
    obeys("plan", succeeded(edgepack("plan", *planned, "-o", tmp_path / "my.plan.json", "--json")))
    words = ("--plan", tmp_path / "my.plan.json", "--with-runtime", "--key", key, "-o", out, "--json")
    bundle = obeys("bundle", succeeded(edgepack("build", *words, cache=cache)))["path"]
    signers = ("--allowed-signers", f"{key}.allowed_signers")

    shown = obeys("inspect", succeeded(edgepack("inspect", bundle, *signers, "--json")))
    checked = edgepack("check", bundle, *signers, "--json", cache=cache)
    report = obeys("check", checked.stdout)
    succeeded(edgepack("unpack", bundle, *signers, tmp_path / "unpacked"))
    text = succeeded(edgepack("run", bundle, *signers, "--prompt", "ab", "--tokens", 8, cache=cache))

    assert shown["signature"]["state"] == "verified"
    assert shown["files"][-1]["path"] == "model.gguf"
    assert not broken(report), checked.stderr
    assert checked.returncode == (0 if report["passed"] else 5)
    obeys("plan", (tmp_path / "unpacked" / "plan.json").read_bytes())
    obeys("server", (tmp_path / "unpacked" / "server.json").read_bytes())
    obeys("selftest", (tmp_path / "unpacked" / "selftest.json").read_bytes())
    assert len(text) > len("ab\n")


def test_a_model_nobody_here_trained_says_what_it_is_known_to_say(cache: Path, tmp_path: Path) -> None:
    """stories260K as a Hugging Face folder, built at F16 for a Jetson, continues greedily as published."""
    stories = ROOT / "tests" / "data" / "stories260K"
    script = ROOT / "scripts" / "stories260k_to_hf.py"
    command = [sys.executable, str(script), str(stories / "stories260K.bin"), str(stories / "tok512.bin")]
    subprocess.run(
        [*command, str(tmp_path / "stories")], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    words = ("--profile", "jetson-orin", "--model", tmp_path / "stories", "--scheme", "F16")
    bundle = succeeded(edgepack("build", *words, "-o", tmp_path, cache=cache)).strip()

    told = edgepack("run", bundle, "--prompt", PROMPT, "--temperature", 0, "--tokens", 200, cache=cache)

    assert succeeded(told) == PROMPT + CONTINUATION + "\n"


def test_the_same_inputs_give_the_same_bundle_anywhere(tiny: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    succeeded(edgepack("key", "new", key))
    build = ("build", "--profile", "jetson-orin", "--model", tiny, "--context", 1024, "--key", key)
    other = tmp_path / "elsewhere"
    other.mkdir()

    one = succeeded(edgepack(*build, "-o", tmp_path / "a", cache=fresh_cache(tmp_path / "c1"))).strip()
    old = os.umask(0o077)
    try:
        env = {"TMPDIR": str(other), "LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7"}
        done = edgepack(*build, "-o", tmp_path / "b", cache=fresh_cache(tmp_path / "c2"), env=env, cwd=other)
    finally:
        os.umask(old)

    assert sha256(Path(one)) == sha256(Path(succeeded(done).strip()))


def test_a_rerun_reuses_every_stage(tiny: Path, cache: Path, tmp_path: Path) -> None:
    build = ("build", "--profile", "jetson-orin", "--model", tiny, "--scheme", "Q4_0", "-o", tmp_path)
    succeeded(edgepack(*build, cache=cache))

    again = edgepack(*build, cache=cache)

    succeeded(again)
    assert "quantizing" not in again.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere" in refused(edgepack("inspect", tmp_path / "nowhere.tar"), 3)
    assert "nowhere" in refused(edgepack("fit", "--model", tmp_path / "nowhere"), 3)
    assert "nowhere" in refused(edgepack("plan", "--profile", tmp_path / "nowhere.yaml"), 3)


def test_an_unknown_profile_names_near_ones() -> None:
    assert "jetson-orin" in refused(edgepack("plan", "--profile", "jetson-orinn"), 3)


def test_every_mistake_in_a_profile_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: jetson-orin-nano-8gb\nname: mine\nmemry: 8 GiB\ncpu_cores: many\n")

    said = refused(edgepack("profiles", "validate", file), 2)

    assert "memry" in said
    assert "memory" in said
    assert "cpu_cores" in said
    assert "line 3" in said


def test_truncated_weights_are_refused_before_anything_is_written(
    tiny: Path, cache: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    said = refused(
        edgepack("build", "--profile", "jetson-orin", "--model", broken, "-o", tmp_path / "out", cache=cache),
        2,
    )

    assert "model.safetensors" in said
    assert not (tmp_path / "out").exists()
    assert not list((cache / "artifacts").glob("*")) if (cache / "artifacts").exists() else True


def test_a_gguf_of_the_future_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "future.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 1, 1) + bytes(64))

    assert "version 9" in refused(edgepack("fit", "--model", file), 2)


def test_an_unknown_architecture_says_what_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba9"}))

    assert "mamba9" in refused(edgepack("fit", "--model", tmp_path / "config.json"), 11)


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    said = refused(
        edgepack("plan", "--profile", "jetson-orin", "--model", "qwen2.5-7b-instruct", "--scheme", "F16"), 4
    )

    assert "more than the" in said
    assert "hint:" in said


def test_a_model_that_cannot_be_had_is_told_before_anything_is_compiled(tmp_path: Path) -> None:
    done = edgepack(
        "build", "--profile", "jetson-orin", "--model", "qwen2.5-1.5b-instruct", "--offline",
        cache=tmp_path / "cache", env={"HF_HOME": str(tmp_path / "hf")}, cwd=tmp_path,
    )  # fmt: skip

    assert "Qwen/Qwen2.5-1.5B-Instruct" in refused(done, 8)
    assert not (tmp_path / "cache" / "toolchain").exists()


def test_offline_the_plan_and_the_repository_are_named(cache: Path) -> None:
    done = edgepack(
        "build", "--profile", "jetson-orin", "--offline", cache=cache, env={"HF_HOME": str(cache / "hf")}
    )

    said = refused(done, 8)
    assert "Qwen/Qwen3-" in said, "the repository that would be fetched"
    assert "its folder" in said
    assert "weights" in said, "the plan is printed first"


@pytest.mark.parametrize("full", ["out", "cache"])
def test_a_full_disk_leaves_nothing_half_written(tiny: Path, tmp_path: Path, full: str) -> None:
    """A tmpfs of 1 MiB, in a mount namespace of its own, holds the output folder or the cache."""
    small = tmp_path / "small"
    small.mkdir()
    folders = {"out": fresh_cache(tmp_path / "roomy"), "cache": tmp_path / "roomy-out"}
    cache = small / "cache" if full == "cache" else folders["out"]
    out = small / "out" if full == "out" else folders["cache"]
    script = (
        'mount -t tmpfs -o size=1m tmpfs "$0" && mkdir "$0/cache" && ln -s "$1" "$0/cache/toolchain" && shift && "$@";'
        ' code=$?; find "$0" -name "*part*" -o -name "*.gguf" -o -name "*.tar" | wc -l; exit $code'
    )
    command = [sys.executable, "-m", "edgepack", "build", "--profile", "jetson-orin", "--model", str(tiny), "-o",
               str(out)]  # fmt: skip
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "EDGEPACK_CACHE": str(cache)}
    toolchain = str((workspace.cache_root() / "toolchain").resolve())

    done = subprocess.run(
        [*namespace, "sh", "-c", script, str(small), toolchain, *command],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip

    said = refused(done, 10)
    assert "hint:" in said
    assert done.stdout.strip().splitlines()[-1] == "0"


def test_ctrl_c_leaves_nothing_half_written_and_the_rerun_resumes(cache: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    random_model.write(WIDE, wide, seed=1)
    words = [
        "build",
        "--profile",
        "jetson-orin",
        "--model",
        str(wide),
        "--scheme",
        "Q4_K_M",
        "--no-quality",
        "-o",
        str(tmp_path / "out"),
    ]
    env = {**os.environ, "EDGEPACK_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "edgepack", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "quantizing" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said += process.stderr.read()
    code = process.wait(timeout=60)

    assert code == 130, said
    assert "Traceback" not in said
    assert "resumes" in said
    assert not (tmp_path / "out").exists()
    assert not list((cache / "artifacts").glob("*Q4_K_M*"))
    converted = {p: p.stat().st_mtime_ns for p in (cache / "artifacts").glob("*")}
    again: dict[str, Any] = json.loads(succeeded(edgepack(*words, "--json", cache=cache)))
    assert Path(again["path"]).is_file()
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in converted.items() if p.exists())


def test_damaged_bundles_are_refused_with_their_own_code(tiny: Path, cache: Path, tmp_path: Path) -> None:
    bundle = Path(
        succeeded(
            edgepack("build", "--profile", "jetson-orin", "--model", tiny, "-o", tmp_path, cache=cache)
        ).strip()
    )
    content = bytearray(bundle.read_bytes())
    for place in range(0, len(content), max(1, len(content) // 25)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        bundle.write_bytes(damaged)

        refused(edgepack("inspect", bundle), 6)


def test_a_device_that_is_too_small_fails_honestly(tiny: Path, cache: Path, tmp_path: Path) -> None:
    bundle = succeeded(
        edgepack(
            "build",
            "--profile",
            "jetson-orin",
            "--model",
            tiny,
            "--context",
            4096,
            "-o",
            tmp_path,
            cache=cache,
        )
    ).strip()

    done = edgepack("check", bundle, "--memory-limit", "12MiB", "--json", cache=cache)

    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["passed"] is False
