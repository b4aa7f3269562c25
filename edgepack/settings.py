"""What a runtime is started with; every number here bounds memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the runtime is started with."""

    context: int
    """Tokens in all slots together, as llama-server's -c."""
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
