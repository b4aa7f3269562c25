"""Fleets, and other tools' forms of a bundle: what is written, and what is made of what Ansible says."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgepack import devices, enrolled, flash, fleet, remote, swu
from edgepack.bundle import sign
from edgepack.cli import cli
from edgepack.device import installer
from edgepack.errors import BadInput, MissingTool, NotFound, Untrusted
from edgepack.flash import Asked, Cargo
from edgepack.fleet import FleetReport, HostReport
from edgepack.progress import Silent
from tests import releases
from tests.plans import example_plan

FILES = {
    "README.md",
    "ansible.cfg",
    "bundles/jetson.tar",
    "bundles/pi.tar",
    "enroll.yml",
    "flash.yml",
    "inventory.ini",
    "roles/edgepack/defaults/main.yml",
    "roles/edgepack/files/agent.pyz",
    "roles/edgepack/files/allowed_signers",
    "roles/edgepack/files/enroll.txt",
    "roles/edgepack/files/push.py",
    "roles/edgepack/meta/main.yml",
    "roles/edgepack/tasks/enroll.yml",
    "roles/edgepack/tasks/main.yml",
    "vars/bundles.yml",
}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    sign.new_key(path)
    path.with_suffix(".allowed_signers").write_text(sign.allowed_signer(path), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bundles(key: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    jetson = example_plan("jetson-orin-nano-8gb")
    return (
        releases.bundle(folder / "pi.tar", key, sequence=3),
        releases.bundle(folder / "jetson.tar", key, sequence=7, plan=jetson),
    )


@pytest.fixture(scope="module")
def cargo(bundles: tuple[Path, Path]) -> Cargo:
    return flash.load(bundles[0], None)


def signers(key: Path) -> Path:
    return key.with_suffix(".allowed_signers")


def tree(folder: Path) -> Mapping[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ── the Ansible project ──


def test_a_project_holds_all_that_flashing_takes(
    bundles: tuple[Path, Path], key: Path, tmp_path: Path
) -> None:
    fleet.emit(bundles, tmp_path / "fleet", signers=signers(key), progress=Silent())

    found = tree(tmp_path / "fleet")
    assert set(found) == FILES
    assert found["bundles/pi.tar"] == bundles[0].read_bytes()
    assert found["roles/edgepack/files/agent.pyz"] == enrolled.zipapp()
    assert found["roles/edgepack/files/allowed_signers"] == signers(key).read_bytes()
    rows = json.loads(found["vars/bundles.yml"])["edgepack_bundles"]
    assert [(row["file"], row["group"], row["sequence"], row["path"]) for row in rows] == [
        ("pi.tar", "raspberry-pi-5-8gb", 3, "bundles/pi.tar"),
        ("jetson.tar", "jetson-orin-nano-8gb", 7, "bundles/jetson.tar"),
    ]
    assert rows[0]["release"] == releases.release_of(bundles[0])
    assert "`bundles/jetson.tar` | `jetson-orin-nano-8gb` | 7" in found["README.md"].decode()
    assert "[raspberry-pi-5-8gb]" in found["inventory.ini"].decode()


@pytest.mark.parametrize("name", ["{{ lookup('pipe', 'id -un') }}", "two\nlines", "{% raw %}"])
def test_words_of_a_bundle_are_no_templates(key: Path, tmp_path: Path, name: str) -> None:
    plan = example_plan("raspberry-pi-5-8gb")
    plan = replace(plan, profile=replace(plan.profile, name=name))
    path = releases.bundle(tmp_path / "any.tar", key, sequence=1, plan=plan)

    with pytest.raises(BadInput, match="whose name is none"):
        fleet.emit([path], tmp_path / "fleet", signers=signers(key), progress=Silent())
    assert not (tmp_path / "fleet").exists()


def test_a_file_s_name_is_no_template(bundles: tuple[Path, Path], key: Path, tmp_path: Path) -> None:
    odd = tmp_path / "{{ odd }}.tar"
    odd.write_bytes(bundles[0].read_bytes())

    with pytest.raises(BadInput, match="take for a template"):
        fleet.emit([odd], tmp_path / "fleet", signers=signers(key), progress=Silent())


def test_the_same_bundles_make_the_same_project(
    bundles: tuple[Path, Path], key: Path, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        fleet.emit(bundles, tmp_path / name, signers=signers(key), progress=Silent())

    assert tree(tmp_path / "one") == tree(tmp_path / "other")


def test_a_folder_that_is_there_is_not_overwritten(
    bundles: tuple[Path, Path], key: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="is there already"):
        fleet.emit(bundles, tmp_path, signers=signers(key), progress=Silent())


def test_two_bundles_of_one_file_name_are_refused(
    key: Path, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"two bundles are named pi\.tar"):
        fleet.emit((bundles[0], bundles[0]), tmp_path / "x", signers=signers(key), progress=Silent())


def test_an_unsigned_bundle_is_for_no_fleet(key: Path, tmp_path: Path) -> None:
    unsigned = releases.bundle(tmp_path / "u.tar", None)

    with pytest.raises(Untrusted, match="not signed"):
        fleet.emit((unsigned,), tmp_path / "x", signers=signers(key), progress=Silent())

    assert not (tmp_path / "x").exists()


# ── push.py, on a store of this machine ──


def push(root: Path, project: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    program = project / "roles/edgepack/files/push.py"
    return subprocess.run(
        [sys.executable, "-I", program, *words, root], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def project(bundles: tuple[Path, Path], key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "fleet"
    fleet.emit(bundles, folder, signers=signers(key), progress=Silent())
    return folder


def test_the_script_enrolls_and_flashes_without_edgepack(project: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    bundle = project / "bundles/pi.tar"

    told = push(root, project, "--enroll", "--mode", "none")
    planned = push(root, project, "--dry-run", "--force", bundle)
    there_before = (root / "current").exists()
    done = push(root, project, "--force", "--no-self-test", bundle)
    again = push(root, project, "--force", "--no-self-test", bundle)

    assert told.returncode == 0, told.stderr
    assert (root / "agent.pyz").read_bytes() == enrolled.zipapp()
    assert json.loads(planned.stdout)["outcome"] == "planned" and not there_before
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["outcome"] == "good"
    assert document["release"] == releases.release_of(bundle) == (root / "current").resolve().name
    assert document["sent"] > 5000
    assert json.loads(again.stdout)["outcome"] == "current"
    assert json.loads(again.stdout)["sent"] == 0


def test_the_script_knows_what_edgepack_knows(project: Path) -> None:
    told = runpy.run_path(str(project / "roles/edgepack/files/push.py"))

    assert (told["SYSTEM_ROOT"], told["USER_ROOT"]) == (installer.SYSTEM_ROOT, installer.USER_ROOT)
    assert (told["PATIENCE"], told["LOST"]) == (flash.PATIENCE, remote.LOST)
    assert told["BUSY"] == installer.STATUS[installer.Busy]


def test_the_script_says_before_anything_travels_how_many_releases_stay(project: Path) -> None:
    told = runpy.run_path(str(project / "roles/edgepack/files/push.py"))
    asked: list[list[str]] = []

    class Current:
        """A device that runs the bundle already."""

        def ask(self, words: list[str], _: object = ()) -> dict[str, object]:
            asked.append(words)
            return {"state": "current", "good": True, "missing": []}

    parsed = argparse.Namespace(
        host="pi", dry_run=False, no_self_test=False, allow_downgrade=True, force=False, keep=1
    )
    told["push"](Current(), told["Bundle"](str(project / "bundles/pi.tar")), parsed)

    assert asked == [["offer", "--allow-downgrade", "--keep", "1"], ["gc", "--keep", "1"]]


def test_the_script_ends_with_the_agents_own_status_and_reason(project: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    push(root, project, "--enroll", "--mode", "none")

    refused = push(root, project, project / "bundles/jetson.tar")
    unknown = push(tmp_path / "nothing", project, project / "bundles/pi.tar")
    (tmp_path / "no.tar").write_bytes(b"not a bundle")
    broken = push(root, project, tmp_path / "no.tar")

    assert refused.returncode == 6 and "built for another device" in refused.stderr
    assert unknown.returncode == 2 and "enroll this device first" in unknown.stderr
    assert broken.returncode == 2 and "no bundle" in broken.stderr
    assert "Traceback" not in refused.stderr + unknown.stderr + broken.stderr
    assert not (root / "current").exists()


def test_a_release_that_fails_there_is_told_with_its_reasons(project: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    push(root, project, "--enroll", "--mode", "none")

    done = push(root, project, "--force", project / "bundles/pi.tar")

    assert done.returncode == 5
    document = json.loads(done.stdout)
    assert document["outcome"] == "rolled-back"
    assert document["report"]["passed"] is False
    assert document["reasons"]
    assert not (root / "current").exists()


# ── what Ansible says ──


def host(**fields: Any) -> HostReport:
    return HostReport(**{"bundle": "pi.tar", "release": "ab" * 32, "outcome": "good", "status": 0, **fields})


def test_the_report_says_who_failed_and_how_many_were_left_alone() -> None:
    back = host(
        outcome="rolled-back", status=5, reasons=("no memory",), passed=False, sent=2048, seconds_to_send=1.0
    )
    left = host(outcome="untouched", status=None)
    done = FleetReport(
        hosts={"a": back, "b": left, "c": left}, documents={"a": {"report": {"passed": False}}}
    )

    failure = fleet.shortfall(done)
    document: Any = fleet.to_document(done)

    assert failure is not None
    assert failure.message == "1 of 3 hosts failed (a rolled-back), and 2 were not touched"
    assert failure.exit_code == 5
    assert fleet.table(done).splitlines()[:2] == [
        "a  pi.tar  rolled-back, self-test FAILED, 2.0 KiB in 1.0 s",
        "   no memory",
    ]
    assert document["hosts"]["a"]["report"] == {"passed": False}
    assert document["hosts"]["b"]["outcome"] == "untouched"
    assert fleet.shortfall(FleetReport(hosts={"a": host()}, documents={})) is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            'fatal: [a]: FAILED! => {"changed": false, "msg": "a has 0 bundles"}',
            "fatal: [a]: FAILED!: a has 0 bundles",
        ),
        ("fatal: [a]: FAILED! => {not json", "fatal: [a]: FAILED! => {not json"),
        ("ERROR! the playbook is wrong", "ERROR! the playbook is wrong"),
    ],
)
def test_of_ansibles_result_the_message_is_told(line: str, told: str) -> None:
    assert fleet._message(line) == told


def test_without_ansible_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MissingTool) as raised:
        fleet.ansible()

    assert raised.value.hint == "pip install 'edgepack[fleet]'"


def test_an_inventory_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, bundles: tuple[Path, Path]
) -> None:
    monkeypatch.setattr(fleet, "ansible", lambda: "ansible-playbook")

    with pytest.raises(NotFound, match=r"no inventory hosts\.ini"):
        fleet.flash(
            bundles, "hosts.ini", signers=None, where=devices.Where(), asked=Asked(), progress=Silent()
        )  # fmt: skip


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (None, "did not get to a host: fatal: [a]: FAILED!: no bundle"),
        (
            {"a": {"bundle": "pi.tar", "release": "ab", "outcome": "untouched"}},
            "1 hosts were not touched: fatal: [a]",
        ),
    ],
)
def test_ansible_that_fails_by_itself_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, bundles: tuple[Path, Path], tmp_path: Path, report: object, told: str
) -> None:
    text = json.dumps({"schema_version": 1, "hosts": report})
    program = tmp_path / "ansible-playbook"
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nif {report is not None}:\n"
        f"    pathlib.Path(sys.argv[-1]).with_name('report.json').write_text({text!r})\n"
        'print(\'fatal: [a]: FAILED! => {"msg": "no bundle"}\')\nsys.exit(2)\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(fleet, "ansible", lambda: str(program))

    done = CliRunner().invoke(cli, ["-q", "flash", str(bundles[0]), "--inventory", "a,"])

    assert done.exit_code in (2, 5)
    assert told in done.output


def test_only_what_is_asked_for_overrides_the_inventory() -> None:
    nothing = fleet._settings(devices.Where(), Asked())
    much = fleet._settings(
        devices.Where(root="/srv/e", mode="user", sudo=True),
        Asked(self_test=False, keep=3, allow_downgrade=True, force=True),
    )

    assert set(nothing) == {"edgepack_program"}
    assert much["edgepack_root"] == "/srv/e" and much["edgepack_sudo"] is True
    options = ["--mode", "user", "--keep", "3", "--allow-downgrade", "--force", "--no-self-test"]
    assert much["edgepack_options"] == options


# ── SWUpdate images ──


def members(archive: bytes) -> dict[str, tuple[bytes, int]]:
    """Content and checksum of each member of a cpio archive, as cpio(5) describes it."""
    found: dict[str, tuple[bytes, int]] = {}
    place = 0
    while True:
        assert archive[place : place + 6] == b"070702"
        fields = [int(archive[place + 6 + 8 * i : place + 14 + 8 * i], 16) for i in range(13)]
        size, length = fields[6], fields[11]
        name = archive[place + 110 : place + 110 + length - 1].decode()
        place += (110 + length + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert len(archive) % 512 == 0 and not any(archive[place:])
            return found
        found[name] = archive[place : place + size], fields[12]
        place += (size + 3) // 4 * 4


@pytest.fixture
def unsigned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature without openssl."""

    def made(text: bytes, certificate: Path, key: Path) -> bytes:
        return b"signature of " + hashlib.sha256(text).digest()

    monkeypatch.setattr(swu, "signed", made)


