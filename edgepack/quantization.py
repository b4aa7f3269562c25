"""A checkpoint to the artifact of a scheme, calibrated and measured: `edgepack quantize`, and a stage of `build`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import edgepack.calibration as calibrations
from edgepack import degradation, heldout, layouts, quality, record, schemes, toolchain, workspace
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import budget, gguf, quantizers
from edgepack.builders.imatrix import is_matrix
from edgepack.calibration import Calibration
from edgepack.calibration.encoder import encoder
from edgepack.errors import BadInput, BuildFailed, Unsupported
from edgepack.evaluation import Quality
from edgepack.modelspec import ModelSpec
from edgepack.plan import Plan
from edgepack.profile import Backend
from edgepack.progress import Progress
from edgepack.record import Record
from edgepack.units import Bytes

FLOATS = ("F32", "F16", "BF16")

USUAL = (
    *FLOATS,
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q4_K_M",
    "Q4_K_S",
    "IQ4_XS",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
)
"""What is proposed instead of a GGUF that loses too much: of every width the types that people use."""

PRESETS: Mapping[str, str] = {"article": "gptq-int4-g128", "article-better": "gptq-int4-g64-actorder"}
"""The article's GPTQ parameters (bits 4, group 128, desc_act off), and its cure where that loses too much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What `edgepack quantize` says of an artifact that it made, or would make."""

    path: Path
    scheme: str
    predicted_tensor_bytes: int
    provenance: Literal["exact", "fitted"]
    """How sure the prediction is."""
    record: Record | None = None
    """None where nothing was made."""
    warnings: tuple[str, ...] = ()
    schema_version: Literal[1] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an artifact may lose against its parent; None: anything."""

    max_kl: float | None = None
    """Nats a token."""
    max_ppl_loss: float | None = None
    """Share of the parent's perplexity."""

    @property
    def any(self) -> bool:
        return self.max_kl is not None or self.max_ppl_loss is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an artifact is made, beside its scheme."""

    calibration: tuple[Path, ...] = ()
    """Files; without any a quantizer that must have data takes the built-in text."""
    calibration_tokens: int | None = None
    """How much of it; None: 65536, and more for a model of wide layers."""
    seed: int = 0
    """Draws it."""
    imatrix: Path | None = None
    """An importance matrix for a GGUF, instead of calibration data."""
    plan: Plan | None = None
    """What a GGUF that fills a budget is to fill; no other scheme needs it."""
    backend: Backend = "cpu"
    """Of the device."""
    context: int = 4096
    """Tokens of one sequence on the device."""
    kv_type: str = "f16"
    """KV cache that a GGUF is measured with."""
    threads: int = 1
    measured: bool = True
    text: Path | None = None
    """What quality is measured on; None: the built-in held-out text."""
    tokens: int = quality.TOKENS
    limits: Limits = field(default_factory=Limits)

    @property
    def weighted(self) -> bool:
        """Whether a GGUF is rounded with an importance matrix."""
        budgeted = self.plan is not None and schemes.is_budget(self.plan.scheme)
        return self.imatrix is not None or bool(self.calibration) or budgeted


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    artifact: Artifact
    spec: ModelSpec
    """The model; with the types that its tensors got where a budget decided them."""
    record: Record
    quality: Quality | None
    warnings: tuple[str, ...]


def make(
    checkpoint: Checkpoint, spec: ModelSpec, scheme: str, options: Options, folder: Path, progress: Progress
) -> Made:
    """The artifact of a scheme in ``folder``, measured against the checkpoint it is made from.

    Raises QualityTooLow when it loses more than ``options.limits``, naming the lightest scheme that is expected to keep
    them, and what calibration, the builder and `quality.measure` raise.
    """
    name = schemes.canonical(scheme)
    _refuse(checkpoint, spec, name, options)
    data = _calibration(checkpoint, spec, options) if _wants_data(name, options) else None
    if data is not None and data.builtin:
        progress.step("calibrating on the built-in text; give your own data with --calibration FILE")
    warnings = [] if data is None or data.builtin else list(data.warnings)
    windows = None
    if data is not None and not (schemes.is_gguf(name) and not schemes.is_budget(name)):
        windows, more = _windows(checkpoint, spec, data)
        warnings += [] if data.builtin else more
    for warning in warnings:
        progress.step(f"warning: {warning}")
    text = heldout.read(options.text)
    if data is not None and options.measured:
        heldout.require_held_out(text, calibrations.record(data).fingerprints)
    artifact, spec = _build(checkpoint, spec, name, data, windows, options, folder, progress)
    _same_size(spec, artifact, options)
    measured: Quality | None = None
    if options.measured and not runs_here(name, options.backend):
        warnings.append("not measured: a graph for CUDA runs where there is onnxruntime-genai-cuda and a GPU")
        progress.step(f"warning: {warnings[-1]}")
    elif options.measured and _has_parent(spec):
        measured = quality.measure(
            artifact.path,
            against=checkpoint.path,
            text=text,
            tokens=options.tokens,
            kv_type=options.kv_type,
            threads=options.threads,
            progress=progress,
        )
        warnings += _judged(measured, spec, name, options)
    return Made(
        artifact=artifact,
        spec=spec,
        record=_record(checkpoint, spec, artifact, data, options, measured),
        quality=measured,
        warnings=tuple(warnings),
    )


def publish(made: Made, out: Path, progress: Progress) -> Path:
    """A copy of the artifact with its record at ``out``: a folder, or a .gguf file. It appears whole.

    Raises BadInput when something else is there, NoSpace.
    """
    source = made.artifact.path
    if out.exists():
        if out.is_dir() == source.is_dir() and quality.digest_of(out) == made.record.sha256:
            record.write(made.record, out)
            return out
        raise BadInput(
            f"{out} is there already and is not overwritten", hint="choose another -o, or remove it"
        )
    workspace.require_space(out.parent, made.artifact.bytes)
    with progress.bar(f"writing {out.name}", None):
        if source.is_dir():
            with workspace.whole_dir(out) as partial:
                workspace.copy_files(source, partial)
                record.write(made.record, partial)
        else:
            with workspace.whole_file(out) as partial:
                shutil.copyfile(source, partial)
            record.write(made.record, out)
    return out


def calibrates(scheme: str) -> bool:
    """Whether a scheme that is no GGUF's is calibrated."""
    return quantizers.named(scheme).calibrates(layouts.parse(scheme))


