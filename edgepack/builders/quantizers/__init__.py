"""Checkpoints in other formats than GGUF: each quantizer is a module, run in a process of its own.

A crash, Ctrl-C or the memory of a quantizer is then that process's own, and so is the environment that its library
wants. The artifact is a folder that appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from edgepack import layouts, record
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import child, safetensors
from edgepack.builders.safetensors import Stored
from edgepack.errors import BadInput, BuildFailed, MissingTool, Unsupported
from edgepack.modelspec import ModelSpec
from edgepack.profile import Backend
from edgepack.progress import Progress
from edgepack.schemes import weights_bytes
from edgepack.units import MIB, Bytes
from edgepack.workspace import require_space, sha256_file, whole_dir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODULES: tuple[str, ...] = (
    "gptqmodel",
    "autoround",
    "llmcompressor",
    "bitsandbytes",
    "onnx_genai",
    "unrounded",
)
"""The quantizers; adding one is a module here and rows in layouts.py."""

RECIPE = 1
"""Raised when a quantizer writes other bytes for the same job, so that old artifacts are not taken for new ones."""

RESUME = "resume"
"""In a quantizer's scratch folder: from what it goes on when it was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a quantizer is told."""

    source: Path
    """A Hugging Face folder of safetensors."""
    out: Path
    """An empty folder; everything that the artifact consists of is written into it."""
    scheme: str
    """Canonical name (layouts.parse)."""
    windows: Path | None
    """Calibration: a .npy of int32 token ids, [windows, tokens]; None for a quantizer that needs none."""
    backend: Backend
    """Of the device that the artifact is for: ONNX graphs differ by it."""
    context: int
    """Tokens of one sequence in the plan; max_length of an ONNX model."""
    threads: int
    seed: int


class Quantizer(Protocol):
    """A module of this package. At module level it imports nothing heavy."""

    FAMILIES: tuple[layouts.Family, ...]
    PACKAGES: tuple[str, ...]
    """Distributions that make the artifact; their versions are part of its name and provenance."""
    EXTRA: str
    """The extra of edgepack that installs them."""
    ENVIRONMENT: Mapping[str, str]
    """Set for its process."""

    def calibrates(self, scheme: layouts.Scheme) -> bool:
        """Whether it must be given calibration windows."""
        ...

    def quantize(self, job: Job) -> None:
        """Writes the artifact into ``job.out`` and ``report``s how far it is.

        The working directory is its own: what a killed run leaves there the next run of the same job finds again.
        """
        ...


def named(scheme: str) -> Quantizer:
    """The quantizer that makes a scheme. Raises Unsupported when none does."""
    family = layouts.parse(scheme).family
    for name in MODULES:
        module = cast(Quantizer, importlib.import_module(f"{__name__}.{name}"))
        if family in module.FAMILIES:
            return module
    raise Unsupported(f"nothing here makes {scheme}", hint="take one that `edgepack quantize --help` lists")


def build(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    job: Job,
    folder: Path,
    *,
    calibration: str | None,
    progress: Progress,
) -> Artifact:
    """The artifact that ``job`` describes, in a folder of ``folder`` (``job.out`` is set here), unless it is there.

    ``calibration``: sha256 of what ``job.windows`` was made from. Raises MissingTool with the extra to install,
    BadInput for calibration that cannot serve and a source without safetensors, NoSpace, and BuildFailed with the
    library's words or when a tensor is not the one that was predicted.
    """
    scheme = layouts.parse(job.scheme)
    quantizer = named(job.scheme)
    versions = installed(quantizer)
    if quantizer.calibrates(scheme) and job.windows is None:
        raise BadInput(
            f"{job.scheme} needs calibration data", hint="--calibration FILE; without it the built-in text"
        )
    predicted = weights_bytes(spec, job.scheme, imatrix=False, backend=job.backend)
    out = folder / f"{_digest(checkpoint, job, calibration, versions)}-{job.scheme}"
    if not out.is_dir():
        stored = safetensors.checkpoint(checkpoint.path)
        if job.windows is not None and quantizer.calibrates(scheme):
            check_windows(job.windows, spec)
        # Twice as much is set aside by libraries that work by layers.
        require_space(folder, 3 * predicted + 64 * MIB)
        scratch = folder / f".{out.name}.scratch"
        with _swept(scratch), whole_dir(out) as partial:
            _run(quantizer, _at_home(job, partial), scratch, progress)
            if scheme.family != "onnx":
                verify(partial, stored, spec, job.scheme)
    return Artifact(
        path=out,
        scheme=job.scheme,
        sha256=folder_sha256(out),
        bytes=Bytes(sum(f.stat().st_size for f in files(out))),
        imatrix_sha256=None,
        calibration_sha256=calibration if quantizer.calibrates(scheme) else None,
        tool=_tool(versions, job, calibrated=quantizer.calibrates(scheme)),
    )


