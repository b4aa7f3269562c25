"""Text comes in whole characters, whatever the tokens are parts of."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from edgepack.server.engines.detokenize import Detokenizer


def of_bytes(tokens: Sequence[int]) -> str:
    """A vocabulary of single bytes."""
    return bytes(tokens).decode("utf-8", "replace")


def of_words(tokens: Sequence[int]) -> str:
    """A vocabulary whose tokens begin with a space, of which the first is dropped, as sentencepiece does."""
    return "".join(f" w{token}" for token in tokens)[1:]


TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")


@given(st.text(TEXT, max_size=80), st.text(TEXT, max_size=8))
def test_the_pieces_of_a_text_are_whole_and_are_the_text(text: str, before: str) -> None:
    detokenizer = Detokenizer(of_bytes, before.encode())

    pieces = [detokenizer.push(byte) for byte in text.encode()]

    assert "".join(pieces) == text


def test_a_character_comes_with_its_last_byte() -> None:
    detokenizer = Detokenizer(of_bytes)

    assert [detokenizer.push(byte) for byte in "a🙂é".encode()] == ["a", "", "", "", "🙂", "", "é"]


def test_a_character_that_the_prompt_began_is_finished() -> None:
    first, *rest = "é".encode()

    assert [Detokenizer(of_bytes, (97, first)).push(byte) for byte in rest] == ["é"]


def test_words_after_a_prompt_keep_their_space() -> None:
    detokenizer = Detokenizer(of_words, (1, 2))

    assert "".join(detokenizer.push(token) for token in range(3, 60)) == "".join(
        f" w{token}" for token in range(3, 60)
    )


@given(st.binary(min_size=200, max_size=600))
def test_bytes_that_are_no_text_neither_pile_up_nor_get_lost(raw: bytes) -> None:
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return of_bytes(tokens)

    detokenizer = Detokenizer(decode)

    said = "".join(detokenizer.push(byte) for byte in raw)

    assert longest <= 4 * 24 + 1
    assert len(said) >= len(raw.decode("utf-8", "replace")) - 3
