"""Many devices at once: Ansible runs a flash on each, a canary first, and the first failure ends it.

Ansible is a program here, never a library. The project that it runs (templates/fleet) is the same that `emit` writes
for machines without edgepack; there a small script sends what here `edgepack flash` does, in the same words.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

from edgepack import devices, enrolled, serde, shell
from edgepack.bundle.render import environment, templates
from edgepack.errors import BadInput, CheckFailed, MissingTool, NotFound
from edgepack.flash import Asked, Cargo, load
from edgepack.profile import NAME
from edgepack.progress import Progress
from edgepack.units import show
from edgepack.workspace import require_space, whole_dir

Result = Literal["good", "installed", "current", "planned", "rolled-back", "failed", "untouched"]
"""What came of a host; ``failed``: its status and last words say why. ``untouched``: its turn did not come."""

FILES = "roles/edgepack/files"
REPORT = "report.json"
TURN = "edgepack : Send "
"""How the task begins that flashes a host."""
_ENDED = re.compile(r"(?:ok|changed|failed|fatal): \[([^ \]]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What came of one host."""

    bundle: str
    """File name of the bundle that is meant for it."""
    release: str
    outcome: Result
    name: str | None = None
    previous: str | None = None
    reasons: tuple[str, ...] = ()
    """Why it went back."""
    sent: int = 0
    seconds_to_send: float | None = None
    seconds_to_switch: float | None = None
    passed: bool | None = None
    """Verdict of the self-test; None where none was made."""
    status: int | None = None
    """Exit status of its flash."""
    said: tuple[str, ...] = ()
    """Last words of a flash that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """What came of all hosts, in the order of their turns."""

    hosts: Mapping[str, HostReport]
    documents: Mapping[str, Mapping[str, object]]
    """What each flash said in full, its self-test with it, by host (flash.to_document)."""
    trouble: str | None = None
    """Why Ansible ended before all was done, though it was no host that failed."""


def flash(
    bundles: Sequence[Path],
    inventory: str,
    *,
    signers: Path | None,
    where: devices.Where,
    asked: Asked,
    limit: str | None = None,
    dry_run: bool = False,
    progress: Progress,
) -> FleetReport:
    """Flashes each host of an Ansible inventory with its bundle; who gets which, the playbook decides (docs/fleet.md).

    Every bundle is verified before anything begins. A host that failed is a value. Raises what `load` raises,
    MissingTool without Ansible, and BadInput with Ansible's words for what it does not take.
    """
    program = ansible()
    if "," not in inventory and not Path(inventory).exists():
        raise NotFound(f"there is no inventory {inventory}")
    cargos = _loaded(bundles, signers, progress)
    with tempfile.TemporaryDirectory(prefix="edgepack-fleet-") as folder:
        place = Path(folder)
        _lay_out(place, cargos, [str(cargo.path.absolute()) for cargo in cargos])
        settings = place / "settings.json"
        settings.write_text(json.dumps(_settings(where, asked)), encoding="utf-8")
        words: list[str | Path] = [program, "-i", inventory, "-e", f"@{settings}"]
        words += [f"--limit={limit}"] if limit else []
        words += ["--check"] if dry_run else []
        done = shell.run(
            [*words, place / "flash.yml"], env=_SURROUNDINGS, check=False, on_line=_reports(progress)
        )
        if not (place / REPORT).is_file():
            raise BadInput(f"ansible-playbook did not get to a host: {_why(done.stdout)}")
        report = _report(place)
    if done.returncode != 0 and not any(host.status for host in report.hosts.values()):
        return replace(report, trouble=_why(done.stdout))
    return report


def ansible() -> str:
    """ansible-playbook: beside this Python, or on PATH. Raises MissingTool."""
    beside = Path(sys.executable).with_name("ansible-playbook")
    found = str(beside) if beside.is_file() else shutil.which("ansible-playbook")
    if found is None:
        raise MissingTool("ansible-playbook is not installed", hint="pip install 'edgepack[fleet]'")
    return found


def emit(bundles: Sequence[Path], out: Path, *, signers: Path, progress: Progress) -> None:
    """Writes an Ansible project that flashes bundles without edgepack into a new folder; its README says how.

    ``signers``: who the devices are enrolled with. Raises BadInput, NotFound, NoSpace, and what `load` raises.
    """
    if out.exists():
        raise BadInput(f"{out} is there already and is not overwritten", hint="name a new folder")
    if not signers.is_file():
        raise NotFound(f"there is no file {signers}")
    cargos = _loaded(bundles, signers, progress)
    require_space(out.parent, sum(cargo.path.stat().st_size for cargo in cargos))
    with whole_dir(out) as folder:
        _lay_out(folder, cargos, [f"bundles/{cargo.path.name}" for cargo in cargos])
        (folder / "bundles").mkdir()
        for cargo in cargos:
            progress.step(f"copying {cargo.path.name}")
            shutil.copyfile(cargo.path, folder / "bundles" / cargo.path.name)
        files = folder / FILES
        (files / "agent.pyz").write_bytes(enrolled.zipapp())
        (files / "enroll.txt").write_text(devices.ENROLL, encoding="utf-8")
        shutil.copyfile(signers, files / "allowed_signers")


# ── the project ──────────────────────────────────────────────────────────────────────────────────────


def _loaded(bundles: Sequence[Path], signers: Path | None, progress: Progress) -> tuple[Cargo, ...]:
    twice = [name for name, count in Counter(path.name for path in bundles).items() if count > 1]
    if twice:
        raise BadInput(f"two bundles are named {twice[0]}", hint="hosts name a bundle by its file's name")
    found = []
    for path in bundles:
        progress.step(f"verifying {path}")
        found.append(load(path, signers))
    return tuple(found)


_ALONE = ("-P",) if sys.version_info >= (3, 11) else ()
"""Without the folder that one happens to stand in among Python's modules; older ones cannot leave it out."""