@contextmanager
def _swept(scratch: Path) -> Iterator[None]:
    """Removes the scratch folder at the end; after a failure it stays where the library can go on from it."""
    try:
        yield
    except BaseException:
        if not (scratch / RESUME).exists():
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _tool(versions: Mapping[str, str], job: Job, *, calibrated: bool) -> str:
    """Programs and versions; with the threads where they decide in what order sums are added."""
    told = [f"{name} {version}" for name, version in versions.items()]
    return ", ".join([*told, f"{job.threads} threads"] if calibrated else told)


_INSTEAD: Mapping[str, tuple[str, ...]] = {
    "onnxruntime-genai": ("onnxruntime-genai-cuda",),
    "onnxruntime": ("onnxruntime-gpu",),
}
"""Distributions that hold the same modules and may be there in a package's place, never beside it."""


def installed(quantizer: Quantizer) -> Mapping[str, str]:
    """Version of each of the quantizer's packages. Raises MissingTool when one is not installed, or two that exclude
    each other are."""
    found: dict[str, str] = {}
    for name in quantizer.PACKAGES:
        names = (name, *_INSTEAD.get(name, ()))
        there = {one: version for one in names if (version := _version(one)) is not None}
        if not there:
            raise MissingTool(
                f"{name} is not installed",
                hint=f"pip install 'edgepack[{quantizer.EXTRA}]' (torch first: README)",
            )
        if len(there) > 1:
            raise MissingTool(
                f"{' and '.join(there)} are both installed, and each wrote over the other's modules",
                hint=f"pip uninstall {' '.join(there)}, then install the one that is wanted again",
            )
        found |= there
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_windows(path: Path, spec: ModelSpec) -> None:
    """Raises BadInput for calibration that the model cannot read, or that is too little to quantize by.

    With fewer tokens than a matrix has columns X'X has no inverse, and what is left is damping.
    """
    import numpy as np

    try:
        windows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is no .npy of token ids: {error}") from error
    if windows.ndim != 2 or windows.dtype != np.int32 or not windows.size:
        raise BadInput(
            f"{path} holds {windows.dtype} of shape {windows.shape}",
            hint="int32 token ids, [windows, tokens]",
        )
    length = windows.shape[1]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= spec.vocab:
        raise BadInput(
            f"{path} has token {low if low < 0 else high}, and {spec.name} knows {spec.vocab}",
            hint="calibrate with the model's own tokenizer",
        )
    if length > spec.context_train:
        raise BadInput(
            f"{path} has windows of {length} tokens, and {spec.name} was trained on {spec.context_train}",
            hint=f"cut it into windows of {spec.context_train} or fewer",
        )
    widest = max(tensor.shape[0] for tensor in spec.tensors if layouts.is_linear(tensor))
    if windows.size < widest:
        raise BadInput(
            f"{path} has {windows.size} tokens of calibration, and {spec.name} has matrices of {widest} columns",
            hint=f"give at least {-(-widest // length)} windows of {length}; 128 of 2048 are usual",
        )


def verify(folder: Path, source: Mapping[str, Stored], spec: ModelSpec, scheme: str) -> None:
    """Raises BuildFailed unless the folder's tensors are the source's, each as it is or packed as predicted, and in all
    as many bytes as the plan counts with."""
    made = safetensors.checkpoint(folder)
    predicted, real = weights_bytes(spec, scheme, imatrix=False), sum(t.bytes for t in made.values())
    parsed = layouts.parse(scheme)
    if parsed.family in ("gptq", "awq", "autoround"):
        _same_tensors(made, source, spec, parsed)
    if real != predicted:
        raise _unlike(f"{folder.name} has tensors of {real} bytes, and {predicted} were predicted")


