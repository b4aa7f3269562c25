"""The device's agent: no byte of a bundle can change unnoticed, and it runs on Python 3.8 alone."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepack.bundle import oci
from edgepack.device import agent
from edgepack.runtimes import llama_cpp
from edgepack.units import MIB
from tests.plans import PROFILES, example_plan

AGENT = Path(agent.__file__)
WEIGHTS = b"GGUF" + bytes(range(256)) * 20
ARMOR = "-----BEGIN SSH SIGNATURE-----\n{}-----END SSH SIGNATURE-----\n"


def armored(raw: bytes) -> bytes:
    text = base64.b64encode(raw).decode()
    return ARMOR.format("".join(text[i : i + 70] + "\n" for i in range(0, len(text), 70))).encode()


def layers(folder: Path) -> tuple[oci.Layer, ...]:
    path = folder / "weights"
    path.write_bytes(WEIGHTS)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    weights = oci.Layer(filepath="model.gguf", kind="weight", content=path, sha256=digest, bytes=len(WEIGHTS))
    return (
        oci.text_layer("plan.json", "weight.config", '{"schema_version": 1}'),
        oci.text_layer("agent.py", "code", "print('hello')\n"),
        oci.text_layer("same.txt", "doc", "print('hello')\n"),
        weights,
    )


def bundle(folder: Path, *, signed: bool = True) -> Path:
    out = folder / "bundle.tar"
    image = oci.Image(
        name="tiny", config={"a": 1}, annotations={agent.REF_NAME: "tiny"}, layers=layers(folder)
    )
    oci.write(out, image, sign=(lambda _: armored(b"SSHSIG" + bytes(200))) if signed else None)
    return out


# ── whole bundles ──


def test_a_bundle_is_read_and_each_file_lies_where_it_says(tmp_path: Path) -> None:
    path = bundle(tmp_path)

    found = agent.read_bundle(str(path))

    assert found["name"] == "tiny"
    assert [file["path"] for file in found["files"]] == ["plan.json", "agent.py", "same.txt", "model.gguf"]
    for file in found["files"]:
        content = path.read_bytes()[file["offset"] : file["offset"] + file["size"]]
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == file["digest"]
    assert found["files"][1]["offset"] == found["files"][2]["offset"]
    assert found["files"][-1]["offset"] % 4096 == 0


def test_every_single_flipped_byte_is_refused(tmp_path: Path) -> None:
    """Every byte of the tar but the signature's key and proof, which ssh-keygen judges (integration test)."""
    content = bytearray(bundle(tmp_path).read_bytes())
    armor = content.index(b"-----BEGIN SSH") + len(b"-----BEGIN SSH SIGNATURE-----\n")
    judged_by_ssh_keygen = range(armor, armor + 290)
    accepted = []

    for at in range(len(content)):
        content[at] ^= 1 << (at % 8)
        try:
            agent._read_layout(agent._Tar(io.BytesIO(content), len(content), lambda _: None))
            accepted.append(at)
        except agent.Refused:
            pass
        content[at] ^= 1 << (at % 8)

    assert set(accepted) <= set(judged_by_ssh_keygen)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 20000), extra=st.binary(max_size=2000))
def test_a_truncated_or_extended_bundle_is_refused(tmp_path: Path, cut: int, extra: bytes) -> None:
    content = bundle(tmp_path, signed=False).read_bytes()
    changed = content[: cut % len(content)] + extra
    target = tmp_path / "cut.tar"
    target.write_bytes(changed)

    with pytest.raises(agent.Refused):
        agent.read_bundle(str(target))


def test_something_after_the_end_is_refused(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(512))

    with pytest.raises(agent.Refused, match="should end at"):
        agent.read_bundle(str(path))


# ── tars that others would read differently ──


