"""The runtimes edgepack plans for: each is one module of constants and arithmetic, and one word below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from edgepack import serde
from edgepack.errors import Unsupported
from edgepack.modelspec import ModelSpec
from edgepack.parts import Part
from edgepack.profile import Arch, Backend, DeviceProfile
from edgepack.runtimes import llama_cpp, onnx_genai, support, transformers, vllm
from edgepack.runtimes.support import Family, Source
from edgepack.runtimes.support import Machine as Machine
from edgepack.runtimes.support import Missing as Missing
from edgepack.settings import Settings


class Runtime(Protocol):
    """What the planner asks a runtime; the modules are the implementations."""

    NAME: str
    VERSION: str
    """The version that the figures hold for."""
    SCHEMES: tuple[str, ...]
    """Tried when no scheme is asked for."""
    STEPS_DOWN: tuple[str, ...]
    """Schemes a hint may propose."""
    ARTIFACT: str
    """Where the artifact lies in a bundle: a file, or a folder."""
    MODULES: tuple[str, ...]
    """What its Python must have; empty for a program."""
    FRONT: bool
    """Whether its own server lacks /chat, so that the front (edgepack/server) may stand before it."""

    INSTALL: str
    """How to get a Python that has them; empty for a program."""
    READERS: Mapping[str, tuple[str, ...]]
    """By family of schemes: requirements beside its own that it reads such a checkpoint with."""
    IMAGES: Mapping[str, str]
    """Images of docker/ that run it where the profile names none; none for what needs more than its requirements.

    By backend, on a Jetson's GPU by its L4T ("l4t-r36"), whose CUDA no other image is for.
    """
    SPEED_FAMILY: Family
    """Whose constants of the speed law it has."""
    EAGER: tuple[Backend, ...]
    """Where it starts the operations of a layer one by one from the host, without graphs."""
    COMPILES: tuple[Backend, ...]
    """Where its server compiles machine code when it starts, and loads it from a file."""
    ONE_BY_ONE: bool
    """Whether slots are computed each by itself, the weights read for each."""

    def source(self, backend: Backend) -> Source:
        """Where what runs on this backend comes from."""

    def reads(self, scheme: str) -> bool:
        """Whether it runs ``scheme`` on any machine."""

    def refusal(self, scheme: str, machine: Machine) -> str | None:
        """Why it cannot run ``scheme`` on this machine; None when it can."""

    def objection(self, machine: Machine) -> str | None:
        """Why only --force takes it on this machine, whatever the scheme; None when nothing speaks against it."""

    def caution(self, machine: Machine) -> str:
        """What speaks against it on this machine without forbidding it; empty when nothing does."""

    def missing(self, machine: Machine) -> Missing | None:
        """What of its requirements PyPI has no wheel of that runs on this machine; None where it has all, or that is
        not known."""

    def kv_types(self, machine: Machine) -> tuple[str, ...]:
        """KV types that the planner tries; the first is the default."""

    def lighter_kv(self, kv_type: str, machine: Machine) -> str | None:
        """A KV type that takes less than this one at no measurable cost; None when there is none."""

    def settings_for(
        self, profile: DeviceProfile | None, *, context: int, slots: int, kv_type: str, ubatch: int
    ) -> Settings:
        """How it is started on this device. Raises BadInput for what it does not take."""

    def parts(
        self,
        spec: ModelSpec,
        scheme: str,
        settings: Settings,
        *,
        backend: Backend,
        arch: Arch,
        imatrix: bool,
    ) -> tuple[Part, ...]:
        """What it takes, part by part. Raises Unsupported for what it cannot do with this model."""

    def launch(
        self,
        settings: Settings,
        *,
        alias: str,
        backend: Backend,
        start_up: Mapping[str, int | float],
        version: str = ...,
    ) -> tuple[str, ...]:
        """Flags of its server, without model, address and key; all that bounds memory is explicit.

        ``alias``: the model's name in its API; ``start_up``, ``version``: the plan's. Raises Unsupported where this
        version has no flag for what the plan wants."""

    def environment(self, settings: Settings, *, backend: Backend, arch: Arch) -> Mapping[str, str]:
        """Variables that its server is started with."""

    def start_up(
        self,
        spec: ModelSpec,
        settings: Settings,
        *,
        backend: Backend,
        needed: int,
        total: int | None,
        version: str = ...,
    ) -> Mapping[str, int | float]:
        """What it prints about its memory when it starts, or is to be told; ``needed`` and ``total``: bytes of the
        accelerator that this plan takes and that there are; ``version``: the plan's."""


RUNTIMES: tuple[Runtime, ...] = (llama_cpp, vllm, onnx_genai, transformers)
NAMES: tuple[str, ...] = tuple(runtime.NAME for runtime in RUNTIMES)


def named(name: str) -> Runtime:
    """The runtime of this name. Raises Unsupported with the nearest name."""
    for runtime in RUNTIMES:
        if name == runtime.NAME:
            return runtime
    raise Unsupported(
        f"runtime {name!r} is not known{serde.did_you_mean(name, NAMES)}",
        hint=f"known runtimes: {', '.join(NAMES)}",
    )


def version(runtime: Runtime, profile: DeviceProfile | None, backend: Backend) -> str:
    """Which version of ``runtime`` a plan for this device is for: what its image holds, else its package's there."""
    return support.version(runtime.NAME, runtime.source(backend), profile)


def reading(scheme: str, machine: Machine) -> tuple[Runtime, ...]:
    """Runtimes that run ``scheme`` on this machine. Raises Unsupported with each one's reason when none does."""
    reasons = {r.NAME: r.refusal(scheme, machine) or r.objection(machine) for r in RUNTIMES}
    able = tuple(runtime for runtime in RUNTIMES if reasons[runtime.NAME] is None)
    if not able:
        said = [str(reasons[r.NAME]) for r in RUNTIMES if r.reads(scheme)] or [
            "none that edgepack knows reads it"
        ]
        raise Unsupported(
            f"no runtime runs {scheme} on this device: {'; '.join(said)}",
            hint="take a GGUF scheme, e.g. Q4_K_M",
        )
    return able
