"""The store on the device: what gets in, in which order, and that no failure leaves anything but a whole release."""

from __future__ import annotations

import argparse
import ast
import ctypes
import errno
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import check, serde
from edgepack.bundle import oci, server_document, sign
from edgepack.device import agent, installer
from edgepack.units import MIB, Bytes
from tests import releases
from tests.plans import example_plan
from tests.releases import Answer, Device


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


# ── enrolling ──


def test_a_folder_that_is_not_enrolled_takes_nothing(tmp_path: Path, first: Path) -> None:
    device = Device(tmp_path / "store")

    answer = device.run("install", first)

    assert answer.status == 2
    assert "enroll" in answer.said
    assert not device.root.exists()


def test_signers_are_replaced_only_when_asked(device: Device, signers: str, tmp_path: Path) -> None:
    sign.new_key(tmp_path / "other")
    other = sign.allowed_signer(tmp_path / "other")

    assert device.enroll(other).status == 6
    assert (device.root / "allowed_signers").read_text() == signers
    assert device.enroll("").status == 0
    assert device.enroll(other, "--replace-signers").status == 0
    assert (device.root / "allowed_signers").read_text() == other


def test_a_mode_whose_units_would_stay_cannot_be_changed(device: Device, signers: str) -> None:
    assert device.enroll(signers, mode="user").status == 0  # none has no units

    answer = device.enroll(signers, mode="none")

    assert answer.status == 6
    assert device.store.settings.mode == "user"


def test_what_was_enrolled_stays_when_only_the_agent_is_renewed(device: Device, signers: str) -> None:
    assert device.enroll(signers, "--keep", "3", "--server", sys.executable).status == 0

    assert device.enroll("").status == 0

    assert device.store.settings == installer.Settings("none", 3, sys.executable, 3)


@pytest.mark.parametrize(
    "text", ["", "# nobody\n", "edgepack\n", "edgepack ssh-ed25519 short\n", "x" * 70000]
)
def test_what_names_no_signer_is_refused(tmp_path: Path, text: str) -> None:
    device = Device(tmp_path / "store")

    assert device.enroll(text).status == 2
    assert not (device.root / "enrolled.json").exists()


def test_an_agent_is_replaced_by_an_enrolling_that_succeeds_alone(tmp_path: Path, signers: str) -> None:
    sign.new_key(tmp_path / "other")
    device = enrolled(tmp_path, signers, "user")
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(name.encode())
    kept = device.root / "agent.pyz"
    assert device.enroll("", "--agent", str(tmp_path / "old"), mode="user").status == 0

    with installer.locked(str(device.root), "install"):
        busy = device.enroll("", "--agent", str(tmp_path / "new"), mode="user")
    bring = ("--agent", str(tmp_path / "new"))
    statuses = [
        busy.status,
        device.enroll(sign.allowed_signer(tmp_path / "other"), *bring, mode="user").status,
        device.enroll("", *bring, mode="none").status,
        device.enroll("", *bring, "--server", "relative", mode="user").status,
        Device(device.root, status=lambda _: (1, "no bus")).enroll("", *bring, mode="user").status,
        device.enroll("", "--agent", str(tmp_path / "none"), mode="user").status,
    ]

    assert statuses == [11, 6, 6, 2, 5, 2]
    assert kept.read_bytes() == b"old"
    assert device.enroll("", *bring, mode="user").status == 0
    assert kept.read_bytes() == b"new"


@pytest.mark.parametrize("link", [False, True])
def test_a_server_that_the_units_of_a_release_would_not_see_is_refused(
    tmp_path: Path, signers: str, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(installer, "SYSTEM_ROOT", str(tmp_path / "store"))
    server = tmp_path / "llama-server"
    server.symlink_to(sys.executable)
    monkeypatch.setattr(
        installer, "HIDDEN", re.compile(re.escape(os.path.realpath(server) if link else str(server)))
    )

    answer = Device(tmp_path / "store").enroll(signers, "--server", str(server), mode="system")

    assert answer.status == 2
    assert "cannot look" in answer.said
    assert not (tmp_path / "store").exists()


def test_a_server_that_is_remembered_of_mode_none_is_held_to_what_a_unit_can_start(
    tmp_path: Path, signers: str
) -> None:
    server = tmp_path / "llama server"
    server.symlink_to(sys.executable)
    device = Device(tmp_path / "store")
    assert device.enroll(signers, "--server", str(server), mode="none").status == 0

    answer = device.enroll("", mode="user")

    assert answer.status == 2
    assert "characters that a unit cannot name" in answer.said


def test_what_a_unit_hides_is_not_taken_for_what_it_shows() -> None:
    hidden = ["/home/pi/llama-server", "/root/bin/x", "/tmp/x", "/var/tmp/x", "/run/user/0/x"]
    seen = ["/usr/local/bin/llama-server", "/opt/home/x", "/homes/x", "/run/x", "/rootfs/x"]

    assert [bool(installer.HIDDEN.match(path)) for path in hidden + seen] == [True] * 5 + [False] * 5


def test_a_folder_with_other_things_in_it_is_no_root(tmp_path: Path, signers: str) -> None:
    (tmp_path / "thesis.txt").write_text("mine")

    answer = Device(tmp_path).enroll(signers)

    assert answer.status == 2
    assert "thesis.txt" in answer.said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("folder", [".", "blobs/sha256", "incoming", "releases"])
def test_a_store_that_others_can_write_is_refused(device: Device, first: Path, folder: str) -> None:
    (device.root / folder).chmod(0o777)

    answer = device.run("install", first)

    assert answer.status == 6
    assert "written by others" in answer.said


@pytest.mark.parametrize("name", ["blobs", "blobs/sha256", "incoming", "quarantine", "releases"])
def test_a_link_in_place_of_a_folder_is_refused(
    device: Device, first: Path, tmp_path: Path, name: str
) -> None:
    shutil.rmtree(device.root / name)
    (device.root / name).symlink_to(tmp_path)

    assert device.run("install", first).status == 6


def test_a_link_inside_a_release_is_not_followed(device: Device, first: Path, tmp_path: Path) -> None:
    device.run("install", first)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "llama-server").write_text("mine")
    release = device.root / "releases" / releases.release_of(first)
    shutil.rmtree(release / "bin")
    (release / "bin").symlink_to(outside)

    statuses = [device.run(*words).status for words in (["fsck"], ["install", first], ["gc"], ["boot"])]

    assert statuses[0] == 6
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]


# ── who may install what ──


def outside_incoming(root: Path) -> dict[str, bytes]:
    """Everything in a store that an offer may not touch before it was judged."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and not name.startswith("incoming/") and name not in ("lock", "journal.jsonl"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture
def resigned(tmp_path: Path, key: Path) -> Callable[..., Path]:
    """A bundle like the first with something about it that is another."""

    def made(signed_by: Path | None = key, **changes: Any) -> Path:
        return releases.bundle(tmp_path / "changed.tar", signed_by, **changes)

    return made


def refusals(device: Device, path: Path, *flags: str) -> list[Answer]:
    """The answers to an offer and to an install of a bundle; both leave the store as it was."""
    before = outside_incoming(device.root)
    answers = [
        device.run("offer", *flags, stdin=releases.offer_frames(path)),
        device.run("install", path, *flags),
    ]
    assert outside_incoming(device.root) == before
    return answers


def test_unsigned_and_foreign_bundles_are_refused(
    device: Device, resigned: Callable[..., Path], tmp_path: Path
) -> None:
    sign.new_key(tmp_path / "other")

    for signer, told in ((None, "not signed"), (tmp_path / "other", "is not in")):
        for answer in refusals(device, resigned(signed_by=signer)):
            assert answer.status == 6
            assert told in answer.said


def test_a_downgrade_is_refused_also_the_second_time_and_when_its_release_is_gone(
    device: Device, resigned: Callable[..., Path], first: Path, second: Path
) -> None:
    device.run("install", first)
    device.run("install", second)
    for number in (5, 6, 7):
        device.run("install", resigned(sequence=number, files={"n.txt": str(number)}))
    assert releases.release_of(first) not in device.store.releases()

    for _ in range(2):
        for answer in refusals(device, second):
            assert answer.status == 6
            assert "sequence 2 is below 7" in answer.said
    shutil.rmtree(device.root / "releases")
    (device.root / "releases").mkdir()
    assert [answer.status for answer in refusals(device, second)] == [6, 6]


def test_another_release_of_the_same_sequence_is_refused(
    device: Device, resigned: Callable[..., Path], first: Path
) -> None:
    device.run("install", first)

    for answer in refusals(device, resigned(sequence=1, files={"n.txt": "another"})):
        assert answer.status == 6
        assert "sequence 1" in answer.said


def test_after_a_downgrade_that_was_asked_for_the_next_releases_count_from_it(
    device: Device, first: Path, second: Path, resigned: Callable[..., Path]
) -> None:
    device.run("install", resigned(sequence=70))  # 7 was meant

    assert device.run("install", first).status == 6
    assert device.run("install", first, "--allow-downgrade").document["outcome"] == "good"
    assert device.store.sequence() == (1, releases.release_of(first))

    assert device.run("install", second).document["outcome"] == "good"


def test_a_release_that_failed_does_not_raise_the_highest_sequence(
    device: Device, first: Path, second: Path
) -> None:
    device.run("install", first)
    Device(device.root, check=fails).run("install", second)

    assert device.store.sequence() == (1, releases.release_of(first))


@pytest.mark.parametrize("text", ["", "0", "-1", "1.0", "1e3", "01", "9" * 40])
def test_a_release_needs_a_number(device: Device, resigned: Callable[..., Path], text: str) -> None:
    path = resigned(annotations={"org.edgepack.release-sequence": text})

    assert [answer.status for answer in refusals(device, path)] == [6, 6]


def fails(_: argparse.Namespace) -> dict[str, Any]:
    failure = {"kind": "oom-killed", "stage": "fill", "message": "out of memory"}
    return {**releases.passing(), "failure": failure}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arch": "x86_64"}, "architecture is x86_64, not aarch64"),
        ({"memory_total": 2 << 30}, "memory is 2.00 GiB, not"),
        ({"device_tree": ["Toaster"]}, "device tree"),
    ],
)
def test_another_device_is_refused_unless_forced(
    device: Device, first: Path, change: dict[str, Any], told: str
) -> None:
    other = Device(device.root, facts={**releases.machine(), **change})

    for answer in refusals(other, first):
        assert answer.status == 6
        assert told in answer.said
    assert other.run("install", first, "--force-device").document["outcome"] == "good"


def test_too_little_memory_in_all_is_refused(device: Device, resigned: Callable[..., Path]) -> None:
    plan = example_plan(releases.PROFILE)
    parts = (*plan.memory.parts[:-1], replace(plan.memory.parts[-1], high=Bytes(64 << 30)))
    path = resigned(plan=replace(plan, memory=replace(plan.memory, parts=parts)))

    for answer in refusals(device, path):
        assert answer.status == 6
        assert "bytes of memory and this device has" in answer.said


def test_too_little_free_memory_refuses_the_switch_and_the_server_goes_on(
    tmp_path: Path, signers: str, first: Path, second: Path
) -> None:
    device = Device(tmp_path / "store")
    device.enroll(signers, mode="user")
    device.run("install", first)
    busy = Device(device.root, facts={**releases.machine(), "memory_available": 1 << 20})

    answer = busy.run("install", second)

    assert answer.status == 6
    assert "are free" in answer.said
    assert busy.current() == releases.release_of(first)
    assert busy.ran[-1] == "systemctl --user start edgepack.service"


def test_another_device_is_let_pass_alone_and_too_little_memory_is_not(device: Device, first: Path) -> None:
    other = Device(device.root, facts={**releases.machine(), "arch": "x86_64"})
    small = Device(device.root, facts={**releases.machine(), "memory_total": 64 << 20})

    for answer in refusals(small, first, "--other-device"):
        assert answer.status == 6
        assert "bytes of memory and this device has 67108864 (--force-device)" in answer.said
    assert other.run("install", first, "--other-device").document["outcome"] == "good"


@pytest.mark.parametrize(
    ("fact", "told", "asked"),
    [
        ("memory_total", "this device has 67108864", []),
        ("memory_available", "67108864 are free", ["show", "stop", "reset-failed", "start"]),
    ],
)
def test_a_self_test_with_too_little_memory_is_refused_and_the_server_goes_on(
    tmp_path: Path, signers: str, first: Path, fact: str, told: str, asked: list[str]
) -> None:
    tested: list[argparse.Namespace] = []

    def check(options: argparse.Namespace) -> dict[str, Any]:
        tested.append(options)
        return releases.passing()

    device = enrolled(tmp_path, signers, "user")
    device.run("install", first)
    small = Device(device.root, check=check, facts={**releases.machine(), fact: 64 << 20})

    refused = small.run("self-test")

    assert (refused.status, len(tested)) == (6, 0)
    assert told in refused.said
    assert [words.split()[2] for words in small.ran] == asked
    assert (small.run("self-test", "--force-device").status, len(tested)) == (0, 1)


@pytest.mark.parametrize(
    "plan",
    [
        "[]", "{}", "not json", '{"profile": 1}', '{"profile": {}}', '{"profile": {"arch": "aarch64"}}',
        '{"profile": {"arch": "aarch64", "memory": "much"}}', '{"profile": {"arch": "aarch64", "memory": 1e999}}',
        '{"profile": {"arch": [], "memory": 1, "match": [], "software": []}}', "[" * 40 + "]" * 40,
        '{"profile": {"arch": "aarch64", "memory": 8000000000}, "memory": {"parts": [{"high": "x"}]}}',
        '{"profile": {"arch": "aarch64", "memory": 8000000000}, "memory": {"parts": {}}, "budget": 1}',
    ],
)  # fmt: skip
def test_a_signed_plan_that_is_none_is_refused(
    device: Device, resigned: Callable[..., Path], plan: str
) -> None:
    for answer in refusals(device, resigned(files={"plan.json": plan})):
        assert answer.status == 6
        assert answer.said.startswith("refused: ")


# ── what the self-test begins with ──


def server_json(**changes: Any) -> str:
    return json.dumps({**json.loads(server_document(example_plan(releases.PROFILE))), **changes})


def server_args(flag: str, *values: str) -> str:
    """The plan's flags, one with another value, or without it."""
    args = json.loads(server_json())["args"]
    at = args.index(flag)
    return server_json(args=[*args[:at], *((flag, *values) if values else ()), *args[at + 2 :]])


