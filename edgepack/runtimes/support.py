"""Which scheme runs where, as data: each runtime lists its kernels, and `refusal` says why a machine has none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edgepack import layouts, schemes
from edgepack.profile import Arch, Backend, DeviceProfile

Family = Literal["llama.cpp", "torch"]
"""Of runtimes, by whose published runs their speed is counted (speed.LAW)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What decides which kernels there are."""

    backend: Backend
    arch: Arch = "x86_64"
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None when there is none, or it is not known."""
    cuda: tuple[int, int] | None = None
    """The CUDA that a Jetson's driver runs, which its L4T release decides; None elsewhere, or when it is not known."""
    memory: int | None = None
    """Bytes that the accelerator reports, or the device where it has none of its own; None when not known."""

    @classmethod
    def of(cls, profile: DeviceProfile) -> Machine:
        accelerator = profile.accelerator
        cuda = profile.software.cuda if profile.device_class == "jetson" else None
        return cls(
            backend=profile.backend,
            arch=profile.arch,
            capability=_pair(accelerator.compute_capability if accelerator else None),
            cuda=_pair(cuda),
            memory=int((accelerator.memory if accelerator else None) or profile.memory),
        )


def _pair(version: str | None) -> tuple[int, int] | None:
    """(8, 7) of "8.7"."""
    if not version:
        return None
    major, _, minor = version.partition(".")
    return int(major), int(minor or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One row: schemes that a runtime computes with on one kind of machine."""

    schemes: tuple[str, ...]
    """Families of layouts.py, or starts of names ("ct-w8a8"), or "gguf"."""
    backend: Backend
    at_least: tuple[int, int] | None = None
    """Lowest compute capability."""
    lacks: tuple[tuple[int, int], ...] = ()
    """Compute capabilities above it for which the published binaries hold no code."""
    why: str
    """Where the row comes from; a refusal quotes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a runtime comes from, for the provenance and the SBOM of a bundle."""

    repository: str
    """Address of its source code."""
    purl: str
    """Its package without a version (https://github.com/package-url/purl-spec)."""
    license: str
    """SPDX identifier."""
    version: str
    """Of this package, where no image holds another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A requirement that PyPI has no wheel of which runs on a machine."""

    package: str
    why: str
    instead: str
    """Where it can be had."""

    @property
    def words(self) -> str:
        return f"{self.why}: {self.instead}"


_WHEELS = (13, 0)
"""CUDA of PyPI's PyTorch for aarch64: the metadata of 2.13.0 name it, those of 2.9.1 no CUDA at all."""


def no_torch(machine: Machine) -> str | None:
    """Why PyPI's PyTorch does not compute on this Jetson's GPU; None where nothing is known against it."""
    if machine.backend != "cuda" or machine.cuda is None or machine.cuda >= _WHEELS:
        return None
    here = ".".join(str(part) for part in machine.cuda)
    return (
        f"PyPI's PyTorch for aarch64 is built for CUDA 13 or none, and this device's driver runs CUDA {here}"
    )


def version(runtime: str, source: Source, profile: DeviceProfile | None) -> str:
    """Which version of ``runtime`` a plan for this device is for: what its image holds, else its package's."""
    images = () if profile is None else profile.software.images
    image = next((image for image in images if image.runtime == runtime), None)
    return image.version if image is not None and image.version is not None else source.version


def refusal(runtime: str, kernels: Iterable[Kernel], scheme: str, machine: Machine) -> str | None:
    """Why ``runtime`` cannot run ``scheme`` on this machine; None when it can, or nothing speaks against it."""
    of_scheme = [row for row in kernels if _holds(row, scheme)]
    if not of_scheme:
        return f"{runtime} does not read {scheme}"
    here = [row for row in of_scheme if row.backend == machine.backend]
    if not here:
        others = ", ".join(sorted({row.backend for row in of_scheme}))
        return (
            f"{runtime} is known to run {scheme} on {others}, not on {machine.backend} ({of_scheme[0].why})"
        )
    reasons = [_unable(row, machine) for row in here]
    if None in reasons:
        return None
    return f"{runtime} cannot run {scheme} here: {reasons[0]} ({here[0].why})"


def reads(kernels: Iterable[Kernel], scheme: str) -> bool:
    """Whether any row is for ``scheme``."""
    return any(_holds(row, scheme) for row in kernels)


def _holds(row: Kernel, scheme: str) -> bool:
    if schemes.is_gguf(scheme):
        return "gguf" in row.schemes
    family = layouts.parse(scheme).family
    return family in row.schemes or any(scheme.startswith(name) for name in row.schemes if "-" in name)


def _unable(row: Kernel, machine: Machine) -> str | None:
    if machine.capability is None:
        return None
    is_there = f"compute capability {machine.capability[0]}.{machine.capability[1]}"
    if row.at_least is not None and machine.capability < row.at_least:
        return f"it needs {row.at_least[0]}.{row.at_least[1]}, the device has {is_there}"
    if machine.capability in row.lacks:
        return f"its published binaries hold no code for {is_there}; it needs a build of its own"
    return None
