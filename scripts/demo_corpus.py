"""The text of the demo model: how the books are cleaned, split and turned into tokens.

The model and the n-gram model that it is compared with both take their tokens from here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
"""Stands between documents: it is the first and the last token, as in GPT-2."""

VOCABULARY = 2048
"""Entries of the tokenizer. Small, because each entry must be learned from about a million tokens."""

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The words of `tokenizer.pre = qwen2`: https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/tokenizer.json"""

PARTS = 4
"""Each book is cut into this many equal parts, and each part gives its end to the measurements."""

SHARE = 0.02
"""Share of each part that is held out, and the same again for validation."""

CHAPTER = re.compile(r"(?=^CHAPTER [IVXL]+$)", re.MULTILINE)
WRAP = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Three texts that share no paragraph."""

    training: tuple[str, ...]
    """Documents: chapters where the book has them, else the parts of it."""
    validation: str
    """Chooses the moment to stop; nothing is reported from it."""
    heldout: str
    """Seen once, when the final model is measured."""


def corpus(prose: Sequence[Path], verse: Sequence[Path]) -> Corpus:
    """The split of these books; line breaks inside the paragraphs of `prose` are the printer's, and go."""
    books = [WRAP.sub(" ", clean(path)) for path in prose] + [clean(path) for path in verse]
    parts = [part for book in books for part in split(book)]
    return Corpus(
        training=tuple(document for part in parts for document in documents(part[0])),
        validation="\n\n".join(part[1] for part in parts) + "\n",
        heldout="\n\n".join(part[2] for part in parts) + "\n",
    )


def clean(path: Path) -> str:
    """The book with Unix line ends and at most one empty line between paragraphs."""
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split(book: str) -> list[tuple[str, str, str]]:
    """Training, validation and held-out text of each part of a book, cut between paragraphs."""
    paragraphs = book.split("\n\n")
    total = sum(map(len, paragraphs))
    pieces: list[tuple[list[str], list[str], list[str]]] = [([], [], []) for _ in range(PARTS)]
    seen = 0
    for paragraph in paragraphs:
        part, within = divmod(seen / total * PARTS, 1)
        which = 0 if within < 1 - 2 * SHARE else 1 if within < 1 - SHARE else 2
        pieces[int(part)][which].append(paragraph)
        seen += len(paragraph)
    return [("\n\n".join(a), "\n\n".join(b), "\n\n".join(c)) for a, b, c in pieces]


def documents(text: str) -> list[str]:
    return [document.strip() for document in CHAPTER.split(text) if document.strip()]


def trained_tokenizer(training: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` entries that cuts words as Qwen2 does, and adds nothing to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        training,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def stream(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    """Tokens of all texts, with `END` before each and after the last: shape [tokens]."""
    end = tokenizer.token_to_id(END)
    tokens = [end]
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        tokens += encoding.ids
        tokens.append(end)
    return np.array(tokens, dtype=np.int64)