def entry(name: str, content: bytes, change: Callable[[tarfile.TarInfo], None] = lambda _: None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    change(info)
    header = info.tobuf(tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % 512)


def symlink(info: tarfile.TarInfo) -> None:
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"


def sparse(info: tarfile.TarInfo) -> None:
    info.type = tarfile.GNUTYPE_SPARSE


def pax(info: tarfile.TarInfo) -> None:
    info.pax_headers = {"path": "../../etc/cron.d/x"}


def executable(info: tarfile.TarInfo) -> None:
    info.mode = 0o755


def owned(info: tarfile.TarInfo) -> None:
    info.uname = "root"


@pytest.mark.parametrize("change", [symlink, sparse, pax, executable, owned])
def test_links_sparse_files_pax_headers_modes_and_owners_are_refused(
    tmp_path: Path, change: Callable[[tarfile.TarInfo], None]
) -> None:
    """The first entry is otherwise right, so only the header can be the reason."""
    content = bundle(tmp_path).read_bytes()
    target = tmp_path / "odd.tar"
    target.write_bytes(entry("oci-layout", oci.OCI_LAYOUT, change) + content[1024:])

    with pytest.raises(agent.Refused):
        agent.read_bundle(str(target))


def test_an_entry_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    content = bundle(tmp_path).read_bytes()
    target = tmp_path / "twice.tar"
    target.write_bytes(content[:1024] + content)

    with pytest.raises(agent.Refused, match=r"expected entry index\.json"):
        agent.read_bundle(str(target))


def test_a_size_that_claims_more_than_the_file_holds_is_refused_before_reading(tmp_path: Path) -> None:
    content = bundle(tmp_path).read_bytes()
    at = content.rindex(agent.BLOCK * b"\0", 0, content.index(b"GGUF")) // 512 * 512
    header_at = content.rindex(b"blobs/sha256/", 0, content.index(b"GGUF"))
    name = content[header_at : header_at + 77].decode()
    target = tmp_path / "huge.tar"
    target.write_bytes(content[:header_at] + agent.tar_header(name, 1 << 60) + content[header_at + 512 :])
    assert at <= header_at

    with pytest.raises(agent.Refused, match="the manifest says"):
        agent.read_bundle(str(target))


# ── hostile content that is hashed and labelled rightly ──


def rewritten(folder: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """A bundle whose manifest was changed, with every digest, size and header made right again."""
    parts = layers(folder)
    image = oci.Image(name="tiny", config={"a": 1}, annotations={agent.REF_NAME: "tiny"}, layers=parts)
    manifest = json.loads(image.manifest())
    change(manifest)
    return spliced(folder, oci.canonical(manifest), parts)


def spliced(folder: Path, manifest: bytes, parts: tuple[oci.Layer, ...], index: bytes | None = None) -> Path:
    out = io.BytesIO()

    def add(name: str, content: bytes) -> None:
        out.write(agent.tar_header(name, len(content)) + content + bytes(-len(content) % 512))

    digest = hashlib.sha256(manifest).hexdigest()
    descriptor = {
        "mediaType": oci.MANIFEST_TYPE,
        "artifactType": oci.ARTIFACT_TYPE,
        "digest": f"sha256:{digest}",
        "size": len(manifest),
        "annotations": {agent.REF_NAME: "tiny"},
    }
    whole = {"schemaVersion": 2, "mediaType": oci.INDEX_TYPE, "manifests": [descriptor]}
    add("oci-layout", oci.OCI_LAYOUT)
    add("index.json", index or oci.canonical(whole))
    add(f"blobs/sha256/{digest}", manifest)
    config = oci.canonical({"a": 1})
    add(f"blobs/sha256/{hashlib.sha256(config).hexdigest()}", config)
    for content in dict.fromkeys(part.content for part in parts[:-1]):
        assert isinstance(content, bytes)
        add(f"blobs/sha256/{hashlib.sha256(content).hexdigest()}", content)
    add(".padding", bytes(-(out.tell() + 1024) % 4096))
    add(f"blobs/sha256/{parts[-1].sha256}", WEIGHTS)
    out.write(bytes(1024))
    path = folder / "spliced.tar"
    path.write_bytes(out.getvalue())
    return path


def named(name: str) -> Callable[[dict[str, object]], object]:
    def change(manifest: dict[str, object]) -> None:
        manifest["layers"][0]["annotations"][agent.FILEPATH] = name  # type: ignore[index]  # known shape

    return change


def test_splicing_alone_changes_nothing(tmp_path: Path) -> None:
    assert agent.read_bundle(str(rewritten(tmp_path, lambda _: None)))["name"] == "tiny"


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../b", "a//b", ".ssh/authorized_keys", "-rf", "a\0b", "a" * 101, "agent.py",
     "agent.py/x", "a/b/c/d", "x\n", "ö"],
)  # fmt: skip
def test_file_names_that_reach_outside_or_clash_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(agent.Refused):
        agent.read_bundle(str(rewritten(tmp_path, named(name))))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.update(subject={}), id="an unknown field"),
        pytest.param(lambda m: m.update(schemaVersion=2.0), id="a float version"),
        pytest.param(lambda m: m.update(artifactType="text/plain"), id="another artifact type"),
        pytest.param(lambda m: m["layers"].reverse(), id="weights first"),
        pytest.param(lambda m: m["layers"].pop(), id="no weights"),
        pytest.param(lambda m: m["layers"][0].update(size=True), id="a boolean size"),
        pytest.param(lambda m: m["layers"][0].update(size=-1), id="a negative size"),
        pytest.param(lambda m: m["layers"][0].update(mediaType="x"), id="an unknown media type"),
        pytest.param(lambda m: m["layers"][0]["annotations"].update(x="y"), id="another annotation"),
        pytest.param(lambda m: m["config"].update(digest="md5:0"), id="another hash"),
        pytest.param(lambda m: m.update(annotations=[]), id="no annotations"),
        pytest.param(lambda m: m["annotations"].clear(), id="no name"),
    ],
)
def test_manifests_of_another_shape_are_refused(
    tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    with pytest.raises(agent.Refused):
        agent.read_bundle(str(rewritten(tmp_path, change)))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":NaN}', "not a number"),
        (b"[" * 40 + b"]" * 40, "nests"),
        (b"[" * 200_000, "nests"),
        (b'{"a":' + b"9" * 30 + b"}", "digits"),
        (b'{"a": 1}', "canonical"),
        (b'{"b":1,"a":1}', "canonical"),
        (b'"\\ud800"', "usable"),
        (b"\xff", "usable"),
        (b'"' + b"x" * (9 << 20) + b'"', "limit"),
    ],
)
def test_json_that_is_too_big_too_deep_or_ambiguous_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(agent.Refused, match=why):
        agent.canonical_json(content, "it")


