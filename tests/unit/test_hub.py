"""What a user may call a model, when it is on this disk or nowhere."""

from __future__ import annotations

import hashlib
import os
import sys
import types
from pathlib import Path

import pytest

from edgepack import catalog, hub
from edgepack.artifact import Checkpoint
from edgepack.errors import BadInput, MissingTool, NotFound, Offline
from edgepack.progress import Silent


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(2 << 20))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: acme-1.0\n---\n")
    return folder


def resolve(source: str, *, offline: bool = True) -> Checkpoint:
    return hub.resolve(source, offline=offline, progress=Silent())


def test_a_folder_is_itself_with_a_revision_over_its_content(tmp_path: Path) -> None:
    folder = model(tmp_path / "tiny")
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    rows = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))

    checkpoint = resolve(str(folder))

    assert checkpoint.path == folder
    assert checkpoint.source == str(folder)
    assert checkpoint.revision == f"sha256:{hashlib.sha256(rows.encode()).hexdigest()}"
    assert checkpoint.license == "acme-1.0"


def test_a_revision_follows_content_and_nothing_else(tmp_path: Path) -> None:
    folder, other = model(tmp_path / "a"), model(tmp_path / "b")
    (other / "notes.txt").write_text("not a part of the model")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # long ago, so that its digest is remembered

    before = resolve(str(folder)).revision
    same = resolve(str(other)).revision
    weights.write_bytes(b"\1" + bytes((2 << 20) - 1))
    after = resolve(str(folder)).revision

    assert before == same
    assert after != before


def test_a_large_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "a")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    first = resolve(str(folder))

    def read(path: Path, on_bytes: object = None) -> str:
        assert path.name != "model.safetensors", "was read again"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(hub, "sha256_file", read)

    assert resolve(str(folder)) == first


def test_a_gguf_file_and_a_folder_with_one_are_the_file(tmp_path: Path) -> None:
    file = tmp_path / "packed" / "tiny.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")

    assert resolve(str(file)).path == resolve(str(file.parent)).path == file
    assert resolve(str(file)).revision == f"sha256:{hashlib.sha256(b'GGUF').hexdigest()}"
    assert resolve(str(file)).license == "unknown"


def test_a_bare_config_is_accepted_for_arithmetic(tmp_path: Path) -> None:
    config = model(tmp_path / "a") / "config.json"

    assert resolve(str(config)).path == config


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")

    with pytest.raises(BadInput, match=r"no config\.json and 0 \.gguf files"):
        resolve(str(tmp_path))
    with pytest.raises(BadInput, match="is not a model"):
        resolve(str(tmp_path / "text"))


@pytest.mark.parametrize(
    "source", ["qwen2.5-0.5b-instruc", "./missing", "models/a.gguf", "a/b/c", "../x", ""]
)
def test_a_name_that_is_nothing_is_not_found(source: str) -> None:
    with pytest.raises(NotFound) as caught:
        resolve(source)

    assert ("did you mean 'qwen2.5-0.5b-instruct'?" in caught.value.message) == source.startswith("qwen")


@pytest.mark.parametrize("revision", ["../../etc", "a b", "-x\n"])
def test_a_revision_that_could_leave_the_cache_is_refused(revision: str) -> None:
    with pytest.raises(BadInput, match="is not a revision"):
        resolve(f"acme/tiny@{revision}")


def test_offline_names_repository_pinned_commit_and_the_way_around() -> None:
    with pytest.raises(Offline) as caught:
        resolve("Qwen/Qwen3-0.6B")

    assert "Qwen/Qwen3-0.6B at revision c1899de289a04d12100db370d81485cdf75e47ca" in caught.value.message
    assert "give its folder instead of the name" in (caught.value.hint or "")


def test_modelscope_without_its_client_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)

    with pytest.raises(MissingTool) as caught:
        resolve("modelscope:acme/tiny")

    assert "edgepack[modelscope]" in (caught.value.hint or "")


def test_modelscope_is_asked_for_safetensors_at_the_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "scope")
    asked: list[tuple[str, object, object]] = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append((name, options["revision"], options["local_files_only"]))
        assert "*.safetensors" in str(options["allow_file_pattern"])
        return str(folder)

    client = types.ModuleType("modelscope")
    vars(client)["snapshot_download"] = snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", client)

    checkpoint = resolve("modelscope:acme/tiny@v1")

    assert asked == [("acme/tiny", "v1", True)]
    assert checkpoint.source == "modelscope:acme/tiny@v1"
    assert checkpoint.revision == hub.content_revision(folder, Silent())


def test_a_built_in_model_is_resolved_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "demo-half")
    monkeypatch.setattr(catalog, "MODELS", tmp_path)

    found = resolve("demo-half")

    assert (found.path, found.source) == (tmp_path / "demo-half", "demo-half")
    assert found.revision == hub.content_revision(tmp_path / "demo-half", Silent())
    with pytest.raises(NotFound):
        resolve("demo-quarter")


@pytest.mark.parametrize("name", catalog.built_in())
def test_a_built_in_models_licence_is_the_catalogs(name: str) -> None:
    assert resolve(name).license == "Apache-2.0"
