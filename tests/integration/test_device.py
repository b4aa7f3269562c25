"""An aarch64 device (scripts/device.py) from its first release to a mended one: as a Raspberry Pi, but for speed.

The first run on a machine makes the device's root, half a minute of CPU; the cache keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import markupsafe
import pytest
from click.testing import CliRunner, Result

from edgepack import bundle as bundles
from edgepack import workspace
from edgepack.bundle import Bundle, sign
from edgepack.cli import cli
from edgepack.device import agent
from edgepack.progress import Silent
from edgepack.units import MIB
from tests.integration import pack_one
from tests.integration.pack_one import Inputs
from tests.sshd import Line

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import device as devices

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BOARD = "raspberry-pi-5-8gb"
HOST = "device"
STORE = "/var/lib/edgepack"
NOT_COMPARABLE = {
    "device", "free memory", "peak memory", "unexplained rest", "budget", "decode", "prefill", "first token",
    "decode, context full",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    state: Path

    @property
    def ssh(self) -> tuple[str, ...]:
        return ("ssh", "-F", str(devices.ssh_config(self.state)))

    @property
    def port(self) -> int:
        found = re.search(r" Port (\d+)\n", devices.ssh_config(self.state).read_text(encoding="ascii"))
        assert found is not None
        return int(found[1])

    @property
    def root(self) -> Path:
        return self.state / "root"

    @property
    def store(self) -> Path:
        """The store's folder, as this machine sees it."""
        return self.root / STORE.lstrip("/")

    def run(self, *words: str) -> str:
        done = subprocess.run([*self.ssh, HOST, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@dataclass(frozen=True, slots=True, kw_only=True)
class Releases:
    """Three releases for the board, signed by one key: a good one, one whose weights are broken, a newer good one."""

    key: Path
    first: Path
    broken: Path
    second: Path
    inputs: Path
    """What the first one was packed from (pack_one)."""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    state = tmp_path_factory.mktemp("device")
    devices.start(state, Silent())
    with pytest.MonkeyPatch.context() as patch:
        found = Device(state=state)
        patch.setenv("EDGEPACK_SSH", " ".join(found.ssh))
        try:
            yield found
        finally:
            devices.stop(state, remove=True)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    folder = tmp_path_factory.mktemp("releases")
    key = folder / "key"
    sign.new_key(key)
    key.with_suffix(".signers").write_text(sign.allowed_signer(key), encoding="ascii")
    inputs = folder / "inputs"
    first = built(folder / "first", key, sequence=1, context=192, inputs=inputs)
    second = built(folder / "second", key, sequence=3, context=128)
    return Releases(
        key=key,
        first=first,
        broken=with_broken_weights(inputs, folder / "broken"),
        second=second,
        inputs=inputs,
    )


def built(folder: Path, key: Path, *, sequence: int, context: int, inputs: Path | None = None) -> Path:
    """`edgepack build` for the board; what it packed is laid into ``inputs``."""
    write = bundles.write

    def noted(plan: Any, artifact: Any, out: Path, **given: Any) -> Bundle:
        if inputs is not None:
            found = {name: given[name] for name in ("checkpoint", "quality", "sequence")}
            pack_one.record(
                inputs, Inputs(plan=plan, artifact=artifact, **found), given["selftest"], server=given["runtime"],
                key=key,
            )  # fmt: skip
        return write(plan, artifact, out, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "write", noted)
        return build(folder, BOARD, key, "--with-runtime", sequence=sequence, context=context)


def build(folder: Path, profile: str, key: Path, *more: str, sequence: int, context: int) -> Path:
    done = command(
        "build", "--profile", profile, "--model", "demo", "--runtime", "llama.cpp", "--context", context, *more,
        "--key", key, "--release-sequence", sequence, "-o", folder, "--json",
    )  # fmt: skip
    return Path(json.loads(done.stdout)["path"])


def with_sequence(inputs: Path, folder: Path, sequence: int) -> Path:
    """The release of these inputs, later."""
    shutil.copytree(inputs, folder)
    found = json.loads((folder / pack_one.INPUTS).read_text(encoding="utf-8"))
    found["sequence"] = sequence
    (folder / pack_one.INPUTS).write_text(json.dumps(found), encoding="utf-8")
    return pack_one.pack(folder, folder / "later.tar").path


def with_broken_weights(inputs: Path, folder: Path) -> Path:
    """A release of the next sequence, whole and signed, whose weights were broken before it was packed."""
    shutil.copytree(inputs, folder)
    model = folder / pack_one.MODEL
    content = bytearray(model.read_bytes())
    half = len(content) // 2
    content[half:] = content[half:][::-1]
    model.write_bytes(content)
    found = json.loads((folder / pack_one.INPUTS).read_text(encoding="utf-8"))
    found["artifact"]["sha256"] = hashlib.sha256(content).hexdigest()
    found["sequence"] = 2
    (folder / pack_one.INPUTS).write_text(json.dumps(found), encoding="utf-8")
    return pack_one.pack(folder, folder / "broken.tar").path


def command(*words: object, status: int = 0) -> Result:
    done = CliRunner().invoke(cli, ["-q", *map(str, words)])
    assert done.exit_code == status, done.output
    return done


def answer(*words: object, status: int = 0) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(command(*words, "--json", status=status).stdout)
    return found


@pytest.fixture(scope="module")
def flashed(device: Device, releases: Releases) -> Mapping[str, Any]:
    """The first release on the device, by its own test good."""
    signers = releases.key.with_suffix(".signers")
    command("flash", "--enroll", "--mode", "none", "--signers", signers, HOST)
    return answer("flash", releases.first, HOST)


def test_the_device_is_an_arm_that_knows_that_it_is_none(device: Device, flashed: Mapping[str, Any]) -> None:
    machine = json.loads(device.run("python3", f"{STORE}/agent.pyz", "facts"))["machine"]

    assert device.run("uname", "-m") == "aarch64\n"
    assert (machine["arch"], machine["emulated"]) == ("aarch64", True)
    assert machine["memory_total"] == 8050 * MIB


def test_a_release_passes_its_test_there_and_speed_is_not_judged(
    device: Device, flashed: Mapping[str, Any]
) -> None:
    report = flashed["report"]

    status = {item["name"]: item["status"] for item in report["items"]}
    assert (flashed["outcome"], report["verdict"]) == ("good", "passed under emulation")
    assert report["emulated"] == "a machine that emulates aarch64"
    assert {name for name, said in status.items() if said == "not-comparable"} == NOT_COMPARABLE
    assert {said for name, said in status.items() if name not in NOT_COMPARABLE} <= {"pass", "note"}
    assert report["facts"]["server"]["source"] == "bundle"
    assert (device.store / "current").readlink().name == flashed["release"]


def test_a_release_is_checked_there_without_a_switch(
    device: Device, releases: Releases, flashed: Mapping[str, Any]
) -> None:
    report = answer("check", releases.second, "--on", HOST)

    assert report["verdict"] == "passed under emulation"
    assert (device.store / "current").readlink().name == flashed["release"]


def test_a_release_that_answers_wrong_goes_back_by_itself(
    device: Device, releases: Releases, flashed: Mapping[str, Any]
) -> None:
    back = answer("flash", releases.broken, HOST, status=5)

    assert (back["outcome"], back["previous"]) == ("rolled-back", flashed["release"])
    assert (device.store / "current").readlink().name == flashed["release"]


def test_a_bundle_for_another_board_is_refused_before_it_travels(
    device: Device, releases: Releases, flashed: Mapping[str, Any], tmp_path: Path
) -> None:
    other = build(tmp_path, "raspberry-pi-5-4gb", releases.key, sequence=9, context=192)
    blobs = set((device.store / "blobs" / "sha256").iterdir())

    refused = command("flash", other, HOST, status=6)

    assert "built for another device: memory is" in refused.output
    assert set((device.store / "blobs" / "sha256").iterdir()) == blobs


def test_a_dry_run_there_says_what_it_would_do_and_writes_nothing(
    device: Device, releases: Releases, flashed: Mapping[str, Any]
) -> None:
    before = contents(device.store)
    here = {path.name for path in (device.store / "blobs" / "sha256").iterdir()}
    lacking = {
        file["digest"].removeprefix("sha256:") for file in agent.read_bundle(str(releases.second))["files"]
    } - here

    planned = answer("flash", releases.second, HOST, "--dry-run")

    assert planned["outcome"] == "planned"
    assert [step["action"] for step in planned["steps"]] == [*(["send"] if lacking else []), "install"]
    assert contents(device.store) == before


def contents(store: Path) -> Mapping[str, str | None]:
    """What files of a store hold, and what links name; the lock says who had it last."""
    return {
        str(path.relative_to(store)): str(path.readlink()) if path.is_symlink() else file_digest(path)
        for path in store.rglob("*")
        if path.name != "lock"
    }


def file_digest(path: Path) -> str | None:
    return workspace.sha256_file(path) if path.is_file() else None


def test_one_flipped_byte_is_found_and_only_its_file_travels_again_though_the_line_is_cut(
    device: Device, releases: Releases, flashed: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = device.store / "current" / "model.gguf"
    whole = hashlib.sha256(model.read_bytes()).hexdigest()
    size = model.stat().st_size
    cut = size * 4 // 5
    flip(model)

    found = answer("flash", "--fsck", HOST, status=6)
    with Line(device.port) as line:
        monkeypatch.setenv("EDGEPACK_SSH", " ".join((*device.ssh, "-p", str(line.port))))
        line.cut_after(cut)
        mended = answer("flash", "--fsck", releases.first, HOST)
    monkeypatch.setenv("EDGEPACK_SSH", " ".join(device.ssh))
    after = answer("flash", "--fsck", HOST)

    assert [(bad["path"], bad["bytes"]) for bad in found["bad"]] == [(f"blobs/sha256/{whole}", size)]
    assert {lost["path"] for lost in found["missing"]} == {"model.gguf"}  # of each release that has it
    assert line.cuts == 1
    assert size < mended["sent"] < size + cut  # not all of it again
    assert (after["bad"], after["missing"]) == ([], [])
    assert hashlib.sha256((device.store / "current" / "model.gguf").read_bytes()).hexdigest() == whole


def flip(path: Path) -> None:
    """Changes one bit in the middle, as worn flash does."""
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def test_the_same_inputs_give_the_same_bundle_on_either_architecture(
    device: Device, releases: Releases, tmp_path: Path
) -> None:
    place = device.root / "srv" / "packing"
    without = shutil.ignore_patterns("__pycache__", "models", "*.so")
    for package in (ROOT / "edgepack", ROOT / "templates", ROOT / "profiles", *pure(jinja2, markupsafe)):
        shutil.copytree(package, place / package.name, ignore=without)
    shutil.copytree(releases.inputs, place / "inputs")
    shutil.copy2(str(pack_one.__file__), place)

    said = device.run(
        "cd", "/srv/packing", "&&", "PYTHONPATH=/srv/packing", "python3", "pack_one.py", "inputs", "there.tar"
    )
    here = pack_one.pack(releases.inputs, tmp_path / "here.tar")

    assert said.strip() == here.manifest_digest
    assert (place / "there.tar").read_bytes() == releases.first.read_bytes() == here.path.read_bytes()


def pure(*modules: ModuleType) -> list[Path]:
    """Folders of packages that run on any Python once their compiled parts are left out."""
    return [Path(str(module.__file__)).parent for module in modules]


def test_releases_that_are_asked_to_stay_are_what_a_device_goes_back_to(
    device: Device, releases: Releases, flashed: Mapping[str, Any], tmp_path: Path
) -> None:
    """More than the two that stay by default."""
    third = with_sequence(releases.inputs, tmp_path / "third", 4)

    done = [answer("flash", path, HOST, "--keep", 3, "--no-self-test") for path in (releases.second, third)]
    back = [answer("flash", "--rollback", HOST)["current"] for _ in done]

    assert [one["outcome"] for one in done] == ["good", "good"]
    assert back == [done[0]["release"], flashed["release"]]
    assert (device.store / "current").readlink().name == flashed["release"]


def test_the_power_goes_and_what_ran_still_runs(device: Device, flashed: Mapping[str, Any]) -> None:
    devices.stop(device.state)
    devices.start(device.state, Silent())

    status = answer("flash", "--status", HOST)

    assert status["store"]["current"] == flashed["release"]