def test_an_oversize_manifest_is_refused_before_it_is_read(tmp_path: Path) -> None:
    manifest = b'"' + b"x" * (2 << 20) + b'"'

    with pytest.raises(agent.Refused, match="the limit is 1048576"):
        agent.read_bundle(str(spliced(tmp_path, manifest, layers(tmp_path))))


def test_a_signature_spelled_another_way_is_refused(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    content = path.read_bytes()
    at = content.index(b"=\n-----END") if b"=\n-----END" in content else content.index(b"\n-----END")
    changed = content[:at] + b"\n" + content[at + 1 :]
    path.write_bytes(changed)

    with pytest.raises(agent.Refused, match="ssh-keygen"):
        agent.read_bundle(str(path))


# ── unpacking ──


def test_extract_writes_the_file_once_and_keeps_it(tmp_path: Path) -> None:
    found = agent.read_bundle(str(bundle(tmp_path)))
    target = Path(agent.extract(found, "model.gguf", str(tmp_path / "work")))
    stamp = target.stat().st_mtime_ns

    again = agent.extract(found, "model.gguf", str(tmp_path / "work"))

    assert target.read_bytes() == WEIGHTS
    assert Path(again).stat().st_mtime_ns == stamp
    assert [p.name for p in target.parent.iterdir()] == ["model.gguf"]


def test_a_link_laid_where_a_file_will_be_written_is_not_followed(tmp_path: Path) -> None:
    found = agent.read_bundle(str(bundle(tmp_path)))
    precious, work = tmp_path / "precious", tmp_path / "work"
    precious.write_text("kept")
    work.mkdir()
    for name in ("model.gguf.part", "server.log"):
        (work / name).symlink_to(precious)

    with pytest.raises(OSError, match="symbolic links"):
        agent.extract(found, "model.gguf", str(work))
    server = agent.running_server(
        "/bin/true",
        [],
        model=str(precious),
        folder=str(work),
        environment={},
        limit=agent.Limit(None, "none", None),
    )
    with pytest.raises(OSError, match="symbolic links"), server:
        pytest.fail("it was started")

    assert precious.read_text() == "kept"


def test_a_bundle_that_changes_after_it_was_verified_is_refused(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    found = agent.read_bundle(str(path))
    content = bytearray(path.read_bytes())
    content[found["files"][-1]["offset"]] ^= 1
    path.write_bytes(content)

    with pytest.raises(agent.Refused, match="changed after"):
        agent.extract(found, "model.gguf", str(tmp_path / "work"))
    assert list((tmp_path / "work").iterdir()) == []


def test_extract_asks_for_space_before_it_writes(tmp_path: Path) -> None:
    found = agent.read_bundle(str(bundle(tmp_path)))
    found["files"][-1]["size"] = 1 << 60

    with pytest.raises(agent.NoSpace, match="must be written"):
        agent.extract(found, "model.gguf", str(tmp_path / "work"))


# ── what a bundle may start its server with ──


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("repack", [True, False])
def test_all_flags_of_the_runtime_are_allowed(profile: str, repack: bool) -> None:
    plan = example_plan(profile)
    args = list(
        llama_cpp.launch(replace(plan.settings, repack=repack, unified_kv=repack, threads=1), alias="m")
    )

    assert agent.server_arguments({"args": args, "env": {}}, None) == (args, {})


@pytest.mark.parametrize(
    ("args", "environment"),
    [
        (["--log-file", "/etc/passwd"], {}),
        (["--api-key", "x"], {}),
        (["-m", "other.gguf"], {}),
        (["--host", "0.0.0.0"], {}),
        (["--alias", "/etc/passwd"], {}),
        (["-c"], {}),
        (["-c", 512], {}),
        ([], {"LD_PRELOAD": "x.so"}),
        ([], {"LLAMA_ARG_HOST": "0.0.0.0"}),
        ("-c 512", {}),
    ],
)
def test_other_flags_and_variables_are_refused(args: object, environment: object) -> None:
    with pytest.raises(agent.Refused):
        agent.server_arguments({"args": args, "env": environment}, None)


def test_a_load_mode_replaces_the_planned_one_and_threads_never_exceed_cores() -> None:
    args = ["-c", "512", "--load-mode", "mmap", "--threads", "6", "--repack"]

    assert agent.with_load_mode(args, "none")[-2:] == ["--load-mode", "none"]
    assert agent.with_load_mode(args, "none").count("--load-mode") == 1
    assert agent.with_threads(args, 2) == ["-c", "512", "--load-mode", "mmap", "--threads", "2", "--repack"]


# ── an emulator ──


def program(path: Path, *cases: tuple[str, str]) -> str:
    arms = "".join(f"{words}) printf '%b' '{said}' ;;\n" for words, said in cases)
    path.write_text(f'#!/bin/sh\ncase "$*" in\n{arms}*) exit 1 ;;\nesac\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


QEMU_SAYS = "qemu-aarch64 version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\\nCopyright (c)\\n"


@pytest.mark.parametrize(
    ("cpus", "cpu", "flags"),
    [
        ("Available CPUs:\\n  cortex-a72\\n  cortex-a76\\n  max\\n", "cortex-a76", ["-cpu", "cortex-a76"]),
        ("Available CPUs:\\n  cortex-a72\\n  max\\n", "default", []),
    ],
)
def test_an_emulator_is_asked_for_its_version_and_for_the_least_cpu_of_the_devices(
    tmp_path: Path, cpus: str, cpu: str, flags: list[str]
) -> None:
    path = program(tmp_path / "qemu-aarch64", ("--version", QEMU_SAYS), ("'-cpu help'", cpus))

    emulator = agent.find_emulator(path, "aarch64")

    assert emulator.facts == {"name": "qemu-aarch64", "version": "7.2.22", "cpu": cpu}
    assert emulator.under == [path, *flags]


def test_a_program_that_is_no_emulator_is_not_taken_for_one(tmp_path: Path) -> None:
    other = program(tmp_path / "other", ("--version", "GNU nano"))

    with pytest.raises(agent.MissingProgram, match="does not say its version"):
        agent.find_emulator(other, "aarch64")
    with pytest.raises(agent.MissingProgram, match="cannot be run"):
        agent.find_emulator(str(tmp_path / "none"), "aarch64")


X86_KERNEL = "cpu:type:x86,ven0000fam0006mod00CF:feature:,0000,0001,0002\n"
ARM_KERNEL = "cpu:type:aarch64:feature:,0000,0001,0002,0003\n"
X86_CPUINFO = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vme de pse\n"
ARM_CPUINFO = "processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("arch", "modalias", "cpuinfo", "emulated"),
    [
        ("x86_64", X86_KERNEL, X86_CPUINFO, False),
        ("aarch64", ARM_KERNEL, ARM_CPUINFO, False),
        ("aarch64", X86_KERNEL, X86_CPUINFO, True),
        ("x86_64", ARM_KERNEL, ARM_CPUINFO, True),
        pytest.param("aarch64", X86_KERNEL, ARM_CPUINFO, True, id="QEMU 8.2 writes cpuinfo itself"),
        pytest.param("aarch64", "", X86_CPUINFO, True, id="no sysfs"),
        pytest.param("i686", X86_KERNEL, X86_CPUINFO, False, id="32-bit programs of the same processor"),
        pytest.param("armv8l", ARM_KERNEL, ARM_CPUINFO, False, id="32-bit programs of an Arm"),
        pytest.param("aarch64", "", "", False, id="nothing to tell by"),
    ],
)
def test_a_machine_is_emulated_when_its_kernel_is_of_the_other_architecture(
    arch: str, modalias: str, cpuinfo: str, emulated: bool
) -> None:
    assert agent.is_emulated(arch, modalias, cpuinfo) is emulated


# ── the machine and the log ──


def machine(**changes: object) -> dict[str, object]:
    orin = {
        "arch": "aarch64",
        "memory_total": 7620 << 20,
        "device_tree": ["NVIDIA Jetson Orin Nano", "nvidia,p3767-0003", "nvidia,tegra234"],
        "l4t": "36.4.7",
        "gpus": [{"name": "Orin (nvgpu)"}],
    }
    return {**orin, **changes}


ORIN = {
    "arch": "aarch64",
    "memory": 7620 << 20,
    "match": {"device_tree": ["p3767-0003"], "gpu_name": "Orin", "memory_min": None, "memory_max": None},
    "software": {"l4t": ["36"]},
}


def test_a_device_matches_its_profile() -> None:
    assert [row["status"] for row in agent.match_device(ORIN, machine())] == ["pass"] * 5


@pytest.mark.parametrize(
    ("changes", "fact", "status"),
    [
        ({"arch": "x86_64", "device_tree": None}, "device tree", "fail"),
        ({"memory_total": 15 << 30}, "memory", "fail"),
        ({"memory_total": int(7620 * 0.96) << 20}, "memory", "pass"),
        ({"device_tree": None, "l4t": None}, "device tree", "unknown"),
        ({"l4t": "35.4.1"}, "L4T", "fail"),
        ({"l4t": None}, "L4T", "unknown"),
        ({"gpus": None}, "GPU", "unknown"),
        ({"gpus": [{"name": "Thor"}]}, "GPU", "fail"),
    ],
)
def test_what_a_machine_says_otherwise_fails_and_what_it_does_not_say_is_unknown(
    changes: dict[str, object], fact: str, status: str
) -> None:
    rows = {row["fact"]: row["status"] for row in agent.match_device(ORIN, machine(**changes))}

    assert rows[fact] == status


LOGS = Path(__file__).parents[1] / "cases" / "logs"


def sizes(name: str) -> dict[str, int]:
    parsed = agent.parse_log((LOGS / name).read_text(encoding="utf-8"))
    return {f"{b['kind']} {b['name']}": b["bytes"] for b in parsed["buffers"]}


def test_the_log_of_a_cpu_server_gives_each_buffer() -> None:
    mib = 1 << 20
    assert sizes("cpu-q8_0-1-slot.log") == {
        "model CPU": round(500.79 * mib),
        "kv CPU": 48 * mib,
        "compute CPU": round(39.51 * mib),
        "output CPU": round(0.58 * mib),
    }


def test_a_repacked_mapped_model_is_two_buffers_and_slots_are_one_cache() -> None:
    parsed = agent.parse_log((LOGS / "cpu-q4_0-mmap-4-slots.log").read_text(encoding="utf-8"))

    names = {b["name"] for b in parsed["buffers"] if b["kind"] == "model"}
    assert names == {"CPU_Mapped", "CPU_REPACK"}
    assert parsed["caches"] == [
        {
            "bytes": round(12.75 * (1 << 20)),
            "cells": 512,
            "layers": 24,
            "sequences": 4,
            "k_type": "q8_0",
            "v_type": "q8_0",
        }
    ]
    assert parsed["context"]["n_ctx_seq"] == "512"
    assert parsed["load_mode"] == "mmap"


# ── Python 3.8 and the standard library, nothing else ──


def test_the_group_of_a_killed_check_is_removed_and_that_of_one_about_to_start_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty group is no dead one: two checks began at once, and the second took the first one's away."""
    with subprocess.Popen([sys.executable, "-c", ""]) as done:
        pass
    dead, alive = tmp_path / f"edgepack-check-{done.pid}", tmp_path / f"edgepack-check-{os.getppid()}"
    for folder in (dead, alive):
        folder.mkdir()
    monkeypatch.setattr(agent, "_cgroup_parents", lambda: iter([("cgroup-v2", str(tmp_path))]))

    with agent.memory_limit(None):
        assert not dead.exists()
        assert alive.exists()


class Ticking:
    """A server that used so many ticks of processor time."""

    def __init__(self) -> None:
        self.ticks = 0

    def now(self) -> dict[str, int]:
        return {"cpu_ticks": self.ticks}


def test_what_others_take_of_the_processors_is_neither_the_servers_time_nor_idleness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    clock = {"now": 100.0, "own": 7.0}
    seen = {"stat": "cpu  10 0 5 1000 3 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"}
    monkeypatch.setattr(agent, "_read", lambda path: seen["stat"] if path == "/proc/stat" else None)
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(os, "times", lambda: (clock["own"], 0.0, 0.0, 0.0, 0.0))
    server = Ticking()
    processors = agent.Processors(server)  # type: ignore[arg-type]  # only now() is asked

    clock["now"] += 0.2
    assert processors.others() is None  # too short for the kernel's ticks

    # In 2 s: the server 3 s of its cores, this process 0.5 s, others 1 s, and 0.6 s stolen by the hypervisor.
    clock.update(now=102.0, own=7.5)
    server.ticks = 3 * tick
    user = 10 + int(4.5 * tick)
    seen["stat"] = f"cpu  {user} 0 5 9999 7777 0 0 {int(0.6 * tick)} 0 0\n"
    assert processors.others() == pytest.approx((1.0 + 0.6) / 2)

    seen["stat"] = ""
    assert processors.others() is None


def test_a_program_that_spins_beside_the_server_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as server:
        meter = agent.Meter(server, 1)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            processors = agent.Processors(meter)
            time.sleep(2)
            taken = processors.others()
            other.kill()
        server.kill()

    assert taken is not None
    assert taken > 0.1


def test_the_agent_is_python_3_8_and_imports_only_the_standard_library() -> None:
    tree = ast.parse(AGENT.read_text(encoding="utf-8"), feature_version=(3, 8))

    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    newer = r"\.removeprefix\(|\.removesuffix\(|zip\([^)]*strict=|\bmatch \w+:|math\.lcm|@cache\b|\|= \{"
    assert not re.search(newer, AGENT.read_text(encoding="utf-8"))


def test_annotations_are_never_evaluated_and_no_runtime_alias_needs_a_newer_python() -> None:
    tree = ast.parse(AGENT.read_text(encoding="utf-8"))
    aliases = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.BinOp)]
    typed = [c for c in tree.body if isinstance(c, ast.ClassDef) and c.bases]
    fields = [f for c in typed for f in c.body if isinstance(f, ast.AnnAssign)]

    assert not [a for a in aliases if isinstance(a.value, ast.BinOp) and isinstance(a.value.op, ast.BitOr)]
    assert not [f for f in fields if "|" in ast.unparse(f.annotation) or "dict[" in ast.unparse(f.annotation)]


