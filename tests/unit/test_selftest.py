"""The quality probe: where its texts come from, and what changes on the build machine."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import selftest
from edgepack.errors import BadInput
from tests.plans import example_plan


def test_the_built_in_text_gives_different_probes_of_whole_words() -> None:
    text = selftest.heldout()

    pieces = selftest.probes(text)

    flat = " ".join(text.split())
    assert len(set(pieces)) == selftest.PROBES
    assert all(f" {piece} " in f" {flat} " for piece in pieces)
    assert max(map(len, pieces)) <= selftest.PROBE_CHARACTERS


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.text(alphabet="abc", min_size=1, max_size=90), min_size=800, max_size=900))
def test_any_long_text_gives_as_many_probes_each_longer_than_the_one_it_grows_from(words: list[str]) -> None:
    text = " ".join(words)

    pieces = selftest.probes(text)

    assert len(pieces) == selftest.PROBES
    for shorter, longer in itertools.pairwise(pieces):
        grows = longer.startswith(shorter) and len(shorter) < len(longer)
        assert grows or len(longer) <= selftest.STEP_CHARACTERS


def test_a_text_without_spaces_is_cut_anyway() -> None:
    pieces = selftest.probes("春眠不觉晓处处闻啼鸟夜来风雨声花落知多少" * 100)

    assert [len(piece) for piece in pieces[: selftest.STEPS]] == [12, 24, 36, 48, 60, 72]


def test_a_short_text_is_refused_with_what_is_needed() -> None:
    with pytest.raises(BadInput, match="576 are needed"):
        selftest.probes("too short")


def test_recording_changes_nothing_that_changes_answers() -> None:
    planned = example_plan("jetson-orin-nano-8gb").settings

    settings = selftest.recording(planned)

    assert settings.context >= selftest.PROBE_CHARACTERS + selftest.DECODE_TOKENS
    assert settings.threads <= planned.threads
    same = replace(
        settings, context=planned.context, slots=planned.slots, threads=planned.threads, gpu_layers=99
    )
    assert same == planned
