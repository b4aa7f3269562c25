"""The bundle's tar: reproducible to the byte, aligned, and never holding a file that changed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepack.bundle import oci
from edgepack.errors import BadInput, NoSpace, Untrusted

ROOT = Path(__file__).parents[2]


def weights_layer(path: Path) -> oci.Layer:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return oci.Layer(filepath="model.gguf", kind="weight", content=path, sha256=digest, bytes=len(content))


def image(folder: Path, weights: bytes, *texts: str) -> oci.Image:
    path = folder / "weights"
    path.write_bytes(weights)
    small = tuple(oci.text_layer(f"file{i}", "doc", text) for i, text in enumerate(texts))
    return oci.Image(
        name="tiny", config={"a": 1}, annotations={"k": "v"}, layers=(*small, weights_layer(path))
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=2000), max_size=5), size=st.integers(0, 3 * oci.PAGE))
def test_every_blob_is_its_digest_and_the_weights_start_on_a_page(
    tmp_path: Path, texts: list[str], size: int
) -> None:
    out = tmp_path / "b.tar"

    written = oci.write(
        out, image(tmp_path, b"\xffGGUF" + os.urandom(size), *texts), sign=lambda _: b"signature"
    )

    with tarfile.open(out) as tar:
        members = tar.getmembers()
        contents = {m.name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]  # files only
    assert [m.name for m in members][:3] == ["oci-layout", "index.json", "signature.sshsig"]
    assert members[-2].name == ".padding"
    assert members[-1].offset_data % oci.PAGE == 0
    assert len(contents) == len(members)
    for name, content in contents.items():
        if name.startswith("blobs/sha256/"):
            assert hashlib.sha256(content).hexdigest() == name.removeprefix("blobs/sha256/")
    index = json.loads(contents["index.json"])
    assert index["manifests"][0]["digest"] == f"sha256:{written.manifest_sha256}"
    manifest = json.loads(contents[f"blobs/sha256/{written.manifest_sha256}"])
    named = {d["digest"].removeprefix("sha256:") for d in [manifest["config"], *manifest["layers"]]}
    stored = {n.removeprefix("blobs/sha256/") for n in contents if n.startswith("blobs/")}
    assert stored == named | {written.manifest_sha256}
    assert out.stat().st_size == written.bytes


@given(size=st.one_of(st.integers(0, 1 << 34), st.integers(8**11 - 2, 8**11 + 2)))
def test_a_header_is_what_the_tar_format_says(size: int) -> None:
    header = oci.tar_header("blobs/sha256/" + "a" * 64, size)

    read = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (read.size, read.mode, read.uid, read.mtime, read.type) == (size, 0o644, 0, 0, tarfile.REGTYPE)
    assert len(header) == 512


_WRITE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from edgepack.bundle import oci
import hashlib
source = Path(sys.argv[2])
data = source.read_bytes()
small = tuple(oci.text_layer(name, "doc", name * 99) for name in sorted({"b", "a", "c"}))
big = oci.Layer(filepath="model.gguf", kind="weight", content=source,
                sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
config = {name: {name} and name for name in {"x", "y", "z"}}
image = oci.Image(name="n", config=config, annotations=config, layers=(*small, big))
oci.write(Path(sys.argv[3]), image)
"""


def test_the_same_inputs_give_the_same_bytes_in_another_environment(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(os.urandom(300_000))
    digests = set()
    surroundings = [
        ("C", 0o022, "0", "UTC", "one"),
        ("de_DE.UTF-8", 0o077, "1", "Asia/Tokyo", "two"),
        ("tr_TR.UTF-8", 0o000, "77", "America/New_York", "three"),
    ]

    for locale, umask, seed, zone, name in surroundings:
        folder = tmp_path / name
        folder.mkdir()
        os.utime(source, (int(seed) * 10**7, int(seed) * 10**7))
        env = {
            "LC_ALL": locale,
            "PYTHONHASHSEED": seed,
            "TZ": zone,
            "TMPDIR": str(folder),
            "PATH": "/usr/bin",
        }
        argv = [sys.executable, "-c", _WRITE, str(ROOT), str(source), str(folder / "out.tar")]
        subprocess.run(argv, check=True, env=env, cwd=folder, umask=umask)
        digests.add(hashlib.sha256((folder / "out.tar").read_bytes()).hexdigest())

    assert len(digests) == 1


@pytest.mark.parametrize("change", ["flip", "truncate", "append"])
def test_weights_that_changed_since_the_build_are_refused_and_nothing_is_left(
    tmp_path: Path, change: str
) -> None:
    content = os.urandom(3 * oci.PIECE + 5)
    ready = image(tmp_path, content)
    changed = {
        "flip": content[:-1] + bytes([content[-1] ^ 1]),
        "truncate": content[:-1],
        "append": content + b"x",
    }
    (tmp_path / "weights").write_bytes(changed[change])

    with pytest.raises(Untrusted, match="changed while it was packed"):
        oci.write(tmp_path / "b.tar", ready)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights"]


def test_identical_small_files_share_one_blob(tmp_path: Path) -> None:
    oci.write(tmp_path / "b.tar", image(tmp_path, b"weights", "same", "same"))

    with tarfile.open(tmp_path / "b.tar") as tar:
        names = tar.getnames()
    assert len(names) == len(set(names))


def test_weights_equal_to_a_small_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="byte for byte"):
        oci.write(tmp_path / "b.tar", image(tmp_path, b"same", "same"))


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", ".", "ü"])
def test_a_file_name_that_could_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    bad = oci.Image(name="n", config={}, annotations={}, layers=(oci.text_layer(name, "doc", "x"),))

    with pytest.raises(BadInput):
        oci.write(tmp_path / "b.tar", bad)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    layers = (oci.text_layer("x", "doc", "1"), oci.text_layer("x", "doc", "2"))

    with pytest.raises(BadInput, match="one name"):
        oci.write(tmp_path / "b.tar", oci.Image(name="n", config={}, annotations={}, layers=layers))


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    huge = oci.Layer(
        filepath="model.gguf", kind="weight", content=tmp_path / "none", sha256="0" * 64, bytes=1 << 60
    )

    with pytest.raises(NoSpace):
        oci.write(tmp_path / "b.tar", oci.Image(name="n", config={}, annotations={}, layers=(huge,)))

    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[int] = []

    written = oci.write(tmp_path / "b.tar", image(tmp_path, b"w" * 5000), on_bytes=seen.append)

    assert sum(seen) == written.bytes - 2 * oci.BLOCK