def written(cargo: Cargo, out: Path, **options: Any) -> dict[str, tuple[bytes, int]]:
    swu.write(cargo, out, certificate=Path("c"), key=Path("k"), **options)
    return members(out.read_bytes())


def test_an_image_holds_the_bundle_as_it_is_in_members_that_cpio_can_hold(
    cargo: Cargo, tmp_path: Path, unsigned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swu, "PART", 10_001)

    found = written(cargo, tmp_path / "x.swu")

    names = list(found)
    assert names[:3] == ["sw-description", "sw-description.sig", "install.sh"]
    assert names[3:] == [f"bundle.tar.{number:02d}" for number in range(len(names) - 3)] and len(names) > 5
    assert b"".join(found[name][0] for name in names[3:]) == cargo.path.read_bytes()
    assert all(checksum == sum(content) & 0xFFFFFFFF for content, checksum in found.values())
    text = found["sw-description"][0].decode()
    for number, name in enumerate(names[3:]):
        assert f'filename = "{name}"' in text
        assert hashlib.sha256(found[name][0]).hexdigest() in text
        assert number == 0 or f'offset = "{number * 10_001}"' in text
    assert 'version = "3"' in text
    assert 'hardware-compatibility: [ "raspberry-pi-5-8gb" ]' in text
    assert hashlib.sha256(found["install.sh"][0]).hexdigest() in text