def _lay_out(folder: Path, cargos: Sequence[Cargo], paths: Sequence[str]) -> None:
    """The project in a folder; ``paths``: where it finds each bundle. Raises BadInput.

    Ansible takes what stands in its files for templates, which run programs here; a bundle's words stay words.
    """
    for cargo, place in zip(cargos, paths, strict=True):
        if not NAME.fullmatch(cargo.plan.profile.name):
            raise BadInput(f"{cargo.path} is for a device whose name is none: {cargo.plan.profile.name!r}")
        if re.search(r"\{[{%#]|[\r\n]", f"{place} {cargo.path.name}"):
            raise BadInput(f"{place!r} holds what Ansible would take for a template", hint="rename it")
    rows = [
        {
            "file": cargo.path.name,
            "path": path,
            "group": group(cargo.plan.profile.name),
            "release": cargo.release,
            "sequence": cargo.sequence,
        }
        for cargo, path in zip(cargos, paths, strict=True)
    ]
    source = templates() / "fleet"
    values = {"bundles": rows, "groups": sorted({str(row["group"]) for row in rows})}
    files = environment(source)
    for path in sorted(source.rglob("*")):
        target = folder / path.relative_to(source)
        if path.is_dir():
            target.mkdir()
        elif path.suffix == ".j2":
            text = files.get_template(path.relative_to(source).as_posix()).render(values)
            target.with_suffix("").write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, target)
    (folder / "vars").mkdir()
    document = json.dumps({"edgepack_bundles": rows}, indent=2, sort_keys=True)
    (folder / "vars" / "bundles.yml").write_text(f"{document}\n", encoding="utf-8")


def group(profile: str) -> str:
    """The name of the hosts that a profile describes; Ansible's own rules want _ for -, and either is taken."""
    return profile.replace("_", "-")


# ── running it ───────────────────────────────────────────────────────────────────────────────────────

_SURROUNDINGS = {
    "ANSIBLE_NOCOLOR": "1",
    "ANSIBLE_NOCOWS": "1",
    "ANSIBLE_LOCALHOST_WARNING": "0",
    "ANSIBLE_RETRY_FILES_ENABLED": "0",
}


def _settings(where: devices.Where, asked: Asked) -> Mapping[str, object]:
    """What the playbook is told beyond the inventory; what is not asked for stays as the inventory has it."""
    options: list[str] = [
        *(["--mode", where.mode] if where.mode is not None else []),
        *(["--keep", str(asked.keep)] if asked.keep is not None else []),
        *(["--allow-downgrade"] if asked.allow_downgrade else []),
        *(["--force"] if asked.force else []),
        *([] if asked.self_test else ["--no-self-test"]),
    ]
    return {
        "edgepack_program": [sys.executable, *_ALONE, "-m", "edgepack", "--quiet", "flash"],
        **({"edgepack_options": options} if options else {}),
        **({"edgepack_root": where.root} if where.root is not None else {}),
        **({"edgepack_sudo": True} if where.sudo else {}),
    }


