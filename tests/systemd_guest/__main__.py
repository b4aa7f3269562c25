"""Flashes releases onto a Debian with systemd, as root and as a user, reboots it and cuts its power.

    python -m tests.systemd_guest [--machine namespaces|qemu] [--cuts N] [--seed N] [--json FILE]

Needs root (debootstrap, mounts), Linux on x86-64, and Debian's busybox, debootstrap, e2fsprogs and qemu-system-x86. The
first run makes the guest's image, in two to four minutes; the cache keeps it. Everything is done by edgepack's command
line over ssh, with the built-in model and the static llama-server. It is no part of CI: in namespaces it takes minutes,
and in QEMU, whose processor is emulated, many times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.systemd_guest import container, guest
from tests.systemd_guest.guest import Guest
from tests.systemd_guest.releases import Releases, edgepack, make, release_of

SETTLE_SECONDS = 200.0
"""Until a service answers that systemd starts, restarts and restarts included."""

ASK = """\
import json, sys, urllib.error, urllib.request
port, key_file = sys.argv[1:]
def ask(path, body=None, key=None):
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = "Bearer " + key
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request("http://127.0.0.1:%s%s" % (port, path), data, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
key = open(key_file).read().strip()
question = {"prompt": "Once upon a time", "n_predict": 4, "temperature": 0}
try:
    ask("/completion", question)
    stranger = 200
except urllib.error.HTTPError as error:
    stranger = error.code
props = ask("/props", None, key)
slots = [props["total_slots"], props["default_generation_settings"]["n_ctx"]]
print(json.dumps({"text": ask("/completion", question, key)["content"], "slots": slots, "stranger": stranger}))
"""
"""What a client on the device asks of the server: without its key, and with it."""

CHAT = """\
import json, sys, urllib.error, urllib.request
port, key_file = sys.argv[1:]
def ask(key):
    headers = {"Content-Type": "application/json", "Authorization": "Bearer " + key}
    data = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}).encode()
    request = urllib.request.Request("http://127.0.0.1:%s/chat" % port, data, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
try:
    ask("none")
    stranger = 200
except urllib.error.HTTPError as error:
    stranger = error.code
print(json.dumps({"tokens": ask(open(key_file).read().strip())["data"]["completion_tokens"], "stranger": stranger}))
"""
"""The same of its front."""
CHAT_PORT = 8082
FRONT = Path(__file__).parents[2] / "docker" / "requirements-front.txt"
"""What the front needs, locked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One of the two ways to be flashed with systemd."""

    name: str
    user: str
    systemctl: str
    units: str
    store: str
    port: int
    key: str


SYSTEM = Mode(
    name="system", user="root", systemctl="systemctl", units="/etc/systemd/system", store="/var/lib/edgepack",
    port=8081, key="/var/lib/edgepack-server/api-key",
)  # fmt: skip
USER = Mode(
    name="user", user="pi", systemctl="XDG_RUNTIME_DIR=/run/user/1000 systemctl --user",
    units="/home/pi/.config/systemd/user", store="/home/pi/.local/share/edgepack", port=8080,
    key="/home/pi/.local/state/edgepack/api-key",
)  # fmt: skip
MODES = (SYSTEM, USER)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.systemd_guest", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--machine", choices=("namespaces", "qemu"), default="namespaces", help="where its systemd runs"
    )
    parser.add_argument("--cuts", type=int, default=2, help="power cuts at random moments of a flash")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen here")
    options = parser.parse_args()
    missing = guest.missing_programs()
    if missing or os.geteuid() != 0:
        sys.exit(f"this needs root, and on Debian the packages of: {' '.join(missing) or 'nothing more'}")
    begin_guest = {"namespaces": container.container, "qemu": guest.guest}[options.machine]
    with tempfile.TemporaryDirectory() as work, begin_guest(Path(work)) as device:
        told = Told(device=device)
        try:
            device.power_on()
            made = make(Path(work), memory=memory(device))
            scenario(told, made, cuts=options.cuts, chance=random.Random(options.seed))
        except AssertionError:
            diagnose(device)
            raise
        finally:
            if options.json is not None:
                options.json.write_text(json.dumps(told.rows, indent=2) + "\n", encoding="utf-8")
    return 0


@dataclass(slots=True, kw_only=True)
class Told:
    """The guest, and a row for each thing that was seen there; each is printed as it comes."""

    device: Guest
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    longest: float = 0.0
    """Seconds that a flash took at most."""

    def row(self, what: str, **facts: Any) -> None:
        self.rows.append({"at": round(time.monotonic() - self.began), "what": what, **facts})
        print(json.dumps(self.rows[-1]), flush=True)


def scenario(told: Told, made: Releases, *, cuts: int, chance: random.Random) -> None:
    """Everything in turn. Raises AssertionError with what was not so."""
    device = told.device
    told.row(
        "booted", seconds=device.boots[-1], systemd=inside(device, "root", "systemctl --version | head -1")
    )
    enroll(told, made)
    for mode in MODES:
        flash(told, mode, made.first, "good")
        doctor(told, mode)
    running(told, made, made.first)
    units(told)
    hangs(told, made)
    give_front(told)
    device.reboot()
    told.row("rebooted", seconds=device.boots[-1])
    running(told, made, made.first)
    chats(told, "rebooted")
    tested_as_its_service(told, made.second)
    flash(told, USER, made.second, "good")
    running(told, made, made.second)
    chats(told, "after a flash")
    for mode in MODES:
        flash(told, mode, made.fails_its_test, "rolled-back")
        doctor(told, mode, ("journal", "server-ended"), ("journal", "rolled-back"), STRANGER)
    running(told, made, made.second)
    for mode in MODES:
        flash(told, mode, made.does_not_start[mode.name], "rolled-back")
        doctor(told, mode, *CAUSES[mode.name], ("journal", "rolled-back"), STRANGER)
    running(told, made, made.second)
    goes_back_at_boot(told, made)
    for _ in range(cuts):
        cut(told, made, chance.uniform(0.0, told.longest))
    for mode in MODES:  # a cut flash may have come to its end all the same
        flash(told, mode, made.third, "good", *(("current",) if cuts else ()))
    running(told, made, made.third)
    for mode in MODES:
        doctor(told, mode, STRANGER)
    off_again(told)


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────


def enroll(told: Told, made: Releases) -> None:
    """Root's store and pi's, whose services run from boot on once pi lingers; root's server has another port."""
    device = told.device
    inside(device, "root", f"mkdir /etc/edgepack; echo EDGEPACK_PORT={SYSTEM.port} >/etc/edgepack/server.env")
    for mode in MODES:
        words = ("flash", "--enroll", "--signers", made.signers, "--mode", mode.name, f"{mode.user}@device")
        done = edgepack(*words, "--json", ssh=device.ssh)
        assert done.returncode == 0, done.stderr
        assert ("enable-linger" in done.stderr) is (mode is USER), done.stderr
        told.row("enrolled", mode=mode.name)
    inside(device, "root", "loginctl enable-linger pi")
    again = edgepack("flash", "--enroll", "--mode", "user", "pi@device", ssh=device.ssh)
    assert again.returncode == 0 and "enable-linger" not in again.stderr, again.stderr


def flash(told: Told, mode: Mode, bundle: Path, *outcomes: str) -> None:
    """Flashes a bundle by the command line, and holds its own account of it against what is expected."""
    began = time.monotonic()
    done = edgepack("flash", bundle, f"{mode.user}@device", "--json", ssh=told.device.ssh)
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    told.row(
        "flashed", mode=mode.name, bundle=bundle.stem, outcome=said["outcome"], status=done.returncode,
        seconds=round(time.monotonic() - began), switched=said["seconds_to_switch"], reasons=said["reasons"],
    )  # fmt: skip
    assert said["outcome"] in outcomes, done.stderr
    told.longest = max(told.longest, time.monotonic() - began)


STRANGER = ("service", "api-key-refused")
"""What `settled` does to every release."""
CAUSES: dict[str, tuple[tuple[str, str], ...]] = {
    "system": (("service", "thread-refused"), ("service", "program-fault")),
    "user": (),
}
"""By mode: what the service itself logs of why a release does not start. That of the user ends without a word."""


def doctor(told: Told, mode: Mode, *expected: tuple[str, str]) -> None:
    """What is wrong by the device's own logs, each with the log that says it; pi is not shown the kernel's."""
    done = edgepack("doctor", "--on", f"{mode.user}@device", "--json", ssh=told.device.ssh)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    found = [(one["section"], one["rule"]) for one in said["diagnoses"]]
    told.row("examined", mode=mode.name, lines=said["lines"], found=found, notes=said["notes"])
    assert found == [*expected], said
    hidden = [note for note in said["notes"] if "kernel's log may not be read by this login" in note]
    assert len(hidden) == len(said["notes"]) == (mode is USER), said["notes"]


WATCH = """\
pid=0; tries=0
while [ "$pid" = 0 ] && [ $tries -lt 3000 ]; do
    pid=$(systemctl show --value --property=MainPID edgepack-self-test.service); tries=$((tries + 1))
    sleep 0.02
done
cat /proc/$pid/comm
grep -E "^(Uid|CapEff|NoNewPrivs|Seccomp):" /proc/$pid/status
ls /proc/$pid/root/home
"""
"""What root sees of the server that the self-test of mode system starts."""


def tested_as_its_service(told: Told, bundle: Path) -> None:
    """In mode system the self-test's server is no root, has no capabilities, and sees no home: as its service."""
    flashing = begin(told.device, SYSTEM, bundle)
    until_tested(flashing)
    said = inside(told.device, "root", WATCH).splitlines()
    flashing.communicate()
    left = inside(told.device, "root", "systemctl list-units --all --plain --no-legend 'edgepack-self-test*'")
    told.row("tested as its service", said=said, status=flashing.returncode, left=left)
    status = dict(line.split(":", 1) for line in said if ":" in line)
    assert said[0] == "llama-server", said
    assert all(int(number) >= 1000 for number in status["Uid"].split()), said
    assert (int(status["CapEff"], 16), status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == (
        0,
        "1",
        "2",
    )
    assert said[-1].startswith("Seccomp:"), said  # the home folders are empty to it
    assert (flashing.returncode, left) == (0, ""), left


def running(told: Told, made: Releases, bundle: Path) -> None:
    """In both modes this release is current, its service is active, and it answers who has the key."""
    for mode in MODES:
        assert settled(told, made, mode) == release_of(bundle)


def settled(told: Told, made: Releases, mode: Mode) -> str:
    """The release that is current once its service is active and answers as that release."""
    began = time.monotonic()
    while True:
        current = inside(told.device, mode.user, f"basename $(readlink {mode.store}/current)")
        state = told.device.run(mode.user, f"{mode.systemctl} is-active edgepack.service")[1]
        if state == "active":
            said = inside(told.device, mode.user, f"python3 - {mode.port} {mode.key} <<'END'\n{ASK}END")
            answer = json.loads(said)
            if answer["slots"] == made.slots.get(current):
                break
        late = time.monotonic() - began > SETTLE_SECONDS
        assert not late, f"{mode.name}: {current[:12]} is current, its unit {state}"
        time.sleep(5)
    assert answer["stranger"] == 401 and answer["text"], answer
    told.row(
        "answers", mode=mode.name, release=current[:12], state=state, waited=round(time.monotonic() - began), **answer
    )  # fmt: skip
    return current


def units(told: Told) -> None:
    """What systemd itself says of the units that were rendered and enrolled."""
    device = told.device
    for mode in MODES:
        manager = "--user " if mode is USER else ""
        names = inside(
            device, mode.user, f"cd {mode.units} && ls -p | grep '^edgepack[a-z-]*[.][a-z]*$'"
        ).split()
        paths = " ".join(f"{mode.units}/{name}" for name in names)
        status, said = device.run(
            mode.user, f"XDG_RUNTIME_DIR=/run/user/$(id -u) systemd-analyze {manager}verify {paths}"
        )
        assert (status, said) == (0, ""), said
        enabled = inside(
            device, mode.user, f"{mode.systemctl} is-enabled edgepack.service edgepack-boot.service"
        )
        assert enabled.split() == ["enabled", "enabled"], enabled
        told.row("verified", mode=mode.name, units=names)
    said = inside(
        device,
        "root",
        "systemd-analyze security --no-pager edgepack.service edgepack-health.service | grep -i overall",
    )
    timers = inside(device, "root", "systemctl list-timers --no-pager edgepack-health.timer | sed -n 2p")
    told.row("secured", said=said.splitlines(), timer=timers)


def hangs(told: Told, made: Releases) -> None:
    """A server that is alive and no longer answers is restarted by its health check, whose own user may not."""
    asked = "systemctl show --value --property=MainPID edgepack.service"
    before = inside(told.device, "root", asked)
    healthy = told.device.run("root", "systemctl start edgepack-health.service")[0]
    inside(told.device, "root", f"kill -STOP {before}")
    began = time.monotonic()
    hung = told.device.run("root", "systemctl start edgepack-health.service")[0]
    after = inside(told.device, "root", asked)
    told.row("hung and restarted", healthy=healthy, hung=hung, seconds=round(time.monotonic() - began))
    assert healthy == 0 and hung != 0 and after not in (before, "0"), (healthy, hung, before, after)
    settled(told, made, SYSTEM)


def give_front(told: Told) -> None:
    """The front of root's release, once it is enabled: beside the server, as its user, started and ended with it."""
    device = told.device
    venv = "/opt/edgepack/venv"
    inside(
        device,
        "root",
        f"python3 -m venv --without-pip {venv}; echo EDGEPACK_CHAT_PORT={CHAT_PORT} >>/etc/edgepack/server.env",
    )
    with tempfile.TemporaryDirectory() as packages:
        Path(packages).chmod(0o755)  # the unit's user reads it
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:",
             "--python-version", "3.11", "--require-hashes", "--requirement", FRONT, "--target", packages],
            check=True,
        )  # fmt: skip
        with subprocess.Popen(["tar", "-cC", packages, "."], stdout=subprocess.PIPE) as packed:
            unpack = f"tar -xC {venv}/lib/python3.11/site-packages --no-same-owner"
            subprocess.run([*device.ssh, "root@device", unpack], stdin=packed.stdout, check=True)
    off = device.run("root", "systemctl is-active edgepack-chat.service")[1]
    inside(device, "root", "systemctl enable --now edgepack-chat.service")
    chats(told, "enabled")
    users = inside(
        device,
        "root",
        "for unit in edgepack edgepack-chat; do ps -o uid= -p $(systemctl show --value -p MainPID $unit); done",
    ).split()
    inside(device, "root", "systemctl stop edgepack.service")
    stopped = device.run("root", "systemctl is-active edgepack-chat.service")[1]
    inside(device, "root", "systemctl start edgepack.service")
    chats(told, "started with the server")
    said = inside(
        device,
        "root",
        "systemd-analyze security --no-pager edgepack-chat.service | grep -i overall; "
        "grep VmHWM /proc/$(systemctl show --value -p MainPID edgepack-chat)/status",
    )
    told.row("fronted", before=off, users=users, stopped=stopped, said=said.splitlines())
    assert (off, stopped) == ("inactive", "inactive")
    assert len(users) == 2 and users[0] == users[1] != "0", users


