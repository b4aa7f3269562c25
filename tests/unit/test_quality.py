"""The quality probe: where its texts come from, and what changes on the build machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack import quality
from edgepack.errors import BadInput
from tests.plans import example_plan


def test_the_built_in_text_gives_different_probes_of_whole_words() -> None:
    text = quality.heldout()

    pieces = quality.probes(text)

    flat = " ".join(text.split())
    assert len(set(pieces)) == quality.PROBES
    assert all(f" {piece} " in f" {flat} " for piece in pieces)
    assert all(60 < len(piece) <= quality.PROBE_CHARACTERS for piece in pieces)


@given(words=st.lists(st.text(alphabet="abc", min_size=1, max_size=9), min_size=1000, max_size=1500))
def test_any_long_text_gives_as_many_probes(words: list[str]) -> None:
    text = " ".join(words)
    if len(text) >= quality.PROBES * quality.PROBE_CHARACTERS:
        assert len(quality.probes(text)) == quality.PROBES


def test_a_short_text_is_refused_with_what_is_needed() -> None:
    with pytest.raises(BadInput, match="3840 are needed"):
        quality.probes("too short")


def test_recording_changes_nothing_that_changes_answers() -> None:
    planned = example_plan("jetson-orin-nano-8gb").settings

    settings = quality.recording(planned)

    assert settings.context >= quality.PROBE_CHARACTERS + quality.DECODE_TOKENS
    assert settings.threads <= planned.threads
    same = replace(
        settings, context=planned.context, slots=planned.slots, threads=planned.threads, gpu_layers=99
    )
    assert same == planned
