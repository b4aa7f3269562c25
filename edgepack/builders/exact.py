"""llama.cpp asked itself: the types its quantizer gives and the buffers its contexts take, without weights.

A GGUF of header and hole is quantized in a dry run and loaded without allocation, in a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack import schemes
from edgepack.builders import ggufwriter
from edgepack.builders.child import end_with_parent, own_code
from edgepack.builders.convert import architecture, planning_only
from edgepack.builders.quantize import file_type
from edgepack.errors import BuildFailed
from edgepack.ggufheader import ALIGNMENT, BLOCKS, Entry
from edgepack.modelspec import CONVERTED, ModelSpec
from edgepack.runtimes.llama_cpp import split_types
from edgepack.settings import Settings
from edgepack.shell import run
from edgepack.toolchain import Toolchain, load_bindings
from edgepack.units import MIB, Bytes, pad

_SIZE = r"= *([0-9.]+) MiB"
_TENSOR = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\w+), size = [^\n]*?(?:\((\w+)\))?\n")
_PARTS: Mapping[str, re.Pattern[str]] = {
    "kv_cache": re.compile(rf"llama_kv_cache: size {_SIZE}"),
    "recurrent_state": re.compile(rf"llama_memory_recurrent: size {_SIZE}"),
    "compute": re.compile(rf"compute buffer size {_SIZE}"),
    "output": re.compile(rf"output buffer size {_SIZE}"),
}
"""The lines llama.cpp logs (src/llama-kv-cache.cpp, llama-memory-recurrent.cpp, llama-context.cpp)."""

PRINTED = Bytes(MIB // 100)
"""llama.cpp prints hundredths of a MiB, so a part of `ExactFigures` is known to half of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactFigures:
    """llama.cpp's own numbers for one model, scheme and settings."""

    tensor_types: tuple[str, ...]
    """Type of every tensor of the spec after quantizing, in the spec's order."""
    tensor_bytes: Bytes
    """Sum of the tensors, without padding: the "model size" of llama.cpp."""
    file_bytes: Bytes | None
    """Whole file; None when the header's size is not known."""
    kv_cache: Bytes
    recurrent_state: Bytes
    compute: Bytes
    output: Bytes


def exact(
    spec: ModelSpec, scheme: str, settings: Settings, *, imatrix: bool = False, toolchain: Toolchain
) -> ExactFigures:
    """What llama.cpp's quantizer and CPU backend say; `exact_many` asks for several settings at once."""
    return exact_many(spec, scheme, (settings,), imatrix=imatrix, toolchain=toolchain)[0]


def exact_many(
    spec: ModelSpec,
    scheme: str,
    settings: Sequence[Settings],
    *,
    imatrix: bool = False,
    toolchain: Toolchain,
) -> tuple[ExactFigures, ...]:
    """Figures for each of ``settings``, from one process: about 0.3 s and 10 ms per context.

    Buffers are those of the CPU backend. Raises BuildFailed with llama.cpp's words when it refuses the
    scheme for this model or cannot make a context (as with quantized V and no flash attention).
    """
    if spec.family not in CONVERTED:
        raise planning_only(spec.name, spec.family)
    keep = spec.gguf_types is not None and scheme in ("as-is", spec.gguf_scheme)
    with tempfile.TemporaryDirectory(prefix="edgepack-exact-") as folder:
        model = Path(folder) / "shape.gguf"
        _sparse(spec, model)
        question = {
            "model": str(model),
            "file_type": None if keep else file_type(scheme),
            "imatrix": imatrix,
            "contexts": [_context(one) for one in settings],
        }
        ended = run(
            [sys.executable, "-m", __name__, toolchain.package.resolve()],
            cwd=Path(folder),
            env=own_code(),
            stdin=json.dumps(question),
            check=False,
        )
        if ended.returncode != 0:
            said = "\n".join(ended.stderr.strip().splitlines()[-8:])
            raise BuildFailed(f"llama.cpp refuses {spec.name} as {scheme} with these settings:\n{said}")
        answer = json.loads(ended.stdout)
    types = spec.gguf_types if spec.gguf_types is not None and keep else _types(spec, answer["dry_run"])
    sizes = [schemes.tensor_bytes(kind, t.shape) for kind, t in zip(types, spec.tensors, strict=True)]
    padded = sum(pad(size, ALIGNMENT) for size in sizes)
    return tuple(
        ExactFigures(
            tensor_types=types,
            tensor_bytes=Bytes(sum(sizes)),
            file_bytes=None if spec.header_bytes is None else Bytes(spec.header_bytes + padded),
            **{name: _sum(pattern, log) for name, pattern in _PARTS.items()},
        )
        for log in answer["contexts"]
    )


