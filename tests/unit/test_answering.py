"""The loop of all engines: what goes through the model, and what a slot is known to hold."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepack.server.engines import Sampling
from edgepack.server.engines.answering import Reader, Slot

GREEDY = Sampling(temperature=0)


class Recorded:
    """A cache that only notes what is done with it; its logits name the token after the last."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []

    def rewind(self, length: int) -> None:
        self.done.append(("rewind", length))

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.done.append(("read", len(tokens)))
        logits = np.zeros(512, dtype=np.float32)
        logits[tokens[-1] + 1] = 9
        return logits


@pytest.mark.parametrize(("last_alone", "reads"), [(False, [4, 4, 2, 1, 1]), (True, [4, 4, 1, 1, 1, 1])])
def test_a_prompt_is_read_in_chunks_and_an_answer_token_by_token(last_alone: bool, reads: list[int]) -> None:
    cache = Recorded()
    reader = Reader(
        ubatch=4, ends=frozenset({0}), decode=str, reading=threading.Lock(), last_alone=last_alone
    )
    slot = Slot(cache=cache)

    said = [t.id for t in reader.answer(slot, range(1, 11), GREEDY, 3, reuse=True, cancelled=lambda: False)]

    assert said == [11, 12, 13]
    assert cache.done == [("rewind", 0), *(("read", count) for count in reads)]
    assert slot.held == list(range(1, 13))


def test_what_failed_to_be_read_is_not_held() -> None:
    class Failing(Recorded):
        def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
            if len(self.done) > 2:
                raise MemoryError
            return super().read(tokens)

    slot = Slot(cache=Failing())
    reader = Reader(ubatch=4, ends=frozenset({0}), decode=str, reading=threading.Lock())

    with pytest.raises(MemoryError):
        list(reader.answer(slot, range(1, 20), GREEDY, 3, reuse=True, cancelled=lambda: False))

    assert slot.held == list(range(1, 9))


def test_the_end_of_a_sequence_is_a_token_without_text_and_min_tokens_bars_it() -> None:
    class Ending(Recorded):
        def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
            logits = np.zeros(8, dtype=np.float32)
            logits[0], logits[5] = 9, 8
            return logits

    reader = Reader(ubatch=4, ends=frozenset({0}), decode=str, reading=threading.Lock())

    def said(sampling: Sampling) -> list[tuple[int, bool]]:
        answer = reader.answer(Slot(cache=Ending()), (1,), sampling, 4, reuse=True, cancelled=lambda: False)
        return [(token.id, token.end) for token in answer]

    assert said(GREEDY) == [(0, True)]
    assert said(Sampling(temperature=0, min_tokens=2)) == [(5, False), (5, False), (0, True)]
    assert said(Sampling(temperature=0, ignore_eos=True)) == [(5, False)] * 4
