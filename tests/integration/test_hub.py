"""Fetching from a Hub over real sockets: a small server here speaks its protocol and misbehaves on demand."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from edgepack import hub
from edgepack.artifact import Checkpoint
from edgepack.errors import EdgepackError, NoSpace, NotFound, Offline, Unsupported, Untrusted
from edgepack.progress import Silent

pytestmark = pytest.mark.integration

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/tiny"
WEIGHTS = bytes(range(256)) * 4096 * 3  # 3 MiB
CARD = b"---\nlicense: mit\n---\n# tiny\n"


def files() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "README.md": CARD,
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"import os",
    }


@dataclass
class FakeHub:
    """The state of the server; ``url`` is what HF_ENDPOINT is set to."""

    files: dict[str, bytes] = field(default_factory=files)
    served: dict[str, bytes] = field(default_factory=dict)
    """Content sent in place of the real one."""
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next transfers of weights break, one entry each."""
    ranges: bool = True
    token: str | None = None
    failing: int = 0
    """Requests below ``failing_below`` to answer with 503 first."""
    failing_below: str = "/"
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(path, Range, Authorization) of every request."""
    url: str = ""
    cdn: str = ""
    """Where weights are redirected to: another host by name."""

    def lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin"))

    def digest(self, name: str) -> str:
        data = self.files[name]
        if self.lfs(name):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def listing(self) -> bytes:
        rows = []
        for name, data in self.files.items():
            row: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "f" * 40}
            if self.lfs(name):
                row["lfs"] = {"sha256": self.digest(name), "size": len(data), "pointerSize": 130}
            else:
                row["blobId"] = self.digest(name)
            rows.append(row)
        rows.append({"rfilename": "original/consolidated.00.pth", "size": 9, "blobId": "e" * 40})
        return json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": rows}).encode()

    def weight_requests(self) -> list[str]:
        return [ranges for path, ranges, _ in self.asked if path.startswith("/cdn/")]


class Handler(BaseHTTPRequestHandler):
    hub: ClassVar[FakeHub]

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state, path = self.hub, unquote(urlsplit(self.path).path)
        state.asked.append((path, self.headers.get("Range", ""), self.headers.get("Authorization")))
        if state.failing and path.startswith(state.failing_below):
            state.failing -= 1
            return self.reply(503, b"")
        if path.startswith("/cdn/"):
            return self.content(path.removeprefix("/cdn/"))
        if state.token is not None and self.headers.get("Authorization") != f"Bearer {state.token}":
            return self.reply(401, b"", {"X-Error-Code": "GatedRepo"})
        if path.startswith(f"/api/models/{REPO}/revision/"):
            known = path.rpartition("/")[2] in (COMMIT, "main")
            if known:
                return self.reply(200, state.listing())
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            facts = {"X-Repo-Commit": COMMIT, "ETag": f'"{state.digest(name)}"'}
            if not state.lfs(name):
                return self.content(name, facts)
            linked = {
                "X-Linked-ETag": f'"{state.digest(name)}"',
                "X-Linked-Size": str(len(state.files[name])),
            }
            return self.reply(302, b"", {**facts, **linked, "Location": f"{state.cdn}/cdn/{name}"})
        return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def content(self, name: str, facts: dict[str, str] | None = None) -> None:
        state = self.hub
        data = state.served.get(name, state.files[name])
        status, extra = 200, dict(facts or {})
        asked = self.headers.get("Range")
        if asked and state.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        cut = (
            state.cuts.pop(0)
            if name == "model.safetensors" and state.cuts and self.command == "GET"
            else None
        )
        self.reply(status, data, extra, cut)

    def reply(
        self, status: int, data: bytes, extra: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(extra or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    state = FakeHub()
    handler = type("Bound", (Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        state.cdn = f"http://localhost:{server.server_address[1]}"
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "_PAUSE", 0.0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def fetch(source: str = REPO, **options: object) -> Checkpoint:
    return hub.resolve(source, progress=Silent(), **options)  # type: ignore[arg-type]  # options by name


def test_a_repository_is_fetched_at_its_commit_without_pickles_or_code(fake: FakeHub) -> None:
    checkpoint = fetch()

    assert (checkpoint.source, checkpoint.revision, checkpoint.license) == (REPO, COMMIT, "mit")
    assert sorted(path.name for path in checkpoint.path.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert (checkpoint.path / "model.safetensors").read_bytes() == WEIGHTS


def test_what_was_fetched_needs_no_network_again(fake: FakeHub) -> None:
    first = fetch()
    fake.asked.clear()

    again = fetch(f"{REPO}@{COMMIT}")
    offline = fetch(offline=True)

    assert again == first == offline
    assert fake.asked == []


def test_a_broken_transfer_goes_on_where_it_broke(fake: FakeHub) -> None:
    fake.cuts = [1_000_000, 500_000]

    checkpoint = fetch()

    assert (checkpoint.path / "model.safetensors").read_bytes() == WEIGHTS
    assert fake.weight_requests() == ["", "bytes=1000000-", "bytes=1500000-"]


def test_an_interrupted_run_is_resumed_by_the_next_one(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ctrl_c(seconds: float) -> None:
        raise KeyboardInterrupt

    fake.cuts = [2_000_000, 0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("edgepack.hub.time.sleep", ctrl_c)
        fetch()
    fake.asked.clear()
    checkpoint = fetch()

    assert fake.weight_requests() == ["bytes=2000000-"]
    assert (checkpoint.path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_that_keeps_breaking_is_given_up_and_the_rest_kept(fake: FakeHub) -> None:
    fake.cuts = [700_000] + [0] * 50

    with pytest.raises(Offline) as caught:
        fetch()
    fake.cuts = []
    fetch()

    assert "stopped at 683.6 KiB of 3.0 MiB" in caught.value.message
    assert caught.value.hint == "the same command resumes there"
    assert fake.weight_requests()[-1] == "bytes=700000-"


def test_a_server_without_ranges_still_ends_with_the_right_file(fake: FakeHub) -> None:
    fake.cuts, fake.ranges = [1_234_567], False

    checkpoint = fetch()

    assert (checkpoint.path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_content_that_is_not_what_the_hub_says_is_refused_and_removed(fake: FakeHub, name: str) -> None:
    real = fake.files[name]
    fake.served[name] = bytes([real[0] ^ 1]) + real[1:]

    with pytest.raises(Untrusted, match=f"{name} of {REPO} has digest"):
        fetch()
    fake.served.clear()

    assert (fetch().path / name).read_bytes() == real


def test_a_cached_file_that_rotted_is_refused_then_fetched_anew(fake: FakeHub) -> None:
    blob = (fetch().path / "model.safetensors").resolve()
    rotten = bytearray(WEIGHTS)
    rotten[77] ^= 1
    blob.write_bytes(rotten)

    with pytest.raises(Untrusted):
        fetch()

    assert (fetch().path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_passing_failure_of_the_server_is_waited_out_in_a_transfer(fake: FakeHub) -> None:
    fetch(weights=False)
    fake.failing = 3
    fake.failing_below = "/cdn/"

    assert (fetch().path / "model.safetensors").read_bytes() == WEIGHTS
    assert len(fake.weight_requests()) == 4


def test_config_alone_is_fetched_when_no_weights_are_needed(fake: FakeHub) -> None:
    checkpoint = fetch(weights=False)

    assert not (checkpoint.path / "model.safetensors").exists()
    assert fake.weight_requests() == []
    assert fetch(weights=False, offline=True) == checkpoint
    with pytest.raises(Offline):
        fetch(offline=True)


def test_shards_come_from_the_index_and_nothing_else(fake: FakeHub) -> None:
    parts = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 1000 for n in (1, 2)}
    index = {"metadata": {}, "weight_map": {f"t{n}": name for n, name in enumerate(parts)}}
    fake.files |= {**parts, "model.safetensors.index.json": json.dumps(index).encode()}

    folder = fetch().path

    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(parts)


def test_a_gated_repository_says_what_to_do_and_the_token_stays_with_the_hub(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "hf_secret"

    with pytest.raises(NotFound) as caught:
        fetch()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch()

    assert "HF_TOKEN" in (caught.value.hint or "")
    assert "hf_secret" not in str(caught.value)
    assert all(authorization is None for path, _, authorization in fake.asked if path.startswith("/cdn/"))


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("acme/none", NotFound, "the Hub has no repository acme/none"),
        (f"{REPO}@v9", NotFound, f"{REPO} has no revision v9"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    fake: FakeHub, source: str, error: type[EdgepackError], said: str
) -> None:
    with pytest.raises(error) as caught:
        fetch(source)

    assert said in caught.value.message


def test_a_repository_of_pickles_is_not_used(fake: FakeHub) -> None:
    del fake.files["model.safetensors"]

    with pytest.raises(Unsupported, match=r"has no safetensors, only pytorch_model\.bin"):
        fetch()


def test_a_full_disk_is_told_before_the_transfer(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, need: int) -> None:
        if need > 1 << 20:
            raise NoSpace(f"{need}")

    monkeypatch.setattr(hub, "require_space", full)

    with pytest.raises(NoSpace, match=str(len(WEIGHTS))):
        fetch()
    assert fake.weight_requests() == []


class FullDisk(io.FileIO):
    """A file on a disk that has room for its first ROOM bytes."""

    ROOM = (1 << 20) + 1000

    def write(self, data: Any, /) -> int:
        room = self.ROOM - self.tell()
        if room >= len(data):
            return super().write(data)
        super().write(data[:room])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_meanwhile_is_said_at_once_and_what_was_written_is_used(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        return FullDisk(path, "a+b") if mode == "a+b" else plain(path, mode, **options)

    plain = Path.open
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(
            NoSpace, match=r"the disk is full at 1\.0 MiB of 3\.0 MiB of model\.safetensors"
        ) as caught:
            fetch()

    assert caught.value.exit_code == 10
    assert fake.weight_requests() == [""], "no second try against a full disk"
    assert (fetch().path / "model.safetensors").read_bytes() == WEIGHTS
    assert fake.weight_requests() == ["", f"bytes={FullDisk.ROOM}-"]


def test_an_unreachable_hub_names_the_pinned_revision_and_the_way_around(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(Offline) as caught:
        fetch("qwen2.5-0.5b-instruct")

    assert "Qwen/Qwen2.5-0.5B-Instruct at revision 7ae557604adf" in caught.value.message
    assert "give its folder instead of the name" in (caught.value.hint or "")


def test_a_log_in_page_is_not_taken_for_the_hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeHub, "listing", lambda self: b"<html>log in</html>")

    with pytest.raises(Offline, match="something else than a model's description"):
        fetch()


def test_the_official_client_and_edgepack_share_one_cache(fake: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    cache = tmp_path / "hf" / "hub"
    ours = fetch()

    theirs = snapshot_download(
        REPO, revision=COMMIT, cache_dir=cache, endpoint=fake.url, local_files_only=True
    )

    assert Path(theirs) == ours.path


def test_edgepack_uses_what_the_official_client_fetched(fake: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    cache = tmp_path / "hf" / "hub"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        hf_hub_download(REPO, name, revision=COMMIT, cache_dir=cache, endpoint=fake.url)
    fake.asked.clear()

    checkpoint = fetch(f"{REPO}@{COMMIT}", offline=True)

    assert (checkpoint.path / "model.safetensors").read_bytes() == WEIGHTS
    assert fake.asked == []
