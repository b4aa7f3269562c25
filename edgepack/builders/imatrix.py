"""Importance matrices: read from llama.cpp's GGUF form, or computed from calibration data by llama-imatrix."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepack import calibration as calibrations
from edgepack import ggufheader
from edgepack.calibration import Calibration
from edgepack.calibration.chat import gguf_tokens
from edgepack.errors import BadInput, BuildFailed
from edgepack.modelspec import ModelSpec
from edgepack.progress import Progress
from edgepack.shell import run
from edgepack.toolchain import Toolchain
from edgepack.units import pad
from edgepack.workspace import whole_file

_TEXT = "calibration.txt"
"""llama-imatrix writes its input's path into its output, so it is always this one."""
_COUNTED = re.compile(r"computing over (\d+) chunks")
_TOO_SHORT = re.compile(r"tokenizes to only (\d+) tokens")
_CHUNK_LINE = re.compile(r"stored collected data after (\d+) chunks")
"""Said at verbosity 5 only."""


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


def compute(
    model: Path,
    calibration: Calibration,
    out: Path,
    *,
    toolchain: Toolchain,
    progress: Progress,
    threads: int | None = None,
) -> Path:
    """Runs llama-imatrix over the data in chunks as ``calibration.sampling`` says, and writes ``out`` whole.

    Chat markers in the data become the tokens that they are in use. The result does not depend on the number of
    threads or on the folder. Holds the model (mapped) and its buffers. Raises BadInput when the data are shorter than
    two chunks, BuildFailed with llama.cpp's words.
    """
    wanted = calibration.sampling
    text = calibrations.as_text(calibration, _between(model))
    size = len(text.encode())
    if size < 2 * wanted.length:
        raise BadInput(
            f"the calibration data are {size} bytes, at most as many tokens; an importance matrix needs "
            f"{2 * wanted.length} tokens",
            hint=f"{wanted.tokens} are a good amount",
        )
    done = 0
    with (
        whole_file(out) as temporary,
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".calibration-") as folder,
        progress.bar("importance matrix", wanted.windows) as advance,
    ):
        (Path(folder) / _TEXT).write_text(text, encoding="utf-8")

        def on_line(line: str) -> None:
            nonlocal done
            match = _CHUNK_LINE.search(line)
            if match is not None:
                advance(int(match.group(1)) - done)
                done = int(match.group(1))

        words: list[str | Path] = [toolchain.imatrix.resolve(), "-m", model.resolve(), "-f", _TEXT]
        # --no-escape: a backslash and n in source code are these two characters, not a line break.
        words += [
            "-o",
            temporary.resolve(),
            "--output-format",
            "gguf",
            "--parse-special",
            "--no-escape",
            "--no-ppl",
        ]
        words += ["-c", str(wanted.length), "-b", str(wanted.length), "--chunks", str(wanted.windows)]
        words += ["-t", str(threads or len(os.sched_getaffinity(0))), "-ngl", "0", "--fit", "off"]
        words += ["--output-frequency", "1", "-lv", "5"]
        ended = run(words, cwd=Path(folder), on_line=on_line, check=False)
        short = _TOO_SHORT.search(ended.stdout)
        if short is not None:
            raise BadInput(
                f"the calibration data are {short.group(1)} tokens; an importance matrix needs {2 * wanted.length}",
                hint=f"{wanted.tokens} are a good amount",
            )
        counted = _COUNTED.search(ended.stdout)
        if ended.returncode != 0:
            tail = "\n".join(ended.stdout.strip().splitlines()[-12:])
            # Its log is written by a thread, which an exit can cut off before it has said why.
            short_of = f"it needs {2 * wanted.length} tokens, and the data are {size} bytes"
            raise BuildFailed(
                f"llama-imatrix ended with status {ended.returncode}:\n{tail}",
                hint=None if counted else f"are the calibration data too short? {short_of}",
            )
        if counted is None:
            raise BuildFailed("llama-imatrix did not say how many chunks it took")
        for warning in calibrations.shortage(int(counted.group(1)) * wanted.length, wanted):
            progress.step(f"warning: {warning}")
    return out


def _between(model: Path) -> str:
    """What a tokenizer writes between two texts: the end of one, and the beginning of the next where it has that."""
    values = ggufheader.parse(model).values
    tokens = gguf_tokens(model)
    begin = tokens.get("bos_token", "") if values.get("tokenizer.ggml.add_bos_token") else ""
    return (tokens.get("eos_token", "") + begin) or "\n\n"
