"""The Plan: model, scheme, runtime and KV-cache budget for one device, with the arithmetic behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgepack.memory import MemoryEstimate
from edgepack.profile import Budget, DeviceProfile, Session
from edgepack.settings import Settings

Goal = Literal["quality", "latency", "context"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which weights, exactly."""

    id: str
    """Catalog id, folder name or Hub id."""
    source: str
    """A path, "demo", or a Hub repository id."""
    revision: str | None
    architecture: str
    parameters: int
    license: str
    teacher: str | None = None
    """The model it was distilled from, when the catalog says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    decode: float
    """Tokens per second at a short context."""
    decode_low: float
    decode_high: float
    decode_full: float
    """Tokens per second with the context full."""
    provenance: Literal["fitted", "calibrated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    score: float
    """Mean of the panel's benchmarks after the scheme's loss; comparable only within `panel`."""
    low: float
    high: float
    panel: str
    """Name of the single-source panel, "none" when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    candidate: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    profile: DeviceProfile
    session: Session
    power_mode: str
    budget: Budget
    model: ModelRef
    scheme: str
    imatrix: bool
    runtime: str
    runtime_version: str
    settings: Settings
    memory: MemoryEstimate
    speed: Speed
    quality: Quality | None
    warnings: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    schema_version: int = 1
