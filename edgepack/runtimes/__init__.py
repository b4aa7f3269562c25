"""The runtimes edgepack plans for: each is one module of constants and arithmetic."""

from __future__ import annotations

RUNTIMES: tuple[str, ...] = ("llama.cpp",)
"""Names as --runtime takes them; llama.cpp is edgepack.runtimes.llama_cpp."""
