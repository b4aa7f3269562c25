"""Fleets on the engines themselves: ansible-playbook over a real sshd, Debian's swupdate with a real llama-server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgepack import devices, flash, fleet, probe, remote, swu
from edgepack.bundle import sign
from edgepack.cli import cli
from edgepack.devices import Where
from edgepack.progress import Silent
from tests import hawkbit, releases
from tests.documents import obeys
from tests.plans import example_plan
from tests.releases import Signer
from tests.sshd import HOST, Sshd

pytestmark = pytest.mark.integration


def this_machine(folder: Path, name: str) -> Path:
    """A profile of this machine."""
    text = probe.to_yaml(probe.probe(Path("/")))
    path = folder / f"{name}.yaml"
    path.write_text(re.sub(r"(?m)^name: .*", f"name: {name}", text), encoding="utf-8")
    return path


def current(root: Path) -> str | None:
    return (root / "current").resolve().name if (root / "current").exists() else None


def events(root: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (root / "journal.jsonl").read_text().splitlines()]


def inventory(path: Path, sshd: Sshd, groups: dict[str, dict[str, Path]]) -> Path:
    """Hosts that are all behind one sshd, each with a store of its own."""
    lines = []
    for group, hosts in groups.items():
        lines += [f"[{group}]", *(f"{name} edgepack_root={root}" for name, root in hosts.items())]
    lines += ["[all:vars]", f"ansible_host={HOST}", f"ansible_ssh_common_args='-F {sshd.folder}/ssh_config'"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_canary_fails_goes_back_and_no_other_host_is_touched(
    sshd: Sshd, signer: Signer, tmp_path: Path
) -> None:
    plan = example_plan(str(this_machine(tmp_path, "kiosk")))
    good = releases.bundle(tmp_path / "good.tar", signer.key, sequence=1, plan=plan)
    bad = releases.bundle(tmp_path / "bad.tar", signer.key, sequence=2, plan=plan)
    roots = {name: tmp_path / name for name in ("first", "second", "third")}
    with closing(remote.connect(HOST, ssh=sshd.ssh, interactive=False)) as line:
        for root in roots.values():
            where = Where(root=str(root), mode="none")
            devices.enroll(
                line, where, signers=signer.signers, server=None, keep=None, replace_signers=False, progress=Silent()
            )  # fmt: skip
            releases.Device(root).run("install", good, "--force-device")
    before = releases.release_of(good)
    assert {current(root) for root in roots.values()} == {before}
    journals = {name: events(root) for name, root in roots.items()}
    hosts = inventory(tmp_path / "hosts.ini", sshd, {"kiosk": roots})

    told = CliRunner().invoke(
        cli,
        ["--quiet", "flash", str(bad), "--inventory", str(hosts), "--json", "-o", str(tmp_path / "r.json")],
    )

    assert told.exit_code == 5
    report = obeys("flash-fleet", (tmp_path / "r.json").read_bytes())
    outcomes = {name: row["outcome"] for name, row in report["hosts"].items()}
    assert outcomes == {"first": "rolled-back", "second": "untouched", "third": "untouched"}
    canary = report["hosts"]["first"]
    assert canary["passed"] is False and canary["reasons"] and canary["seconds_to_switch"] is not None
    assert canary["previous"] == before
    assert {current(root) for root in roots.values()} == {before}
    assert "went-back" in events(roots["first"])
    for name in ("second", "third"):
        assert events(roots[name]) == journals[name], "not even asked"


def playbook(project: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a playbook of an emitted project as its README says."""
    return subprocess.run(
        [fleet.ansible(), name, *words],
        cwd=project,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_project_flashes_two_kinds_of_hosts_without_edgepack_and_stops_in_the_middle(
    sshd: Sshd, signer: Signer, tmp_path: Path
) -> None:
    """One canary of each kind, then half of five; one of that half is not enrolled, so the last host stays as it is."""
    kinds = ("kiosk", "robot")
    bundles = [
        releases.bundle(
            tmp_path / f"{kind}.tar", signer.key, plan=example_plan(str(this_machine(tmp_path, kind)))
        )
        for kind in kinds
    ]
    project = tmp_path / "fleet"
    fleet.emit(bundles, project, signers=signer.signers, progress=Silent())
    roots = {name: tmp_path / name for name in ("k1", "k2", "k3", "r1", "r2")}
    groups = {
        "kiosk": {n: roots[n] for n in ("k1", "k2", "k3")},
        "robot": {n: roots[n] for n in ("r1", "r2")},
    }
    inventory(project / "inventory.ini", sshd, groups)
    options = ("-e", json.dumps({"edgepack_mode": "none", "edgepack_options": ["--no-self-test"]}))

    enrolled = playbook(project, "enroll.yml", "-e", "edgepack_mode=none", "--limit", "!k3")
    asked = playbook(project, "flash.yml", "--check", "--limit", "k1", *options)
    asked_before = {name: current(root) for name, root in roots.items()}
    flashed = playbook(project, "flash.yml", *options)

    assert enrolled.returncode == 0, enrolled.stdout + enrolled.stderr
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert set(asked_before.values()) == {None}
    assert flashed.returncode == 2, flashed.stdout + flashed.stderr
    hosts: Any = json.loads((project / "report.json").read_text())["hosts"]
    assert list(hosts) == ["k1", "r1", "k2", "k3", "r2"], "canaries come first"
    assert {name: row["outcome"] for name, row in hosts.items()} == {
        "k1": "good", "r1": "good", "k2": "good", "k3": "failed", "r2": "untouched",
    }  # fmt: skip
    assert hosts["k3"]["status"] == 2 and "enroll this device first" in hosts["k3"]["said"][-1]
    kiosk, robot = map(releases.release_of, bundles)
    assert {name: current(root) for name, root in roots.items()} == {
        "k1": kiosk, "k2": kiosk, "k3": None, "r1": robot, "r2": None,
    }  # fmt: skip
    assert json.loads((project / "report.r1.json").read_text())["sent"] == hosts["r1"]["sent"] > 5000
    assert events(roots["r2"]) == ["enrolled"]


def test_a_host_without_a_bundle_ends_it_before_it_begins(sshd: Sshd, signer: Signer, tmp_path: Path) -> None:
    plans = {name: example_plan(name) for name in ("raspberry-pi-5-8gb", "jetson-orin-nano-8gb")}
    bundles = [
        releases.bundle(tmp_path / f"{name}.tar", signer.key, plan=plan) for name, plan in plans.items()
    ]
    hosts = inventory(
        tmp_path / "hosts.ini",
        sshd,
        {"raspberry_pi_5_8gb": {"pi": tmp_path / "pi"}, "attic": {"x": tmp_path / "x"}},
    )

    done = CliRunner().invoke(cli, ["-q", "flash", *map(str, bundles), "--inventory", str(hosts)])

    assert done.exit_code == 2
    assert "x has 0 bundles, not one" in done.output
    assert "raspberry-pi-5-8gb, jetson-orin-nano-8gb" in done.output


def test_what_a_device_says_is_text_and_what_the_inventory_says_of_devices_is_not_done_here(
    signer: Signer, tmp_path: Path
) -> None:
    """A device's words that Ansible would take for a template, and connection variables that fail on this machine."""
    project = tmp_path / "fleet"
    bundle = releases.bundle(tmp_path / "b.tar", signer.key)
    fleet.emit((bundle,), project, signers=signer.signers, progress=Silent())
    mark = tmp_path / "ran"
    evil = f"{{{{ lookup('pipe', 'touch {mark}') }}}}"
    answer = {
        "outcome": "rolled-back",
        "name": evil,
        "previous": evil,
        "reasons": [evil],
        "report": {"passed": evil},
    }
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.stdout.write({json.dumps(answer)!r})\nsys.exit(5)\n")
    (project / "inventory.ini").write_text(
        "[all]\nlocalhost\n[all:vars]\nansible_connection=ssh\nansible_host=192.0.2.1\nansible_become=true\n"
        "ansible_become_exe=/nowhere\nansible_python_interpreter=/nowhere\nedgepack_sudo=false\n"
    )

    words = json.dumps({"edgepack_program": [sys.executable, str(program)]})
    done = playbook(project, "flash.yml", "-e", words)

    row: Any = json.loads((project / "report.json").read_text())["hosts"]["localhost"]
    assert done.returncode == 2
    assert (row["outcome"], row["status"], row["passed"]) == ("rolled-back", 5, False)
    assert row["reasons"] == [evil] and row["name"] == evil
    assert not mark.exists()


# ── SWUpdate ──


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """A key that signs images, and its certificate, as docs/fleet.md makes them."""

    key: Path
    certificate: Path


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    folder = tmp_path_factory.mktemp("certificate")
    made = Certified(key=folder / "fleet.key", certificate=folder / "fleet.crt")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-subj", "/CN=fleet",
         "-addext", "extendedKeyUsage=emailProtection", "-keyout", made.key, "-out", made.certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def demo(signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with its server, for this machine."""
    folder = tmp_path_factory.mktemp("demo")
    words = [
        "-q", "build", "--profile", this_machine(folder, "kiosk"), "--model", "demo", "--with-runtime", "--context",
        256, "--no-quality", "--key", signer.key, "-o", folder, "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return Path(json.loads(done.stdout)["path"])


def store(root: Path, signers: Path) -> Path:
    with closing(remote.connect(f"{root}/", interactive=False)) as line:
        devices.enroll(
            line, Where(), signers=signers, server=None, keep=None, replace_signers=False, progress=Silent()
        )
    return root


def image(bundle: Path, out: Path, certified: Certified, root: Path) -> Path:
    done = CliRunner().invoke(
        cli,
        ["-q", "emit", "--swu", str(bundle), "--cert", str(certified.certificate), "--key", str(certified.key),
         "--root", str(root), "-o", str(out), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    obeys("emit-swu", done.stdout)
    return out


WEIGHTS = b"GGUF" + bytes(2 << 20)
"""More than fits into a socket: `swupdate -i` is done with a smaller image before it knows what became of it."""


def swupdate(
    image: Path, certified: Certified, *, hardware: str = "edge:kiosk"
) -> subprocess.CompletedProcess[str]:
    """Debian's swupdate on an image, as its daemon would take it from a server."""
    place = image.with_suffix(".tmp")
    place.mkdir(exist_ok=True)
    return subprocess.run(
        ["swupdate", "-v", "-H", hardware, "-k", certified.certificate, "-i", image],
        cwd=place,
        env={**os.environ, "TMPDIR": str(place)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def test_swupdate_installs_an_image_by_the_agent_that_is_enrolled(
    signer: Signer, certified: Certified, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swu, "PART", 8 << 20)  # so that it comes in parts, as a bundle above 3.5 GiB does
    root = store(tmp_path / "store", signer.signers)
    made = image(demo, tmp_path / "x.swu", certified, root)

    again = image(demo, tmp_path / "y.swu", certified, root)
    done = swupdate(made, certified)

    assert made.read_bytes() == again.read_bytes()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "bundle.tar.02" in done.stdout
    release = flash.load(demo, None).release
    assert f"release {release}; good" in done.stdout
    assert current(root) == release
    assert {"tested", "good"} <= set(events(root))
    assert not list(root.glob(".swupdate*")), "nothing is left of the bundle's file"


def test_swupdate_refuses_what_was_changed_and_other_hardware(
    signer: Signer, certified: Certified, tmp_path: Path
) -> None:
    plan = example_plan(str(this_machine(tmp_path, "kiosk")))
    bundle = releases.bundle(tmp_path / "b.tar", signer.key, plan=plan, weights=WEIGHTS)
    root = store(tmp_path / "store", signer.signers)
    made = image(bundle, tmp_path / "x.swu", certified, root)
    content = made.read_bytes()
    damaged: dict[str, Path] = {}
    for name, place in (
        ("description", content.index(b"sw-description") + 40),
        ("bundle", len(content) - 3000),
    ):
        damaged[name] = tmp_path / f"{name}.swu"
        damaged[name].write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])

    described = swupdate(damaged["description"], certified)
    changed = swupdate(damaged["bundle"], certified)
    elsewhere = swupdate(made, certified, hardware="edge:other")

    assert [done.returncode for done in (described, changed, elsewhere)] == [1, 1, 1]
    assert "HASH mismatch" in changed.stderr
    assert "SW not compatible with hardware" in elsewhere.stderr
    assert current(root) is None
    assert "switching" not in events(root)


def test_the_agent_refuses_a_stranger_before_the_weights_come(
    signer: Signer, certified: Certified, tmp_path: Path
) -> None:
    """SWUpdate's own signature is right; that of the bundle is not one that the device knows."""
    other = tmp_path / "other"
    sign.new_key(other)
    plan = example_plan(str(this_machine(tmp_path, "kiosk")))
    bundle = releases.bundle(tmp_path / "b.tar", other, plan=plan, weights=WEIGHTS)
    root = store(tmp_path / "store", signer.signers)

    done = swupdate(image(bundle, tmp_path / "x.swu", certified, root), certified)

    assert done.returncode == 1
    assert "that signed this is not in" in done.stderr
    assert "Installing STREAM" not in done.stdout
    assert events(root) == ["enrolled"]


def test_an_image_that_fails_its_test_fails_the_update_and_goes_back(
    signer: Signer, certified: Certified, tmp_path: Path
) -> None:
    plan = example_plan(str(this_machine(tmp_path, "kiosk")))
    good = releases.bundle(tmp_path / "good.tar", signer.key, sequence=1, plan=plan)
    bad = releases.bundle(tmp_path / "bad.tar", signer.key, sequence=2, plan=plan, weights=WEIGHTS)
    root = store(tmp_path / "store", signer.signers)
    releases.Device(root).run("install", good, "--force-device")

    done = swupdate(image(bad, tmp_path / "x.swu", certified, root), certified)

    assert done.returncode == 1
    assert f"release {releases.release_of(bad)}; rolled-back; " in done.stderr
    assert current(root) == releases.release_of(good)
    assert not list(root.glob(".swupdate*"))


def test_devices_behind_nat_fetch_images_and_hawkbit_learns_what_came_of_them(
    signer: Signer, certified: Certified, tmp_path: Path
) -> None:
    """SWUpdate's own client, as docs/fleet.md sets it up: `-p` after an update, `-c 2` at the start that follows."""
    plan = example_plan(str(this_machine(tmp_path, "kiosk")))
    root = store(tmp_path / "store", signer.signers)
    images = []
    for sequence in (1, 2):
        bundle = releases.bundle(
            tmp_path / f"{sequence}.tar", signer.key, sequence=sequence, plan=plan, weights=WEIGHTS
        )
        images.append(image(bundle, tmp_path / f"{sequence}.swu", certified, root))
    good = releases.release_of(tmp_path / "1.tar")
    releases.Device(root).run("install", tmp_path / "1.tar", "--force-device")
    mark = tmp_path / "installed"
    hook = tmp_path / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {mark}\n")
    hook.chmod(0o755)

    with hawkbit.serving(images[0]) as server:
        first = server.client(
            "kiosk-01", certified.certificate, "edge:kiosk", tmp_path, hook, until=mark.exists
        )
        closed_before = list(server.closed)
        second = server.client("kiosk-01", certified.certificate, "edge:kiosk", tmp_path, hook, "-c 2")
        learned = list(server.closed)
    with hawkbit.serving(images[1]) as server:
        third = server.client("kiosk-01", certified.certificate, "edge:kiosk", tmp_path, hook)
        refused = list(server.closed)

    assert f"release {good}; current" in first and not closed_before
    assert learned == ["success"], second
    assert refused == ["failure"], third
    assert "rolled-back" in third
    assert current(root) == good
