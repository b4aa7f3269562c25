"""A bundle as a whole: what is in it, that it is the same every time, and that any change is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgepack import bundle, tables
from edgepack.artifact import Artifact, Checkpoint
from edgepack.bundle import Bundle
from edgepack.device import agent
from edgepack.errors import BadInput, CheckFailed, EdgepackError, MissingTool, NoSpace, NotFound, Untrusted
from edgepack.plan import Plan
from edgepack.units import Bytes
from tests.plans import PROFILES, example_plan
from tests.scorers import measured

SELFTEST: Mapping[str, object] = {"schema_version": 1, "text": "It was the best of times"}


def artifact_in(folder: Path, content: bytes = b"GGUF" + bytes(range(256)) * 4) -> Artifact:
    path = folder / "artifact.gguf"
    path.write_bytes(content)
    return Artifact(
        path=path,
        scheme="Q4_K_M",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=Bytes(len(content)),
        imatrix_sha256=None,
        tool="llama.cpp",
    )


def checkpoint_at(folder: Path) -> Checkpoint:
    return Checkpoint(
        path=folder, source=str(folder / "tiny"), revision="sha256:" + "12" * 32, license="Apache-2.0"
    )


def local_plan(folder: Path, name: str = "raspberry-pi-5-8gb") -> Plan:
    plan = example_plan(name, model="tiny")
    return replace(plan, model=replace(plan.model, source=str(folder / "tiny"), revision=None))


def write(folder: Path, out: Path, *, runtime: Path | None = None, sequence: int = 1) -> Bundle:
    return bundle.write(
        local_plan(folder),
        artifact_in(folder),
        out,
        checkpoint=checkpoint_at(folder),
        selftest=SELFTEST,
        runtime=runtime,
        sequence=sequence,
    )


def test_what_was_measured_travels_with_the_bundle(tmp_path: Path) -> None:
    given = measured(kl=(0.02, 0.018, 0.022))
    bundle.write(
        local_plan(tmp_path), artifact_in(tmp_path), tmp_path / "b.tar", checkpoint=checkpoint_at(tmp_path),
        selftest=SELFTEST, quality=given,
    )  # fmt: skip

    shown = bundle.inspect(tmp_path / "b.tar")

    assert shown.quality == given
    assert "KL to the parent  0.02 [0.018, 0.022] nats a token" in tables.inspect(shown)
    found, _ = bundle.verified(tmp_path / "b.tar", None)
    assert bundle.quality_in(found, tmp_path / "b.tar") == given


def test_a_bundle_that_was_not_measured_says_so(tmp_path: Path) -> None:
    write(tmp_path, tmp_path / "b.tar")

    assert bundle.inspect(tmp_path / "b.tar").quality is None


@pytest.mark.parametrize("name", PROFILES)
def test_a_written_bundle_is_verified_by_the_devices_agent(tmp_path: Path, name: str) -> None:
    written = bundle.write(
        local_plan(tmp_path, name),
        artifact_in(tmp_path),
        tmp_path / "b.tar",
        checkpoint=checkpoint_at(tmp_path),
        selftest=SELFTEST,
        sequence=7,
    )

    found = bundle.inspect(written.path)

    assert found.manifest_digest == written.manifest_digest
    assert found.bytes == written.bytes == written.path.stat().st_size
    annotations = found.annotations
    assert annotations["org.edgepack.profiles"] == name
    assert annotations["org.edgepack.release-sequence"] == "7"
    assert int(annotations["org.edgepack.required-memory-bytes"]) == example_plan(name).memory.high


def test_the_flags_in_a_bundle_are_flags_its_agent_accepts(tmp_path: Path) -> None:
    written = write(tmp_path, tmp_path / "b.tar")

    document = agent.read_document(agent.read_bundle(str(written.path)), "server.json")

    args, environment = agent.server_arguments(document, None)
    assert "--ctx-size" in args
    assert environment == {}


def test_the_plan_the_agent_and_the_start_files_travel_with_the_weights(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_bytes(b"\x7fELF")

    written = write(tmp_path, tmp_path / "b.tar", runtime=server)

    names = [file["path"] for file in agent.read_bundle(str(written.path))["files"]]
    assert names[-2:] == ["bin/llama-server", "model.gguf"]
    expected = {"agent.py", "compose.yaml", "edgepack.container", "edgepack.service", "plan.json"}
    expected |= {"provenance.json", "sbom.cdx.json", "selftest.json", "server.env", "server.json", "start.sh"}
    assert expected <= set(names)


def test_two_builds_in_other_folders_are_the_same_file(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, folder / "b.tar")
        digests.add(hashlib.sha256((folder / "b.tar").read_bytes()).hexdigest())

    assert len(digests) == 1
    assert str(tmp_path).encode() not in (tmp_path / "one" / "b.tar").read_bytes()


def test_another_sequence_is_another_bundle(tmp_path: Path) -> None:
    first = write(tmp_path, tmp_path / "1.tar", sequence=1)
    second = write(tmp_path, tmp_path / "2.tar", sequence=2)

    assert first.manifest_digest != second.manifest_digest


def test_a_sequence_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="release sequence 0"):
        write(tmp_path, tmp_path / "b.tar", sequence=0)


def test_unpacking_gives_every_file_and_makes_the_server_executable(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_bytes(b"\x7fELF")
    written = write(tmp_path, tmp_path / "b.tar", runtime=server)

    bundle.unpack(written.path, tmp_path / "release")

    assert (tmp_path / "release" / "model.gguf").read_bytes() == (tmp_path / "artifact.gguf").read_bytes()
    assert (tmp_path / "release" / "bin" / "llama-server").stat().st_mode & 0o111
    files = {p.relative_to(tmp_path / "release").as_posix() for p in (tmp_path / "release").rglob("*.*")}
    assert {"start.sh", "plan.json", "edgepack.service"} <= files
    with pytest.raises(BadInput, match="not overwritten"):
        bundle.unpack(written.path, tmp_path / "release")


def test_a_damaged_bundle_leaves_no_folder(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    path.write_bytes(path.read_bytes()[:-600] + bytes([1]) + path.read_bytes()[-599:])

    with pytest.raises(Untrusted):
        bundle.unpack(path, tmp_path / "release")

    assert not (tmp_path / "release").exists()


def test_a_disk_without_the_agent_s_own_margin_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))

    with pytest.raises(NoSpace, match="1048576 bytes free") as caught:
        bundle.unpack(path, tmp_path / "release")

    assert "EDGEPACK_CACHE" in (caught.value.hint or "")
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (agent.Refused("one byte differs"), Untrusted),
        (agent.MissingProgram("no llama-server"), MissingTool),
        (agent.NoSpace("no room"), NoSpace),
        (agent.Failed("oom-killed", "load", "out of memory"), CheckFailed),
        (OSError(errno.ENOSPC, "No space left on device"), NoSpace),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), NoSpace),
    ],
)
def test_whatever_the_agent_raises_has_an_exit_code_and_a_hint(
    raised: Exception, expected: type[EdgepackError]
) -> None:
    with pytest.raises(expected) as caught, bundle.translated(Path("b.tar")):
        raise raised

    assert caught.value.hint


def test_other_errors_pass_the_translation_as_they_are() -> None:
    with pytest.raises(PermissionError), bundle.translated(Path("b.tar")):
        raise PermissionError(errno.EACCES, "Permission denied", "b.tar")


def test_a_missing_bundle_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        bundle.inspect(tmp_path / "none.tar")


def test_every_json_file_of_a_bundle_is_json(tmp_path: Path) -> None:
    written = write(tmp_path, tmp_path / "b.tar")

    found = agent.read_bundle(str(written.path))

    for file in found["files"]:
        if file["path"].endswith(".json"):
            assert json.loads(agent.read_file(found, file["path"]))


def tiny(folder: Path, *, signature: bytes | None = None) -> Path:
    """The smallest bundle there is, so that every byte of it can be flipped."""
    from edgepack.bundle import oci

    content = b"GGUF" + bytes(60)
    path = folder / "w"
    path.write_bytes(content)
    weights = oci.Layer(
        filepath="model.gguf",
        kind="weight",
        content=path,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
    )
    image = oci.Image(
        name="tiny",
        config={"a": 1},
        annotations={"org.opencontainers.image.ref.name": "tiny"},
        layers=(oci.text_layer("plan.json", "weight.config", "{}\n"), weights),
    )
    oci.write(folder / "tiny.tar", image, sign=None if signature is None else lambda _: signature)
    return folder / "tiny.tar"


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
def test_any_flipped_bit_of_an_unsigned_bundle_is_refused(tmp_path: Path, bit: int) -> None:
    path = tiny(tmp_path)
    good = path.read_bytes()
    bundle.inspect(path)

    with path.open("r+b", buffering=0) as stream:
        for offset in range(len(good)):
            stream.seek(offset)
            stream.write(bytes([good[offset] ^ bit]))
            with pytest.raises(Untrusted):
                bundle.inspect(path)
            stream.seek(offset)
            stream.write(good[offset : offset + 1])

    bundle.inspect(path)


def test_any_truncation_and_any_appended_block_is_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    good = path.read_bytes()

    for size in (*range(0, len(good), 97), len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(Untrusted):
            bundle.inspect(path)
    for extra in (b"\0", bytes(512), b"x"):
        path.write_bytes(good + extra)
        with pytest.raises(Untrusted):
            bundle.inspect(path)


def test_tar_itself_can_read_a_bundle(tmp_path: Path) -> None:
    written = write(tmp_path, tmp_path / "b.tar")

    with tarfile.open(written.path) as tar:
        assert tar.getnames()[0] == "oci-layout"