def chats(told: Told, when: str) -> None:
    """The front answers who has the key."""
    began = time.monotonic()
    ask = f"python3 - {CHAT_PORT} {SYSTEM.key} <<'END'\n{CHAT}END"
    while (done := told.device.run("root", ask))[0] != 0:
        assert time.monotonic() - began < SETTLE_SECONDS, done[1]
        time.sleep(2)
    answer = json.loads(done[1])
    told.row("chats", when=when, waited=round(time.monotonic() - began), **answer)
    assert answer["stranger"] == 401 and answer["tokens"] > 0, answer


def goes_back_at_boot(told: Told, made: Releases) -> None:
    """The power goes while a release is tested whose service does not start: the device goes back by itself."""
    flashing = [begin(told.device, mode, made.does_not_start[mode.name]) for mode in MODES]
    for mode, one in zip(MODES, flashing, strict=True):
        until_tested(one)
        told.row("testing", mode=mode.name)
    power_cut(told, flashing)
    for mode in MODES:
        current = inside(told.device, mode.user, f"basename $(readlink {mode.store}/current)")
        told.row("after the cut", mode=mode.name, current=current[:12])
    running(told, made, made.second)
    for mode in MODES:
        boots = f"tail -n 20 {mode.store}/journal.jsonl"
        events = [json.loads(line) for line in inside(told.device, mode.user, boots).splitlines()]
        tail = [(line["event"], line.get("tries")) for line in events][-4:]
        assert tail[-1][0] == "went-back", tail
        told.row("went back at boot", mode=mode.name, journal=tail)