def _types(spec: ModelSpec, log: str) -> tuple[str, ...]:
    """The type of each tensor from the dry run's lines: `(q6_K)` at the end, else the type it has."""
    found = {name: (after or before).upper() for name, before, after in _TENSOR.findall(log)}
    missing = [t.name for t in spec.tensors if found.get(t.name) not in BLOCKS]
    if missing:
        raise BuildFailed(f"llama.cpp's dry run said nothing that is understood about {missing[0]}")
    return tuple(found[t.name] for t in spec.tensors)


def _sum(pattern: re.Pattern[str], log: str) -> Bytes:
    return Bytes(round(sum(float(size) for size in pattern.findall(log)) * MIB))


def _context(settings: Settings) -> Mapping[str, int]:
    """The context that llama-server makes from its flags (tools/server/server-context.cpp)."""
    key, value = split_types(settings.kv_type)
    return {
        "n_ctx": settings.context,
        "n_batch": settings.batch,
        "n_ubatch": settings.ubatch,
        "n_seq_max": settings.slots,
        "n_outputs_max": settings.slots,
        "n_outputs_max_per_seq": 1,
        "type_k": BLOCKS[key.upper()][0],
        "type_v": BLOCKS[value.upper()][0],
        "flash_attn_type": int(settings.flash_attention),
        "kv_unified": settings.unified_kv,
        "swa_full": False,
        "n_threads": 1,
    }


def _sparse(spec: ModelSpec, path: Path) -> None:
    """A GGUF with every tensor's description and a hole where the data would be; no tokenizer."""
    kinds = spec.gguf_types or tuple("F16" if len(t.shape) > 1 else "F32" for t in spec.tensors)
    infos = ggufwriter.layout([(t.name, kind, t.shape) for t, kind in zip(spec.tensors, kinds, strict=True)])
    entries = (
        *architecture(spec, {}, outtype="F16"),
        Entry(key="tokenizer.ggml.model", kind="str", value="none"),
    )
    head = ggufwriter.header(entries, infos)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + sum(pad(schemes.tensor_bytes(i.type, i.shape), ALIGNMENT) for i in infos))


# ── the other process ──


def _answer(llama: Any, question: Mapping[str, Any]) -> Mapping[str, object]:
    log: list[bytes] = []

    @llama.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes of the toolchain
    def listen(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        log.append(text)

    def said() -> str:
        text = b"".join(log).decode("utf-8", errors="replace")
        log.clear()
        return text

    llama.llama_log_set(listen, None)
    llama.llama_backend_init()
    model_path = os.fsencode(question["model"])
    dry_run = ""
    if question["file_type"] is not None:
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.dry_run = question["file_type"], True
        if question["imatrix"]:
            present = (llama.llama_model_imatrix_data * 2)()
            present[0].name, present[0].size = b"present", 0
            params.imatrix = present
        if llama.llama_model_quantize(model_path, b"", ctypes.byref(params)) != 0:
            raise BuildFailed(said())
        dry_run = said()
    model_params = llama.llama_model_default_params()
    model_params.no_alloc, model_params.load_mode, model_params.n_gpu_layers = True, 0, 0
    model = llama.llama_model_load_from_file(model_path, model_params)
    if not model:
        raise BuildFailed(said())
    contexts: list[str] = []
    for wanted in question["contexts"]:
        said()
        context_params = llama.llama_context_default_params()
        for name, value in wanted.items():
            setattr(context_params, name, value)
        context = llama.llama_init_from_model(model, context_params)
        if not context:
            raise BuildFailed(said())
        contexts.append(said())
        llama.llama_free(context)
    return {"dry_run": dry_run, "contexts": contexts}


def _main(package: Path) -> int:
    end_with_parent()
    try:
        answer = _answer(load_bindings(package), json.load(sys.stdin))
    except BuildFailed as error:
        sys.stderr.write(error.message)
        return 1
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
