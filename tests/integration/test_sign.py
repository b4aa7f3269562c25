"""Signing with the real ssh-keygen: reproducible, verifiable, and clear about unusable keys."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepack.bundle import sign
from edgepack.errors import BadInput, NotFound

pytestmark = pytest.mark.integration

DIGEST = "ab" * 32


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    sign.new_key(path)
    return path


def verify(signature: bytes, signers: str, folder: Path, text: str) -> int:
    (folder / "sig").write_bytes(signature)
    (folder / "signers").write_text(signers)
    argv = ["ssh-keygen", "-Y", "verify", "-n", "edgepack", "-I", "edgepack"]
    argv += ["-f", str(folder / "signers"), "-s", str(folder / "sig")]
    return subprocess.run(argv, input=text.encode(), check=False, capture_output=True).returncode


def test_a_signature_verifies_and_is_the_same_every_time(key: Path, tmp_path: Path) -> None:
    first = sign.sign(key, DIGEST)
    second = sign.sign(key, DIGEST)

    assert first == second
    signers = sign.allowed_signer(key)
    assert verify(first, signers, tmp_path, sign.statement(DIGEST)) == 0
    assert verify(first, signers, tmp_path, sign.statement("cd" * 32)) != 0


def test_a_new_key_is_private_and_never_overwritten(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadInput, match="not overwritten"):
        sign.new_key(key)


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        sign.sign(tmp_path / "none", DIGEST)
    assert caught.value.hint is not None
    assert "edgepack key new" in caught.value.hint


def test_another_key_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ecdsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(path)], check=True)

    with pytest.raises(BadInput, match="ecdsa-sha2-nistp256"):
        sign.sign(path, DIGEST)


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("hello\n")
    path.chmod(0o600)

    with pytest.raises(BadInput, match="not a private SSH key"):
        sign.sign(path, DIGEST)


def test_a_key_others_can_read_is_refused(key: Path) -> None:
    key.chmod(0o644)

    with pytest.raises(BadInput, match="read by others"):
        sign.sign(key, DIGEST)


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    path = tmp_path / "locked"
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-C", "x", "-f", str(path)]
    subprocess.run(argv, check=True)
    return path


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    socket = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        yield
        process.terminate()


def test_a_locked_key_without_agent_is_refused_without_asking(
    locked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    with pytest.raises(BadInput, match="locked by a passphrase"):
        sign.sign(locked, DIGEST)


@pytest.mark.usefixtures("agent")
def test_a_locked_key_signs_through_the_agent(locked: Path, tmp_path: Path) -> None:
    asking = tmp_path / "askpass"
    asking.write_text("#!/bin/sh\necho secret\n")
    asking.chmod(0o700)
    env = {**os.environ, "SSH_ASKPASS": str(asking), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(["ssh-add", "-q", str(locked)], check=True, env=env, stdin=subprocess.DEVNULL)

    signature = sign.sign(locked, DIGEST)

    assert verify(signature, sign.allowed_signer(locked), tmp_path, sign.statement(DIGEST)) == 0
