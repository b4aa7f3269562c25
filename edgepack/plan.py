"""The Plan: model, scheme, runtime and KV-cache budget for one device, with the arithmetic behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgepack.memory import MemoryEstimate
from edgepack.profile import Budget, DeviceProfile, Session

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
class Settings:
    """What the runtime is started with."""

    context: int
    """Tokens per slot times slots, as llama-server's -c."""
    slots: int
    kv_type: str
    batch: int
    ubatch: int
    flash_attention: bool
    unified_kv: bool
    threads: int
    gpu_layers: int
    """99 with an accelerator (all), 0 on CPU."""
    load_mode: str
    """llama.cpp's --load-mode: none (default) or mmap."""
    repack: bool
    """CPU weight repacking; off keeps one copy of the weights."""


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
