"""Bundles for runtimes that have no server of their own: built, checked and started by their own start files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from edgepack import workspace
from edgepack.bundle import APP

pytestmark = pytest.mark.integration

RUNTIMES = (("onnx-genai", "onnx-int8"), ("transformers", "bf16"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own that shares only the compiled toolchain."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "toolchain").symlink_to(workspace.cache_root() / "toolchain")
    return folder


def edgepack(*words: str | Path, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "edgepack", *map(str, words)], capture_output=True, text=True,
        env={**os.environ, "EDGEPACK_CACHE": str(cache), "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module", params=RUNTIMES, ids=[runtime for runtime, _ in RUNTIMES])
def bundle(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed bundle of the built-in model; its key lies beside it."""
    runtime, scheme = request.param
    out = tmp_path_factory.mktemp(runtime)
    edgepack("key", "new", out / "key", cache=cache)
    edgepack(
        "build", "--profile", "x86-laptop", "--model", "demo", "--runtime", runtime, "--scheme", scheme,
        "--no-quality", "--key", out / "key", "-o", out, cache=cache,
    )  # fmt: skip
    (made,) = out.glob("*.tar")
    return made


def test_what_was_built_passes_its_check_with_the_code_that_it_carries(bundle: Path, cache: Path) -> None:
    signers = bundle.parent / "key.allowed_signers"
    report = json.loads(edgepack("check", bundle, "--allowed-signers", signers, "--json", cache=cache))

    rows = {item["name"]: item for item in report["items"]}
    assert report["passed"] is True
    assert rows["signature"]["status"] == "pass"
    assert "bundle: edgepack_server" in rows["server"]["measured"]
    for part in ("weights", "kv_cache"):
        assert "equal, to the byte" in rows[part]["measured"], rows[part]
    assert rows["quality"]["status"] == "pass"
    assert rows["second turn"]["status"] == "pass"


@pytest.fixture(scope="module")
def started(bundle: Path, cache: Path) -> Iterator[tuple[str, Path]]:
    """The bundle's server by its own start file: (address, key file)."""
    release, state = bundle.parent / "release", bundle.parent / "state"
    edgepack("unpack", bundle, release, cache=cache)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ, "EDGEPACK_STATE": str(state), "EDGEPACK_PORT": str(port),
        "EDGEPACK_PYTHON": sys.executable, "EDGEPACK_FORCE": "1",
    }  # fmt: skip
    server = subprocess.Popen(["sh", str(release / "start.sh")], env=env, start_new_session=True)
    try:
        subprocess.run(["sh", str(release / "start.sh"), "ready"], env=env, check=True)
        yield f"http://127.0.0.1:{port}", state / "api-key"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        assert server.wait(timeout=60) == 0
    assert not list(release.rglob("__pycache__")), "a bundle is not written into"


def test_a_client_of_openai_streams_from_its_own_start_file(started: tuple[str, Path]) -> None:
    address, key = started
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=key.read_text().strip())

    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Who comes?"}], max_tokens=12, temperature=0.0,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    events = list(stream)

    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 12


def test_the_article_s_chat_answers_in_its_own_shape(started: tuple[str, Path]) -> None:
    address, key = started
    asked = urllib.request.Request(
        f"{address}/chat",
        json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "session_id": "s1"}).encode(),
        {"Authorization": f"Bearer {key.read_text().strip()}", "Content-Type": "application/json"},
    )  # fmt: skip

    answer = json.loads(urllib.request.urlopen(asked, timeout=60).read())

    assert answer["code"] == 200
    assert answer["data"]["session_id"] == "s1"
    assert answer["data"]["completion_tokens"] == 8


def test_the_server_s_package_in_a_bundle_is_whole(started: tuple[str, Path], bundle: Path) -> None:
    carried = bundle.parent / "release" / "edgepack_server"

    assert {p.relative_to(carried) for p in carried.rglob("*")} == {
        path.relative_to(APP) for path in APP.rglob("*") if path.suffix == ".py" or path.name == "engines"
    }
