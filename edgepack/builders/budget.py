"""A GGUF that fills its byte budget: types chosen by what each costs, the costs measured on calibration data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgepack import allocation, schemes
from edgepack.allocation import Limits, Place
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import gguf, sensitivity
from edgepack.calibration import Calibration
from edgepack.errors import BuildFailed
from edgepack.fit import excess
from edgepack.modelspec import ModelSpec, Tensor
from edgepack.plan import Plan
from edgepack.progress import Progress
from edgepack.runtimes import llama_cpp
from edgepack.toolchain import Toolchain
from edgepack.units import show


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What was made, and how well it fills its budget."""

    artifact: Artifact
    spec: ModelSpec
    """The model with the recipe of the artifact, for exact figures (plan.with_spec)."""
    nats: float
    """Divergence from the parent that the costs add up to, a token."""
    used: float
    """Share of the budget that is taken: of the file or of memory, whichever is fuller; 1.0 is all of it."""


def build(
    plan: Plan,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    folder: Path,
    *,
    windows: Path,
    data: Calibration | Path,
    toolchain: Toolchain,
    progress: Progress,
    threads: int | None = None,
) -> Filled:
    """The artifact of a plan for `schemes.BUDGET`, in ``folder``; what is there already is used again.

    ``windows``: a .npy of int32 token ids, [windows, tokens], for the costs; ``data``: what they were made from, or an
    importance matrix made from it. Another budget takes up the same costs. Never takes more than the plan leaves, nor a
    larger file than its scheme says. Raises as `sensitivity.measure`, `allocation.solve` and `gguf.build` do.
    """
    place = place_of(plan)
    limits = limits_of(plan, spec, place)
    spec, _ = allocation.planned(spec, plan.scheme, place, room=plan.budget)
    matrix = _matrix(checkpoint, spec, data, folder, toolchain, progress, threads)
    kinds = {t.name: allocation.kinds(t, place.backend) for t in spec.tensors if schemes.quantizable(t)}
    costs = sensitivity.measure(
        checkpoint,
        spec,
        kinds,
        folder,
        windows=windows,
        matrix=matrix,
        toolchain=toolchain,
        progress=progress,
        threads=threads,
    )

    def loss(tensor: Tensor, kind: str) -> float:
        return costs[tensor.name][kind]

    items = allocation.items(spec, place, loss)
    chosen = allocation.solve(items, limits)
    file, held = allocation.used(chosen)
    used = max(n / limit for n, limit in ((file, limits.file), (held, limits.memory)) if limit)
    progress.step(f"budget   {used:.2%} of it is used")
    if used < llama_cpp.FILLED and chosen == allocation.best(items):
        progress.step(
            f"budget   the best types everywhere take {show(file)}: a larger model would use the rest"
        )
    elif used < llama_cpp.FILLED:
        progress.step("budget   what is left of it is too little for any better choice of types")
    spec = allocation.recipe(spec, chosen, measured=True)
    artifact = gguf.build(
        checkpoint,
        spec,
        plan.scheme,
        folder,
        imatrix=matrix,
        toolchain=toolchain,
        progress=progress,
        threads=threads,
    )
    size = schemes.budget_of(plan.scheme)
    if size is not None and artifact.bytes > size:
        raise BuildFailed(f"the artifact has {artifact.bytes} bytes, {size} were allowed")
    return Filled(
        artifact=replace(artifact, calibration_sha256=data.sha256 if isinstance(data, Calibration) else None),
        spec=spec,
        nats=allocation.lost(chosen),
        used=used,
    )


def place_of(plan: Plan) -> Place:
    return Place(
        settings=plan.settings,
        backend=plan.profile.backend,
        arch=plan.profile.arch,
        unified=plan.budget.unified,
    )


def limits_of(plan: Plan, spec: ModelSpec, place: Place) -> Limits:
    """What the plan leaves for the weights. A plan that was forced though it does not fit promises no
    memory, only a size of the file."""
    size = schemes.budget_of(plan.scheme)
    header = int(spec.header_bytes or schemes.header_estimate(spec))
    left = allocation.memory_left(plan.memory.parts, plan.budget, place)
    return Limits(
        file=None if size is None else size - header,
        memory=None if excess(plan.memory, plan.budget) > 0 else left,
    )


def _matrix(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    data: Path | Calibration,
    folder: Path,
    toolchain: Toolchain,
    progress: Progress,
    threads: int | None,
) -> Path:
    """The importance matrix: the given one, or made from the data and kept for the next budget."""
    if isinstance(data, Path):
        return data
    kept = gguf.matrix_path(data, checkpoint, spec, folder)
    if kept.is_file():
        return kept
    whole = gguf.full_precision(checkpoint, spec, schemes.BUDGET, folder, True, progress)
    return gguf.importances(data, whole, checkpoint, spec, folder, toolchain, progress, threads)
