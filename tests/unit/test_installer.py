"""The store on the device: what gets in, in which order, and that no failure leaves anything but a whole release."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepack.bundle import sign
from edgepack.device import installer
from tests import releases
from tests.releases import Device


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    sign.new_key(path)
    return path


@pytest.fixture(scope="session")
def signers(key: Path) -> str:
    return sign.allowed_signer(key)


@pytest.fixture(scope="session")
def first(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases.bundle(tmp_path_factory.mktemp("first") / "first.tar", key, sequence=1)


@pytest.fixture(scope="session")
def second(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another configuration of the same weights."""
    out = tmp_path_factory.mktemp("second") / "second.tar"
    return releases.bundle(out, key, sequence=2, files={"notes.txt": "another context"})


@pytest.fixture
def device(tmp_path: Path, signers: str) -> Device:
    made = Device(tmp_path / "store")
    assert made.enroll(signers).status == 0
    return made


# ── offer, receive, install ──


def test_a_release_that_is_offered_received_and_installed_is_the_current_one(
    device: Device, first: Path
) -> None:
    offered = device.run("offer", stdin=releases.offer_frames(first)).document
    sent = b"".join(releases.blob_frames(first, offered["missing"]))
    received = device.run("receive", offered["release"], stdin=sent).document
    installed = device.run("install", offered["release"])

    assert (offered["state"], received["state"]) == ("new", "received")
    assert installed.status == 0
    assert installed.document["outcome"] == "good"
    assert device.current() == releases.release_of(first)
    assert device.previous() is None
    current = device.root / "current"
    assert (current / "model.gguf").read_bytes() == b"GGUF" + bytes(5000)
    assert (current / "app/empty.txt").read_bytes() == b""
    assert device.events() == ["enrolled", "offered", "laid-out", "switching", "tested", "good"]


def test_a_second_release_takes_only_what_the_first_has_not(
    device: Device, first: Path, second: Path
) -> None:
    device.run("install", first)

    offered = device.run("offer", stdin=releases.offer_frames(second)).document

    assert [entry["bytes"] for entry in offered["missing"]] == [len("another context")]
    sent = b"".join(releases.blob_frames(second, offered["missing"]))
    device.run("receive", offered["release"], stdin=sent)
    assert device.run("install", offered["release"]).document["outcome"] == "good"
    assert device.current() == releases.release_of(second)
    assert device.previous() == releases.release_of(first)
    weights = [(device.root / link / "model.gguf").stat() for link in ("current", "previous")]
    assert weights[0].st_ino == weights[1].st_ino


def test_installing_what_is_current_does_nothing(device: Device, first: Path) -> None:
    device.run("install", first)

    again = device.run("install", first)

    assert again.document["outcome"] == "current"
    assert device.events().count("switching") == 1


def test_a_release_that_fails_its_test_goes_back_to_the_one_before(
    device: Device, first: Path, second: Path
) -> None:
    device.run("install", first)
    failing = Device(device.root, check=lambda _: {**releases.passing(), "failure": {
        "kind": "oom-killed", "stage": "fill", "message": "out of memory",
    }})  # fmt: skip

    answer = failing.run("install", second)

    assert answer.status == 5
    assert answer.document["outcome"] == "rolled-back"
    assert "oom-killed" in answer.document["reasons"][0]
    assert device.current() == releases.release_of(first)
    assert device.previous() is None
    assert installer.good_releases(device.store) == [releases.release_of(first)]
