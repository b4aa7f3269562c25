"""Enrolls a device and brings it a bundle, over ssh, where there is no edgepack: `edgepack flash` in its least form.

    push.py BUNDLE HOST [--dry-run] [--no-self-test] [--allow-downgrade] [--force] [--keep N]
    push.py --enroll --signers FILE HOST [--mode system|user|none] [--server PATH] [--replace-signers]

Both take --root PATH, --sudo and --json, which is how they answer in any case. HOST is what ssh takes, or a path with
a slash: a store on a disk of this machine. EDGEPACK_SSH names the ssh program and options of its own. Exit status: 0
done, 255 the device was not reached, else the agent's own (2 bad usage, 5 the release failed its test and the one
before it runs, 6 refused, 7 a program is missing, 10 no space, 11 another installer is at work).

Standard library, Python 3.8 or newer. Everything that must be refused is refused by the agent on the device.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SYSTEM_ROOT = "/var/lib/edgepack"
USER_ROOT = "~/.local/share/edgepack"
PIECE = 1 << 18
PATIENCE = (1, 2, 4, 8, 15, 30, 60, 60)
"""Seconds to wait before each further try to reach a device; they count anew whenever something arrived."""
LOST = 255
"""ssh's own exit status, where others are the program's."""
BUSY = 11

AGENT = f"""\
import os, sys
roots = [sys.argv[1]] if sys.argv[1] else [{SYSTEM_ROOT!r}, os.path.expanduser({USER_ROOT!r})]
found = [root for root in roots if os.access(os.path.join(root, "enrolled.json"), os.R_OK)]
mine = [root for root in found if os.stat(root).st_uid == os.geteuid()] or found
if not mine:
    sys.stderr.write("bad usage: %s is no store: enroll this device first\\n" % roots[0])
    sys.exit(2)
agent = os.path.join(mine[0], "agent.pyz")
os.execv(sys.executable, [sys.executable, "-I", agent, "--root", mine[0]] + sys.argv[2:])
"""
"""Finds the enrolled store there and becomes its agent."""


class Failure(Exception):
    """The agent, or ssh, said no."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class Device:
    """The agent on a device."""

    def __init__(self, host: str, root: str, sudo: bool) -> None:
        self.host: str | None = host
        self.root = root
        self.before = ["sudo", "-n"] if sudo else []
        if "/" in host and not host.startswith("ssh://"):
            self.host, self.root = None, root or str(Path(host).resolve())

    def ask(self, words: Sequence[str], pieces: Iterable[bytes] = (), accept: Sequence[int] = (0,)) -> Any:
        """One command of the agent, fed with bytes; its document."""
        return self.run(["python3", "-I", "-c", AGENT, self.root, *words], pieces, accept)

    def run(self, argv: Sequence[str], pieces: Iterable[bytes] = (), accept: Sequence[int] = (0,)) -> Any:
        argv = [*self.before, *argv]
        if self.host is not None:
            ssh = shlex.split(os.environ.get("EDGEPACK_SSH", "ssh"))
            options = ["BatchMode=yes", "Compression=no", "ConnectTimeout=30", "ServerAliveInterval=15"]
            ssh += [word for option in options for word in ("-o", option)]
            argv = [*ssh, "-T", "--", self.host, shlex.join(argv)]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            said: list[str] = []
            answer: list[bytes] = []
            stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
            if stdin is None or stdout is None or stderr is None:
                raise Failure(1, "a program without pipes")
            readers = [
                threading.Thread(target=lambda: said.extend(tell(stderr))),
                threading.Thread(target=lambda: answer.append(stdout.read())),
            ]
            for reader in readers:
                reader.start()
            try:
                for piece in pieces:
                    stdin.write(piece)
                stdin.close()
            except BrokenPipeError:  # its status and its last line say why
                process.stdin = None
            for reader in readers:
                reader.join()
        if process.returncode not in accept or not answer[0]:
            raise Failure(process.returncode or 1, said[-1] if said else "no message")
        return json.loads(answer[0].decode("utf-8"))


