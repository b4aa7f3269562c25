"""The toolchain unpacks nothing outside its folder and runs only builds that it knows."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path

import pytest

from edgepack import toolchain
from edgepack.errors import BuildFailed, MissingTool, Untrusted
from edgepack.progress import Silent
from edgepack.serde import to_json


def archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    info.size = 3 if kind == tarfile.REGTYPE else 0
    return info


def test_plain_files_are_unpacked_and_executables_stay_so(tmp_path: Path) -> None:
    source = archive(
        tmp_path / "a.tar.gz", member("top/a/b.txt"), member("top/run", mode=0o755), member("top/no")
    )

    toolchain.unpack(source, tmp_path / "out", wanted=lambda name: name != "no")

    assert (tmp_path / "out/top/a/b.txt").read_bytes() == b"xxx"
    assert (tmp_path / "out/top/run").stat().st_mode & 0o111
    assert not (tmp_path / "out/top/no").exists()


@pytest.mark.parametrize(
    "bad",
    [
        member("/etc/passwd"),
        member("top/../../escape"),
        member("top/link", tarfile.SYMTYPE, link="/etc"),
        member("top/hard", tarfile.LNKTYPE, link="top/a"),
        member("top/device", tarfile.CHRTYPE),
        member("top/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_members_that_leave_the_folder_or_are_no_files_are_refused(
    bad: tarfile.TarInfo, tmp_path: Path
) -> None:
    source = archive(tmp_path / "a.tar.gz", bad)

    with pytest.raises(Untrusted):
        toolchain.unpack(source, tmp_path / "out", wanted=lambda _: True)

    assert not (tmp_path / "escape").exists()


def test_a_member_cannot_replace_another(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.tar.gz", member("top/a"), member("top/a"))

    with pytest.raises(Untrusted, match="twice"):
        toolchain.unpack(source, tmp_path / "out", wanted=lambda _: True)


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("version: 0.5.0-dev (build 1, commit 0c1e57098)\nbuilt with GNU 12.2.0", True),
        ("version: 0.5.0-dev (build 1, commit 0c1e570)", True),
        ("version: 0.7.0 (build 11669, commit abcdef012)", False),
        ("version: 0.5.0-dev (build 1, commit unknown)", False),
        ("", False),
    ],
)
def test_only_known_commits_are_run(said: str, known: bool) -> None:
    assert toolchain.is_known(said) is known


def test_an_absent_toolchain_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MissingTool) as missing:
        toolchain.find()

    assert missing.value.hint is not None and "edgepack toolchain install" in missing.value.hint
    status = toolchain.status()
    assert (status.installed, status.server, status.bytes) == (False, None, 0)
    assert json.loads(to_json(status))["commit"] == toolchain.COMMIT


@pytest.mark.parametrize(("commit", "used"), [("0c1e570", True), ("feedbee", False)])
def test_a_server_on_path_is_used_when_its_commit_is_known(
    commit: str, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path / "llama-server"
    server.write_text(f"#!/bin/sh\necho 'version: 0.5.0-dev (build 1, commit {commit})'\n")
    server.chmod(0o755)
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))

    assert (toolchain.status().server == server) is used


def test_the_static_server_of_another_architecture_is_the_one_that_was_built_for_its_bundles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path))
    with pytest.raises(MissingTool, match="no llama-server for aarch64 was built here"):
        toolchain.find_static("aarch64")
    built = toolchain._static_home("aarch64") / "llama-server"
    built.parent.mkdir(parents=True)
    built.touch()

    assert toolchain.find_static("aarch64") == built
    assert toolchain.static_runtime("aarch64", Silent()) == built


def elf(kinds: list[int]) -> bytes:
    head = b"\x7fELF\x02\x01" + bytes(26) + struct.pack("<QQIHHH", 64, 0, 0, 64, 56, len(kinds)) + bytes(6)
    return head + b"".join(struct.pack("<I", kind) + bytes(52) for kind in kinds)


def test_a_binary_that_asks_for_a_loader_is_not_static(tmp_path: Path) -> None:
    (tmp_path / "static").write_bytes(elf([1, 1, 6]))
    (tmp_path / "dynamic").write_bytes(elf([6, 3, 1]))
    (tmp_path / "text").write_text("#!/bin/sh")

    toolchain.require_static(tmp_path / "static")
    for name in ("dynamic", "text"):
        with pytest.raises(BuildFailed):
            toolchain.require_static(tmp_path / name)
