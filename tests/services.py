"""A service manager for tests: what the installer asks of systemctl and loginctl, with its state in a folder.

In a process of ours `Manager` answers; `programs` makes a systemctl and a loginctl that ask one, for processes that are
killed. A place is a folder with the store, the units and the manager's state; systemd's own enabling links are state.
Like systemd it knows units as they were when it last read them, and lets the boot unit run before each start.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

PLACE = "EDGEPACK_TEST_PLACE"
"""The variable that names the place, for programs."""
FAULT = "EDGEPACK_TEST_MANAGER_FAULT"
"""The variable that has one of the programs' calls fail: its number from 1, and how."""
Fault = Literal["fails", "hangs", "killed-before", "killed-after"]
FAULTS: tuple[Fault, ...] = ("fails", "hangs", "killed-before", "killed-after")
SERVER = "edgepack.service"
BOOT = "edgepack-boot.service"
POWER = "edgepack-power.service"
DROP_IN = "edgepack.service.d/50-boot.conf"
HANG_SECONDS = 60.0
BURST = 5
"""Starts of a unit until it stays down: StartLimitBurst= of the units."""

PROGRAM = """\
#!{python} -IS
import sys
sys.path.insert(0, {tests!r})
import services
sys.exit(services.main())
"""


class Manager:
    """The service manager of a place; ``boot`` does what the boot unit says."""

    def __init__(self, place: Path, boot: Callable[[], object], *, folder: Path | None = None) -> None:
        self.units = place / "units"
        self.store = place / "store"
        self.folder = folder or place / "manager"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._boot = boot

    def call(self, argv: Sequence[str]) -> tuple[int, str]:
        """What a program says, and its exit status."""
        words = [word for word in argv[1:] if word != "--user"]
        if argv[0] == "loginctl":
            return 0, "Linger=yes\n"
        verb, names = words[0], [word for word in words[1:] if not word.startswith("--")]
        if verb == "show":
            return 0, self._shown(words[1], names[0])
        if verb == "daemon-reload":
            with self._state() as state:
                state["loaded"] = self._on_disk()
            return 0, ""
        if verb == "start" and names == [SERVER]:
            return self._started()
        if verb in ("stop", "reset-failed", "restart", "enable", "disable") and len(names) == 1:
            return self._other(verb, names[0])
        raise AssertionError(f"the installer asks {argv}")

    def power_on(self) -> None:
        """What a start of the machine does: the units as they are on the disk, and what is enabled."""
        with self._state() as state:
            state.update(running=None, restarts=0, loaded=self._on_disk())
            enabled = SERVER in state["enabled"]
        if enabled:
            self._started()
            self.time_passes()

    def time_passes(self) -> None:
        """The restarts of a server that failed and was not stopped since (Restart=, StartLimitBurst=)."""
        while self._restarts():
            self._started(again=True)

    def stopped(self) -> None:
        """The machine is off."""
        with self._state() as state:
            state.update(running=None, restarts=0, loaded={})

    def enables(self, *names: str) -> None:
        """Units that start with the machine: systemd's links, which it wrote long ago."""
        with self._state() as state:
            state["enabled"] = sorted(names)

    def breaks(self, release: str) -> None:
        """A release whose server does not start."""
        with self._state() as state:
            state["broken"].append(release)

    def count(self) -> int:
        """The calls of the programs so far, this one too."""
        with self._state() as state:
            state["calls"] += 1
            return int(state["calls"])

    @property
    def state(self) -> dict[str, Any]:
        with self._state() as state:
            return state

    def _restarts(self) -> bool:
        with self._state() as state:
            state["restarts"] = max(0, state["restarts"] - 1)
            return bool(state["restarts"])

    def _shown(self, what: str, name: str) -> str:
        with self._state() as state:
            if what == "--property=LoadState":
                known = name in state["loaded"] or (self.units / name).exists()
                return f"LoadState={'loaded' if known else 'not-found'}\n"
            if what == "--property=NeedDaemonReload":
                changed = name in state["loaded"] and state["loaded"] != self._on_disk()
                return f"NeedDaemonReload={'yes' if changed else 'no'}\n"
            assert (what, name) == ("--property=SubState,Job", SERVER), (what, name)
            rests = "auto-restart" if state["restarts"] else "dead"
            return f"SubState={rests if state['running'] is None else 'running'}\nJob=\n"

    def _other(self, verb: str, name: str) -> tuple[int, str]:
        with self._state() as state:
            there = (self.units / name).exists()
            if name not in state["loaded"] and there:  # it is read when it is first named
                state["loaded"][name] = (self.units / name).read_text(encoding="utf-8")
            if verb == "enable" and not there:
                return 1, f"Failed to enable unit: Unit file {name} does not exist.\n"
            if verb in ("restart", "stop", "reset-failed") and name not in state["loaded"]:
                return 5, f"Failed to {verb} {name}: Unit {name} not loaded.\n"
            if verb == "stop" and name == SERVER:
                state.update(running=None, restarts=0)
            if verb == "enable":
                state["enabled"] = sorted({*state["enabled"], name})
            if verb == "disable":
                state["enabled"] = sorted({*state["enabled"]} - {name})
        return 0, ""

    def _started(self, *, again: bool = False) -> tuple[int, str]:
        with self._state() as state:
            if state["running"] is not None:
                return 0, ""
            if SERVER not in state["loaded"]:
                state["loaded"] = {**self._on_disk(), **state["loaded"]}
            if SERVER not in state["loaded"]:
                return 5, f"Failed to start {SERVER}: Unit {SERVER} not found.\n"
            boots = {BOOT, DROP_IN} <= {*state["loaded"]}
        if boots:
            self._boot()
        with self._state() as state:
            unit = state["loaded"].get(SERVER)
            release = self._current()
            whole = release is not None and is_whole(self.store / "releases" / release)
            state["starts"].append({"release": release, "whole": whole, "unit": unit})
            if unit is None or not whole or release in state["broken"]:
                state["restarts"] = state["restarts"] if again else BURST
                return 1, f'Job for {SERVER} failed.\nSee "systemctl status {SERVER}" for details.\n'
            state["restarts"] = 0
            state["running"] = {"release": release, "unit": unit}
        return 0, ""

    def _current(self) -> str | None:
        try:
            return (self.store / "current").readlink().name
        except FileNotFoundError:
            return None

    def _on_disk(self) -> dict[str, str]:
        """Units by name; what is hidden is none (systemd.unit)."""
        found = [path for path in self.units.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return {str(p.relative_to(self.units)): p.read_text(encoding="utf-8") for p in found}

    @contextmanager
    def _state(self) -> Iterator[dict[str, Any]]:
        """The state, for one process at a time; what is changed in it stays."""
        with (self.folder / "state.json").open("a+", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            text = stream.read()
            empty: dict[str, Any] = {
                "loaded": {},
                "enabled": [],
                "running": None,
                "starts": [],
                "restarts": 0,
                "broken": [],
                "calls": 0,
            }
            state = json.loads(text) if text else empty
            yield state
            changed = json.dumps(state)
            if changed != text:
                stream.truncate(0)
                stream.write(changed)


def is_whole(release: Path) -> bool:
    """Whether each file that a release's manifest names is there with its size."""
    try:
        layers = json.loads((release / ".release/manifest.json").read_bytes())["layers"]
        sizes = {layer["annotations"]["org.cncf.model.filepath"]: layer["size"] for layer in layers}
        return all((release / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


# ── as programs ──


def programs(folder: Path) -> Path:
    """A folder for PATH with a systemctl and a loginctl that ask the manager of the place in the environment."""
    folder.mkdir()
    text = PROGRAM.format(python=sys.executable, tests=str(Path(__file__).parent))
    for name in ("systemctl", "loginctl"):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def main() -> int:
    """One call of a program; the fault that is asked for happens at its call."""
    place = Path(os.environ[PLACE])
    store = place / "store"
    boot = [sys.executable, "-I", "-S", str(store / "agent.pyz"), "--root", str(store), "boot"]
    manager = Manager(place, lambda: subprocess.run(boot, capture_output=True, check=False))
    at, _, fault = os.environ.get(FAULT, "0 ").partition(" ")
    hit = manager.count() == int(at)
    if hit and fault == "killed-before":
        os.kill(os.getppid(), signal.SIGKILL)
    if hit and fault == "hangs":
        time.sleep(HANG_SECONDS)
    if hit and fault in ("fails", "hangs", "killed-before"):
        print("Failed to connect to bus: Connection refused")
        return 1
    status, said = manager.call([Path(sys.argv[0]).name, *sys.argv[1:]])
    if hit:
        os.kill(os.getppid(), signal.SIGKILL)
    sys.stdout.write(said)
    return status