def _refuse(checkpoint: Checkpoint, spec: ModelSpec, scheme: str, options: Options) -> None:
    """Raises BadInput for options that the scheme, the checkpoint or one another exclude, before any work."""
    if options.limits.any and not options.measured:
        raise BadInput(
            "--no-quality measures nothing that --max-kl or --max-ppl-loss could limit", hint="leave it out"
        )
    if options.limits.any and not runs_here(scheme, options.backend):
        raise BadInput(
            f"{scheme} for {options.backend} cannot be measured here, so no limit can be held",
            hint="leave the limit out, or build where there is onnxruntime-genai-cuda and a GPU",
        )
    if (
        options.measured
        and not schemes.is_gguf(scheme)
        and not (checkpoint.path / "tokenizer.json").is_file()
    ):
        raise BadInput(
            f"{checkpoint.path} has no tokenizer.json", hint="save the model's fast tokenizer beside it"
        )
    if options.limits.any and not _has_parent(spec):
        raise BadInput(
            f"{checkpoint.source} is quantized already, so there is no parent that a limit could be held against",
            hint="give the full-precision checkpoint, or leave the limit out",
        )
    if options.imatrix is not None:
        if options.calibration:
            raise BadInput(
                "--imatrix and --calibration exclude each other", hint="a matrix is computed from the data"
            )
        if not schemes.is_gguf(scheme) or schemes.is_budget(scheme) or _unrounded(spec, scheme):
            raise BadInput(
                f"{scheme} takes no importance matrix", hint="leave it out, or see --calibration FILE"
            )
        if not is_matrix(options.imatrix):
            raise BadInput(
                f"{options.imatrix} is no importance matrix (a GGUF by llama-imatrix)",
                hint="--calibration FILE computes one from text or chats",
            )
    if options.calibration and (
        _unrounded(spec, scheme) or not (schemes.is_gguf(scheme) or calibrates(scheme))
    ):
        raise BadInput(f"{scheme} is not calibrated", hint="leave out --calibration")