def test_the_same_bundle_and_signature_make_the_same_image(
    cargo: Cargo, tmp_path: Path, unsigned: None
) -> None:
    written(cargo, tmp_path / "one.swu")
    written(cargo, tmp_path / "other.swu")

    assert (tmp_path / "one.swu").read_bytes() == (tmp_path / "other.swu").read_bytes()


def test_the_agent_that_judges_is_the_devices_own(cargo: Cargo, tmp_path: Path, unsigned: None) -> None:
    found = written(cargo, tmp_path / "x.swu", root="/srv/store", hardware=("1.2", "1.3"))

    text, script = found["sw-description"][0].decode(), found["install.sh"][0].decode()
    size = cargo.path.stat().st_size
    assert f"python3 -I /srv/store/agent.pyz --root /srv/store offer --room {size} 2>" in text
    assert (
        "python3 -I /srv/store/agent.pyz --root /srv/store install --consume /srv/store/.swupdate.tar"
        in script
    )
    assert 'hardware-compatibility: [ "1.2", "1.3" ]' in text


@pytest.mark.parametrize(
    "options", [{"root": "/srv/a b"}, {"root": "srv"}, {"root": "/srv/'x"}, {"hardware": ("a b",)}]
)
def test_names_that_a_description_cannot_hold_are_refused(
    cargo: Cargo, tmp_path: Path, unsigned: None, options: dict[str, Any]
) -> None:
    with pytest.raises(BadInput):
        written(cargo, tmp_path / "x.swu", **options)

    assert not (tmp_path / "x.swu").exists()


