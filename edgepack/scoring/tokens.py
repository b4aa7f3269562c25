"""The tokenizer of a checkpoint or ONNX folder: tokenizer.json by the library that defines it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepack.errors import BuildFailed, MissingTool


class Tokenizer:
    """Raises MissingTool without the tokenizers package, BuildFailed for a folder without tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingTool("tokenizers is not installed", hint="pip install 'edgepack[torch]'") from error
        place = folder / "tokenizer.json"
        if not place.is_file():
            raise BuildFailed(
                f"{folder} has no tokenizer.json",
                hint="copy it from the model it was made from; transformers writes one from a tokenizer.model",
            )
        self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(place))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        self.known: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        """Ids below it are tokens."""
        self.bos: int | None = whole[0] if whole[: len(plain)] != plain else None

    def tokenize(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
