"""A bundle for a Raspberry Pi carries a static aarch64 server that really runs: here under QEMU's user emulation.

The first run cross-compiles llama-server (about 6 minutes on two idle cores); the cache keeps it.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack import bundle as bundles
from edgepack import check, toolchain
from edgepack.bundle import sign
from edgepack.device import agent
from edgepack.progress import Terminal
from edgepack.runtimes import llama_cpp
from tests.integration.test_stories import CONTINUATION, PROMPT

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
NOT_COMPARABLE = {
    "device", "free memory", "peak memory", "unexplained rest", "budget", "decode", "prefill", "first token",
    "decode, context full",
}  # fmt: skip


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "signing"
    sign.new_key(path)
    path.with_suffix(".allowed").write_text(sign.allowed_signer(path), encoding="ascii")
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Path:
    """stories260K at F16 for a Raspberry Pi 5, with the server inside, signed."""
    toolchain.static_runtime("aarch64", Terminal())
    folder = tmp_path_factory.mktemp("arm")
    stories = ROOT / "tests" / "data" / "stories260K"
    convert = [str(ROOT / "scripts" / "stories260k_to_hf.py"), str(stories / "stories260K.bin")]
    subprocess.run(
        [sys.executable, *convert, str(stories / "tok512.bin"), str(folder / "stories")], check=True
    )
    words = ["build", "--profile", "raspberry-pi-5-8gb", "--model", str(folder / "stories"), "--scheme", "F16",
             "--with-runtime", "--key", str(key), "-q", "-o", str(folder / "out")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "edgepack", *words], check=True, capture_output=True, text=True
    )
    return Path(done.stdout.strip())


def test_the_bundle_unpacks_to_a_server_for_arm_that_needs_no_library(bundle: Path, tmp_path: Path) -> None:
    bundles.unpack(bundle, tmp_path / "release")
    server = tmp_path / "release" / bundles.SERVER

    content = server.read_bytes()

    start, size, count = struct.unpack_from("<Q14xHH", content, 32)
    kinds = {struct.unpack_from("<I", content, start + size * i)[0] for i in range(count)}
    assert content[:5] == b"\x7fELF\x02"
    assert int.from_bytes(content[18:20], "little") == 183, "EM_AARCH64"
    assert 1 in kinds, "PT_LOAD"
    assert 3 not in kinds, "PT_INTERP: it would need the device's loader"


def test_the_carried_server_says_on_arm_what_the_model_is_known_to_say(bundle: Path, tmp_path: Path) -> None:
    bundles.unpack(bundle, tmp_path / "release")
    program = toolchain.find_emulator("aarch64")
    assert program is not None, "no qemu-aarch64 is installed (scripts/system_tools.sh)"
    emulator = agent.find_emulator(str(program), "aarch64")
    found = agent.read_bundle(str(bundle))
    args, environment = agent.server_arguments(agent.read_document(found, "server.json"), None)
    args = agent.with_threads(args, 1)

    with (
        agent.memory_limit(None) as limit,
        agent.running_server(
            str(tmp_path / "release" / bundles.SERVER), args, model=str(tmp_path / "release" / llama_cpp.ARTIFACT),
            folder=str(tmp_path), environment=environment, limit=limit, under=emulator.under,
        ) as server,
    ):  # fmt: skip
        server.wait_healthy(300)
        answer = server.post("/completion", {"prompt": PROMPT, "n_predict": 40, "temperature": 0}, "run")

    assert CONTINUATION.startswith(answer["content"])
    assert len(answer["content"]) > 60


def test_a_check_under_emulation_passes_and_judges_neither_speed_nor_the_size_of_the_process(
    bundle: Path, key: Path, tmp_path: Path
) -> None:
    words = ["check", str(bundle), "--emulate", "--allowed-signers", str(key.with_suffix(".allowed"))]
    done = subprocess.run(
        [sys.executable, "-m", "edgepack", *words, "-o", str(tmp_path / "report.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\npassed under emulation: speed and peak memory were not comparable\n")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    status = {item["name"]: item["status"] for item in report["items"]}
    server = report["facts"]["server"]
    assert {name for name, said in status.items() if said == "not-comparable"} == NOT_COMPARABLE
    assert {said for name, said in status.items() if name not in NOT_COMPARABLE} <= {"pass", "note"}
    beside = {residual["part"]: abs(residual["bytes"]) for residual in report["residuals"]}
    assert beside.keys() == {"weights", "kv_cache", "compute", "output"}
    assert max(beside.values()) <= check.LOG_ROUNDING
    assert report["verdict"] == "passed under emulation"
    assert report["emulated"] == f"{server['emulator']['name']} {server['emulator']['version']}"
    assert server["emulator"]["cpu"] == "cortex-a76"
    assert server["source"] == "bundle"
