"""Signed releases of a few kilobytes and a device to install them on, for tests of the installer and its like."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack import serde
from edgepack.bundle import oci, server_document, sign
from edgepack.device import agent, installer
from edgepack.plan import Plan
from tests.plans import example_plan

PROFILE = "raspberry-pi-5-8gb"
SERVER = b"#!/bin/sh\nexec true\n"
SELFTEST = {
    "schema_version": 1,
    "probes": [{"prompt": "Once upon a time", "top": [[7, -0.5], [9, -1.25]]}],
    "decode": {"prompt": "Once upon a time", "tokens": [7, 11], "text": ", there"},
}
UNITS = {name: f"# {name}\n" for name in installer.UNITS[:3]}


def bundle(
    out: Path,
    key: Path | None,
    *,
    sequence: int = 1,
    weights: bytes = b"GGUF" + bytes(5000),
    files: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
    plan: Plan | None = None,
    annotations: Mapping[str, str] | None = None,
    server: bytes = SERVER,
) -> Path:
    """A bundle as `edgepack build` writes them, small; without ``key`` unsigned."""
    model = out.with_suffix(".weights")
    model.write_bytes(weights)
    plan = plan or example_plan(PROFILE)
    documents = {
        "plan.json": serde.to_json(plan),
        "server.json": server_document(plan),
        "selftest.json": json.dumps(SELFTEST),
    }
    texts = {**documents, "start.sh": "#!/bin/sh\n", **UNITS, "app/empty.txt": "", **(files or {})}
    layers = [oci.text_layer(name, "code", text) for name, text in texts.items() if name not in without]
    layers.append(oci.text_layer(agent.SERVER, "code", server.decode()))
    layers.append(
        oci.Layer(
            filepath=agent.WEIGHTS,
            kind="weight",
            content=model,
            sha256=hashlib.sha256(weights).hexdigest(),
            bytes=len(weights),
        )
    )
    image = oci.Image(
        name="tiny",
        config={"a": 1},
        annotations={
            agent.REF_NAME: "tiny",
            "org.edgepack.release-sequence": str(sequence),
            **(annotations or {}),
        },
        layers=tuple(layers),
    )
    oci.write(out, image, sign=None if key is None else lambda digest: sign.sign(key, digest))
    return out


def release_of(path: Path) -> str:
    return agent.read_bundle(str(path))["manifest_digest"].removeprefix("sha256:")


# ── frames, as the workstation sends them ──


def frame(name: str, content: bytes, offset: int = 0) -> bytes:
    head = {"name": name, "offset": offset, "bytes": len(content)}
    return json.dumps(head).encode("ascii") + b"\n" + content


def offer_frames(path: Path) -> bytes:
    """What an offer of a bundle sends."""
    head, found = agent.read_head(str(path))
    plan = agent.read_file(found, "plan.json")
    frames = [frame("index", head.index_json)]
    if head.signature is not None:
        frames.append(frame("signature", head.signature))
    frames += [frame("manifest", head.manifest), _blob(head.config), _blob(plan)]
    return b"".join(frames)


def _blob(content: bytes) -> bytes:
    return frame(f"sha256:{hashlib.sha256(content).hexdigest()}", content)


def blob_frames(path: Path, missing: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """The blobs that an answer calls missing, each from what is there on."""
    found = agent.read_bundle(str(path))
    content = path.read_bytes()
    for entry in missing:
        file = next(file for file in found["files"] if file["digest"] == entry["digest"])
        have = int(entry["have"])
        yield frame(entry["digest"], content[file["offset"] + have : file["offset"] + file["size"]], have)


# ── a device ──


def copied(before: Path, folder: Path) -> None:
    """Copies a store, or a folder with one, into a folder; the same files are hard links of each other there, too."""
    made: dict[int, Path] = {}
    folder.mkdir(exist_ok=True)
    for path in sorted(before.rglob("*")):
        target = folder / path.relative_to(before)
        number = path.lstat().st_ino
        if path.is_symlink():
            target.symlink_to(path.readlink())
        elif path.is_dir():
            target.mkdir(mode=path.stat().st_mode & 0o777)
        elif number in made:
            os.link(made[number], target)
        else:
            shutil.copy2(path, target)
            made[number] = target


def machine(plan: Plan | None = None) -> dict[str, Any]:
    """Facts of the machine that a plan is for, with all its memory free."""
    profile = (plan or example_plan(PROFILE)).profile
    tree = [*profile.match.device_tree] if profile.match else []
    return {
        "arch": profile.arch, "kernel": "6.1", "python": "3.8.0", "cpu": None, "cores": 4, "load": 0.0,
        "memory_total": profile.memory, "memory_available": profile.memory, "swap_total": 0,
        "device_tree": tree or None, "l4t": None, "gpus": None,
    }  # fmt: skip


def passing(plan: Plan | None = None) -> dict[str, Any]:
    """What the agent's check would say of a server that does what the plan says."""
    plan = plan or example_plan(PROFILE)
    each = plan.settings.context // plan.settings.slots
    return {
        "schema_version": 1,
        "failure": None,
        "match": [],
        "machine": {"emulated": False},
        "server": {"emulator": None},
        "served": None,
        "log": {"buffers": [{"kind": "model", "name": "CPU", "bytes": 1}]},
        "slots": {"slots": plan.settings.slots, "tokens": [each] * plan.settings.slots},
        "fill": {"target_tokens": each, "held_tokens": [each - 1]},
        "quality": {"probes": 10, "agree": 9, "ties": 1, "mean_drift": 0.01},
        "memory": {
            "peak_rss": plan.memory.total,
            "peak_anonymous": plan.memory.total,
            "rss_file": 0,
            "rss_shared": 0,
            "processes": None,
            "nvmap": None,
            "gpu": None,
            "system_drop": None,
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """A key, and the file that devices know it by."""

    key: Path
    signers: Path


def signer(folder: Path) -> Signer:
    """A new key of its own."""
    made = Signer(key=folder / "key", signers=folder / "key.allowed_signers")
    sign.new_key(made.key)
    made.signers.write_text(sign.allowed_signer(made.key), encoding="utf-8")
    return made


Check = Callable[[argparse.Namespace], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    document: dict[str, Any]
    said: str
    """What it wrote to stderr."""


class Device:
    """A store in a folder, and the commands that are run on it."""

    def __init__(
        self,
        root: Path,
        *,
        check: Check = lambda _: passing(),
        facts: Mapping[str, Any] | None = None,
        status: Callable[[Sequence[str]], tuple[int, str]] = lambda _: (0, ""),
    ) -> None:
        self.root = root
        self.ran: list[str] = []
        """What was asked of the service manager."""
        self.guarded: list[str] = []
        """What would run if the installer were killed, until it is done."""
        self._status = status
        self.world = installer.World(
            run=self._run,
            guard=self._guard,
            check=check,
            machine=lambda: dict(facts or machine()),
            clock=lambda: 0.0,
            system_units=str(root.parent / "units"),
            user_units=str(root.parent / "units"),
        )

    def _run(self, argv: list[str]) -> tuple[int, str]:
        self.ran.append(" ".join(argv))
        return self._status(argv)

    def _guard(self, argv: list[str]) -> Callable[[], None]:
        self.guarded.append(" ".join(argv))
        return lambda: self.guarded.append("done")

    @property
    def store(self) -> installer.Store:
        return installer.Store(str(self.root), self.world)

    def run(self, *words: str | Path, stdin: bytes = b"") -> Answer:
        """Runs one command of agent.pyz in this process."""
        out, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
            argv = ["--root", str(self.root), *map(str, words)]
            status = installer.respond(argv, self.world, io.BufferedReader(io.BytesIO(stdin)))
        return Answer(
            status=status, document=json.loads(out.getvalue() or "{}"), said=told.getvalue().strip()
        )

    def enroll(self, signers: str, *words: str, mode: str = "none") -> Answer:
        return self.run("enroll", "--mode", mode, *words, stdin=signers.encode())

    def current(self) -> str | None:
        return self.store.target("current")

    def previous(self) -> str | None:
        return self.store.target("previous")

    def events(self) -> list[str]:
        return [line["event"] for line in installer.journal_lines(self.store, 1000)]
