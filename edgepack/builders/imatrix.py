"""Importance matrices: read from llama.cpp's GGUF form, or computed from a text by llama-imatrix."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepack import ggufheader
from edgepack.errors import BadInput
from edgepack.modelspec import ModelSpec
from edgepack.progress import Progress
from edgepack.shell import run
from edgepack.toolchain import Toolchain
from edgepack.units import pad
from edgepack.workspace import whole_file

_CHUNK = 512
"""Tokens per evaluated chunk; llama-imatrix's default context."""
_CHUNKS = 100
"""About 51 000 tokens at most: more changes little and costs a prefill of the whole model each."""
_CHUNK_LINE = re.compile(r"\[(\d+)\]")


def is_matrix(path: Path) -> bool:
    """Whether the file is a GGUF, not a text to compute from. Raises BadInput when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def read(path: Path) -> Mapping[str, NDArray[np.float32]]:
    """Mean squared input per column of every tensor in the file, by the tensor's name.

    Sums are divided by counts; a count of 0 (an expert never used) gives ones
    (tools/quantize/quantize.cpp, load_imatrix).
    """
    header = ggufheader.parse(path)
    start = pad(header.unpadded, header.alignment)
    arrays: dict[str, NDArray[np.float32]] = {}
    for info in header.tensors:
        if info.type != "F32":
            raise BadInput(f"{path}: tensor {info.name} is {info.type}; an importance matrix is F32")
        count = int(np.prod(info.shape))
        arrays[info.name] = np.fromfile(path, dtype="<f4", count=count, offset=start + info.offset)
    importances: dict[str, NDArray[np.float32]] = {}
    for name in arrays:
        tensor = name.removesuffix(".in_sum2")
        if tensor == name:
            continue
        counts = arrays.get(f"{tensor}.counts")
        if counts is None or counts.size == 0 or arrays[name].size % counts.size:
            raise BadInput(f"{path}: {tensor} has no counts that match its sums")
        sums = arrays[name].reshape(counts.size, -1)
        used = counts[:, None] > 0
        mean = np.where(used, sums / np.where(used, counts[:, None], 1), 1).astype("<f4").reshape(-1)
        if not np.isfinite(mean).all():
            raise BadInput(f"{path}: {tensor} has importances that are not finite")
        importances[tensor] = mean
    if not importances:
        raise BadInput(f"{path} is a GGUF but no importance matrix", hint="make one with llama-imatrix")
    return importances


def require_match(path: Path, spec: ModelSpec) -> None:
    """Raises BadInput when the matrix is of another model: a block's tensor is missing or of another size."""
    rows = read(path)
    for tensor in spec.tensors:
        if not tensor.name.startswith("blk.") or len(tensor.shape) < 2:
            continue
        found = rows.get(tensor.name)
        wanted = tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
        if found is None or found.size != wanted:
            has = "nothing" if found is None else f"{found.size} columns"
            raise BadInput(
                f"{path} has {has} for {tensor.name}, the model has {wanted} columns",
                hint="the importance matrix was made for another model",
            )


def compute(model: Path, text: Path, out: Path, *, toolchain: Toolchain, progress: Progress) -> Path:
    """Runs llama-imatrix over up to 100 chunks of 512 tokens of ``text`` and writes ``out`` whole.

    Holds the model (mapped) and its buffers; raises BuildFailed with llama.cpp's words, for example when
    the text is shorter than two chunks.
    """
    done = 0
    with (
        whole_file(out) as temporary,
        progress.bar(f"importance matrix from {text.name}", _CHUNKS) as advance,
    ):

        def on_line(line: str) -> None:
            nonlocal done
            for match in _CHUNK_LINE.finditer(line):
                advance(max(0, int(match.group(1)) - done))
                done = max(done, int(match.group(1)))

        files: tuple[str | Path, ...] = ("-m", model, "-f", text, "-o", temporary, "--output-format", "gguf")
        bounds = ("-c", str(_CHUNK), "--chunks", str(_CHUNKS), "-t", str(len(os.sched_getaffinity(0))))
        run([toolchain.imatrix, *files, *bounds, "--no-ppl", "-ngl", "0", "--fit", "off"], on_line=on_line)
    return out
