"""One bundle packed from a folder of its inputs, on any machine: `python -m tests.integration.pack_one FOLDER OUT`.

Needs of edgepack only its bundle writer: the standard library and Jinja.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack import bundle as bundles
from edgepack import serde
from edgepack.artifact import Artifact, Checkpoint
from edgepack.bundle import Bundle
from edgepack.evaluation import Quality
from edgepack.plan import Plan

MODEL, SERVER, KEY, INPUTS, SELFTEST = "model.gguf", "llama-server", "key", "inputs.json", "selftest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What `bundle.write` takes beside files; paths are those of the machine that recorded them."""

    plan: Plan
    artifact: Artifact
    checkpoint: Checkpoint
    quality: Quality | None
    sequence: int


def record(folder: Path, inputs: Inputs, selftest: object, *, server: Path, key: Path) -> None:
    """Lays the inputs of a bundle into a new ``folder`` that can be carried to another machine."""
    folder.mkdir(parents=True)
    (folder / INPUTS).write_text(serde.to_json(inputs), encoding="utf-8")
    (folder / SELFTEST).write_text(json.dumps(selftest), encoding="utf-8")
    for source, name in ((inputs.artifact.path, MODEL), (server, SERVER), (key, KEY)):
        shutil.copy2(source, folder / name)
    shutil.copy2(key.with_name(f"{key.name}.pub"), folder / f"{KEY}.pub")


def pack(folder: Path, out: Path) -> Bundle:
    """The bundle of a folder that `record` wrote."""
    inputs = serde.load_json(Inputs, folder / INPUTS)
    return bundles.write(
        inputs.plan,
        replace(inputs.artifact, path=folder / MODEL),
        out,
        checkpoint=inputs.checkpoint,
        selftest=json.loads((folder / SELFTEST).read_text(encoding="utf-8")),
        key=folder / KEY,
        runtime=folder / SERVER,
        sequence=inputs.sequence,
        quality=inputs.quality,
    )


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), Path(sys.argv[2])).manifest_digest)
