"""Text of tokens one by one, in whole characters: a token of a byte-level vocabulary may be a part of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""
_BYTES = 3
"""Bytes of a character that may be missing its last one."""
_CONTEXT = 6
"""Tokens before the first that a decoder is given, since some drop a space at the very beginning."""
_WINDOW = 24
"""Tokens that are decoded together at most, when they end in a whole character."""


class Detokenizer:
    """What each next token adds to the text of those before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-_CONTEXT:])
        self._said = len(_whole(decode(self._ids)) if self._ids else "")

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = _whole(text)
        new = whole[self._said :]
        self._said = max(self._said, len(whole))
        if len(self._ids) > (_WINDOW if whole == text else 4 * _WINDOW):
            self._ids = self._ids[-_CONTEXT:]
            self._said = len(_whole(self._decode(self._ids)))
        return new


def _whole(text: str) -> str:
    """Without the end that may still become a character."""
    end = len(text)
    while end > max(0, len(text) - _BYTES) and text[end - 1] == UNFINISHED:
        end -= 1
    return text[:end]
