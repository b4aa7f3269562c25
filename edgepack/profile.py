"""What a device is: memory as the system reports it, bandwidth per power mode, and what must stay free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edgepack.units import Bytes

Arch = Literal["x86_64", "aarch64"]
Backend = Literal["cuda", "cpu"]
DeviceClass = Literal["jetson", "nvidia-discrete", "cpu"]
Session = Literal["headless", "desktop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerMode:
    name: str
    """Name as in /etc/nvpmodel.conf; mode ids differ per SKU, so they are never used."""
    bandwidth_gbs: float
    """Peak memory bandwidth in this mode, 10^9 bytes per second."""
    fp16_tflops: float | None = None
    """Dense FP16, 10^12 FLOP per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    name: str
    backend: Backend
    compute_capability: str | None = None
    memory: Bytes | None = None
    """Memory of its own as NVML reports it; None when it shares the system's (unified)."""
    largest_allocation: Bytes | None = None
    """Largest single allocation known to succeed; None when there is no known limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserves:
    """What the model may not use, per kind of session."""

    os_headless: Bytes
    os_desktop: Bytes
    accelerator_context: Bytes
    """Driver and CUDA context of one process; 0 on CPU devices."""
    safety: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeImage:
    runtime: str
    reference: str
    """Registry, repository and exact tag."""
    digest: str = "unknown"
    """sha256:… where it could be read; otherwise "unknown", which is warned about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    os: str | None = None
    l4t: tuple[str, ...] = ()
    """L4T majors this profile may run on, e.g. ("36",); empty when not a Jetson."""
    cuda: str | None = None
    service_groups: tuple[str, ...] = ()
    """Groups the service user needs (video, render)."""
    images: tuple[RuntimeImage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """How the device is recognised; every given fact must hold."""

    device_tree: tuple[str, ...] = ()
    """Substrings of /proc/device-tree/{model,compatible}, any of which matches."""
    gpu_name: str | None = None
    """Substring of the name NVML gives."""
    memory_min: Bytes | None = None
    memory_max: Bytes | None = None
    """Bounds on MemTotal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    name: str
    title: str
    device_class: DeviceClass
    arch: Arch
    memory: Bytes
    """System memory that the OS reports (MemTotal), not the number on the box."""
    unified: bool
    """Accelerator and CPU share `memory`; true for CPU-only devices too."""
    accelerator: Accelerator | None = None
    cpu_cores: int
    cpu_features: tuple[str, ...] = ()
    power_modes: tuple[PowerMode, ...]
    """At least one; devices without modes have one called "default"."""
    default_mode: str
    reserves: Reserves
    disk: Bytes | None = None
    """Free storage to assume; None when unknown."""
    software: Software = field(default_factory=Software)
    match: Match = field(default_factory=Match)
    aliases: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    """Dotted names of fields that are estimates; intervals widen for them."""
    deployable: bool = True

    @property
    def backend(self) -> Backend:
        return self.accelerator.backend if self.accelerator else "cpu"

    def mode(self, name: str | None = None) -> PowerMode:
        """The named power mode, or the default one. Raises KeyError for a name it does not have."""
        wanted = name or self.default_mode
        for mode in self.power_modes:
            if mode.name == wanted:
                return mode
        raise KeyError(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes a model server may use on a device, after the reserves."""

    device: Bytes
    """Where weights on the accelerator live; on unified and CPU devices the one shared pool."""
    host: Bytes
    """System memory; equal to `device` on unified and CPU devices."""
    unified: bool
    session: Session
    arithmetic: tuple[tuple[str, int], ...]
    """Named terms, signed, that add up to `device`; shown in refusals."""


def budget(profile: DeviceProfile, session: Session = "headless") -> Budget:
    """The bytes a model server may use on this device in this kind of session."""
    reserves = profile.reserves
    os_reserve = reserves.os_headless if session == "headless" else reserves.os_desktop
    own = profile.accelerator.memory if profile.accelerator else None
    if own is None:
        terms = (
            ("memory the system reports", int(profile.memory)),
            (f"operating system ({session})", -os_reserve),
            ("accelerator context", -reserves.accelerator_context),
            ("safety", -reserves.safety),
        )
        total = Bytes(sum(value for _, value in terms))
        return Budget(device=total, host=total, unified=True, session=session, arithmetic=terms)
    display = 0 if session == "headless" else os_reserve
    terms = (
        ("memory the card reports", int(own)),
        (f"display ({session})", -display),
        ("accelerator context", -reserves.accelerator_context),
        ("safety", -reserves.safety),
    )
    host = Bytes(profile.memory - max(os_reserve, reserves.os_headless) - reserves.safety)
    return Budget(
        device=Bytes(sum(value for _, value in terms)),
        host=host,
        unified=False,
        session=session,
        arithmetic=terms,
    )