def selftest_json(**changes: Any) -> str:
    return json.dumps({**releases.SELFTEST, **changes})


def probe(**changes: Any) -> str:
    return selftest_json(probes=[{"prompt": "Once", "top": [[7, -0.5]], **changes}])


NONSENSE = [
    ("server.json", "not json", "server.json is not usable JSON"),
    ("server.json", "[]", "server.json is not a JSON object"),
    ("server.json", "[" * 40 + "]" * 40, "nests 40 levels"),
    ("server.json", '{"args": NaN}', "NaN is not a number"),
    ("server.json", '{"args": 1e999}', "1e999 is larger than a number can be"),
    ("server.json", "{}", "no list args"),
    ("server.json", server_json(schema_version=2), "schema_version 2"),
    ("server.json", server_json(runtime="ollama"), "the runtime 'ollama'"),
    ("server.json", server_json(runtime="vllm"), "plan.json is for 'llama.cpp', server.json for vllm"),
    ("server.json", server_json(args=["--ctx-size", 4096]), "not a short text"),
    ("server.json", server_json(args=["--model", "/etc/passwd"]), "which a bundle may not"),
    ("server.json", server_json(args=["--metrics"] * 300), "more than 256 arguments"),
    ("server.json", server_json(args=["--metrics"]), "does not give --parallel and --ctx-size"),
    ("server.json", server_json(env={"LD_PRELOAD": "x.so"}), "'LD_PRELOAD' in the environment"),
    ("server.json", server_args("--alias", "../../outside"), "gives --alias the value"),
    ("server.json", server_args("--ctx-size", "many"), "gives --ctx-size the value 'many'"),
    ("server.json", server_args("--ctx-size", "9" * 18), "gives --ctx-size the value"),
    ("server.json", server_args("--ctx-size", "-1"), "of -1 tokens, plan.json says"),
    ("server.json", server_args("--ctx-size", "8"), "of 8 tokens, plan.json says"),
    ("server.json", server_args("--ctx-size", "999999999"), "of 999999999 tokens, plan.json says"),
    ("server.json", server_args("--ctx-size", "512", "-c", "8"), "of 8 tokens, plan.json says"),
    ("server.json", server_args("--parallel", "2"), "server.json starts 2 slots"),
    ("server.json", server_args("--parallel"), "does not give --parallel"),
    ("selftest.json", "7", "selftest.json is not a JSON object"),
    ("selftest.json", "{}", "no list of at most"),
    ("selftest.json", selftest_json(schema_version="1"), "selftest.json has the schema_version '1'"),
    ("selftest.json", selftest_json(probes="many"), "no list of at most"),
    ("selftest.json", selftest_json(probes=[[]]), "probe 0 of selftest.json has no prompt or no top"),
    ("selftest.json", probe(prompt=7), "probe 0 of selftest.json has no prompt"),
    ("selftest.json", probe(prompt="x" * 70_000), "probe 0 of selftest.json has no prompt"),
    ("selftest.json", probe(top=[]), "no tokens with their log-probabilities"),
    ("selftest.json", probe(top=[[7, "-0.5"]]), "no tokens with their log-probabilities"),
    ("selftest.json", probe(top=[[7, 1e300]]), "no tokens with their log-probabilities"),
    ("selftest.json", probe(top=[[-1, -0.5]]), "no tokens with their log-probabilities"),
    ("selftest.json", probe(top=[[True, -0.5]]), "no tokens with their log-probabilities"),
    ("selftest.json", probe(top=[[2**40, -0.5]]), "no tokens with their log-probabilities"),
    ("selftest.json", selftest_json(decode=None), "the continuation (decode) of selftest.json has no prompt"),
    ("selftest.json", selftest_json(decode={"prompt": "a", "tokens": []}), "no list of 1 to 4096 tokens"),
    ("selftest.json", selftest_json(decode={"prompt": "a", "tokens": ["a"]}), "no list of 1 to 4096 tokens"),
]


@pytest.mark.parametrize(("name", "text", "told"), NONSENSE, ids=[told for _, _, told in NONSENSE])
def test_documents_that_the_self_test_could_not_begin_with_are_refused_before_the_switch(
    device: Device, first: Path, resigned: Callable[..., Path], name: str, text: str, told: str
) -> None:
    assert device.run("install", first).status == 0
    before = outside_incoming(device.root)
    path = resigned(sequence=2, files={name: text})

    answer = device.run("install", path)

    assert (answer.status, answer.said.count("\n")) == (6, 0)
    assert told in answer.said
    assert outside_incoming(device.root) == before
    *_, last = installer.journal_lines(device.store, 10)
    assert (last["event"], last["release"]) == ("refused", releases.release_of(path))
    assert told in last["reason"]
    assert device.run("install", path, "--no-self-test", "--allow-downgrade", "--force-device").status == 6


def test_a_release_whose_documents_are_nonsense_is_refused_before_its_weights_come(
    device: Device, resigned: Callable[..., Path]
) -> None:
    path = resigned(files={"selftest.json": "{}"})
    weights = agent.read_bundle(str(path))["files"][-1]["digest"]
    offer = device.run("offer", stdin=releases.offer_frames(path))
    frames = [*releases.blob_frames(path, offer.document["missing"])]

    received = device.run("receive", releases.release_of(path), stdin=b"".join(frames))
    again = device.run("offer", stdin=releases.offer_frames(path))
    dry = device.run("offer", "--dry-run", stdin=releases.offer_frames(path))
    resumed = device.run("receive", releases.release_of(path), stdin=frames[-1])

    assert [one.status for one in (offer, received, again, dry, resumed)] == [0, 6, 6, 6, 6]
    assert not Path(device.store.blob(weights)).exists()
    assert not Path(device.store.part(weights)).exists()
    assert device.events().count("refused") == 3  # not of the dry run


def test_a_release_without_the_files_that_its_server_loads_is_refused(
    device: Device, resigned: Callable[..., Path]
) -> None:
    planned = replace(example_plan(releases.PROFILE), runtime="onnx-genai")
    args = ["--ctx-size", str(planned.settings.context), "--parallel", str(planned.settings.slots)]
    files = {"server.json": server_json(runtime="onnx-genai", args=args)}
    model = {"model/genai_config.json": "{}", "model/tokenizer.json": "{}"}
    code = {"edgepack_server/__main__.py": ""}
    elsewhere = {"model/genai_config.json": '{"model": {"decoder": {"filename": "../../outside"}}}'}

    def said(**more: str) -> str:
        answer = device.run("install", resigned(plan=planned, files={**files, **more}))
        return answer.said if answer.status == 6 else str(answer.document["outcome"])

    assert said() == "refused: the bundle has no model/"
    assert said(**model) == "refused: the bundle has no edgepack_server/, which the onnx-genai server is"
    assert "names the path '../../outside'" in said(**{**model, **elsewhere, **code})
    assert said(**model, **code) == "good"


@pytest.mark.parametrize(
    "change",
    [
        {"profile": {"accelerator": 7}}, {"budget": {"device": "much"}}, {"budget": {"device": None}},
        {"settings": {"context": 8, "slots": 1}}, {"settings": {"context": 4096, "slots": 4096}},
        {"memory": {"parts": [{"place": "device", "high": 1}]}},
    ],
)  # fmt: skip
def test_a_plan_that_no_test_can_be_held_against_is_refused_before_the_switch(
    device: Device, resigned: Callable[..., Path], change: dict[str, dict[str, object]]
) -> None:
    plan = json.loads(serde.to_json(example_plan(releases.PROFILE)))
    ((place, fields),) = change.items()
    plan[place].update(fields)

    for answer in refusals(device, resigned(files={"plan.json": json.dumps(plan)})):
        assert answer.status == 6
        assert answer.said.startswith("refused: plan.json ")


# ── the disk ──


def test_too_little_disk_refuses_before_anything_is_written(
    device: Device, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer.Store, "free", lambda self: installer.MARGIN)

    answers = refusals(device, first)
    dry = device.run("offer", "--dry-run", stdin=releases.offer_frames(first))

    assert [answer.status for answer in (*answers, dry)] == [10, 10, 10]
    assert dry.said == answers[0].said
    assert list((device.root / "incoming").iterdir()) == []


