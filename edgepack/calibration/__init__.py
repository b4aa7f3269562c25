"""Calibration data: a user's files to the passages, token windows and text that quantizers look at.

A quantizer rounds for the inputs that it sees, so these are part of the artifact: read with every problem named,
rendered with the model's own chat template, drawn by a seed, hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack import heldout
from edgepack.calibration import chat, formats, scripts
from edgepack.calibration.chat import ChatTemplate
from edgepack.calibration.encoder import Encoder
from edgepack.errors import BadInput
from edgepack.modelspec import ModelSpec
from edgepack.workspace import whole_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUILTIN = Path(__file__).with_name("builtin.jsonl")
"""What stands in when a user gives nothing; README.md beside it says what it is."""

_PASSAGE = 4
"""Characters per token of a window that a long document is cut into, so that a window is about one passage."""
_AT_MOST = 16
"""Characters kept per token that is wanted. Text has 1 to 5 a token, so windows are not short because of it, and what
is kept is small (1 MB at most by default) however large the files are."""
_PER_COLUMN = 4
"""Tokens per input of the widest layer below which GPTQ suffers. KL to the parent of the built-in model (inputs of up
to 1024) by 4-bit GPTQ with groups of 128, on its held-out text, calibrated on its training text; means of two seeds:
0.0142 with 0.5 tokens per input, 0.0111 with 1, 0.0090 with 2, 0.0077 with 4, and of one seed 0.0075 with 8; rounding
alone gives 0.0121."""
_FEW_BYTES = 2.0
"""Bytes per token below which a tokenizer falls back to single bytes and scraps. Measured: GPT-2's has 3.9 for English,
3.2 for Python and 1.4 for Chinese; the built-in model's, trained on English books, 3.2, 1.7 and 1.0."""
_TINY_VOCABULARY = 1024
"""Vocabularies up to this have short entries whatever the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How much is drawn from the data, and how.

    128 sequences are GPTQ's (Frantar et al. 2022, section 4: 128 of 2048 tokens); 512 tokens a sequence are
    llama-imatrix's chunk. A model with a shorter context takes shorter ones.
    """

    windows: int = 128
    length: int = 512
    """Tokens."""
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.windows * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file of the data."""

    name: str
    sha256: str
    documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was drawn from the data for one model: its template rendered the passages."""

    passages: tuple[str, ...]
    """In the order of use, without the tokens that a tokenizer puts around a text."""
    sampling: Sampling
    sources: tuple[Source, ...]
    builtin: bool
    sha256: str
    """Of passages and sampling: all that windows and importance matrices depend on beside the model."""
    warnings: tuple[str, ...]

    @property
    def characters(self) -> int:
        return sum(map(len, self.passages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What an artifact's provenance keeps of its calibration data, without their text."""

    sha256: str
    sampling: Sampling
    sources: tuple[Source, ...]
    builtin: bool
    fingerprints: tuple[str, ...]
    """A sketch of the text (heldout.py), so that quality is never measured on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token ids for a quantizer."""

    ids: NDArray[np.int32]
    """[windows, length]"""
    warnings: tuple[str, ...]


def of(
    model: Path,
    spec: ModelSpec,
    files: Sequence[Path],
    *,
    sampling: Sampling | None = None,
    tokens: int | None = None,
    seed: int = 0,
) -> Calibration:
    """``read`` for a model, a folder or a GGUF: its chat template, its card, windows no longer than its context.

    Without ``sampling`` there are ``tokens`` in all; without these either, a model of wide layers gets more windows.
    """
    drawn = sampling or Sampling(seed=seed)
    length = min(drawn.length, spec.context_train)
    enough = 0 if sampling else -(-(tokens or _PER_COLUMN * widest(spec)) // length)
    if tokens and not sampling:
        drawn = replace(drawn, windows=1)
    return read(
        files,
        template=chat.template(model),
        languages=scripts.languages(model),
        sampling=replace(drawn, length=length, windows=max(drawn.windows, enough)),
    )


def widest(spec: ModelSpec) -> int:
    """Inputs of the widest layer."""
    return max(t.shape[0] for t in spec.tensors if t.name.startswith("blk.") and len(t.shape) > 1)


def read(
    files: Sequence[Path],
    *,
    template: ChatTemplate | None,
    languages: Sequence[str] = (),
    sampling: Sampling | None = None,
) -> Calibration:
    """The data of these files, or the built-in text without any.

    Text files are one document each; .jsonl and .json hold a row per document (formats.py). Rows of a chat are
    rendered with ``template``. Long documents are cut into passages, and passages are taken in an order that depends
    on the seed and on their text only, not on files or their order, until there is enough for ``sampling``.
    ``languages``: codes of the model's card (scripts.languages), for a warning. Raises NotFound, and BadInput with all
    problems of all files.
    """
    drawn = sampling or Sampling()
    if drawn.windows < 1 or drawn.length < 2:
        raise BadInput(f"{drawn.windows} windows of {drawn.length} tokens are nothing to calibrate with")
    paths = tuple(files) or (BUILTIN,)
    documents, sources = [], []
    for path, (found, digest) in zip(paths, formats.read_all(paths), strict=True):
        documents += found
        sources.append(Source(name=path.name, sha256=digest, documents=len(found)))
    units = [piece for document in documents for piece in formats.pieces(document, _PASSAGE * drawn.length)]
    units.sort(key=lambda unit: _order(unit, drawn.seed))
    passages: list[str] = []
    left = _AT_MOST * drawn.tokens
    problems: list[str] = []
    for unit in units:
        if left <= 0:
            break
        try:
            passages.append(formats.render(unit, template))
        except BadInput as error:
            problems.append(f"{unit.place}: {error.message}")
            continue
        left -= len(passages[-1])
    formats.raise_all(problems)
    warnings = []
    if template is None and files and any(unit.messages for unit in units):
        warnings.append("the model has no chat template: the turns of a chat are written as 'role: content'")
    warnings += scripts.mismatch("".join(passages), languages)
    return Calibration(
        passages=tuple(passages),
        sampling=drawn,
        sources=tuple(sources),
        builtin=not files,
        sha256=_digest(passages, drawn),
        warnings=tuple(warnings),
    )


def windows(calibration: Calibration, encoder: Encoder, *, columns: int = 0) -> Windows:
    """The passages as tokens, packed and cut: int32 [windows, length], fewer when there is not enough text.

    Packed, for quantizers take no mask and padding would count as input (gptqmodel's calibration_concat_size and
    AutoRound's ":concat" do the same); the tokenizer's end-of-text stands between passages, and its beginning-of-text
    first in each window as in llama-imatrix, for models lean on that token. No token is used twice. ``columns``: inputs
    of the model's widest layer, for a warning. Raises BadInput when there is not one window.
    """
    import numpy as np

    wanted = calibration.sampling
    body = wanted.length - (encoder.begin is not None)
    stream: list[int] = []
    scraps, used = 0, 0
    for passage in calibration.passages:
        if len(stream) >= wanted.windows * body:
            break
        tokens = encoder.encode(passage)
        size = len(passage.encode())
        used += size
        scraps += size if size < _FEW_BYTES * len(tokens) else 0
        stream += tokens
        stream += [token for token in (encoder.end, encoder.begin) if token is not None]
    count = min(len(stream) // body, wanted.windows)
    if count == 0:
        raise BadInput(
            f"the calibration data are {len(stream)} tokens, less than one window of {wanted.length}",
            hint=f"{wanted.tokens} are a good amount",
        )
    ids = np.empty((count, wanted.length), dtype=np.int32)
    ids[:, wanted.length - body :] = np.reshape(stream[: count * body], (count, body))
    if encoder.begin is not None:
        ids[:, 0] = encoder.begin
    warnings = [*shortage(count * wanted.length, wanted, columns)]
    if encoder.vocabulary > _TINY_VOCABULARY and 2 * scraps > used:
        warnings.append(
            f"{scraps / used:.0%} of the calibration data have fewer than {_FEW_BYTES:g} bytes per token: the model's "
            "tokenizer hardly knows this kind of text, so the model is hardly meant for it"
        )
    return Windows(ids=ids, warnings=tuple(warnings))


def save(found: Windows, path: Path) -> None:
    """The ids as a .npy that appears whole: what a quantizer's process is given."""
    import numpy as np

    with whole_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, found.ids, allow_pickle=False)


def record(calibration: Calibration) -> Record:
    """For the provenance."""
    return Record(
        sha256=calibration.sha256,
        sampling=calibration.sampling,
        sources=calibration.sources,
        builtin=calibration.builtin,
        fingerprints=heldout.fingerprints(as_text(calibration)),
    )


def as_text(calibration: Calibration, separator: str = "\n\n") -> str:
    """The passages as one text for a tool that tokenizes and cuts by itself, such as llama-imatrix.

    ``separator``: what the model's tokenizer puts between texts, as text.
    """
    return separator.join(calibration.passages)


def shortage(tokens: int, wanted: Sampling, columns: int = 0) -> tuple[str, ...]:
    """A warning when there are too few tokens.

    A layer with n inputs is rounded by the n × n sums over the tokens' inputs; fewer tokens than n leave directions in
    which nothing is known but the damping.
    """
    if columns and tokens < _PER_COLUMN * columns:
        return (
            f"the calibration data give {tokens} tokens for layers of up to {columns} inputs; "
            f"below {_PER_COLUMN * columns} GPTQ fits what is particular to these tokens",
        )
    if tokens < wanted.tokens:
        return (f"the calibration data give {tokens} tokens, and {wanted.tokens} were asked for",)
    return ()


def _order(unit: formats.Document, seed: int) -> bytes:
    text = json.dumps([unit.text, unit.messages], ensure_ascii=False)
    return hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=16).digest()


def _digest(passages: Sequence[str], sampling: Sampling) -> str:
    settings = [sampling.windows, sampling.length, sampling.seed]
    return hashlib.sha256(json.dumps([settings, list(passages)]).encode()).hexdigest()
