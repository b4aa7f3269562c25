"""A checkpoint to the GGUF of a scheme: converted, then quantized by llama.cpp; a rerun resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from edgepack import calibration, schemes
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import convert
from edgepack.builders.convert import OutType
from edgepack.builders.imatrix import compute, is_matrix, require_match
from edgepack.builders.quantize import quantize
from edgepack.calibration import Calibration
from edgepack.errors import Unsupported
from edgepack.modelspec import ModelSpec
from edgepack.progress import Progress
from edgepack.toolchain import COMMIT, LLAMA_VERSION, SDIST_VERSION, Toolchain
from edgepack.units import Bytes
from edgepack.workspace import require_space, sha256_file, whole_file

AS_IT_IS = "as-is"
"""Scheme of a GGUF that is used unchanged."""

_FLOATS: dict[str, OutType] = {"F16": "F16", "BF16": "BF16", "F32": "F32"}
VERSION = 1
"""Raised when the converter writes other bytes for the same input, so that old stages are not reused."""


def build(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    scheme: str,
    out_dir: Path,
    *,
    imatrix: Path | Calibration | None = None,
    toolchain: Toolchain,
    progress: Progress,
    threads: int | None = None,
) -> Artifact:
    """The artifact of ``scheme`` in ``out_dir``, made unless it is there already.

    ``imatrix`` is an importance matrix (GGUF), or calibration data to compute one from: a file, or read already. A
    GGUF of the wanted scheme is used where it lies, never copied. Needs room for the result and, while quantizing, for
    the converted checkpoint; no stage's file is ever visible half-written. Raises Unsupported for schemes that need an
    importance matrix when there is none, BadInput, NoSpace and BuildFailed.
    """
    if spec.gguf_types is not None and scheme in (AS_IT_IS, spec.gguf_scheme):
        return _artifact(checkpoint.path, spec.gguf_scheme or scheme, "used as it is", progress)
    name = schemes.canonical(scheme)
    schemes.tensor_types(spec, name, imatrix=imatrix is not None)
    if imatrix is None and schemes.requires_imatrix(spec, name):
        raise Unsupported(
            f"{name} needs an importance matrix for {spec.name}",
            hint="--calibration FILE computes one, --imatrix FILE gives one made by llama-imatrix",
        )
    source = given(imatrix, checkpoint, spec, progress)
    data = source.sha256 if isinstance(source, Calibration) else None
    matrix_id = sha256_file(source) if isinstance(source, Path) else None
    tool = f"llama.cpp {LLAMA_VERSION} ({COMMIT[:9]}), llama-cpp-python {SDIST_VERSION}"
    types = recipe_types(spec) if schemes.is_budget(name) else None
    also = (data or matrix_id or "") + ("" if types is None else json.dumps(types))
    out = out_dir / f"{stage(spec, checkpoint, name, also)}.gguf"
    if name in _FLOATS and spec.gguf_types is None:
        if not out.is_file():
            convert.convert(checkpoint.path, out, outtype=_FLOATS[name], progress=progress)
        return _artifact(out, name, "edgepack's converter", progress)
    if not out.is_file():
        whole = full_precision(checkpoint, spec, name, out_dir, source is not None, progress)
        matrix = source if isinstance(source, Path) else None
        if isinstance(source, Calibration):
            matrix = importances(source, whole, checkpoint, spec, out_dir, toolchain, progress, threads)
        with whole_file(out) as temporary:
            quantize(
                whole,
                temporary,
                name,
                imatrix=matrix,
                types=types,
                threads=threads,
                toolchain=toolchain,
                progress=progress,
            )
        if whole != checkpoint.path:
            whole.unlink()
    made = _artifact(out, name, tool, progress)
    return replace(made, imatrix_sha256=matrix_id, calibration_sha256=data)


def recipe_types(spec: ModelSpec) -> dict[str, str]:
    """The type that the model's recipe gives to each tensor that llama-quantize may change."""
    types = schemes.tensor_types(spec, schemes.BUDGET, imatrix=True)
    return {t.name: kind for t, kind in zip(spec.tensors, types, strict=True) if schemes.quantizable(t)}


def full_precision(
    checkpoint: Checkpoint, spec: ModelSpec, name: str, out_dir: Path, imatrix: bool, progress: Progress
) -> Path:
    """The GGUF to quantize from: the given one, or the checkpoint converted without loss where possible."""
    final, _ = schemes.file_bytes(spec, name, imatrix=imatrix)
    if spec.gguf_types is not None:
        require_space(out_dir, final)
        return checkpoint.path
    outtype = convert.stored_type(checkpoint.path)
    whole = out_dir / f"{stage(spec, checkpoint, outtype, 'to-quantize')}.gguf"
    if not whole.is_file():
        size, _ = schemes.file_bytes(spec, outtype, imatrix=False)
        require_space(out_dir, final + size)
        convert.convert(checkpoint.path, whole, outtype=outtype, progress=progress)
    require_space(out_dir, final)
    return whole


def importances(
    data: Calibration,
    whole: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    out_dir: Path,
    toolchain: Toolchain,
    progress: Progress,
    threads: int | None = None,
) -> Path:
    """The importance matrix of a checkpoint from calibration data, kept for its other schemes."""
    matrix = matrix_path(data, checkpoint, spec, out_dir)
    if not matrix.is_file():
        compute(whole, data, matrix, toolchain=toolchain, progress=progress, threads=threads)
    return matrix


def matrix_path(data: Calibration, checkpoint: Checkpoint, spec: ModelSpec, out_dir: Path) -> Path:
    """Where the importance matrix of a checkpoint and data is, or will be."""
    return out_dir / f"{stage(spec, checkpoint, 'imatrix', data.sha256)}.gguf"


def given(
    imatrix: Path | Calibration | None, checkpoint: Checkpoint, spec: ModelSpec, progress: Progress
) -> Path | Calibration | None:
    """A file that is no importance matrix is calibration data; a matrix of another model is refused before any work."""
    if not isinstance(imatrix, Path):
        return imatrix
    if is_matrix(imatrix):
        require_match(imatrix, spec)
        return imatrix
    data = calibration.of(checkpoint.path, spec, (imatrix,))
    for warning in data.warnings:
        progress.step(f"warning: {warning}")
    return data


def stage(spec: ModelSpec, checkpoint: Checkpoint, scheme: str, also: str) -> str:
    """Name of a stage's file: readable, and different for every input that changes its bytes."""
    inputs = (checkpoint.revision, spec.architecture, scheme, also, SDIST_VERSION, COMMIT, str(VERSION))
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    return f"{digest}-{scheme}"


def _artifact(path: Path, scheme: str, tool: str, progress: Progress) -> Artifact:
    size = path.stat().st_size
    with progress.bar(f"hashing {path.name}", size) as advance:
        digest = sha256_file(path, on_bytes=advance)
    return Artifact(
        path=path, scheme=scheme, sha256=digest, bytes=Bytes(size), imatrix_sha256=None, tool=tool
    )