CARDS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of them is there where there is an NVIDIA card: on Linux, and under WSL."""


def runs_here(scheme: str, backend: Backend) -> bool:
    """Whether this machine can run what is made: a graph for CUDA only with the library for it and a card."""
    if schemes.is_gguf(scheme) or layouts.parse(scheme).family != "onnx" or backend == "cpu":
        return True
    there = {found.name for found in importlib.metadata.distributions()}
    return "onnxruntime-genai-cuda" in there and any(path.exists() for path in CARDS)


def _unrounded(spec: ModelSpec, scheme: str) -> bool:
    """Whether a GGUF is only converted, or used as it is."""
    return scheme in FLOATS or (spec.gguf_types is not None and scheme == spec.gguf_scheme)


def _wants_data(scheme: str, options: Options) -> bool:
    if schemes.is_gguf(scheme):
        return bool(options.calibration) or schemes.is_budget(scheme)
    return calibrates(scheme)


def _calibration(checkpoint: Checkpoint, spec: ModelSpec, options: Options) -> Calibration:
    return calibrations.of(
        checkpoint.path, spec, options.calibration, tokens=options.calibration_tokens, seed=options.seed
    )


def _build(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    scheme: str,
    data: Calibration | None,
    windows: Path | None,
    options: Options,
    folder: Path,
    progress: Progress,
) -> tuple[Artifact, ModelSpec]:
    if schemes.is_budget(scheme):
        return _filled(checkpoint, spec, data, windows, options, folder, progress)
    if schemes.is_gguf(scheme):
        tools = toolchain.install(progress)
        matrix = options.imatrix or data
        made = gguf.build(
            checkpoint,
            spec,
            scheme,
            folder,
            imatrix=matrix,
            toolchain=tools,
            progress=progress,
            threads=options.threads,
        )
        return made, spec
    job = quantizers.Job(
        source=checkpoint.path,
        out=folder,
        scheme=scheme,
        windows=windows,
        backend=options.backend,
        context=options.context,
        threads=options.threads,
        seed=options.seed,
    )
    sha256 = None if data is None else data.sha256
    return quantizers.build(checkpoint, spec, job, folder, calibration=sha256, progress=progress), spec


def _filled(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    data: Calibration | None,
    windows: Path | None,
    options: Options,
    folder: Path,
    progress: Progress,
) -> tuple[Artifact, ModelSpec]:
    """A GGUF of types that fill what the plan leaves, and the model with these types."""
    if options.plan is None or data is None or windows is None:
        raise BadInput(f"{schemes.BUDGET} fills what a plan leaves, and there is none", hint="--profile NAME")
    filled = budget.build(
        options.plan,
        checkpoint,
        spec,
        folder,
        windows=windows,
        data=data,
        toolchain=toolchain.install(progress),
        progress=progress,
        threads=options.threads,
    )
    return filled.artifact, filled.spec


def _windows(checkpoint: Checkpoint, spec: ModelSpec, data: Calibration) -> tuple[Path, tuple[str, ...]]:
    """The data as a file of token windows, in the cache, and what is to be said of them."""
    drawn = calibrations.windows(data, encoder(checkpoint.path), columns=calibrations.widest(spec))
    digest = hashlib.sha256(drawn.ids.tobytes()).hexdigest()[:16]
    path = workspace.cache_root() / "calibration" / f"{digest}-{'x'.join(map(str, drawn.ids.shape))}.npy"
    if not path.is_file():
        calibrations.save(drawn, path)
    return path, drawn.warnings


def _same_size(spec: ModelSpec, artifact: Artifact, options: Options) -> None:
    """Raises BuildFailed for a GGUF of other bytes than predicted; quantizers.build has looked at the others."""
    if not schemes.is_gguf(artifact.scheme):
        return
    predicted, provenance = schemes.file_bytes(spec, artifact.scheme, imatrix=options.weighted)
    if provenance == "exact" and artifact.bytes != predicted:
        raise BuildFailed(
            f"the artifact has {artifact.bytes} bytes, {predicted} were predicted",
            hint="this is a bug in edgepack's arithmetic; report it with the model's config.json",
        )


def _has_parent(spec: ModelSpec) -> bool:
    """Whether the checkpoint is in full precision: a GGUF that is quantized already has lost its parent."""
    return spec.gguf_types is None or all(kind in FLOATS for kind in spec.gguf_types)


def _judged(measured: Quality, spec: ModelSpec, scheme: str, options: Options) -> tuple[str, ...]:
    limits = options.limits
    if not limits.any:
        return ()
    return quality.refuse(
        measured,
        max_kl=limits.max_kl,
        max_ppl_loss=limits.max_ppl_loss,
        heavier=heavier(spec, scheme, imatrix=options.weighted, keep=_share(measured, limits)),
    )


def _share(measured: Quality, limits: Limits) -> float:
    """What part of the measured loss a scheme may have to keep the limits."""
    if measured.parent is None:
        return 1.0
    pairs = ((measured.parent.kl, limits.max_kl), (measured.parent.ppl_loss, limits.max_ppl_loss))
    return min(
        (limit / found.value for found, limit in pairs if limit is not None and found.value > 0), default=1.0
    )


def heavier(spec: ModelSpec, scheme: str, *, imatrix: bool, keep: float) -> str | None:
    """The lightest scheme of the same kind that is expected to lose at most ``keep`` of what ``scheme`` loses.

    Expected by the planner's law of loss (degradation.py); None when no scheme is.
    """
    lost = _lost(spec, scheme, imatrix=imatrix)
    options = []
    for other in _alternatives(scheme):
        try:
            other_lost = _lost(spec, other, imatrix=imatrix)
            weight = schemes.weights_bytes(spec, other, imatrix=imatrix)
        except Unsupported:
            continue  # a shape that this one cannot hold
        if other_lost < lost and other_lost <= lost * keep:
            options.append((weight, other))
    return min(options)[1] if options else None


def _lost(spec: ModelSpec, scheme: str, *, imatrix: bool) -> float:
    return degradation.of_scheme(spec, scheme, imatrix=imatrix, family=None).perplexity_ratio - 1


def _alternatives(scheme: str) -> Sequence[str]:
    if schemes.is_gguf(scheme):
        return [name for name in schemes.GGUF if name in USUAL]
    family = layouts.parse(scheme).family
    return [name for name in layouts.GRID if layouts.parse(name).family == family]


def _record(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    artifact: Artifact,
    data: Calibration | None,
    options: Options,
    measured: Quality | None,
) -> Record:
    weights = schemes.weights_bytes(spec, artifact.scheme, imatrix=options.weighted, backend=options.backend)
    return Record(
        model=spec.name,
        source=checkpoint.source,
        revision=checkpoint.revision,
        license=checkpoint.license,
        scheme=artifact.scheme,
        tool=artifact.tool,
        sha256=artifact.sha256,
        bytes=artifact.bytes,
        tensor_bytes=Bytes(weights),
        imatrix_sha256=artifact.imatrix_sha256,
        calibration=None if data is None else calibrations.record(data),
        quality=measured,
    )
