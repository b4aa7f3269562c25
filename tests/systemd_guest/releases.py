"""What is flashed: three good releases by `edgepack build`, and bad ones made of the second."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgepack.bundle import oci, sign
from edgepack.device import agent

PROFILE = {
    "name": "systemd-guest",
    "extends": "x86-laptop-ddr5",
    "cpu_cores": 1,
    "reserves": {
        "os_headless": "160 MiB",
        "os_desktop": "200 MiB",
        "safety": "64 MiB",
        "accelerator_context": 0,
    },
    "match": {},
}
"""What an idle Debian takes of the guest; how much memory there is, the guest says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Releases:
    """Bundles of the built-in model, signed by one key."""

    signers: Path
    first: Path
    second: Path
    third: Path
    fails_its_test: Path
    does_not_start: Mapping[str, Path]
    """By mode: the test passes, and what systemd is told then does not start."""
    slots: Mapping[str, list[int]]
    """By release: how many, and the tokens of each. A server tells them, so that it is known which release it is."""


def make(work: Path, *, memory: int) -> Releases:
    """Signs all of them with a key of their own. ``memory``: bytes of the device that they are for."""
    key, profile = work / "key", work / "profile.yaml"
    sign.new_key(key)
    signers = work / "signers"
    signers.write_text(sign.allowed_signer(key), encoding="utf-8")
    profile.write_text(json.dumps({**PROFILE, "memory": f"{memory >> 20} MiB"}), encoding="utf-8")

    def built(sequence: int, slots: int, context: int) -> Path:
        out = work / f"release-{sequence}"
        done = edgepack(
            "build", "--profile", profile, "--model", "demo", "--with-runtime", "--scheme", "Q8_0", "--key", key,
            "--release-sequence", sequence, "--slots", slots, "--context", context, "--output", out,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return next(out.glob("*.tar")).rename(out.with_suffix(".tar"))

    def altered(name: str, sequence: int, path: str, change: Callable[[str], str]) -> Path:
        return _with_another_file(second, work / f"{name}.tar", key, sequence, path, change)

    first, second, third = built(1, 1, 256), built(2, 1, 512), built(5, 2, 512)
    return Releases(
        signers=signers,
        first=first,
        second=second,
        third=third,
        fails_its_test=altered("fails-its-test", 3, agent.SERVER, lambda _: "#!/bin/sh\nexit 3\n"),
        does_not_start={
            "system": altered("no-room", 4, "edgepack.service", with_little_room),
            "user": altered("no-start", 4, "start.sh", lambda _: "#!/bin/sh\nexit 3\n"),
        },
        slots={release_of(first): [1, 256], release_of(second): [1, 512], release_of(third): [2, 256]},
    )


def with_little_room(unit: str) -> str:
    """A unit whose command, which no self-test runs, limits the server's address space to 48 MiB; its rights stay."""
    assert unit.count("\nExecStart=/") == 1, unit
    return unit.replace("\nExecStart=", '\nExecStart=/bin/sh -c \'ulimit -v 49152; exec "$$0" "$$@"\' ')


def _with_another_file(
    bundle: Path, out: Path, key: Path, sequence: int, path: str, change: Callable[[str], str]
) -> Path:
    """A bundle, signed, in which one text or program is another."""
    head, found = agent.read_head(str(bundle))
    manifest = json.loads(head.manifest)
    whole = bundle.read_bytes()
    kinds = {
        layer["annotations"][oci.FILEPATH]: layer["mediaType"].removeprefix("application/vnd.cncf.model.")
        for layer in manifest["layers"]
    }
    layers = []
    for file in found["files"]:
        content = whole[file["offset"] : file["offset"] + file["size"]]
        if file["path"] == path:
            content = change("" if path == agent.SERVER else content.decode()).encode()
        layers.append(
            oci.Layer(
                filepath=file["path"],
                kind=cast(oci.Kind, kinds[file["path"]].removesuffix(".v1.raw")),
                content=content,
                sha256=hashlib.sha256(content).hexdigest(),
                bytes=len(content),
            )
        )
    annotations = {**manifest["annotations"], "org.edgepack.release-sequence": str(sequence)}
    image = oci.Image(
        name=found["name"], config=json.loads(head.config), annotations=annotations, layers=tuple(layers)
    )
    oci.write(out, image, sign=lambda digest: sign.sign(key, digest))
    return out


def release_of(bundle: Path) -> str:
    return agent.read_head(str(bundle))[1]["manifest_digest"].removeprefix("sha256:")


def edgepack(*words: object, ssh: Sequence[str] = ("ssh",)) -> subprocess.CompletedProcess[str]:
    """What the command line does and says, with this ssh."""
    argv = [sys.executable, "-m", "edgepack", *map(str, words)]
    return subprocess.run(
        argv, env={**os.environ, "EDGEPACK_SSH": shlex.join(ssh)}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
