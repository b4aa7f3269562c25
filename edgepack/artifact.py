"""What a build makes: weights on disk, and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgepack.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on this disk, ready to be built from."""

    path: Path
    """A Hugging Face folder or a .gguf file."""
    source: str
    """What the user named: a folder, a Hub id, a built-in model."""
    revision: str
    """Commit of a Hub repository, or "sha256:…" over the files of a local one."""
    license: str


UNKNOWN = "unknown"
"""Licence of a model that names none."""


def joint_license(first: str, second: str) -> str:
    """Of what two models went into: theirs when it is one, both as an SPDX expression, unknown when either is."""
    if first.lower() == second.lower():
        return first
    return UNKNOWN if UNKNOWN in (first, second) else " AND ".join(sorted((first, second)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What a runtime loads, with its provenance."""

    path: Path
    """A .gguf file, or a folder with weights, config and tokenizer."""
    scheme: str
    sha256: str
    """Of the file, or over the names and digests of the folder's files."""
    bytes: Bytes
    imatrix_sha256: str | None
    calibration_sha256: str | None = None
    """Of the calibration data; None when none was used."""
    tool: str
    """Program and version that made it."""
