"""What runtimes share that edgepack's own server serves (edgepack/server): how it is started, in what chunks."""

from __future__ import annotations

from collections.abc import Mapping

from edgepack.errors import BadInput
from edgepack.profile import Arch, Backend, DeviceProfile
from edgepack.runtimes.allocator import huge_pages
from edgepack.settings import Settings


def settings(
    profile: DeviceProfile | None, *, context: int, slots: int, kv_type: str, ubatch: int
) -> Settings:
    """Settings of a runtime in edgepack's own server: prompts in chunks of ``ubatch`` tokens, of one slot at a time.

    Raises BadInput for numbers below 1 and more slots than tokens.
    """
    if context < 1 or slots < 1 or ubatch < 1:
        raise BadInput(f"context {context}, slots {slots} and ubatch {ubatch} must all be at least 1")
    if context < slots:
        raise BadInput(f"a context of {context} tokens leaves none for some of {slots} slots")
    return Settings(
        context=context,
        slots=slots,
        kv_type=kv_type.lower(),
        batch=ubatch,
        ubatch=ubatch,
        flash_attention=True,
        unified_kv=False,
        threads=profile.cpu_cores if profile else 4,
        gpu_layers=0 if profile is not None and profile.backend == "cpu" else 99,
        load_mode="none",
        repack=False,
    )


def chunk(settings: Settings) -> int:
    """Tokens that go through the model at once at most; longer contexts leave ``ubatch`` as it was asked for."""
    return min(settings.ubatch, settings.context // settings.slots)


def arguments(name: str, settings: Settings, *, alias: str, backend: Backend) -> tuple[str, ...]:
    """Flags of edgepack's own server, without model, address and key."""
    return (
        "--engine", name,
        "--alias", alias,
        "--ctx-size", str(settings.context),
        "--parallel", str(settings.slots),
        "--ubatch-size", str(settings.ubatch),
        "--cache-type-k", settings.kv_type,
        "--threads", str(settings.threads),
        "--provider", "cpu" if backend == "cpu" else "cuda",
        "--queue-size", str(_QUEUE),
        "--timeout", str(_TIMEOUT),
    )  # fmt: skip


_QUEUE = 32
"""Requests that wait for a slot; one more is refused (429)."""
_TIMEOUT = 600
"""Seconds from a request's arrival to its end."""

_ENVIRONMENT: Mapping[str, str] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "2097152",
    "MALLOC_TRIM_THRESHOLD_": "2097152",
}
"""glibc's allocator in edgepack's own server: what a chunk of a prompt needs goes back to the system when it is over.
Left alone it raises the first threshold to the largest block that was ever freed and keeps 10 to 45 MiB, more with each
length. Blocks above it are mapped afresh for every token: at 128 KiB those were 180 of up to 1.2 MiB for transformers
(0.5B, vocabulary of 152 thousand). 4 MiB kept 6 MiB more of the built-in model than 2, which is above all of those."""


def environment(backend: Backend, arch: Arch) -> Mapping[str, str]:
    """Variables of edgepack's own server."""
    return {**_ENVIRONMENT, **huge_pages(backend, arch)}
