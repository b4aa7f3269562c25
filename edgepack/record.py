"""How an artifact was made and what it lost: edgepack.json, in an artifact's folder or beside its file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import edgepack.calibration as calibrations
from edgepack import serde
from edgepack.evaluation import Quality
from edgepack.units import Bytes
from edgepack.workspace import write_text

NAME = "edgepack.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    model: str
    source: str
    revision: str
    license: str
    scheme: str
    tool: str
    sha256: str
    """Of the file, or over the names and digests of the folder's files without this record."""
    bytes: Bytes
    """Of the file or all the folder's files."""
    tensor_bytes: Bytes
    """Of the weights alone: predicted, and found to be so."""
    imatrix_sha256: str | None
    """Of the importance matrix that was given; one that was computed follows from the calibration."""
    calibration: calibrations.Record | None
    quality: Quality | None
    """None when it was not measured."""
    schema_version: Literal[1] = 1


def place(artifact: Path) -> Path:
    """Where the record of an artifact lies: in its folder, or beside its file with ".edgepack.json" behind the name."""
    return artifact / NAME if artifact.is_dir() else artifact.with_name(f"{artifact.name}.{NAME}")


def write(record: Record, artifact: Path) -> None:
    write_text(place(artifact), serde.to_json(record))


def of(artifact: Path) -> Record | None:
    """The record of an artifact; None when there is none. Raises BadInput for one that is damaged."""
    path = place(artifact)
    return serde.load_json(Record, path) if path.is_file() else None


def shown(record: Record) -> Record:
    """A record for people and their programs: without the sketch of the calibration text, which is for edgepack."""
    known = record.calibration
    return record if known is None else replace(record, calibration=replace(known, fingerprints=()))