def cut(told: Told, made: Releases, seconds: float) -> None:
    """The power goes some seconds after a flash of the third release began: the old one or the new one runs, whole."""
    flashing = [begin(told.device, mode, made.third) for mode in MODES]
    time.sleep(seconds)
    told.row("cut", after=round(seconds, 1))
    power_cut(told, flashing)
    for mode in MODES:
        assert settled(told, made, mode) in (release_of(made.second), release_of(made.third))


def off_again(told: Told) -> None:
    """What the docs say takes edgepack off a device leaves no file, unit or process of it."""
    page = (Path(__file__).parents[2] / "docs" / "flashing.md").read_text(encoding="utf-8")
    told_there = page.partition("## And off again")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", told_there, re.M | re.S)
    for mode, block in zip(MODES, blocks, strict=True):
        script = block.replace("sudo ", "")  # as root, where a guest has no sudo
        inside(told.device, mode.user, f"export XDG_RUNTIME_DIR=/run/user/$(id -u); set -e\n{script}")
    others = " ".join(f"! -path '{place}*'" for place in ("/proc/", "/sys/", "/etc/edgepack"))
    left = inside(told.device, "root", f"find / -xdev -name '*edgepack*' {others}")
    left += told.device.run("root", "pgrep -a llama-server")[1]
    loaded = [
        told.device.run(m.user, f"{m.systemctl} list-units --all --plain --no-legend 'edgepack*'")[1]
        for m in MODES
    ]
    told.row("off again", left=left.split("\n"), units=loaded)
    assert not left and not any(loaded), (left, loaded)


