"""A bundle for a Raspberry Pi carries a static aarch64 server that really runs: here under qemu's user emulation.

The first run cross-compiles llama-server (about 6 minutes on two idle cores); the cache keeps it.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack import bundle as bundles
from edgepack import toolchain
from edgepack.device import agent
from edgepack.progress import Terminal
from tests.integration.test_stories import CONTINUATION, PROMPT

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
QEMU = "qemu-aarch64-static"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K at F16 for a Raspberry Pi 5, with the server inside."""
    toolchain.static_runtime("aarch64", Terminal())
    folder = tmp_path_factory.mktemp("arm")
    stories = ROOT / "tests" / "data" / "stories260K"
    convert = [str(ROOT / "scripts" / "stories260k_to_hf.py"), str(stories / "stories260K.bin")]
    subprocess.run(
        [sys.executable, *convert, str(stories / "tok512.bin"), str(folder / "stories")], check=True
    )
    words = ["build", "--profile", "raspberry-pi-5-8gb", "--model", str(folder / "stories"), "--scheme", "F16",
             "--with-runtime", "-q", "-o", str(folder / "out")]  # fmt: skip
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
    emulator = shutil.which(QEMU)
    assert emulator is not None, f"{QEMU} is not installed (scripts/system_tools.sh)"
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {emulator} "{tmp_path}/release/{bundles.SERVER}" "$@"\n')
    program.chmod(0o755)
    found = agent.read_bundle(str(bundle))
    args, environment = agent.server_arguments(agent.read_document(found, "server.json"), None)

    with (
        agent.memory_limit(None) as limit,
        agent.running_server(
            str(program), args, model=str(tmp_path / "release" / bundles.WEIGHTS), folder=str(tmp_path),
            environment=environment, limit=limit,
        ) as server,
    ):  # fmt: skip
        server.wait_healthy(300)
        answer = server.post("/completion", {"prompt": PROMPT, "n_predict": 40, "temperature": 0}, "run")

    assert CONTINUATION.startswith(answer["content"])
    assert len(answer["content"]) > 60
