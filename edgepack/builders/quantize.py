"""llama.cpp's quantizer, run in a process of its own: `python -m edgepack.builders.quantize`.

A crash or Ctrl-C of the quantizer then ends that process only, and its memory is its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgepack import schemes
from edgepack.builders.child import end_with_parent, listener, own_code
from edgepack.errors import BuildFailed, NoSpace, Unsupported
from edgepack.ggufheader import BLOCKS, FILE_TYPES
from edgepack.progress import Progress
from edgepack.shell import run
from edgepack.toolchain import Toolchain, load_bindings
from edgepack.units import MIB
from edgepack.workspace import free_bytes

_BUFFER = 64 * MIB
"""Bytes of one tensor's rows that the quantizer holds at a time; its default is 8 GiB."""

_TENSOR_LINE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")


def quantize(
    source: Path, out: Path, scheme: str, *, imatrix: Path | None, toolchain: Toolchain, progress: Progress,
    types: Mapping[str, str] | None = None, threads: int | None = None,
) -> None:  # fmt: skip
    """Writes ``source`` (an F16, BF16 or F32 GGUF) quantized to ``scheme`` to ``out``.

    ``imatrix`` is a GGUF of importances. ``types``: the type of each tensor, where the scheme does not say.
    ``threads``: all cores without. Peak anonymous memory is about twice `_BUFFER` plus the header. Raises BuildFailed
    with llama.cpp's words, NoSpace when the disk ran full meanwhile.
    """
    count = threads or len(os.sched_getaffinity(0))
    files = (toolchain.package.resolve(), source.resolve(), out.resolve())
    kind = file_type(scheme) if types is None else common_file_type(types.values())
    words: list[str | Path] = [sys.executable, "-m", __name__, *files, str(kind), "--threads", str(count)]
    if imatrix is not None:
        words += ["--imatrix", imatrix.resolve()]
    if types is not None:
        words += ["--types", json.dumps(types)]
    tail: list[str] = []
    with progress.bar(f"quantizing to {scheme}", 100) as advance:
        ended = run(
            words,
            cwd=out.parent,
            env=own_code(),
            on_line=listener(_TENSOR_LINE, advance, tail),
            check=False,
        )
    if ended.returncode == 0:
        return
    said = "\n".join(line for line in tail if line.strip())[-800:]
    if free_bytes(out.parent) < MIB:
        raise NoSpace(
            f"the disk is full while writing {out.parent}; nothing was kept",
            hint="free some space or set EDGEPACK_CACHE to another disk; the same command resumes",
        )
    raise BuildFailed(f"quantizing to {scheme} ended with status {ended.returncode}:\n{said}")


def file_type(scheme: str) -> int:
    """llama.cpp's number of a scheme (include/llama.h, llama_ftype)."""
    for number, name in FILE_TYPES.items():
        if name == scheme:
            return number
    raise Unsupported(f"scheme {scheme!r} has no file type")


def common_file_type(types: Iterable[str]) -> int:
    """llama.cpp's number for a file with these types: the scheme of the most frequent that is quantized, as it guesses
    it for a file that does not say (src/llama-model-loader.cpp). Raises Unsupported when none is."""
    counted = Counter(kind for kind in types if kind not in ("F32", "F16", "BF16"))
    if not counted:
        raise Unsupported("no tensor of this model can be quantized", hint="take F16")
    common = max(sorted(counted), key=lambda kind: counted[kind])
    return file_type(schemes.ALIASES.get(common, common))


def importances(llama: Any, path: Path) -> Any:
    """The array of llama_model_imatrix_data for an importance file, ended by an entry without a name.

    Each entry is the mean square of the inputs of one tensor's columns (tools/imatrix/imatrix.cpp).
    """
    from edgepack.builders.imatrix import read

    rows = read(path)
    array = (llama.llama_model_imatrix_data * (len(rows) + 1))()
    for entry, (name, values) in zip(array, rows.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    # The entries point into the arrays of numpy, which must live as long as they do.
    array.keep = rows
    return array


def overrides(llama: Any, types: Mapping[str, str]) -> Any:
    """The array of llama_model_tensor_override for these types, ended by one without a pattern.

    The quantizer searches a tensor's name for each pattern in turn (src/llama-quant.cpp, llama_tensor_get_type).
    """
    array = (llama.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(array, types.items(), strict=False):
        entry.pattern = f"^{name.replace('.', '[.]')}$".encode()
        entry.type = BLOCKS[kind][0]
    return array


def _main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edgepack.builders.quantize")
    parser.add_argument("package", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("file_type", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--types", type=json.loads)
    asked = parser.parse_args(words)
    end_with_parent()
    llama: Any = load_bindings(asked.package)
    llama.llama_backend_init()
    params = llama.llama_model_quantize_default_params()
    params.ftype = asked.file_type
    params.nthread = asked.threads
    params.max_buf_size = _BUFFER
    if asked.imatrix is not None:
        params.imatrix = importances(llama, asked.imatrix)
    if asked.types is not None:
        params.tt_overrides = overrides(llama, asked.types)
    status: int = llama.llama_model_quantize(
        os.fsencode(asked.source), os.fsencode(asked.out), ctypes.byref(params)
    )
    return status


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
