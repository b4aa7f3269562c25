"""A model's tokenizer.json as what packs passages into windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.calibration.chat import special_tokens, tokenizer_settings
from edgepack.errors import BadInput, MissingTool


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Text to tokens, and what stands around a text."""

    encode: Callable[[str], list[int]]
    """A passage to ids; texts of special tokens in it, such as chat markers, become these tokens."""
    begin: int | None
    """Put in front of a text by the tokenizer; None when it puts nothing."""
    end: int | None
    """Ends a document; None when the tokenizer names none."""
    vocabulary: int


def encoder(model: Path) -> Encoder:
    """Of a Hugging Face folder. Raises what `load` raises."""
    tokenizer = load(model)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    begin = whole[0] if whole[: len(plain)] != plain else None
    end = special_tokens(tokenizer_settings(model)).get("eos_token")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return Encoder(
        encode=encode,
        begin=begin,
        end=None if end is None else tokenizer.token_to_id(end),
        vocabulary=tokenizer.get_vocab_size(with_added_tokens=True),
    )


def load(model: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a Hugging Face folder, which pads and cuts nothing.

    Raises MissingTool without the library, BadInput without a sound tokenizer.json.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingTool("tokenizers is not installed", hint="pip install 'edgepack[quant]'") from error
    path = model / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{model} has no tokenizer.json", hint="save the model's fast tokenizer beside it")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise BadInput(f"{path} is no tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
