"""glibc's allocator in a bundle's server."""

from __future__ import annotations

from collections.abc import Mapping

from edgepack.profile import Arch, Backend

HUGE_PAGES: Mapping[str, str] = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Large blocks are to lie in huge pages, where the system grants them to who asks (the "madvise" of most
distributions): weights that are read whole for every token otherwise miss the processor's page table cache. Decoding of
0.15 and 0.5 B on a CPU is 1.3 times as fast with llama.cpp, 1.2 to 1.3 with onnx-genai (`python
benchmarks/server_speed.py`). A glibc before 2.35, and another C library, do not know it and do as before."""


def huge_pages(backend: Backend, arch: Arch) -> Mapping[str, str]:
    """Variables for a server whose weights a CPU reads. On x86-64 only, whose huge pages have 2 MiB: on Arm they may
    have 32 or 512, and the heap ends at a whole one."""
    return HUGE_PAGES if backend == "cpu" and arch == "x86_64" else {}
