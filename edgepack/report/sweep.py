"""The plan's own arithmetic at other contexts and numbers of users: how far speed and memory carry."""

from __future__ import annotations

from dataclasses import dataclass

from edgepack import memory, runtimes, speed
from edgepack.errors import BadInput, Unsupported
from edgepack.fit import excess
from edgepack.memory import MemoryEstimate
from edgepack.modelspec import ModelSpec
from edgepack.plan import Plan
from edgepack.settings import Settings

USERS = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = 8
"""Contexts that are tried: powers of two, up to what the model was trained for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Decode speed of one user with ``tokens`` in the KV cache."""

    tokens: int
    decode: float
    """Tokens per second."""
    decode_low: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """So many users, each with so much context."""

    users: int
    context: int
    """Tokens of each user."""
    kv_cache: int
    """Bytes, of all users together."""
    total: int
    """Bytes of the whole server, by the upper ends of the parts."""
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    pace: tuple[Pace, ...]
    """By rising tokens, up to what fits for the planned number of users."""
    cells: tuple[Cell, ...]
    """By users, then context; those that the runtime does not take are left out."""


def sweep(plan: Plan, spec: ModelSpec) -> Sweep | None:
    """The plan's arithmetic for the model with these shapes; None where they do not give the plan's own figures.

    So figures of another model of the same name, or of another version of edgepack, are never shown beside a plan.
    """
    try:
        same = _estimate(plan, spec, plan.settings).parts == plan.memory.parts
    except (Unsupported, BadInput):
        return None
    if not same:
        return None
    cells = tuple(
        cell
        for users in USERS
        for context in _contexts(spec)
        if (cell := _cell(plan, spec, users, context)) is not None
    )
    return Sweep(pace=_paces(plan, spec), cells=cells)


def _contexts(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(2**power for power in range(6, spec.context_train.bit_length()))[-COLUMNS:]


def _cell(plan: Plan, spec: ModelSpec, users: int, context: int) -> Cell | None:
    try:
        estimate = _estimate(plan, spec, _settings(plan, users=users, context=context))
    except (Unsupported, BadInput):
        return None
    return Cell(
        users=users,
        context=context,
        kv_cache=estimate.part("kv_cache"),
        total=estimate.high,
        fits=excess(estimate, plan.budget) <= 0,
    )


def _paces(plan: Plan, spec: ModelSpec) -> tuple[Pace, ...]:
    slots, planned = plan.settings.slots, plan.settings.context // plan.settings.slots
    found = []
    for tokens in sorted({*_contexts(spec), planned}):
        cell = _cell(plan, spec, slots, tokens)
        if cell is None or not (cell.fits or tokens <= planned):
            continue
        at = speed.estimate(
            plan.profile,
            plan.profile.mode(plan.power_mode),
            speed.work(spec, plan.scheme, imatrix=plan.imatrix, backend=plan.profile.backend),
            kv_bytes=cell.kv_cache // slots,
            slots=slots,
            prompt=min(speed.PROMPT, tokens),
            runtime=plan.runtime,
        )
        found.append(Pace(tokens=tokens, decode=at.decode_full, decode_low=at.decode_full_low))
    return tuple(found)


def _settings(plan: Plan, *, users: int, context: int) -> Settings:
    settings = plan.settings
    if (users, users * context) == (settings.slots, settings.context):
        return settings
    return runtimes.named(plan.runtime).settings_for(
        plan.profile, context=users * context, slots=users, kv_type=settings.kv_type, ubatch=settings.ubatch
    )


def _estimate(plan: Plan, spec: ModelSpec, settings: Settings) -> MemoryEstimate:
    return memory.estimate(
        spec,
        plan.scheme,
        settings,
        backend=plan.profile.backend,
        imatrix=plan.imatrix,
        arch=plan.profile.arch,
        runtime=plan.runtime,
    )
