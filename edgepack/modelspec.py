"""A model as shapes: every tensor, every layer that keeps a KV cache; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgepack.units import Bytes

Architecture = Literal["llama", "qwen2", "qwen3", "gemma3", "mistral"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    name: str
    """GGUF name, e.g. blk.0.attn_q.weight."""
    shape: tuple[int, ...]
    """ggml order: ne[0] is the contiguous dimension (columns)."""

    @property
    def elements(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayers:
    """Layers that keep a KV cache of one kind."""

    count: int
    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    """Sliding window in tokens; None is full attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    name: str
    """What the user called it, or the folder's or catalog's name."""
    architecture: str
    """GGUF architecture: llama, qwen2, qwen3, gemma3."""
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context_train: int
    kv: tuple[KvLayers, ...]
    tensors: tuple[Tensor, ...]
    """Every tensor of the GGUF file, in file order."""
    experts: int = 0
    experts_used: int = 0
    expert_ffn: int = 0
    header_bytes: Bytes | None = None
    """Exact bytes before the tensor data of its F16 GGUF; None when there is no tokenizer to count."""
    gguf_types: tuple[str, ...] | None = None
    """Type of each tensor when the source is already a GGUF (its scheme is then fixed); else None."""
    file_bytes: Bytes | None = None
    """Size of that GGUF on disk."""

    @property
    def parameters(self) -> int:
        return sum(t.elements for t in self.tensors)
