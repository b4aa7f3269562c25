"""Checkpoints in other formats than GGUF: each quantizer is a module, run in a process of its own.

A crash, Ctrl-C or the memory of a quantizer is then that process's own, and so is the environment that its library
wants. The artifact is a folder that appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import re
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from edgepack import errors, layouts
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import safetensors
from edgepack.builders.quantize import import_path
from edgepack.errors import BadInput, BuildFailed, EdgepackError, MissingTool, NoSpace, Unsupported
from edgepack.modelspec import ModelSpec
from edgepack.profile import Backend
from edgepack.progress import Progress
from edgepack.schemes import weights_bytes
from edgepack.shell import run
from edgepack.units import MIB, Bytes
from edgepack.workspace import free_bytes, require_space, sha256_file, whole_dir, write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODULES: tuple[str, ...] = ("gptqmodel", "autoround", "llmcompressor", "bitsandbytes", "onnx_genai")
"""The quantizers; adding one is a module here and rows in layouts.py."""

RECIPE = 1
"""Raised when a quantizer writes other bytes for the same job, so that old artifacts are not taken for new ones."""

REFUSED = "refused "
"""Start of the line with which a quantizer's process hands an EdgepackError over: its class, message and hint."""

_PROGRESS_LINE = re.compile(r"^progress (\d+) (\d+)$")


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
        """Writes the artifact into ``job.out``; prints lines ``progress DONE TOTAL`` on stdout."""
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
    BuildFailed with the library's words, NoSpace, and BuildFailed when the tensors' bytes are not those predicted.
    """
    scheme = layouts.parse(job.scheme)
    quantizer = named(job.scheme)
    versions = installed(quantizer)
    if quantizer.calibrates(scheme) and job.windows is None:
        raise BadInput(f"{job.scheme} needs calibration data", hint="--calibration FILE; without it the built-in text")
    predicted = weights_bytes(spec, job.scheme, imatrix=False, backend=job.backend)
    out = folder / f"{_digest(checkpoint, job, calibration, versions)}-{job.scheme}"
    if not out.is_dir():
        require_space(folder, predicted + 64 * MIB)
        with whole_dir(out) as partial:
            _run(quantizer, replace(job, out=partial), progress)
    return Artifact(
        path=out,
        scheme=job.scheme,
        sha256=folder_sha256(out),
        bytes=Bytes(sum(f.stat().st_size for f in files(out))),
        imatrix_sha256=None,
        calibration_sha256=calibration if quantizer.calibrates(scheme) else None,
        tool=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def installed(quantizer: Quantizer) -> Mapping[str, str]:
    """Version of each of the quantizer's packages. Raises MissingTool when one is not installed."""
    found = {}
    for name in quantizer.PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingTool(
                f"{name} is not installed", hint=f"pip install 'edgepack[{quantizer.EXTRA}]' (torch first: README)"
            ) from error
    return found


def files(folder: Path) -> list[Path]:
    """The files of an artifact, in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_sha256(folder: Path) -> str:
    """sha256 over the names and digests of the files, in the form that sha256sum prints."""
    lines = (f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files(folder))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def report(done: int, total: int) -> None:
    """Tells the parent of a quantizer's process how far it is; on a line of its own whatever a library printed."""
    sys.stdout.write(f"\nprogress {done} {total}\n")
    sys.stdout.flush()


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
    inputs = (
        checkpoint.revision, job.scheme, calibration or "", job.backend, str(job.context), str(job.seed), str(RECIPE),
        *(f"{name} {version}" for name, version in versions.items()),
    )  # fmt: skip
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def _run(quantizer: Quantizer, job: Job, progress: Progress) -> None:
    """Runs the quantizer's process to its end, its words kept for when it fails."""
    module = str(quantizer.__name__)  # type: ignore[attr-defined]  # a module has one
    tail: list[str] = []
    done = 0
    with progress.bar(f"quantizing to {job.scheme}", 100) as advance:

        def on_line(line: str) -> None:
            nonlocal done
            match = _PROGRESS_LINE.match(line)
            if match is None:
                tail.append(line)
                return
            percent = 100 * int(match.group(1)) // max(1, int(match.group(2)))
            advance(percent - done)
            done = percent

        environment = {
            "PYTHONPATH": import_path(), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(job.threads), **quantizer.ENVIRONMENT,
        }  # fmt: skip
        ended = run(
            [sys.executable, "-m", "edgepack.builders.quantizers.worker", module, to_json(job)],
            env=environment,
            on_line=on_line,
            check=False,
        )
    if ended.returncode == 0:
        return
    if free_bytes(job.out) < MIB:
        raise NoSpace(
            f"the disk is full while writing {job.out.parent}; nothing was kept",
            hint="free some space or set EDGEPACK_CACHE to another disk",
        )
    if ended.returncode == -signal.SIGKILL:
        raise BuildFailed(
            f"quantizing to {job.scheme} was killed, most likely because memory ran out",
            hint="give the machine more memory or swap, or take a smaller model",
        )
    said = [line for line in tail if line.strip()]
    for line in said:
        if line.startswith(REFUSED):
            raise _refusal(line)
    raise BuildFailed(
        f"quantizing to {job.scheme} ended with status {ended.returncode}: {said[-1] if said else 'it said nothing'}",
        hint=f"what it printed is in {_log(job, said)}",
    )


def _refusal(line: str) -> EdgepackError:
    kind, message, hint = json.loads(line.removeprefix(REFUSED))
    return cast(EdgepackError, getattr(errors, kind)(message, hint=hint))


def _log(job: Job, said: list[str]) -> Path:
    """All that a failed process printed, beside where its artifact would be."""
    path = job.out.with_name(f"{job.scheme}.log")
    write_text(path, "\n".join(said) + "\n")
    return path


def to_json(job: Job) -> str:
    return json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in asdict(job).items()})


def from_json(text: str) -> Job:
    fields = json.loads(text)
    paths = {name: Path(fields[name]) for name in ("source", "out")}
    windows = None if fields["windows"] is None else Path(fields["windows"])
    return Job(**{**fields, **paths, "windows": windows})