def test_a_dry_offer_counts_on_what_a_real_one_would_remove(
    device: Device, resigned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two releases with a file of their own are surplus, and one file is both theirs; a third shares another."""
    for number in (1, 2, 3, 4):
        theirs = {"both.txt": "b" * 300 if number < 3 else "", "kept.txt": "k" * 500 if number > 1 else ""}
        device.run(
            "install",
            resigned(sequence=number, files={**theirs, "n.txt": str(number) * 100}),
            "--no-self-test",
        )
        assert device.enroll("", "--keep", "9").status == 0
    assert device.enroll("", "--keep", "2").status == 0
    coming = resigned(sequence=5, weights=b"GGUF" + b"5" * 3000)
    abandoned = device.root / "blobs/sha256/.new-x"
    installer.hard_link(str(device.root / "previous/n.txt"), str(abandoned))

    expected = installer.surplus(device.store, 2).bytes
    short = 0
    monkeypatch.setattr(installer.Store, "free", lambda self: installer.MARGIN + 3004 - expected + short)
    enough = device.run("offer", "--dry-run", stdin=releases.offer_frames(coming))
    short = -1
    lacking = device.run("offer", "--dry-run", stdin=releases.offer_frames(coming))

    assert expected == 300 + 2 * 100
    assert (enough.status, lacking.status) == (0, 10)
    assert len(device.store.releases()) == 4
    assert device.run("gc").document["freed"] == expected
    assert installer.surplus(device.store, 2) == ([], [], [], 0)


def test_no_other_installer_sweeps_while_a_signature_is_verified(
    device: Device, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = agent._ssh_keygen
    others: list[int] = []

    def verified(argv: list[str], text: str | None) -> str | None:
        others.append(device.run("gc").status)
        return real(argv, text)

    monkeypatch.setattr(agent, "_ssh_keygen", verified)

    dry = device.run("offer", "--dry-run", stdin=releases.offer_frames(first))
    offered = device.run("offer", stdin=releases.offer_frames(first))

    assert (dry.status, offered.status) == (0, 0)
    assert set(others) == {11}


def test_what_nothing_needs_makes_room(
    device: Device, first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.run("install", first)
    garbage = device.root / "incoming" / ("a" * 64 + ".part")
    garbage.write_bytes(bytes(1000))
    abandoned = device.root / "blobs/sha256" / ("b" * 64)
    abandoned.write_bytes(bytes(1000))
    monkeypatch.setattr(
        installer.Store, "free", lambda self: 0 if garbage.exists() or abandoned.exists() else 1 << 30
    )

    assert device.run("install", second).document["outcome"] == "good"


def disk_of(device: Device, room: int) -> Callable[[installer.Store], int]:
    """Free bytes of a disk on which, beside the margin, so many bytes of weights have room."""

    def free(_: installer.Store) -> int:
        held = [
            *(device.root / "blobs/sha256").iterdir(),
            *(device.root / "incoming").glob("*.part"),
            *(device.root / "quarantine").iterdir(),
        ]
        sizes = (path.stat().st_size for path in held)
        return installer.MARGIN + room - sum(size for size in sizes if size >= 100_000)

    return free


def test_an_offer_makes_room_down_to_the_releases_that_it_says_stay(
    device: Device, resigned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three good releases the oldest is neither current nor previous."""
    device.enroll("", "--keep", "3")
    for number in (1, 2, 3):
        weights = b"GGUF" + bytes([number]) * 100_000
        device.run("install", resigned(sequence=number, weights=weights))
    coming = releases.offer_frames(resigned(sequence=4, weights=b"GGUF" + b"4" * 100_000))
    monkeypatch.setattr(installer.Store, "free", disk_of(device, 350_000))

    kept = device.run("offer", stdin=coming)
    dry = device.run("offer", "--keep", "1", "--dry-run", stdin=coming)
    untouched = len(device.store.releases())
    taken = device.run("offer", "--keep", "1", stdin=coming)

    assert (kept.status, dry.status, untouched, taken.status) == (10, 0, 3, 0)
    assert len(device.store.releases()) == 2


def test_a_bundle_that_comes_as_a_file_needs_its_whole_size_though_the_store_has_its_weights(
    device: Device, first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.run("install", first)
    size = second.stat().st_size
    lacking = len("another context")
    spare = 0
    monkeypatch.setattr(installer.Store, "free", lambda self: installer.MARGIN + size + lacking + spare)
    words = ("offer", "--room", str(size))

    enough = [device.run(*words, *dry, stdin=releases.offer_frames(second)) for dry in ((), ("--dry-run",))]
    spare = -1
    short = [device.run(*words, *dry, stdin=releases.offer_frames(second)) for dry in ((), ("--dry-run",))]

    assert [answer.status for answer in (*enough, *short)] == [0, 0, 10, 10]
    assert enough[0].document["disk"]["needed"] == size + lacking


def test_of_a_bundle_that_is_consumed_no_more_than_a_window_is_there_twice(
    device: Device, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "FLUSH", 1000)
    size = first.stat().st_size

    answer = device.run("offer", "--room", str(size), stdin=releases.offer_frames(first))

    assert answer.document["disk"]["needed"] == size + 2000


@pytest.mark.parametrize("by", ["offer", "repair"])
def test_what_fsck_set_aside_gives_its_place_to_the_same_file(
    device: Device, resigned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    path = resigned(weights=b"GGUF" + bytes(100_000))
    device.run("install", path)
    (device.root / "quarantine" / ("e" * 64)).write_bytes(b"of another release")
    flip(device.root / "current/model.gguf")
    monkeypatch.setattr(installer.Store, "free", disk_of(device, 150_000))
    device.run("fsck")

    if by == "repair":
        answer = device.run("fsck", "--repair-from", path)
    else:
        dry = device.run("offer", "--dry-run", stdin=releases.offer_frames(path))
        held = len(list((device.root / "quarantine").iterdir()))
        assert (dry.status, held) == (0, 2)
        offered = device.run("offer", stdin=releases.offer_frames(path)).document
        sent = b"".join(releases.blob_frames(path, offered["missing"]))
        answer = device.run("receive", offered["release"], stdin=sent)

    assert answer.status == 0
    assert agent.read_bundle(str(device.root / "current"))["name"] == "tiny"
    assert [path.name for path in (device.root / "quarantine").iterdir()] == ["e" * 64]


def test_a_repair_from_a_bundle_that_has_no_room_writes_nothing(
    device: Device, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.run("install", first)
    flip(device.root / "current/model.gguf")
    monkeypatch.setattr(installer.Store, "free", lambda self: installer.MARGIN)

    answer = device.run("fsck", "--repair-from", first)

    assert answer.status == 10
    assert list((device.root / "incoming").iterdir()) == []


def test_another_configuration_writes_none_of_the_weights_again(
    device: Device, resigned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = b"GGUF" + bytes(300_000)
    device.run("install", resigned(weights=weights))
    other = resigned(weights=weights, sequence=2, files={"notes.txt": "another context"})
    written = 0
    write = os.write

    def counted(handle: int, content: bytes) -> int:
        nonlocal written
        written += len(content)
        return write(handle, content)

    monkeypatch.setattr(os, "write", counted)
    assert device.run("install", other).document["outcome"] == "good"

    assert 0 < written < 10_000


# ── frames ──


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


@pytest.mark.parametrize(
    "stream",
    [
        b"\n", b"{}\n", b"[]\n", b"null\n", b"x" * 600, b"\xff\xfe\n", b'{"name": "index"}\n',
        line(name="index", offset=0, bytes=-1), line(name="index", offset=-1, bytes=0),
        line(name="index", offset=0, bytes=1 << 60), line(name="index", offset=0, bytes=1.0),
        line(name="index", offset=0, bytes=True), line(name=1, offset=0, bytes=0),
        line(name="index", offset=0, bytes=0, more=1), line(name="index", offset=1, bytes=0),
        line(name="index", offset=0, bytes=1 << 17), line(name="../index", offset=0, bytes=0),
        line(name="index", offset=0, bytes=4) + b"{}", line(name="sha256:" + "0" * 64, offset=0, bytes=0),
        line(name="index", offset=0, bytes=2) + b"{}" + line(name="index", offset=0, bytes=2) + b"{}",
        line(name="index", offset=0, bytes=2) + b"{}" + line(name="manifest", offset=0, bytes=2) + b"{}",
        b'{"name": "index", "name": "index", "offset": 0, "bytes": 0}\n', b"",
    ],
)  # fmt: skip
def test_other_shapes_than_an_offer_are_refused(device: Device, stream: bytes) -> None:
    before = outside_incoming(device.root)

    answer = device.run("offer", stdin=stream)

    assert answer.status == 6
    assert outside_incoming(device.root) == before


def test_an_offer_without_a_part_or_with_another_is_refused(
    device: Device, first: Path, second: Path
) -> None:
    parts = split_frames(releases.offer_frames(first))
    others = split_frames(releases.offer_frames(second))

    for at in range(len(parts)):
        without = parts[:at] + parts[at + 1 :]
        twice = [*parts, parts[at]]
        swapped = [*parts[:at], others[at], *parts[at + 1 :]]
        for frames in (without, twice, swapped) if parts[at] != others[at] else (without, twice):
            assert device.run("offer", stdin=b"".join(frames)).status == 6


def split_frames(stream: bytes) -> list[bytes]:
    found = []
    while stream:
        head, _, rest = stream.partition(b"\n")
        size = json.loads(head)["bytes"]
        found.append(head + b"\n" + rest[:size])
        stream = rest[size:]
    return found


def test_a_dry_offer_writes_nothing(device: Device, first: Path) -> None:
    before = sorted(device.root.rglob("*"))

    answer = device.run("offer", "--dry-run", stdin=releases.offer_frames(first))

    assert answer.document["state"] == "new"
    assert sorted(device.root.rglob("*")) == before


def test_a_transfer_goes_on_where_it_was_cut(device: Device, first: Path) -> None:
    document = device.run("offer", stdin=releases.offer_frames(first)).document
    cuts = random.Random(0)
    sent = 0

    for _ in range(100):
        if not document["missing"]:
            break
        stream = b"".join(releases.blob_frames(first, document["missing"]))
        cut = stream[: cuts.randrange(1, 900)]
        sent += len(cut)
        document = device.run("receive", document["release"], stdin=cut).document

    assert document["state"] == "received"
    assert sent < 12000
    assert device.run("install", document["release"]).document["outcome"] == "good"


def test_a_remembered_offer_that_the_disk_damaged_is_written_again(device: Device, first: Path) -> None:
    release = device.run("offer", stdin=releases.offer_frames(first)).document["release"]
    described = device.root / "incoming" / f"{release}.offer/.release"
    flip(described / "manifest.json")
    assert device.run("receive", release).status == 6
    (described / "config.json").unlink()

    again = device.run("offer", stdin=releases.offer_frames(first)).document

    sent = b"".join(releases.blob_frames(first, again["missing"]))
    assert device.run("receive", release, stdin=sent).document["state"] == "received"


def test_wrong_bytes_are_refused_and_come_again(device: Device, first: Path) -> None:
    offered = device.run("offer", stdin=releases.offer_frames(first)).document
    weights = [entry for entry in offered["missing"] if entry["bytes"] > 5000]
    wrong = releases.frame(weights[0]["digest"], bytes(weights[0]["bytes"]))

    answer = device.run("receive", offered["release"], stdin=wrong)

    assert answer.status == 6
    assert "another sha256" in answer.said
    again = device.run("offer", stdin=releases.offer_frames(first)).document
    assert again["missing"] == offered["missing"]


def test_frames_that_do_not_go_on_where_the_part_ends_are_refused(device: Device, first: Path) -> None:
    offered = device.run("offer", stdin=releases.offer_frames(first)).document
    weights = next(entry for entry in offered["missing"] if entry["bytes"] > 5000)
    digest, size = weights["digest"], weights["bytes"]
    frames = [
        releases.frame(digest, b"x", 1),
        releases.frame(digest, bytes(size + 1)),
        releases.frame("sha256:" + "0" * 64, b"x"),
        releases.frame("index", b"x"),
        releases.frame("../../etc/passwd", b"x"),
    ]

    for stream in frames:
        assert device.run("receive", offered["release"], stdin=stream).status == 6
    assert device.run("receive", offered["release"]).document["missing"] == offered["missing"]
    assert device.run("receive", "0" * 64).status == 2
    assert device.run("receive", "../..").status == 2


def test_a_part_that_is_longer_than_its_blob_begins_anew(device: Device, first: Path) -> None:
    offered = device.run("offer", stdin=releases.offer_frames(first)).document
    weights = next(entry for entry in offered["missing"] if entry["bytes"] > 5000)
    device.store.part(weights["digest"])
    Path(device.store.part(weights["digest"])).write_bytes(bytes(9000))

    sent = b"".join(releases.blob_frames(first, offered["missing"]))

    assert device.run("receive", offered["release"], stdin=sent).document["state"] == "received"


def test_a_silent_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.write(write, b"abc")
    monkeypatch.setattr(installer, "IDLE", 0.01)

    content = io.BufferedReader(installer.Patient(read)).read()

    assert content == b"abc"
    os.close(write)
    os.close(read)


# ── hostile manifests: the same checks for tars and for frames ──


def hostile(key: Path, change: Callable[[dict[str, Any]], None], path: Path) -> bytes:
    """The frames of an offer whose manifest was changed and signed again."""
    head, found = agent.read_head(str(path))
    plan = agent.read_file(found, "plan.json")
    manifest = json.loads(head.manifest)
    change(manifest)
    content = oci.canonical(manifest)
    digest = hashlib.sha256(content).hexdigest()
    index = json.loads(head.index_json)
    index["manifests"][0].update(digest=f"sha256:{digest}", size=len(content))
    parts = [
        releases.frame("index", oci.canonical(index)),
        releases.frame("signature", sign.sign(key, digest)),
        releases.frame("manifest", content),
        *(releases.frame(f"sha256:{hashlib.sha256(blob).hexdigest()}", blob) for blob in (head.config, plan)),
    ]
    return b"".join(parts)


def rename_layer(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["layers"][1]["annotations"].update({agent.FILEPATH: name})


@pytest.mark.parametrize(
    "change",
    [
        *map(rename_layer, (
            "../x", "/etc/passwd", "a/../b", "a//b", ".release", ".release/index.json", ".new-x", "a\nb", "",
            "plan.json", "plan.json/x", "a/b/c/d", "x" * 101, "C:\\x", "model.gguf", "-rf", "a/.x",
        )),
        lambda manifest: manifest["layers"][1].update(size=-1),
        lambda manifest: manifest["layers"][1].update(size=1 << 60),
        lambda manifest: manifest["layers"][1].update(size=1.5),
        lambda manifest: manifest["layers"][1].update(digest="sha256:../../x"),
        lambda manifest: manifest["layers"][1].update(digest=manifest["layers"][-1]["digest"]),
        lambda manifest: manifest["layers"][1].update(urls=["http://example.com"]),
        lambda manifest: manifest["layers"].extend([]) or manifest.update(layers=manifest["layers"] * 99),
        lambda manifest: manifest.update(layers=[]),
        lambda manifest: manifest["layers"].append(
            {**manifest["layers"][1], "size": 7, "annotations": {agent.FILEPATH: "twice"}}),
        lambda manifest: manifest["config"].update(size=1),
        lambda manifest: manifest["annotations"].pop("org.edgepack.release-sequence"),
        lambda manifest: manifest["annotations"].update({"org.edgepack.release-sequence": 3}),
    ],
)  # fmt: skip
def test_a_signed_manifest_with_hostile_content_is_refused_before_anything_is_written(
    device: Device, key: Path, first: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    before = sorted(device.root.rglob("*"))

    answer = device.run("offer", stdin=hostile(key, change, first))

    assert answer.status == 6
    assert answer.said.startswith("refused: ")
    assert sorted(device.root.rglob("*")) == before


def test_a_signed_release_that_is_too_large_for_any_disk_is_refused(
    device: Device, key: Path, first: Path
) -> None:
    def grown(manifest: dict[str, Any]) -> None:
        manifest["layers"][-1].update(digest="sha256:" + "1" * 64, size=(1 << 50) - 1)

    assert device.run("offer", stdin=hostile(key, grown, first)).status == 10


# ── two at once ──


def test_a_second_installer_is_told_who_is_at_work(device: Device, first: Path) -> None:
    with installer.locked(str(device.root), "install"):
        answers = [device.run("install", first), device.run("gc"), device.run("rollback")]
        booted = device.run("boot")
        told = device.run("status")

    for answer in answers:
        assert answer.status == 11
        assert f"process {os.getpid()}, install" in answer.said
    assert booted.document["outcome"] == "busy"
    assert told.status == 0
    assert device.run("install", first).status == 0


# ── the bundle that is consumed ──

BIG = b"GGUF" + random.Random(1).randbytes(3 << 20)


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_consumed_bundle_gives_its_disk_back_and_is_gone(
    device: Device, resigned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resigned(weights=BIG)
    monkeypatch.setattr(installer, "FLUSH", 1 << 19)
    peak = 0
    punch = installer.Puncher.punch

    def measured(self: installer.Puncher, begin: int, end: int) -> None:
        nonlocal peak
        peak = max(peak, blocks(path) + sum(map(blocks, (device.root / "incoming").glob("*.part"))))
        punch(self, begin, end)

    monkeypatch.setattr(installer.Puncher, "punch", measured)
    before = blocks(path)

    answer = device.run("install", path, "--consume")

    assert answer.document["outcome"] == "good"
    assert not path.exists()
    assert (device.root / "current/model.gguf").read_bytes() == BIG
    assert before <= peak <= before + 2 * agent.PIECE


def test_a_consumed_bundle_gives_up_no_byte_that_the_disk_has_not_given_back(
    device: Device, resigned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those that a killed install wrote: the part has them, and perhaps no disk."""
    path = resigned(weights=BIG)
    monkeypatch.setattr(installer, "FLUSH", 1 << 19)
    begin = next(
        file["offset"] for file in agent.read_bundle(str(path))["files"] if file["path"] == agent.WEIGHTS
    )
    part = device.root / "incoming" / (hashlib.sha256(BIG).hexdigest() + ".part")
    blob = device.root / "blobs" / "sha256" / hashlib.sha256(BIG).hexdigest()
    punch, fsync, fsync_folder, read_back = (
        installer.Puncher.punch, installer.fsync, installer.fsync_folder, installer.read_back,
    )  # fmt: skip
    written, named, read = [0], [False], [0]
    pieces: list[int] = []

    def flushed(handle: int) -> None:
        fsync(handle)
        if Path(f"/proc/self/fd/{handle}").readlink() == part:
            written.append(os.fstat(handle).st_size)

    def folder_flushed(folder: str) -> None:
        fsync_folder(folder)
        named.append(
            named[-1] or any(folder == str(place.parent) and place.exists() for place in (part, blob))
        )

    def read_again(place: str, digest: Any, first: int, end: int) -> None:
        read_back(place, digest, first, end)
        if place == str(part):
            read.append(end)

    def punched(self: installer.Puncher, first: int, end: int) -> None:
        if begin <= first < min(end, begin + len(BIG)):
            assert named[-1]
            assert end - begin <= min(max(written), max(read))
            pieces.append(end)
        punch(self, first, end)

    def interrupted(self: installer.Puncher, first: int, end: int) -> None:
        punched(self, first, end)
        if pieces:
            raise KeyboardInterrupt

    monkeypatch.setattr(installer, "fsync", flushed)
    monkeypatch.setattr(installer, "fsync_folder", folder_flushed)
    monkeypatch.setattr(installer, "read_back", read_again)
    monkeypatch.setattr(installer.Puncher, "punch", interrupted)
    assert device.run("install", path, "--consume").status == 130
    assert part.exists()
    written[:], named[:], read[:] = [0], [False], [0]
    monkeypatch.setattr(installer.Puncher, "punch", punched)

    assert device.run("install", path, "--consume").document["outcome"] == "good"
    assert len(pieces) > 1


def test_a_consumed_bundle_goes_on_after_a_kill(
    device: Device, resigned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resigned(weights=BIG)
    monkeypatch.setattr(installer, "FLUSH", 1 << 19)
    punch = installer.Puncher.punch
    punched: list[int] = []

    def killed(self: installer.Puncher, begin: int, end: int) -> None:
        punch(self, begin, end)
        punched.append(end)
        if len(punched) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(installer.Puncher, "punch", killed)
    assert device.run("install", path, "--consume").status == 130
    whole = path.stat().st_size
    assert blocks(path) < whole - (1 << 19)

    answer = device.run("install", path, "--consume")

    assert answer.document["outcome"] == "good"
    assert (device.root / "current/model.gguf").read_bytes() == BIG
    assert not path.exists()


def test_a_consumed_bundle_cut_off_at_the_end_is_gone_or_goes_on(
    device: Device, resigned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resigned(weights=BIG)
    discard = installer.discard

    def killed(place: str) -> None:
        discard(place)
        if place.endswith(".offer") and device.current() is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(installer, "discard", killed)
        assert device.run("install", path, "--consume").status == 130

    assert not path.exists() or device.run("install", path, "--consume").status == 0
    assert (device.root / "current/model.gguf").read_bytes() == BIG


def test_a_bundle_that_is_not_whole_is_not_consumed(device: Device, resigned: Callable[..., Path]) -> None:
    path = resigned(weights=BIG)
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)

    answer = device.run("install", path, "--consume")

    assert answer.status == 6
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", ["more", "less", "other"])
def test_a_bundle_with_another_end_keeps_every_byte(
    device: Device, resigned: Callable[..., Path], change: str
) -> None:
    path = resigned(weights=BIG)
    content = path.read_bytes()
    content = {"more": content + b"x" * 4096, "less": content[:-512], "other": content[:-9] + b"123456789"}[
        change
    ]
    path.write_bytes(content)

    assert device.run("install", path, "--consume").status == 6
    assert path.read_bytes() == content


def test_half_a_consumed_bundle_is_not_collected_by_another_install(
    device: Device, resigned: Callable[..., Path], first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resigned(weights=BIG, sequence=3)
    monkeypatch.setattr(installer, "FLUSH", 1 << 19)
    commit = installer.Incoming.commit

    def killed(self: installer.Incoming) -> None:
        if self.size > 1 << 20:
            raise KeyboardInterrupt
        commit(self)

    with monkeypatch.context() as patched:
        patched.setattr(installer.Incoming, "commit", killed)
        assert device.run("install", path, "--consume").status == 130
    device.run("install", first)

    assert device.run("install", path, "--consume").document["outcome"] == "good"


def test_a_consumed_bundle_that_is_gone_holds_no_disk(
    tmp_path: Path, signers: str, resigned: Callable[..., Path], first: Path, second: Path
) -> None:
    failed = {**releases.passing(), "failure": {"kind": "crashed", "stage": "run", "message": "it ended"}}
    facts = iter([releases.passing(), failed, releases.passing()])
    device = Device(tmp_path / "store", check=lambda _: next(facts))
    device.enroll(signers)
    device.run("install", first)
    path = resigned(weights=BIG, sequence=2)
    assert device.run("install", path, "--consume").document["outcome"] == "rolled-back"
    path.unlink(missing_ok=True)  # as SWUpdate does with what it had streamed

    device.run("install", second)

    sizes = [blob.stat().st_size for blob in (device.root / "blobs/sha256").iterdir()]
    assert max(sizes) < len(BIG)


def test_without_holes_nothing_is_consumed(
    device: Device, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    before = first.read_bytes()

    for answer in (device.run("install", first, "--consume"), device.run("install", "0" * 64, "--consume")):
        assert answer.status == 2
    assert first.read_bytes() == before


# ── fsck ──


def flip(path: Path) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    path.chmod(0o444)


def test_a_flipped_byte_is_found_set_aside_and_only_its_blob_comes_again(
    device: Device, first: Path, second: Path
) -> None:
    device.run("install", first)
    device.run("install", second)
    weights = device.root / "current/model.gguf"
    good = weights.read_bytes()
    flip(weights)

    found = device.run("fsck").document

    digest = f"sha256:{hashlib.sha256(good).hexdigest()}"
    assert [(entry["digest"], entry["path"]) for entry in found["bad"]] == [
        (digest, f"blobs/sha256/{digest[7:]}")
    ]
    assert found["quarantined"] == 1
    assert sorted(entry["release"] for entry in found["missing"]) == device.store.releases()
    assert {entry["digest"] for entry in found["missing"]} == {digest}
    assert not weights.exists()
    assert (device.root / "quarantine" / digest[7:]).stat().st_nlink == 1
    offered = device.run("offer", stdin=releases.offer_frames(second)).document
    assert [entry["digest"] for entry in offered["missing"]] == [digest]
    sent = b"".join(releases.blob_frames(second, offered["missing"]))
    assert device.run("receive", offered["release"], stdin=sent).document["state"] == "current"
    assert weights.read_bytes() == good
    mended = device.run("fsck").document
    assert (mended["bad"], mended["missing"]) == ([], [])
    assert (device.root / "previous/model.gguf").read_bytes() == good


@pytest.mark.parametrize(("mode", "shared"), [("user", False), ("user", True), ("none", False)])
def test_damage_to_what_runs_leaves_it_running_and_says_what_its_next_start_comes_to(
    tmp_path: Path,
    signers: str,
    first: Path,
    second: Path,
    resigned: Callable[..., Path],
    mode: str,
    shared: bool,
) -> None:
    """Where the weights are another release's too, neither starts; else the device goes back by itself."""
    device = enrolled(tmp_path, signers, mode)
    newer = second if shared else resigned(sequence=2, weights=b"GGUF" + b"2" * 6000)
    for path in (first, newer):
        device.run("install", path)
    before, now = releases.release_of(first), releases.release_of(newer)
    well = device.run("fsck").document
    flip(device.root / "current/model.gguf")
    device.ran.clear()

    answer = device.run("fsck")

    found = answer.document
    back = before if mode == "user" and not shared else None
    assert (well["current"], well["restarts"], well["back"]) == (now, True, None)
    assert (found["current"], found["restarts"], found["back"]) == (now, False, back)
    assert (device.ran, device.current()) == ([], now)
    assert f"release {now[:12]} lacks files" in answer.said
    assert device.run("boot").document["outcome"] == ("broken" if shared else "went-back")


def test_a_bundle_repairs_what_fsck_found(device: Device, first: Path, second: Path) -> None:
    device.run("install", first)
    flip(device.root / "current/model.gguf")

    refused = device.run("fsck", "--repair-from", second)
    repaired = device.run("fsck", "--repair-from", first).document

    assert refused.status == 6
    assert repaired["missing"] == []
    assert agent.read_bundle(str(device.root / "current"))["name"] == "tiny"


def test_a_file_of_a_release_that_is_not_its_blob_is_put_right(device: Device, first: Path) -> None:
    device.run("install", first)
    start = device.root / "current/start.sh"
    start.unlink()
    start.write_text("#!/bin/sh\nevil\n")
    notes = device.root / "current/edgepack.service"
    copied = notes.read_bytes()
    notes.unlink()
    notes.write_bytes(copied)

    found = device.run("fsck").document

    assert [entry["path"].rpartition("/")[2] for entry in found["bad"]] == ["start.sh"]
    assert found["missing"] == []
    assert start.read_text() == "#!/bin/sh\n"
    assert notes.stat().st_nlink > 1


def test_a_damaged_description_of_a_release_is_mended_by_an_offer(device: Device, first: Path) -> None:
    device.run("install", first)
    described = device.root / "current/.release/manifest.json"
    before = described.read_bytes()
    flip(described)

    found = device.run("fsck").document
    offered = device.run("offer", stdin=releases.offer_frames(first)).document
    device.run("receive", offered["release"])

    assert [entry["path"] for entry in found["missing"]] == [".release"]
    assert described.read_bytes() == before
    assert device.run("fsck").document["missing"] == []


def test_a_blob_that_cannot_be_read_is_bad(
    device: Device, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.run("install", first)
    weights = os.path.realpath(device.root / "blobs")
    broken = hashlib.sha256(b"GGUF" + bytes(5000)).hexdigest()
    real = installer.hash_on_disk

    def read(path: str) -> str:
        if path == f"{weights}/sha256/{broken}":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(installer, "hash_on_disk", read)

    assert [entry["digest"] for entry in device.run("fsck").document["bad"]] == [f"sha256:{broken}"]


def test_what_is_installed_may_be_mended_though_a_newer_one_runs(
    device: Device, first: Path, resigned: Callable[..., Path]
) -> None:
    device.run("install", first)
    device.run("install", resigned(sequence=2, weights=b"GGUF" + b"2" * 6000))
    flip(device.root / "previous/model.gguf")
    device.run("fsck")

    offered = device.run("offer", stdin=releases.offer_frames(first)).document
    sent = b"".join(releases.blob_frames(first, offered["missing"]))
    device.run("receive", offered["release"], stdin=sent)

    assert agent.read_bundle(str(device.root / "previous"))["name"] == "tiny"
    assert device.run("install", first).status == 6


def test_what_a_rollback_made_current_is_mended_and_flashed_again_and_a_downgrade_stays_one(
    device: Device, first: Path, second: Path, resigned: Callable[..., Path]
) -> None:
    device.run("install", first)
    device.run("install", resigned(sequence=3, weights=b"GGUF" + b"3" * 6000))
    device.run("rollback")
    flip(device.root / "current/model.gguf")
    device.run("fsck")

    offered = device.run("offer", stdin=releases.offer_frames(first)).document
    sent = b"".join(releases.blob_frames(first, offered["missing"]))
    device.run("receive", offered["release"], stdin=sent)
    installed = [device.run("install", words).document["outcome"] for words in (offered["release"], first)]

    assert installed == ["current", "current"]
    assert device.store.sequence()[0] == 3
    assert device.run("install", second).status == 6


# ── an installed release is a bundle, too ──


def test_a_release_is_read_where_it_lies_and_gives_links_instead_of_copies(
    device: Device, first: Path, tmp_path: Path
) -> None:
    device.run("install", first)
    folder = device.root / "current"

    found = agent.read_bundle(str(folder))
    linked = Path(agent.extract(found, agent.SERVER, str(tmp_path / "work")))

    assert found["manifest_digest"] == agent.read_bundle(str(first))["manifest_digest"]
    assert agent.read_document(found, "plan.json")["schema_version"] == 1
    assert linked.stat().st_ino == (folder / agent.SERVER).stat().st_ino
    assert linked.stat().st_mode & 0o777 == 0o555
    assert (
        agent.preflight(found, {**json.loads((folder / "plan.json").read_text())}, ".", None)["disk_needed"]
        == 0
    )


@pytest.mark.parametrize(
    "name", ["start.sh", ".release/config.json", ".release/manifest.json", ".release/index.json"]
)
def test_a_release_that_lost_or_changed_a_file_is_refused(device: Device, first: Path, name: str) -> None:
    device.run("install", first)
    path = device.root / "current" / name
    content = path.read_bytes()
    path.unlink()

    with pytest.raises(agent.Refused):
        agent.read_bundle(str(device.root / "current"))
    path.write_bytes(content[:-1] + b" ")
    with pytest.raises(agent.Refused):
        agent.read_bundle(str(device.root / "current"))
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises((agent.Refused, OSError)):
        agent.read_bundle(str(device.root / "current"))


# ── back again: rollback, boot ──


def test_a_rollback_never_returns_to_what_was_rolled_back_from(
    device: Device, first: Path, second: Path, resigned: Callable[..., Path]
) -> None:
    third = resigned(sequence=3, files={"notes.txt": "a third"})
    assert device.enroll("", "--keep", "3").status == 0
    device.run("install", first)
    assert device.run("rollback").status == 6
    device.run("install", second)
    device.run("install", third)
    names = [releases.release_of(path) for path in (first, second, third)]

    assert device.run("rollback").status == 0
    assert (device.current(), device.previous()) == (names[1], names[0])
    assert device.run("rollback").status == 0
    assert (device.current(), device.previous()) == (names[0], None)
    refused = device.run("rollback")

    assert (refused.status, device.current()) == (6, names[0])
    assert "no other good release" in refused.said
    again = device.run("install", third).document
    assert (again["outcome"], again["previous"]) == ("good", names[0])


@pytest.mark.parametrize("cut", ["good", "current"])
def test_a_rollback_that_was_cut_off_goes_on(device: Device, first: Path, second: Path, cut: str) -> None:
    """After the mark of the release is gone, or after the link too."""
    device.run("install", first)
    device.run("install", second)
    names = [releases.release_of(path) for path in (first, second)]
    installer.remove(device.store.release(names[1]) + ".good")
    if cut == "current":
        installer.point(str(device.root / "current"), "releases/" + names[0])

    assert device.run("rollback").status == 0
    assert (device.current(), device.previous()) == (names[0], None)
    assert device.run("rollback").status == 6


def interrupted(device: Device, path: Path) -> None:
    """A device whose power was cut in the middle of the self-test."""

    def cut(_: argparse.Namespace) -> dict[str, Any]:
        raise PowerCut

    with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCut):
        patched.setattr(installer, "go_back", lambda *_: [])
        Device(device.root, check=cut).run("install", path)


class PowerCut(BaseException):
    pass


def test_a_release_that_never_passed_its_test_starts_three_times(
    device: Device, first: Path, second: Path
) -> None:
    device.run("install", first)
    interrupted(device, second)
    assert device.current() == releases.release_of(second)

    outcomes = [device.run("boot").document["outcome"] for _ in range(5)]

    assert outcomes == ["trying", "trying", "trying", "went-back", "good"]
    assert device.current() == releases.release_of(first)
    assert device.previous() is None


def test_an_install_that_was_cut_off_is_tested_when_it_runs_again(
    device: Device, first: Path, second: Path
) -> None:
    device.run("install", first)
    interrupted(device, second)
    device.run("boot")

    again = device.run("install", second).document

    assert (again["outcome"], again["previous"]) == ("good", releases.release_of(first))
    assert device.run("boot").document["outcome"] == "good"


def test_a_release_that_lost_a_file_is_left_at_once(device: Device, first: Path, second: Path) -> None:
    device.run("install", first)
    device.run("install", second)
    (device.root / "current/start.sh").unlink()

    assert device.run("boot").document["outcome"] == "went-back"
    assert device.current() == releases.release_of(first)


def test_the_only_release_is_never_left(device: Device, first: Path) -> None:
    interrupted(device, first)

    assert [device.run("boot").document["outcome"] for _ in range(5)] == ["trying"] * 5
    assert device.current() == releases.release_of(first)


def test_a_first_release_that_fails_its_test_is_not_current(device: Device, first: Path) -> None:
    answer = Device(device.root, check=fails).run("install", first)

    assert (answer.status, answer.document["outcome"]) == (5, "rolled-back")
    assert device.current() is None
    assert device.run("boot").document["outcome"] == "none"
    assert device.run("install", first).document["outcome"] == "good"


@pytest.mark.parametrize(
    "error", [agent.MissingProgram("no server"), agent.Refused("odd"), KeyError("x"), OSError(5, "EIO")]
)
def test_whatever_ends_the_test_sends_the_device_back(
    device: Device, first: Path, second: Path, error: Exception
) -> None:
    device.run("install", first)

    def raises(_: argparse.Namespace) -> dict[str, Any]:
        raise error

    answer = Device(device.root, check=raises).run("install", second)

    assert answer.status == 5
    assert type(error).__name__ in answer.document["reasons"][0]
    assert device.current() == releases.release_of(first)


def test_an_interrupted_test_goes_back_and_says_so(device: Device, first: Path, second: Path) -> None:
    device.run("install", first)

    def stopped(_: argparse.Namespace) -> dict[str, Any]:
        raise KeyboardInterrupt

    assert Device(device.root, check=stopped).run("install", second).status == 130
    assert device.current() == releases.release_of(first)
    assert "went-back" in device.events()


def test_a_good_release_whose_second_test_is_stopped_is_still_good(
    device: Device, first: Path, second: Path
) -> None:
    device.run("install", first)
    device.run("install", second)

    def stopped(_: argparse.Namespace) -> dict[str, Any]:
        raise KeyboardInterrupt

    assert Device(device.root, check=stopped).run("install", first, "--allow-downgrade").status == 130
    assert (device.current(), device.previous()) == (releases.release_of(second), releases.release_of(first))


# ── the journal ──


def test_half_a_line_is_ignored_and_cut(device: Device, first: Path) -> None:
    journal = device.root / "journal.jsonl"
    with journal.open("ab") as stream:
        stream.write(b'{"event": "go')

    assert device.events() == ["enrolled"]
    device.run("install", first)

    assert all(json.loads(text) for text in journal.read_text().splitlines())
    assert device.events()[:2] == ["enrolled", "offered"]


def test_lines_that_a_power_cut_zeroed_do_not_hide_the_others(device: Device, first: Path) -> None:
    with (device.root / "journal.jsonl").open("ab") as stream:
        stream.write(bytes(50) + b"\n")

    device.run("install", first)

    events = [entry["event"] for entry in device.run("status").document["journal"]]
    assert events[:3] == ["enrolled", "unreadable", "offered"]


def test_an_old_journal_loses_its_first_half(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "JOURNAL_LIMIT", 2000)

    for number in range(200):
        device.store.note("tick", number=number)

    lines = installer.journal_lines(device.store, 1000)
    assert (device.root / "journal.jsonl").stat().st_size < 2100
    assert [entry["number"] for entry in lines] == list(range(lines[0]["number"], 200))


# ── room ──


def test_the_newest_good_releases_stay(device: Device, resigned: Callable[..., Path]) -> None:
    names = []
    for number in range(1, 6):
        path = resigned(sequence=number, files={"n.txt": str(number)})
        names.append(releases.release_of(path))
        device.run("install", path)

    assert sorted(device.store.releases()) == sorted(names[-2:])
    device.run("rollback")
    device.run("gc", "--keep", "1")
    assert device.store.releases() == [names[-2]]
    linked = {path.stat().st_nlink for path in (device.root / "blobs/sha256").iterdir()}
    assert 1 not in linked


def test_an_install_leaves_as_many_good_releases_as_are_asked_to_stay(
    device: Device, resigned: Callable[..., Path]
) -> None:
    names = []
    for number in range(1, 5):
        path = resigned(sequence=number, files={"n.txt": str(number)})
        names.append(releases.release_of(path))
        assert device.run("install", path, "--keep", "3").status == 0

    assert device.store.releases() == sorted(names[1:])


def test_markers_and_half_made_things_are_swept(device: Device, first: Path) -> None:
    device.run("install", first)
    for name in (".new-current", "releases/.new-abc", "incoming/.new-x", "blobs/sha256/.new-y"):
        (device.root / name).mkdir()
        (device.root / name / "inside").write_text("x")
    (device.root / "releases" / ("c" * 64 + ".good")).write_text("{}")

    device.run("gc")

    left = [path.name for path in device.root.rglob("*") if path.name.startswith((".new-", "c" * 64))]
    assert left == []


# ── services ──


def enrolled(tmp_path: Path, signers: str, mode: str, **world: Any) -> Device:
    device = Device(tmp_path / "store", **world)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 0)
        patched.setattr(installer, "SYSTEM_ROOT", str(tmp_path / "store"))
        answer = device.enroll(signers, mode=mode)
    assert answer.status == 0, answer.said
    return device


def test_mode_system_puts_a_release_s_units_in_place_and_starts_it_when_it_is_good(
    tmp_path: Path, signers: str, first: Path
) -> None:
    device = enrolled(tmp_path, signers, "system")
    device.ran.clear()

    answer = device.run("install", first)

    assert answer.document["outcome"] == "good"
    assert device.ran == [
        "systemctl show --property=LoadState edgepack.service",
        "systemctl stop edgepack.service",
        "systemctl daemon-reload",
        "systemctl enable edgepack.service",
        "systemctl reset-failed edgepack.service",
        "systemctl start edgepack.service",
    ]
    units = tmp_path / "units"
    assert {path.name for path in units.iterdir() if path.is_file()} == {
        *releases.UNITS,
        "edgepack-boot.service",
    }
    assert (units / "edgepack.service").read_text() == "# edgepack.service\n"


def test_the_power_mode_of_a_release_is_selected_before_its_test_and_after_a_rollback(
    tmp_path: Path, signers: str, resigned: Callable[..., Path]
) -> None:
    device = enrolled(tmp_path, signers, "system")

    def check(_: argparse.Namespace) -> dict[str, Any]:
        device.ran.append("test")
        return releases.passing()

    device.world = device.world._replace(check=check)
    for sequence, mode in ((1, "# 15W\n"), (2, "# 25W\n")):
        device.ran.clear()
        device.run("install", resigned(sequence=sequence, files={"edgepack-power.service": mode}))

    asked = [words.removeprefix("systemctl ") for words in device.ran]
    device.ran.clear()
    device.run("rollback")
    again = [words.removeprefix("systemctl ") for words in device.ran]

    selected = ["daemon-reload", "enable edgepack.service", "restart edgepack-power.service"]
    started = ["reset-failed edgepack.service", "start edgepack.service"]
    assert asked[2:] == [*selected, "test", *started]
    assert again[2:] == [*selected, *started]
    assert (tmp_path / "units/edgepack-power.service").read_text() == "# 15W\n"


def test_a_power_mode_that_cannot_be_set_is_told_and_the_release_runs(
    tmp_path: Path, signers: str, resigned: Callable[..., Path]
) -> None:
    def status(argv: Sequence[str]) -> tuple[int, str]:
        return (1, "Job for edgepack-power.service failed.\n") if argv[1] == "restart" else (0, "")

    device = enrolled(tmp_path, signers, "system", status=status)

    answer = device.run("install", resigned(files={"edgepack-power.service": "# 25W\n"}))

    assert answer.document["outcome"] == "good"
    assert (
        "the plan's power mode is not set: systemctl restart edgepack-power.service: Job for" in answer.said
    )


def test_the_front_of_a_release_comes_and_goes_with_it_and_whoever_wants_it_enables_it(
    tmp_path: Path, signers: str, resigned: Callable[..., Path]
) -> None:
    device = enrolled(tmp_path, signers, "system")
    unit = tmp_path / "units/edgepack-chat.service"

    device.run("install", resigned(files={"edgepack-chat.service": "# front\n"}))
    there = unit.read_text()
    device.run("install", resigned(sequence=2))

    assert there == "# front\n"
    assert not unit.exists()
    assert not [words for words in device.ran if "edgepack-chat" in words]


def test_mode_user_runs_one_unit_of_its_own(tmp_path: Path, signers: str, first: Path) -> None:
    device = enrolled(tmp_path, signers, "user")
    assert "systemctl --user enable edgepack.service" in device.ran
    device.ran.clear()

    device.run("install", first)

    assert device.ran[-1] == "systemctl --user start edgepack.service"
    unit = (tmp_path / "units/edgepack.service").read_text()
    assert f"ExecStartPost=/bin/sh {device.root}/current/start.sh ready\n" in unit


@pytest.mark.parametrize(("carried", "started"), [(True, "the release's"), (False, "/opt/server")])
def test_mode_user_starts_the_server_that_was_tested(
    tmp_path: Path, signers: str, first: Path, carried: bool, started: str
) -> None:
    device = enrolled(tmp_path, signers, "user")
    device.run("install", first)
    start = device.root / "current/start.sh"
    start.unlink()
    start.write_text("echo ${EDGEPACK_LLAMA_SERVER:-the release\\'s}\n")
    if not carried:
        (device.root / "current" / agent.SERVER).unlink()
    lines = (tmp_path / "units/edgepack.service").read_text().splitlines()
    (command,) = (line.partition("=")[2] for line in lines if line.startswith("ExecStart="))

    done = subprocess.run(
        shlex.split(command), env={"EDGEPACK_LLAMA_SERVER": "/opt/server"}, capture_output=True, check=True
    )

    assert done.stdout.decode() == started + "\n"


def test_a_release_whose_server_does_not_start_goes_back_with_its_units(
    tmp_path: Path, signers: str, resigned: Callable[..., Path], first: Path
) -> None:
    starts = 0

    def status(argv: Sequence[str]) -> tuple[int, str]:
        nonlocal starts
        starts += argv[1] == "start"
        said = 'Job for edgepack.service failed.\nSee "systemctl status edgepack.service" for details.\n'
        return (1, said) if argv[1] == "start" and starts == 2 else (0, "")

    device = enrolled(tmp_path, signers, "system", status=status)
    device.run("install", first)
    other = resigned(sequence=2, files={"edgepack.service": "# new\n", "edgepack-power.service": "# power\n"})

    answer = device.run("install", other)

    assert answer.status == 5
    assert answer.document["outcome"] == "rolled-back"
    assert "edgepack.service failed" in answer.document["reasons"][0]
    assert went_back(device)["reasons"] == answer.document["reasons"]
    assert device.current() == releases.release_of(first)
    assert (tmp_path / "units/edgepack.service").read_text() == "# edgepack.service\n"
    assert not (tmp_path / "units/edgepack-power.service").exists()
    assert (starts, device.ran[-1]) == (3, "systemctl start edgepack.service")


def went_back(device: Device) -> dict[str, Any]:
    """The last line of the journal."""
    (line,) = installer.journal_lines(device.store, 1)
    assert line["event"] == "went-back"
    return line


SERVICE = """\
[Unit]
Wants=edgepack-health.timer
# [Service]
ExecStart=/bin/never
[Service]
DynamicUser=yes
Environment=HOME=%S/edgepack-server \\
    [Service]=no
ExecStartPre=/bin/false
; NoNewPrivileges=no
MemoryMax=1000000
[Install]
WantedBy=multi-user.target
"""


def test_of_a_unit_only_what_its_service_may_is_taken() -> None:
    kept = ["DynamicUser=yes", "Environment=HOME=%S/edgepack-server \\", "    [Service]=no"]
    kept += ["ExecStartPre=/bin/false", "MemoryMax=1000000"]

    assert installer.service_section(SERVICE).splitlines() == kept
    assert installer.service_section("[Service]\nUser=a\\") == "User=a\\\n"
    assert installer.service_section("") == ""


class TestManager:
    """systemd as far as a test needs it: reads the unit of the test, starts what that says, tells how it ended."""

    __test__ = False

    def __init__(self, units: Path) -> None:
        self.unit = units / installer.TEST_UNIT
        self.text = ""
        self.environment = ""
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, argv: Sequence[str]) -> tuple[int, str]:
        if argv[-1] != installer.TEST_UNIT:
            return 0, ""
        if argv[1] == "start":
            self.text = self.unit.read_text(encoding="utf-8")
            folder = Path(re.findall("^EnvironmentFile=(.*)/server.env$", self.text, re.M)[-1])
            self.environment = (folder / "server.env").read_text(encoding="utf-8")
            assert (folder / "server.env").stat().st_mode & 0o777 == 0o600
            command = shlex.split(re.findall("^ExecStart=(.*)$", self.text, re.M)[-1].replace("%%", "%"))
            self.process = subprocess.Popen(command, start_new_session=True)
        assert self.process is not None
        if argv[1] == "stop":
            self.process.kill()
        status = None if argv[1] == "start" else self.process.poll()
        pid = self.process.pid
        if argv[1] != "show" or status is None:
            return 0, f"MainPID={pid}\nExecMainPID={pid}\nExecMainCode=0\nExecMainStatus=0"
        code = os.CLD_KILLED if status < 0 else os.CLD_EXITED
        return 0, f"MainPID=0\nExecMainPID={pid}\nExecMainCode={code}\nExecMainStatus={abs(status)}"


def test_mode_system_tests_a_release_with_the_rights_of_its_unit(
    tmp_path: Path, signers: str, resigned: Callable[..., Path]
) -> None:
    units = tmp_path / "passing"
    manager = TestManager(units)
    seen: dict[str, Any] = {}

    def check(options: argparse.Namespace) -> dict[str, Any]:
        work = Path(options.work)
        seen["modes"] = [place.stat().st_mode & 0o777 for place in (work, *work.parents[:2])]
        launch = agent.Launch(
            ["/bin/sh", "-c", "sleep $0; exit 3 % 100", "60"], {"A": 'b"c'}, "secret", options.work, None,
            agent.Limit(7_000_000, "none", None),
        )  # fmt: skip
        with options.launcher.start(launch) as (process, limit):
            seen["pid"], seen["limit"] = process.pid, limit
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
            os.killpg(process.pid, 9)
            seen["ended"] = process.wait(10)
        assert not manager.unit.exists()
        return releases.passing()

    device = enrolled(tmp_path, signers, "system", check=check, status=manager)
    device.world = device.world._replace(passing_units=str(units))
    (Path(device.world.system_units) / "edgepack.service.d/60-mine.conf").write_text("[Service]\nNice=5\n")

    answer = device.run("install", resigned(files={"edgepack.service": SERVICE}))

    assert (answer.status, answer.document["outcome"]) == (0, "good")
    lines = manager.text.splitlines()
    assert seen["ended"] == -9
    assert seen["modes"] == [0o755, 0o755, 0o755]  # the service's user comes that far
    assert seen["limit"].bytes == 7_000_000
    assert lines.index("DynamicUser=yes") < lines.index("Nice=5") < lines.index("ExecStart=")
    assert lines.index("ExecStartPre=/bin/false") < lines.index("ExecStartPre=")
    assert lines.index("MemoryMax=1000000") < lines.index("MemoryMax=7000000")
    assert "Wants=edgepack-health.timer" not in lines
    assert "Conflicts=edgepack.service" in lines
    assert 'ExecStart="/bin/sh" "-c" "sleep $$0; exit 3 %% 100" "60"' in lines
    assert "secret" not in manager.text
    assert manager.environment.splitlines() == ['A="b\\"c"', 'EDGEPACK_TEST_KEY="secret"']
    assert device.guarded == [
        "systemctl start edgepack.service", f"systemctl stop {installer.TEST_UNIT}", "done", "done",
    ]  # fmt: skip
    assert not [*tmp_path.rglob(".new-*")]


@pytest.mark.parametrize(("mode", "name"), [("system", "edgepack.service"), ("user", "start.sh")])
def test_a_release_that_its_mode_could_not_start_is_refused(
    tmp_path: Path, signers: str, key: Path, mode: str, name: str
) -> None:
    device = enrolled(tmp_path, signers, mode)
    path = releases.bundle(tmp_path / "b.tar", key, without=(name,))

    answer = device.run("install", path)

    assert (answer.status, answer.said) == (
        6,
        f"refused: the bundle has no {name}, which starts it in mode {mode}",
    )


def test_the_server_rests_while_a_release_is_tested(tmp_path: Path, signers: str, first: Path) -> None:
    device = enrolled(tmp_path, signers, "user")
    device.run("install", first)
    device.ran.clear()

    answer = device.run("self-test")

    assert answer.document["verdict"] == {"passed": True, "reasons": []}
    assert [words.split()[2] for words in device.ran] == ["show", "stop", "reset-failed", "start"]


def test_a_server_that_rests_is_started_when_the_installer_is_killed(
    tmp_path: Path, signers: str, first: Path
) -> None:
    device = enrolled(tmp_path, signers, "user")
    seen: list[str] = []

    def check(_: argparse.Namespace) -> dict[str, Any]:
        seen.extend(device.guarded)
        return releases.passing()

    device.world = device.world._replace(check=check)
    device.run("install", first)

    assert seen == ["systemctl --user start edgepack.service"]
    assert device.guarded == [*seen, "done"]


def test_what_ran_before_is_started_once_more_when_its_start_fails(
    tmp_path: Path, signers: str, first: Path, second: Path
) -> None:
    starts = 0

    def status(argv: Sequence[str]) -> tuple[int, str]:
        nonlocal starts
        starts += "start" in argv
        return (1, "Job for edgepack.service failed.\n") if "start" in argv and starts > 1 else (0, "")

    device = enrolled(tmp_path, signers, "user", status=status)
    device.run("install", first)
    device.guarded.clear()

    answer = device.run("install", second)

    assert answer.document["outcome"] == "rolled-back"
    assert "the release before it did not start" in answer.document["reasons"][-1]
    assert device.guarded == ["systemctl --user start edgepack.service"]  # when the installer ends


def test_units_that_systemd_has_not_read_are_read_before_the_server_starts(
    tmp_path: Path, signers: str, first: Path
) -> None:
    device = enrolled(
        tmp_path, signers, "system",
        status=lambda argv: (0, "NeedDaemonReload=yes\n" if "--property=NeedDaemonReload" in argv else ""),
    )  # fmt: skip
    device.run("install", first)
    device.ran.clear()

    device.run("boot")

    assert device.ran[1:] == ["systemctl daemon-reload", "systemctl enable edgepack.service"]


def test_folders_around_a_store_have_durable_names(
    tmp_path: Path, signers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(installer, "fsync_folder", flushed.append)

    Device(tmp_path / "new" / "folders" / "store").enroll(signers, mode="user")

    folders = ("", "new", "new/folders", "new/folders/units")
    assert {str(tmp_path / folder) for folder in folders} <= {*flushed}


def test_a_server_that_rests_is_started_after_an_error(
    tmp_path: Path, signers: str, first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = enrolled(tmp_path, signers, "user")
    device.run("install", first)
    device.run("install", second)
    device.guarded.clear()

    def broken(link: str, target: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(installer, "point", broken)

    assert device.run("rollback").status == 2
    assert device.guarded == ["systemctl --user start edgepack.service"]


def test_boot_goes_back_with_the_units_too(
    tmp_path: Path, signers: str, resigned: Callable[..., Path], first: Path
) -> None:
    device = enrolled(tmp_path, signers, "system")
    device.run("install", first)
    other = resigned(sequence=2, files={"edgepack.service": "# new\n"})
    device.run("install", other)
    shutil.rmtree(device.root / "current/bin")

    device.run("boot")

    assert (tmp_path / "units/edgepack.service").read_text() == "# edgepack.service\n"
    assert device.ran[-2:] == ["systemctl daemon-reload", "systemctl enable edgepack.service"]


class Manager:
    """A service manager that remembers whether it runs the server."""

    def __init__(self, *, starts: bool = True) -> None:
        self.runs = False
        self.starts = starts

    def __call__(self, argv: Sequence[str]) -> tuple[int, str]:
        if "--property=SubState,Job" in argv:
            return 0, f"SubState={'running' if self.runs else 'dead'}\n"
        if "start" in argv:
            self.runs = self.starts
            return (0, "") if self.starts else (1, "Job for edgepack.service failed.\n")
        self.runs = self.runs and "stop" not in argv
        return 0, ""


@pytest.mark.parametrize(
    ("told", "active"),
    [
        ("SubState=running\n", True),
        ("SubState=start-post\nJob=17\n", True),
        ("Job=17\nSubState=dead\n", True),
        ("SubState=dead\nJob=\n", False),
        ("SubState=auto-restart\n", False),
        ("SubState=failed\n", False),
        ("Failed to connect to bus: No medium found\n", False),
    ],
)
def test_a_server_that_starts_or_waits_for_its_turn_is_active(
    device: Device, told: str, active: bool
) -> None:
    device = Device(device.root, status=lambda _: (0, told))

    assert installer.UserService(str(device.root), None, device.world).active() == active


@pytest.mark.parametrize("mode", ["system", "user"])
def test_a_card_that_was_written_elsewhere_is_started_when_the_device_enrolls_it(
    tmp_path: Path, signers: str, first: Path, mode: str
) -> None:
    enrolled(tmp_path, signers, "none").run("install", first, "--no-self-test")

    device = enrolled(tmp_path, "", mode, status=Manager())

    words = ["systemctl", *(["--user"] if mode == "user" else [])]
    assert device.ran[-1].split() == [*words, "start", "edgepack.service"]
    if mode == "system":
        assert (tmp_path / "units/edgepack.service").read_text() == "# edgepack.service\n"
        assert "systemctl enable edgepack.service" in device.ran


@pytest.mark.parametrize(
    ("starts", "whole", "told"),
    [
        (True, True, "which lay here, is started"),
        (False, True, "does not start: systemctl start edgepack.service: Job for"),
        (True, False, "lacks files and is not started"),
    ],
)
def test_an_enrolling_says_what_became_of_the_release_that_lay_there(
    tmp_path: Path, signers: str, first: Path, starts: bool, whole: bool, told: str
) -> None:
    device = Device(tmp_path / "store", status=Manager(starts=starts))
    device.enroll(signers)
    device.run("install", first, "--no-self-test")
    if not whole:
        (device.root / "current/model.gguf").unlink()

    first_time, again = device.enroll("", mode="user"), device.enroll("", mode="user")

    release = releases.release_of(first)[:12]
    notes = [note for note in first_time.document["notes"] if release in note]
    assert (first_time.status, len(notes)) == (0, 1)
    assert told in notes[0]
    assert any(release in note for note in again.document["notes"]) != (starts and whole)


def test_a_current_release_that_does_not_run_is_tested_and_started(
    tmp_path: Path, signers: str, first: Path
) -> None:
    manager = Manager()
    device = enrolled(tmp_path, signers, "user", status=manager)
    head = releases.offer_frames(first)
    device.run("install", first)

    runs = device.run("offer", stdin=head).document["state"], device.run("install", first).document["outcome"]
    manager.runs = False
    rests = (
        device.run("offer", stdin=head).document["state"],
        device.run("install", first).document["outcome"],
    )

    assert (runs, rests) == (("current", "current"), ("installed", "good"))
    assert manager.runs
    assert device.events().count("tested") == 2


@pytest.mark.parametrize("words", [("boot",), ("install",)])
def test_units_of_another_release_than_the_current_one_do_not_stay(
    tmp_path: Path, signers: str, first: Path, words: tuple[str, ...]
) -> None:
    device = enrolled(tmp_path, signers, "system", status=Manager())
    device.run("install", first)
    unit = tmp_path / "units/edgepack.service"
    unit.write_text("# of a release whose installation was cut\n")
    device.ran.clear()

    answer = device.run(*words, *([first] if words == ("install",) else []))

    assert answer.status == 0
    assert unit.read_text() == "# edgepack.service\n"
    assert device.ran[-2:] == ["systemctl daemon-reload", "systemctl enable edgepack.service"]


def test_a_full_disk_does_not_start_a_release_for_ever_that_never_was_good(
    device: Device, first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.run("install", first)
    device.run("install", second)
    (device.root / "releases" / (releases.release_of(second) + ".good")).unlink()
    write = installer.write_whole

    def full(path: str, content: bytes, *more: Any, **named: Any) -> None:
        if path.endswith(".tries"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        write(path, content, *more, **named)

    monkeypatch.setattr(installer, "write_whole", full)

    assert device.run("boot").document["outcome"] == "went-back"
    assert device.current() == releases.release_of(first)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--mode", "system"), "needs root"),
        (("--mode", "none", "--server", "llama-server"), "not a whole path"),
        (("--mode", "none", "--keep", "0"), None),
        (("--mode", "other"), None),
    ],
)
def test_an_enrolling_that_cannot_be_is_refused(
    tmp_path: Path, signers: str, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    device = Device(tmp_path / "store")

    if told is None:
        with pytest.raises(SystemExit, match="2"):
            device.run("enroll", *words, stdin=signers.encode())
    else:
        answer = device.run("enroll", *words, stdin=signers.encode())
        assert answer.status == 2
        assert told in answer.said
    assert not device.root.exists()


# ── the verdict ──


def judged(**changes: Any) -> list[str]:
    plan = json.loads(serde.to_json(example_plan(releases.PROFILE)))
    return installer.verdict(plan, {**releases.passing(), **changes})


def test_what_the_plan_promises_is_good() -> None:
    assert judged() == []
    assert judged(quality=None) == []


MEMORY = {"peak_rss": 0, "processes": None, "nvmap": None, "gpu": None, "system_drop": None}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"failure": {"kind": "crashed", "stage": "fill", "message": "gone"}}, "crashed (fill): gone"),
        ({"slots": {"slots": 1, "tokens": [2048]}}, "the plan says 1 of 4096"),
        ({"slots": {"slots": 2, "tokens": [4096, 4096]}}, "the plan says 1 of 4096"),
        ({"fill": {"target_tokens": 4096, "held_tokens": [4000]}}, "held [4000]"),
        ({"fill": {"target_tokens": 4096, "held_tokens": [None]}}, "held [None]"),
        ({"memory": {**MEMORY, "peak_rss": 3 << 30}}, "the plan says up to"),
        ({"memory": {**MEMORY, "peak_rss": 64 << 30}}, "the device has"),
        ({"memory": {**MEMORY, "peak_rss": 1, "processes": {"peak": 3 << 30}}}, "the plan says up to"),
        ({"quality": {"probes": 10, "agree": 10, "ties": 0, "mean_drift": 0.3}}, "not those recorded"),
        ({"quality": {"probes": 10, "agree": 6, "ties": 0, "mean_drift": 0.0}}, "not those recorded"),
    ],
)
def test_what_it_does_not_hold_is_told(changes: dict[str, Any], told: str) -> None:
    assert any(told in reason for reason in judged(**changes)), judged(**changes)


def test_pages_of_libraries_that_may_be_unused_are_no_more_than_planned() -> None:
    plan = example_plan("x86-laptop")
    document = json.loads(serde.to_json(plan))
    most = installer.promise_of(document).most
    facts = releases.passing(plan)

    def told(peak: int, beyond: int) -> list[str]:
        code = agent.RUNTIMES["llama.cpp"].libraries + beyond
        memory = {**facts["memory"], "peak_rss": peak, "code": code}
        return installer.verdict(document, {**facts, "memory": memory})

    assert told(most + MIB, 0)
    assert told(most + MIB, MIB - 1)
    assert not told(most + MIB, MIB)


def test_memory_is_judged_only_on_the_device_of_the_plan() -> None:
    much = {**MEMORY, "peak_rss": 64 << 30}

    assert judged(memory=much, server={"emulator": {"name": "qemu"}}) == []
    assert judged(memory=much, match=[{"status": "fail"}]) == []
    assert judged(memory=much, machine={"emulated": True}) == []
    assert judged(memory=much, log={"buffers": [{"kind": "model", "name": "CUDA0"}]}) == []


def test_on_a_card_pages_of_the_weights_file_do_not_count_and_its_own_memory_does() -> None:
    plan = example_plan("rtx-4060-8gb")
    document = json.loads(serde.to_json(plan))
    most = plan.budget.device + plan.profile.reserves.accelerator_context
    log = {"buffers": [{"kind": "model", "name": "CUDA0", "bytes": 1}]}
    mapped = {"peak_rss": plan.budget.host + 1, "peak_anonymous": 1, "rss_file": 2, "rss_shared": 3, "gpu": 1}

    def told(**memory: Any) -> list[str]:
        facts = releases.passing(plan)
        return installer.verdict(document, {**facts, "log": log, "memory": {**facts["memory"], **memory}})

    assert told(**mapped) == []
    assert any("the device has" in line for line in told(**{**mapped, "rss_file": None}))
    assert any("on the card" in line for line in told(**{**mapped, "gpu": most + 1}))
    assert not any("on the card" in line for line in told(**{**mapped, "gpu": most}))


def test_the_limits_of_the_verdict_are_those_of_check() -> None:
    assert installer.DRIFT_WRONG == check.DRIFT_WRONG
    assert installer.AGREEMENT_WRONG == check.AGREEMENT_WRONG
    assert installer.UNEXPLAINED == check.UNEXPLAINED


# ── what the device's Python must know ──


def test_it_is_python_3_8_and_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(installer.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])

    assert found - {"edgepack"} <= sys.stdlib_module_names


# ── a disk that lied ──


@pytest.mark.parametrize(
    "left",
    [b"", b"\0\0\0", b"{}", b'{"sequence": "9", "release": 9}', bytes(agent.JSON_LIMIT + 1), None, "."],
    ids=["empty", "zeros", "no fields", "other types", "too large", "gone", "a folder"],
)
def test_a_sequence_that_is_gone_or_cannot_be_read_is_that_of_the_best_release_that_was_good(
    device: Device, first: Path, second: Path, left: bytes | str | None
) -> None:
    for path in (first, second):
        assert device.run("install", path).status == 0
    file = device.root / "sequence.json"
    file.unlink()
    if isinstance(left, bytes):
        file.write_bytes(left)
    elif left is not None:
        file.symlink_to(left)
    with (device.root / "journal.jsonl").open("ab") as journal:
        journal.write(b"{}\n")  # of which a disk left no more, either

    downgrade = device.run("install", first)
    mended = device.run("fsck").document

    assert downgrade.status == 6
    assert "below 2" in downgrade.said
    assert [entry["path"] for entry in mended["bad"]] == ["sequence.json"]
    assert json.loads(file.read_bytes())["sequence"] == 2
    assert device.run("fsck").document["bad"] == []


def test_a_sequence_that_the_disk_does_not_give_back_locks_nobody_out(
    device: Device,
    first: Path,
    second: Path,
    resigned: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in (first, second):
        assert device.run("install", path).status == 0
    bad = tmp_path / "bad"
    os.link(device.root / "sequence.json", bad)
    read = installer.read_whole

    def broken(path: str, *limit: int) -> bytes | None:
        if os.path.lexists(path) and os.path.samestat(os.lstat(path), bad.lstat()):
            raise OSError(errno.EIO, "Input/output error", path)
        return read(path, *limit)

    monkeypatch.setattr(installer, "read_whole", broken)

    assert device.run("status").document["store"]["sequence"] == 2
    assert device.run("install", first).status == 6
    assert device.run("install", resigned(sequence=3, files={"n.txt": "3"})).document["outcome"] == "good"
    assert device.store.sequence()[0] == 3


def test_a_store_in_which_nothing_was_good_lacks_no_sequence(device: Device, first: Path) -> None:
    Device(device.root, check=fails).run("install", first)

    assert device.run("fsck").document["bad"] == []
    assert device.store.sequence() == (0, None)


def test_a_release_whose_head_is_damaged_is_offered_and_received_again(device: Device, first: Path) -> None:
    assert device.run("install", first).status == 0
    release = releases.release_of(first)
    for part in sorted((device.root / "releases" / release / ".release").iterdir()):
        part.unlink()
        part.write_bytes(b"")

    offered = device.run("offer", stdin=releases.offer_frames(first))
    received = device.run(
        "receive", release, stdin=b"".join(releases.blob_frames(first, offered.document["missing"]))
    )

    assert (offered.status, received.status) == (0, 0)


def test_an_answer_that_stdout_does_not_take_is_said_and_no_traceback(device: Device) -> None:
    command = [sys.executable, "-m", "edgepack.device.installer", "--root", str(device.root), "status"]

    with Path("/dev/full").open("w", encoding="ascii") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert done.returncode == 10
    assert done.stderr == "cannot read or write: [Errno 28] No space left on device: 'stdout'\n"


def test_whoever_does_not_hear_the_answer_does_not_stop_the_work(device: Device) -> None:
    command = [sys.executable, "-m", "edgepack.device.installer", "--root", str(device.root), "status"]
    hears, said = os.pipe()
    os.close(hears)

    done = subprocess.run(command, stdout=said, stderr=subprocess.PIPE, text=True, check=False)

    os.close(said)
    assert (done.returncode, done.stderr) == (0, "")