def tell(stream: Iterable[bytes]) -> Iterator[str]:
    """Lines of a device, printed as they come, with nothing in them that a terminal obeys."""
    for line in stream:
        text = line.decode("utf-8", "replace").strip()
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
        print(text, file=sys.stderr, flush=True)
        yield text


class Bundle:
    """Where the parts of a bundle lie in its file."""

    def __init__(self, path: str) -> None:
        self.path = path
        with tarfile.open(path, "r:") as archive:
            self.places = {member.name: (member.offset_data, member.size) for member in archive}
        index = self.read("index.json")
        described = json.loads(index)["manifests"][0]
        self.release = described["digest"].rpartition(":")[2]
        self.name = described["annotations"]["org.opencontainers.image.ref.name"]
        manifest = self.blob(described["digest"])
        told = json.loads(manifest)
        path_key = "org.cncf.model.filepath"
        plan = next(one["digest"] for one in told["layers"] if one["annotations"][path_key] == "plan.json")
        self.head = [
            ("index", index),
            ("signature", self.read("signature.sshsig") if "signature.sshsig" in self.places else b""),
            ("manifest", manifest),
            *((digest, self.blob(digest)) for digest in (told["config"]["digest"], plan)),
        ]

    def read(self, member: str) -> bytes:
        place, size = self.places[member]
        with Path(self.path).open("rb") as stream:
            stream.seek(place)
            return stream.read(size)

    def blob(self, digest: str) -> bytes:
        content = self.read("blobs/sha256/" + digest.rpartition(":")[2])
        if hashlib.sha256(content).hexdigest() != digest.rpartition(":")[2]:
            raise Failure(6, f"{self.path} is damaged")
        return content

    def offer(self) -> Iterator[bytes]:
        for name, content in self.head:
            yield frame(name, 0, len(content)) + content

    def missing(self, missing: Iterable[dict[str, Any]], sent: list[int]) -> Iterator[bytes]:
        """What an offer was answered with, each file from where it stopped."""
        with Path(self.path).open("rb") as stream:
            for one in missing:
                place, size = self.places["blobs/sha256/" + one["digest"].rpartition(":")[2]]
                left = size - one["have"]
                stream.seek(place + one["have"])
                yield frame(one["digest"], one["have"], left)
                while left:
                    piece = stream.read(min(PIECE, left))
                    if not piece:
                        raise Failure(6, f"{self.path} became shorter while it was sent")
                    left -= len(piece)
                    sent.append(len(piece))
                    yield piece


def frame(name: str, offset: int, count: int) -> bytes:
    return json.dumps({"name": name, "offset": offset, "bytes": count}).encode("ascii") + b"\n"


def left(offer: dict[str, Any]) -> int:
    return sum(one["bytes"] - one["have"] for one in offer["missing"])


