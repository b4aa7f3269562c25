"""edgepack run with a server that only plays llama-server: what is unpacked where, what is run, how it fails."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgepack import bundle as bundles
from edgepack import run
from edgepack.bundle import oci
from edgepack.device import agent
from edgepack.errors import CheckFailed, EdgepackError, MissingTool, NoSpace, Untrusted
from edgepack.progress import Silent

WEIGHTS = b"GGUF" + bytes(5000)
SERVER = f"""#!{sys.executable}
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(b"{{}}")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(b'data: {{"content": "once "}}\\n\\ndata: {{"content": "more"}}\\n\\n')
    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bundle(folder: Path, *, args: str = '["--ctx-size", "64"]', carried: str | None = None) -> Path:
    """An unsigned bundle of a server document, weights, and perhaps a server."""
    path = folder / "weights"
    path.write_bytes(WEIGHTS)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    layers = (
        oci.text_layer("server.json", "weight.config", f'{{"args": {args}, "env": {{}}}}\n'),
        *([] if carried is None else [oci.text_layer("bin/llama-server", "code", carried)]),
        oci.Layer(filepath="model.gguf", kind="weight", content=path, sha256=digest, bytes=len(WEIGHTS)),
    )
    named = {"org.opencontainers.image.ref.name": "tiny"}
    oci.write(
        folder / "tiny.tar", oci.Image(name="tiny", config={}, annotations=named, layers=layers), sign=None
    )
    return folder / "tiny.tar"


def program(folder: Path, text: str = SERVER) -> Path:
    path = folder / "llama-server"
    path.write_text(text)
    path.chmod(0o755)
    return path


def say(path: Path, server: Path | None) -> str:
    pieces = run.speak(
        path,
        "a",
        tokens=2,
        temperature=0.0,
        seed=1,
        ignore_eos=False,
        allowed_signers=None,
        server=server,
        progress=Silent(),
    )
    return "".join(pieces)


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **options)

    return call


def test_weights_lie_in_the_cache_under_the_bundle_s_digest_and_stay(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, server = bundle(tmp_path), program(tmp_path)
    digest = agent.read_bundle(str(path))["manifest_digest"].removeprefix("sha256:")
    small = tmp_path / "tmp"
    small.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(small))

    first = say(path, server)
    model = cache / "run" / digest / "model.gguf"
    before = model.stat()
    second = say(path, server)

    assert first == second == "once more"
    assert model.read_bytes() == WEIGHTS
    assert (model.stat().st_ino, model.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(small.iterdir()) == []


def test_a_damaged_copy_in_the_cache_is_made_anew(tmp_path: Path, cache: Path) -> None:
    path, server = bundle(tmp_path), program(tmp_path)
    say(path, server)
    (model,) = (cache / "run").glob("*/model.gguf")
    model.write_bytes(bytes(len(WEIGHTS)))

    say(path, server)

    assert model.read_bytes() == WEIGHTS


def test_a_bundle_is_verified_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, server = bundle(tmp_path), program(tmp_path)
    calls: list[str] = []
    for function in (agent.read_bundle, agent.verify_signature):
        monkeypatch.setattr(agent, function.__name__, counted(function, calls))

    say(path, server)

    assert calls == ["read_bundle", "verify_signature"]


def test_a_carried_server_runs_only_when_its_signer_is_verified(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path, carried=SERVER.replace("once ", "carried, once "))

    unsigned = say(path, program(tmp_path))
    signed = bundles.Signature(state="verified", principal="me", key="k", message="")
    monkeypatch.setattr(bundles, "verified", lambda path, _: (agent.read_bundle(str(path)), signed))
    verified = say(path, None)

    assert (unsigned, verified) == ("once more", "carried, once more")


@pytest.mark.parametrize(
    ("args", "server", "expected", "words"),
    [
        ('["--api-key", "x"]', SERVER, Untrusted, "which a bundle may not"),
        ("[]", "#!/nowhere/interpreter\n", MissingTool, "cannot be started"),
        ("[]", "#!/bin/sh\nexit 3\n", CheckFailed, "llama-server ended with status 3"),
    ],
)
def test_what_goes_wrong_has_an_exit_code_and_no_traceback(
    tmp_path: Path, cache: Path, args: str, server: str, expected: type[EdgepackError], words: str
) -> None:
    with pytest.raises(expected, match=words) as caught:
        say(bundle(tmp_path, args=args), program(tmp_path, server))

    assert caught.value.hint


def test_a_full_cache_is_said_as_such(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, server = bundle(tmp_path), program(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))

    with pytest.raises(NoSpace, match=str(cache)):
        say(path, server)
