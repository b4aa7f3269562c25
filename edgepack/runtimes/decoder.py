"""What one pass of a decoder holds at its largest moment, in runtimes that run PyTorch's operators one by one."""

from __future__ import annotations

from edgepack.errors import Unsupported
from edgepack.modelspec import ModelSpec

FFN_COPIES = 3
"""gate, up and their product live at once in the feed-forward block, …"""
HIDDEN_COPIES = 4
"""… beside the residual, its norm, the norm's scratch and what comes back. Fitted: the slope of peak memory over the
prompt's length is (3 x ffn + 4 x hidden) x 2 bytes within 5 % in all BF16 rows of the Qwen2.5 table
(`python scripts/measured_memory.py`), and vLLM's own profile of Qwen2.5-1.5B, 2.02 GiB for 32768
tokens, is 1.002 times that."""

HALF = 2
"""Bytes of a bf16 or fp16 number."""


def activation_bytes(spec: ModelSpec, tokens: int) -> int:
    """Bytes of activations while ``tokens`` go through one layer, in 16 bits.

    A mixture of experts keeps every token's chosen experts, and their outputs before they are summed.
    """
    if spec.experts:
        width = spec.experts_used * (FFN_COPIES * spec.expert_ffn + spec.hidden)
    else:
        width = FFN_COPIES * spec.ffn
    return tokens * HALF * (width + HIDDEN_COPIES * spec.hidden)


def cache_bytes(
    spec: ModelSpec, *, tokens: int, sequences: int, element: int, runtime: str, windowed: bool = True
) -> int:
    """Bytes of a plain cache: K and V of every head and layer for each token of each sequence; with ``windowed`` a
    sliding layer keeps its window only, one that llama.cpp ignores too. ``element``: bytes of one number.

    Raises Unsupported for latent attention, which is cached unfolded there, and for recurrent layers.
    """
    if spec.recurrent_bytes or any(kind.value_dim == 0 for kind in spec.kv):
        raise Unsupported(
            f"what {runtime} caches for {spec.architecture} is not known here", hint="plan it for llama.cpp"
        )
    return sequences * sum(
        kind.count
        * kind.heads
        * (kind.key_dim + kind.value_dim)
        * element
        * (min(tokens, kind.window or spec.ignored_window or tokens) if windowed else tokens)
        for kind in spec.kv
    )


def largest_matrix(spec: ModelSpec) -> int:
    """Elements of the widest matrix of a block, one expert at a time."""
    return max(
        (t.shape[0] * t.shape[1] for t in spec.tensors if t.name.startswith("blk.") and len(t.shape) > 1),
        default=0,
    )