def push(device: Device, bundle: Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Sends what is missing, installs, and tells what came of it."""
    allowed = ["--allow-downgrade"] if options.allow_downgrade else []
    allowed += ["--force-device"] if options.force else []
    keep = ["--keep", str(options.keep)] if options.keep is not None else []
    done: dict[str, Any] = {
        "schema_version": 1, "host": options.host, "name": bundle.name, "release": bundle.release, "outcome": "current",
        "previous": None, "sent": 0, "seconds_to_send": None, "seconds_to_switch": None, "reasons": [], "report": None,
    }  # fmt: skip
    offer = device.ask(
        ["offer", *allowed, *keep, *(["--dry-run"] if options.dry_run else [])], bundle.offer()
    )
    if options.dry_run:
        return dict(done, outcome="planned", bytes=left(offer))
    if offer["missing"]:
        began = time.monotonic()
        done["sent"] = send(device, bundle, offer, [*allowed, *keep])
        done["seconds_to_send"] = round(time.monotonic() - began, 3)
    if offer["state"] != "current" or not offer["good"] or offer["missing"]:
        words = ["install", bundle.release, *allowed, *(["--no-self-test"] if options.no_self_test else [])]
        told = device.ask(words, accept=(0, 5))
        back = told["outcome"] == "rolled-back"
        test = told.get("selftest") or {}
        done.update(
            outcome=told["outcome"],
            previous=told["current" if back else "previous"],
            seconds_to_switch=told["seconds_to_switch"],
            reasons=told.get("reasons", []),
            report=test.get("verdict"),
        )
    if keep and done["outcome"] != "rolled-back":
        device.ask(["gc", *keep])
    return done


def send(device: Device, bundle: Bundle, offer: dict[str, Any] | None, allowed: list[str]) -> int:
    """Sends what is missing, and goes on where it stopped when the line is cut; returns the bytes that were sent."""
    sent: list[int] = []
    before, waits, was_cut = float("inf"), iter(PATIENCE), False
    while True:
        try:
            if offer is None:
                offer = device.ask(["offer", *allowed], bundle.offer())
            if not offer["missing"]:
                return sum(sent)
            if left(offer) < before:
                before, waits = left(offer), iter(PATIENCE)
            offer = device.ask(["receive", bundle.release], bundle.missing(offer["missing"], sent))
            if offer["missing"] and left(offer) >= before:
                raise Failure(1, "the device took nothing of what it said was missing")
        except Failure as failure:
            wait = next(waits, None)
            if wait is None or not (failure.status == LOST or (failure.status == BUSY and was_cut)):
                raise
            was_cut, offer = True, None  # the agent at the other end of the cut line may not have noticed yet
            print(f"{failure}; trying again in {wait} s", file=sys.stderr, flush=True)
            time.sleep(wait)


def enroll(device: Device, options: argparse.Namespace) -> Any:
    """Puts the agent that lies beside this file, and who may sign, onto a device."""
    parts = {"agent": (HERE / "agent.pyz").read_bytes(), "signers": Path(options.signers).read_bytes()}
    encoded = {name: base64.b64encode(content).decode("ascii") for name, content in parts.items()}
    program = (HERE / "enroll.txt").read_text(encoding="utf-8").format(**encoded)
    root = device.root
    if not root:
        places = {"system": SYSTEM_ROOT, "user": USER_ROOT}
        if options.mode not in places:
            raise Failure(2, "mode none has no usual place: --root PATH")
        look = "import os, sys, json; print(json.dumps(os.path.expanduser(sys.argv[1])))"
        root = device.run(["python3", "-I", "-c", look, places[options.mode]])
    words = ["--mode", options.mode]
    words += ["--keep", str(options.keep)] if options.keep is not None else []
    words += ["--server", options.server] if options.server else []
    words += ["--replace-signers"] if options.replace_signers else []
    return device.run(["python3", "-I", "-", root, *words], [program.encode("utf-8")])


def main() -> int:
    parser = argparse.ArgumentParser(prog="push.py", description="enrolls a device, and brings it a bundle")
    parser.add_argument("words", nargs="+", metavar="[BUNDLE] HOST")
    for flag in (
        "--enroll",
        "--sudo",
        "--json",
        "--dry-run",
        "--no-self-test",
        "--allow-downgrade",
        "--force",
    ):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--replace-signers", action="store_true")
    parser.add_argument("--root", default="")
    parser.add_argument("--keep", type=int)
    parser.add_argument("--signers", default=str(HERE / "allowed_signers"))
    parser.add_argument("--mode", choices=("system", "user", "none"), default="system")
    parser.add_argument("--server")
    options = parser.parse_args()
    *bundles, options.host = options.words
    if options.host.startswith("-") or len(bundles) != (0 if options.enroll else 1):
        parser.error("name a bundle and a host, or --enroll and a host")
    device = Device(options.host, options.root, options.sudo)
    try:
        done = enroll(device, options) if options.enroll else push(device, Bundle(bundles[0]), options)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return failure.status
    except (OSError, tarfile.TarError, KeyError, IndexError, StopIteration, ValueError) as error:
        print(f"{' '.join(options.words)}: no bundle that can be sent: {error!r}", file=sys.stderr)
        return 2
    json.dump(done, sys.stdout, indent=2, sort_keys=True)
    print()
    return 5 if done.get("outcome") == "rolled-back" else 0


if __name__ == "__main__":
    sys.exit(main())
