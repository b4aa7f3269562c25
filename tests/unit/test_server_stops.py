"""Stop strings: cut at the right place however the text comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.server.stops import Stops


def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """What comes out, and whether a stop string ended it."""
    one = Stops(stops)
    out = ""
    for piece in pieces:
        text, met = one.feed(piece)
        out += text
        if met:
            return out, True
    return out + one.rest(), False


def by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """The stop string that is complete first, of two that end together the longer."""
    for end in range(len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


@pytest.mark.parametrize(
    ("pieces", "stops", "out", "met"),
    [
        (["one two"], ["two"], "one ", True),
        (["one t", "w", "o three"], ["two"], "one ", True),
        (["one t", "w"], ["two"], "one tw", False),
        (["aaab"], ["aab"], "a", True),
        (["abcd"], ["bcd", "c"], "ab", True),
        (["xab"], ["ab", "b"], "x", True),
        (["hé", "llo"], ["él"], "h", True),
        (["plain"], [], "plain", False),
    ],
)
def test_text_is_cut_at_stop_strings(pieces: list[str], stops: list[str], out: str, met: bool) -> None:
    assert cut(pieces, stops) == (out, met)


@given(
    pieces=st.lists(st.text("abé", max_size=4), max_size=8),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
)
def test_the_result_does_not_depend_on_how_the_text_is_split(pieces: list[str], stops: list[str]) -> None:
    assert cut(pieces, stops) == by_definition("".join(pieces), stops)


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_more_is_held_back_than_may_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    one = Stops(stops)
    given_out = ""
    for count, piece in enumerate(pieces):
        text, met = one.feed(piece)
        given_out += text
        if met:
            return
        held = "".join(pieces[: count + 1])[len(given_out) :]

        assert held == "" or any(stop.startswith(held) for stop in stops)