def _same_tensors(
    made: Mapping[str, Stored], source: Mapping[str, Stored], spec: ModelSpec, scheme: layouts.Scheme
) -> None:
    kind = layouts.matrix_kind(scheme) or "BF16"
    expected: dict[str, tuple[str, int]] = {}
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in made:
            rows, columns = tensor.shape
            parts = layouts.packed(kind, columns, rows)
            expected |= {f"{module}.{part}": like for part, like in parts.items()}
        elif name in made or not (spec.tied and module == "lm_head"):
            expected[name] = ("", 2 * math.prod(tensor.shape))
    if unknown := sorted(made.keys() - expected.keys()):
        raise _unlike(f"{unknown[0]} is in the artifact and in no prediction")
    for name, (dtype, size) in expected.items():
        if name not in made:
            raise _unlike(f"{name} is not in the artifact")
        got = made[name]
        if got.bytes != size or got.dtype not in ((dtype,) if dtype else ("F16", "BF16")):
            raise _unlike(
                f"{name} has {got.bytes} bytes of {got.dtype}; predicted are {size} of {dtype or '16 bits'}"
            )


def _unlike(what: str) -> BuildFailed:
    return BuildFailed(
        what, hint="this is a bug in edgepack or in the library; report it with the model's config.json"
    )


def files(folder: Path) -> list[Path]:
    """The files of an artifact, in one order, without the record that is written of it."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != record.NAME)


def folder_sha256(folder: Path) -> str:
    """sha256 over the names and digests of the files, in the form that sha256sum prints."""
    lines = (f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files(folder))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_windows(job: Job) -> NDArray[np.int32]:
    """The calibration's token ids, [windows, tokens], in the order in which they were given."""
    import numpy as np

    if job.windows is None:
        raise BadInput(f"{job.scheme} needs calibration data", hint="--calibration FILE")
    windows: NDArray[np.int32] = np.load(job.windows, allow_pickle=False)
    return windows


def float_type(source: Path) -> str:
    """torch's name of the type in which what stays unquantized is kept: the source's own, bfloat16 for 32 bits.

    A library that is not told loads and saves in float32, which doubles embeddings and head.
    """
    types = {stored.dtype for stored in safetensors.checkpoint(source).values()}
    return "float16" if types == {"F16"} else "bfloat16"


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def copy_tokenizer(job: Job) -> None:
    """Copies what goes with the weights, as it is, and makes every file readable for all, as the rest of them is."""
    for name in TOKENIZER_FILES:
        if (job.source / name).is_file():
            shutil.copyfile(job.source / name, job.out / name)
    for path in job.out.iterdir():
        path.chmod(0o644)  # safetensors' writer leaves some to their owner alone


def _digest(checkpoint: Checkpoint, job: Job, calibration: str | None, versions: Mapping[str, str]) -> str:
    # Sums over calibration data are added in another order by another number of threads.
    calibrated = (calibration, str(job.threads)) if calibration else ()
    graph = (job.backend, str(job.context)) if layouts.parse(job.scheme).family == "onnx" else ()
    inputs = (
        checkpoint.revision, job.scheme, *calibrated, *graph, str(job.seed), str(RECIPE),
        *(f"{name} {version}" for name, version in versions.items()),
    )  # fmt: skip
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def _run(quantizer: Quantizer, job: Job, scratch: Path, progress: Progress) -> None:
    """Runs the quantizer's process in ``scratch`` to its end, its words kept for when it fails."""
    module = str(quantizer.__name__)  # type: ignore[attr-defined]  # a module has one
    scratch.mkdir(exist_ok=True)
    child.run(
        f"{__name__}.worker",
        [module, to_json(job)],
        title=f"quantizing to {job.scheme}",
        cwd=scratch,
        log=job.out.with_name(f"{job.scheme}.log"),
        threads=job.threads,
        progress=progress,
        environment=quantizer.ENVIRONMENT,
    )


def _at_home(job: Job, out: Path) -> Job:
    """The job with paths that do not depend on where its process runs."""
    windows = None if job.windows is None else job.windows.resolve()
    return replace(job, source=job.source.resolve(), out=out.resolve(), windows=windows)


def to_json(job: Job) -> str:
    return json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in asdict(job).items()})


def from_json(text: str) -> Job:
    fields = json.loads(text)
    paths = {
        name: None if fields[name] is None else Path(fields[name]) for name in ("source", "out", "windows")
    }
    return Job(**{**fields, **paths})