def _reports(progress: Progress) -> Callable[[str], None]:
    """Tells of each host whose turn has ended, and what Ansible itself complains of."""
    task = ""

    def tell(line: str) -> None:
        nonlocal task
        if line.startswith("TASK ["):
            task = line.removeprefix("TASK [").partition("]")[0]
        found = _ENDED.match(line)
        if found and task.startswith(TURN):
            progress.step(f"{found[1]}: its turn has ended")
        elif line.startswith(("fatal: ", "ERROR! ", "[WARNING]: ")):
            progress.step(_message(line))

    return tell


def _message(line: str) -> str:
    """What Ansible prints of a failure, without the rest of its result."""
    head, arrow, result = line.partition(" => ")
    try:
        told = json.loads(result) if arrow else {}
    except ValueError:
        told = {}
    return f"{head}: {told['msg']}" if isinstance(told, dict) and "msg" in told else line


def _why(said: str) -> str:
    """Ansible's own reason, out of what it printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [_message(line) for line in lines if line.startswith(("fatal: ", "ERROR! ", "[ERROR]: "))]
    return (told or lines or ["it said nothing"])[-1][:2000]


def _report(folder: Path) -> FleetReport:
    hosts = json.loads((folder / REPORT).read_text(encoding="utf-8"))["hosts"]
    files = {name: folder / f"report.{name.replace('/', '_')}.json" for name in hosts}
    return FleetReport(
        hosts={name: serde.load(HostReport, row, source=name) for name, row in hosts.items()},
        documents={
            name: json.loads(file.read_text(encoding="utf-8"))
            for name, file in files.items()
            if file.is_file()
        },
    )


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────


def shortfall(done: FleetReport) -> CheckFailed | None:
    """The failure that a fleet's flash ends with when a host's did."""
    failed = {name: host for name, host in done.hosts.items() if host.status}
    untouched = sum(host.outcome == "untouched" for host in done.hosts.values())
    if done.trouble is not None:
        return CheckFailed(f"ansible-playbook ended, and {untouched} hosts were not touched: {done.trouble}")
    if not failed:
        return None
    told = "; ".join(f"{name} {host.outcome}" for name, host in failed.items())
    return CheckFailed(
        f"{len(failed)} of {len(done.hosts)} hosts failed ({told}), and {untouched} were not touched",
        hint="the report above says why; the same command goes on when the cause is gone",
    )


class FleetDocument(TypedDict):
    """Of each host what came of it, and its self-test as `edgepack check` writes it."""

    schema_version: Literal[1]
    hosts: dict[str, HostReport]


def to_document(done: FleetReport) -> dict[str, object]:
    """The report as JSON: of each host what came of it, and its self-test as `edgepack check` writes it."""
    reports = {name: document.get("report") for name, document in done.documents.items()}
    rows = {name: serde.dump(host) for name, host in done.hosts.items()}
    return {
        "schema_version": 1,
        "hosts": {
            name: {**row, "report": reports.get(name)} for name, row in rows.items() if isinstance(row, dict)
        },
    }


def table(done: FleetReport) -> str:
    """The same for people, a host a line and the reasons below it."""
    width = max(map(len, done.hosts), default=0)
    lines = []
    for name, host in done.hosts.items():
        told = [
            host.outcome,
            *([f"self-test {'passed' if host.passed else 'FAILED'}"] if host.passed is not None else []),
        ]
        if host.seconds_to_send is not None:
            told.append(f"{show(host.sent)} in {host.seconds_to_send:.1f} s")
        if host.seconds_to_switch is not None:
            told.append(f"switched in {host.seconds_to_switch:.2f} s")
        lines.append(f"{name:<{width}}  {host.bundle}  {', '.join(told)}")
        lines += [f"{'':<{width}}  {why}" for why in (host.reasons or host.said)]
    return "".join(f"{line}\n" for line in lines)