def power_cut(told: Told, flashing: list[subprocess.Popen[str]]) -> None:
    told.device.cut_power()
    for one in flashing:
        one.kill()
        one.communicate()
    told.device.power_on()
    told.row("power cut, and booted again", seconds=told.device.boots[-1])


def begin(device: Guest, mode: Mode, bundle: Path) -> subprocess.Popen[str]:
    """A flash that is not waited for."""
    argv = [sys.executable, "-m", "edgepack", "flash", str(bundle), f"{mode.user}@device", "--json"]
    environment = {**os.environ, "EDGEPACK_SSH": shlex.join(device.ssh)}
    return subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def until_tested(flashing: subprocess.Popen[str]) -> None:
    """Until the device says that it tests the release: by then it is the current one."""
    assert flashing.stderr is not None
    said = []
    for line in flashing.stderr:
        said.append(line)
        if "starting llama-server" in line:
            return
    raise AssertionError("".join(said))


def inside(device: Guest, user: str, script: str) -> str:
    """What a shell script says in the guest. Raises AssertionError when it fails."""
    status, said = device.run(user, script)
    assert status == 0, f"{script}: status {status}\n{said}"
    return said


def memory(device: Guest) -> int:
    """Bytes that Linux has there."""
    return int(inside(device, "root", "awk '$1 == \"MemTotal:\" { print $2 }' /proc/meminfo")) << 10


def diagnose(device: Guest) -> None:
    """What the guest has to say when something was not as it must be."""
    for mode in MODES:
        asked = f"{mode.systemctl} status --no-pager --lines 30 'edgepack*'; tail -n 15 {mode.store}/journal.jsonl"
        print(f"── {mode.name}\n{device.run(mode.user, asked)[1]}", file=sys.stderr)
    print(device.run("root", "journalctl --no-pager --lines 80; free -m")[1], file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
