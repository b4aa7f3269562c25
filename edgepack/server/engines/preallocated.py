"""Keys and values for transformers in memory that is taken once: written in place, read as a view, cut by a number.

transformers' own DynamicCache copies itself at each token, and its StaticCache attends to every place there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """[1, heads, capacity, size] of keys and of values, of which the first ``length`` are held.

    A layer with a sliding window has all places too, so that it can be cut anywhere; the window is in its mask.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, like: tuple[torch.Tensor, torch.Tensor], capacity: int) -> None:
        """``like``: keys and values of one token, [1, heads, 1, size]."""
        super().__init__()
        # Zeros written, not calloc's: the pages are there from now on.
        self.keys, self.values = (
            torch.empty((*t.shape[:2], capacity, t.shape[3]), dtype=t.dtype, device=t.device).fill_(0)
            for t in like
        )
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Done by the constructor."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return int(self.keys.shape[-2])


class Preallocated(Cache):  # type: ignore[misc]  # the same
    """One sequence's layers."""

    def __init__(self, like: Sequence[tuple[torch.Tensor, torch.Tensor]], capacity: int) -> None:
        super().__init__(layers=[Layer(pair, capacity) for pair in like])

    def cut(self, length: int) -> None:
        """Forgets what comes after ``length`` tokens."""
        for layer in self.layers:
            layer.length = length

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


def plain(cache: Cache) -> bool:
    """Whether a model's own cache is keys and values of its tokens and nothing else, such as a recurrent state."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