def test_the_agent_alone_inspects_a_bundle_and_refuses_a_broken_one(tmp_path: Path) -> None:
    """As on a device: another folder, no edgepack on the path, no environment."""
    path = bundle(tmp_path, signed=False)
    lonely = tmp_path / "agent.py"
    lonely.write_bytes(AGENT.read_bytes())
    command = [sys.executable, "-I", str(lonely), "inspect", "--json"]

    good = subprocess.run([*command, str(path)], capture_output=True, text=True, env={}, check=False)
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    bad = subprocess.run([*command, str(path)], capture_output=True, text=True, env={}, check=False)

    assert good.returncode == 0
    assert json.loads(good.stdout)["signature"]["state"] == "unsigned"
    assert bad.returncode == 6
    assert bad.stderr.splitlines()[-1].startswith("refused: ")
    assert "Traceback" not in bad.stderr


def test_a_missing_bundle_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(AGENT), "inspect", str(tmp_path / "none.tar")],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        check=False,
    )

    assert done.returncode == 6
    assert "is not a file" in done.stderr


SMAPS = """\
7f10a0000000-7f10a0800000 r--p 00000000 fe:00 41                         /lib/libtorch_cpu.so
Size:               8192 kB
Rss:                4096 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
7f10a0800000-7f10a1000000 r-xp 00800000 fe:00 41                         /lib/libtorch_cpu.so
Rss:                6144 kB
Anonymous:          1024 kB
7f10b0000000-7f10b0800000 r--s 00000000 fe:00 42                         /model/model.safetensors
Rss:                8192 kB
Anonymous:             0 kB
7f10d0000000-7f10d0001000 r-xp 00000000 00:00 0
Rss:                   4 kB
Anonymous:             0 kB
"""


def test_pages_of_code_are_those_of_libraries_and_not_of_weights() -> None:
    assert agent.code_pages(SMAPS.splitlines()) == {("fe:00", "41"): 9 * MIB}