def test_a_bundle_that_changes_meanwhile_makes_no_image(cargo: Cargo, tmp_path: Path, unsigned: None) -> None:
    bundle = tmp_path / "b.tar"
    bundle.write_bytes(cargo.path.read_bytes())
    parts = swu.parts_of(bundle, 1 << 20)
    bundle.write_bytes(b"x" + cargo.path.read_bytes()[1:])

    with pytest.raises(Untrusted, match="changed"):
        list(swu.archive(bundle, {}, parts))


def test_quotes_and_backslashes_stay_what_they_are() -> None:
    assert swu._quoted('a "b" \\n') == '"a \\"b\\" \\\\n"'


# ── the command ──


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "say in which form"),
        (("--ansible",), "name who may sign"),
        (("--swu",), "an image is signed"),
        (("--ansible", "--root", "/x"), "--root is for --swu"),
        (("--swu", "--signers", "x"), "--signers is for --ansible"),
    ],
)
def test_emit_says_what_is_missing(
    bundles: tuple[Path, Path], tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    done = CliRunner().invoke(cli, ["emit", str(bundles[0]), *words, "-o", str(tmp_path / "x")])

    assert done.exit_code == 2
    assert told in done.output


def test_an_inventory_takes_bundles_only(bundles: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(cli, ["flash", "--status", "--inventory", "hosts.ini", str(bundles[0])])

    assert done.exit_code == 2
    assert "--inventory flashes bundles" in done.output


def test_the_script_takes_words_of_edgepack_flash(project: Path) -> None:
    """So the role can run either."""
    known = {name for option in cli.commands["flash"].params for name in option.opts}
    program = project / "roles/edgepack/files/push.py"
    told = subprocess.run(
        [sys.executable, "-I", program, "--help"], capture_output=True, text=True, check=True
    )

    flags = set(re.findall(r"--[a-z-]+", told.stdout)) - {"--help"}

    assert {"--enroll", "--dry-run", "--json", "--root", "--keep", "--force"} <= flags <= known
