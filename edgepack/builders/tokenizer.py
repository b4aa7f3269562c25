"""A Hugging Face tokenizer as GGUF metadata: byte-level BPE and SentencePiece, nothing guessed."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgepack.errors import BadInput, Unsupported
from edgepack.ggufheader import Entry

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""enum llama_token_type (include/llama.h); the numbers of sentencepiece_model.proto are the same."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
PRE_BY_REGEX: Mapping[tuple[str, bool], str] = {
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}", False): "qwen2",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}", False): "smaug-bpe",
    (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}", True): "tekken",
    (
        rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        False,
    ): "gpt-4o",
}
"""(regex in tokenizer.json, its ignore_merges) to llama.cpp's name (llama-vocab.cpp, llm_tokenizer_bpe)."""

_SPM_MODEL_BPE = 2
"""TrainerSpec.ModelType.BPE (sentencepiece_model.proto); llama.cpp's "llama" tokenizer merges like it."""
_SPACE = "▁"
_MISSING_SCORE = -10000.0
_ADDED_SCORE = -1000.0
"""Scores that the reference converter gives to padding and to added tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """What a folder says about its tokenizer."""

    folder: Path
    tokenizer: Mapping[str, object] | None
    """tokenizer.json."""
    settings: Mapping[str, object]
    """tokenizer_config.json."""
    config: Mapping[str, object]
    """config.json (of the text model)."""

    def part(self, name: str) -> Mapping[str, object]:
        """An object of tokenizer.json; empty when it is null or absent."""
        value = (self.tokenizer or {}).get(name)
        return value if isinstance(value, dict) else {}

    def parts(self, name: str, inside: str) -> Sequence[Mapping[str, object]]:
        """The steps of a part of tokenizer.json that is one step or a sequence of them."""
        value = self.part(name)
        if not value:
            return ()
        steps = value.get(inside) if value.get("type") == "Sequence" else [value]
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise BadInput(f"{self.folder}: tokenizer.json has a damaged {name}")
        return steps


def entries(folder: Path, config: Mapping[str, object], vocab: int) -> tuple[Entry, ...]:
    """The tokenizer.* keys for a model with ``vocab`` rows of embeddings.

    Raises BadInput for a damaged tokenizer or one larger than the model, Unsupported for a kind that
    llama.cpp has no equal of; the message says which part is not known.
    """
    files = _Files(
        folder=folder,
        tokenizer=_json(folder / "tokenizer.json"),
        settings=_json(folder / "tokenizer_config.json") or {},
        config=config,
    )
    sentencepiece = folder / "tokenizer.model"
    kind = _kind(files)
    if kind == "bpe":
        tokens, own = _byte_level(files, vocab)
    elif sentencepiece.is_file():
        tokens, own = _sentencepiece(files, read_sentencepiece(sentencepiece), vocab)
    elif kind == "spm":
        tokens, own = _sentencepiece(files, _pieces_of_json(files), vocab)
    else:
        raise BadInput(
            f"{folder} has no tokenizer.json and no tokenizer.model",
            hint="save the tokenizer beside the weights with save_pretrained",
        )
    return (*own, *_special(files, tokens), *_chat_template(files))


# ── byte-level BPE ──


def _byte_level(files: _Files, vocab: int) -> tuple[_Tokens, tuple[Entry, ...]]:
    model = files.part("model")
    tokens = _Tokens(vocab, files.folder)
    for text, number in _vocabulary(files, model):
        tokens.put(number, text, NORMAL)
    for number, text, special in _added_tokens(files, vocab):
        tokens.put(number, text, CONTROL if special else USER_DEFINED)
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(files, model)]
    return tokens, (
        Entry(key="tokenizer.ggml.model", kind="str", value="gpt2"),
        Entry(key="tokenizer.ggml.pre", kind="str", value=_pre_tokenizer(files, model)),
        *tokens.entries(scores=False),
        Entry(key="tokenizer.ggml.merges", kind="str", value=merges),
    )


def _pre_tokenizer(files: _Files, model: Mapping[str, object]) -> str:
    """llama.cpp's name for how text is split before merging; Unsupported when it has no equal."""
    normalizers = {str(part.get("type")) for part in files.parts("normalizer", "normalizers")}
    if normalizers - {"NFC"}:
        # llama.cpp applies none to BPE. NFC changes only decomposed text; the others change all of it.
        raise Unsupported(f"{files.folder}: normalizer {', '.join(sorted(normalizers))} of tokenizer.json")
    parts = files.parts("pre_tokenizer", "pretokenizers")
    kinds = [part.get("type") for part in parts]
    ignore_merges = model.get("ignore_merges") is True
    byte_level = kinds[-1:] == ["ByteLevel"] and parts[-1].get("add_prefix_space") is not True
    own_regex = byte_level and parts[-1].get("use_regex", True) is True
    if own_regex and kinds == ["ByteLevel"]:
        return "gpt-2"
    if own_regex and kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") is True:
        return "smollm"
    if byte_level and not own_regex and kinds == ["Split", "ByteLevel"]:
        pattern = parts[0].get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        isolated = parts[0].get("behavior") == "Isolated" and parts[0].get("invert") is not True
        known = PRE_BY_REGEX.get((str(regex), ignore_merges))
        if isolated and known is not None:
            return known
    raise Unsupported(
        f"{files.folder}: the pre_tokenizer of tokenizer.json is none that llama.cpp is known to have: "
        f"{json.dumps(parts)[:400]} (ignore_merges {ignore_merges})",
        hint="known are those of gpt-2, smollm, qwen2, llama 3, gpt-4o and tekken; "
        "a .gguf made elsewhere can be built from instead",
    )


# ── SentencePiece ──


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """A SentencePiece model: its pieces by id, and what it does to text."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    space_prefix: bool
    """A space is put before the text."""
    ids: Mapping[str, int]
    """Of unk, bos, eos, pad; those it has."""


def read_sentencepiece(path: Path) -> Pieces:
    """Reads a tokenizer.model (sentencepiece_model.proto) without sentencepiece or protobuf.

    Raises BadInput for a damaged file, Unsupported for a unigram, word or char model.
    """
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    ids = {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    model_type, space_prefix = 1, True
    for field, value in _fields(path.read_bytes(), path):
        if field == 1 and isinstance(value, bytes):
            piece = dict(_fields(value, path))
            texts.append(_as_bytes(piece.get(1, b""), path).decode("utf-8", errors="replace"))
            score = _as_bytes(piece.get(2, bytes(4)), path)
            if len(score) != 4:
                raise BadInput(f"{path} is damaged: a score of {len(score)} bytes")
            scores.append(struct.unpack("<f", score)[0])
            types.append(_as_number(piece.get(3, NORMAL), path))
        elif field == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value, path))
            model_type = _as_number(trainer.get(3, 1), path)
            for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
                if number in trainer:
                    ids[name] = _signed(_as_number(trainer[number], path))
        elif field == 3 and isinstance(value, bytes):
            space_prefix = bool(_as_number(dict(_fields(value, path)).get(3, 1), path))
    if not texts:
        raise BadInput(f"{path} holds no pieces; it is not a SentencePiece model")
    if model_type != _SPM_MODEL_BPE:
        kinds = {1: "unigram", 3: "word", 4: "char"}
        raise Unsupported(
            f"{path} is a SentencePiece {kinds.get(model_type, model_type)} model; only bpe is known"
        )
    return Pieces(
        texts=tuple(texts),
        scores=tuple(scores),
        types=tuple(types),
        space_prefix=space_prefix,
        ids={name: number for name, number in ids.items() if 0 <= number < len(texts)},
    )


def _pieces_of_json(files: _Files) -> Pieces:
    """The pieces of a tokenizer.json that was made from a SentencePiece BPE model.

    The scores are not in it. SentencePiece merges the pair with the highest score first and the list of
    merges is in that order, so minus the first rank that makes a piece orders the merges as they were.
    """
    model = files.part("model")
    by_number = {number: text for text, number in _vocabulary(files, model)}
    count = max(by_number, default=-1) + 1
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(files, model)):
        ranks.setdefault("".join(pair), rank)
    unknown = model.get("unk_token")
    texts = tuple(by_number.get(number, f"[PAD{number}]") for number in range(count))
    types = tuple(
        UNUSED if number not in by_number else _piece_type(text, unknown) for number, text in enumerate(texts)
    )
    worst = float(len(ranks) + 1)
    return Pieces(
        texts=texts,
        scores=tuple(-float(ranks[text]) if text in ranks else -worst for text in texts),
        types=types,
        space_prefix=_space_prefix(files),
        ids={"unk": texts.index(unknown)} if isinstance(unknown, str) and unknown in texts else {},
    )


def _piece_type(text: str, unknown: object) -> int:
    if text == unknown:
        return UNKNOWN
    return BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL


def _space_prefix(files: _Files) -> bool:
    """Whether the tokenizer puts a space before the text; Unsupported for normalizers that do more."""
    prefix = False
    for part in files.parts("normalizer", "normalizers"):
        match part:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                raise Unsupported(f"{files.folder}: normalizer {json.dumps(part)[:200]} of tokenizer.json")
    for part in files.parts("pre_tokenizer", "pretokenizers"):
        match part:
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}:
                pass
            case {"type": "Metaspace", "replacement": "▁"}:
                prefix = True
            case {"type": "Split", "pattern": {"String": " "}}:
                pass  # Gemma's: the normalizer has left no space to split at
            case _:
                raise Unsupported(f"{files.folder}: pre_tokenizer {json.dumps(part)[:200]} of tokenizer.json")
    return prefix


def _sentencepiece(files: _Files, pieces: Pieces, vocab: int) -> tuple[_Tokens, tuple[Entry, ...]]:
    tokens = _Tokens(vocab, files.folder)
    for number, (text, score, kind) in enumerate(zip(pieces.texts, pieces.scores, pieces.types, strict=True)):
        tokens.put(number, text, kind, score)
    for number, text, special in _added_tokens(files, vocab):
        if tokens.types[number] == UNKNOWN:
            continue
        plain = text if special else text.replace(_SPACE, " ")
        tokens.put(number, plain, CONTROL if special else USER_DEFINED, _ADDED_SCORE)
    tokens.ids = dict(pieces.ids)
    if files.tokenizer is not None:
        prefix = _space_prefix(files)
    else:
        prefix = files.settings.get("add_prefix_space", pieces.space_prefix) is True
    return tokens, (
        Entry(key="tokenizer.ggml.model", kind="str", value="llama"),
        Entry(key="tokenizer.ggml.pre", kind="str", value="default"),
        *tokens.entries(scores=True),
        Entry(key="tokenizer.ggml.add_space_prefix", kind="bool", value=prefix),
    )


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, bytes | int]]:
    """(field number, value) of a protobuf message; fixed and length-delimited values stay bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, path)
        wire = key & 7
        if wire == 0:
            number, at = _varint(data, at, path)
            yield key >> 3, number
            continue
        if wire == 2:
            length, at = _varint(data, at, path)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise BadInput(f"{path} is not a SentencePiece model (wire type {wire} at byte {at})")
        if length > len(data) - at:
            raise BadInput(f"{path} is truncated or not a SentencePiece model", hint="fetch it again")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int, path: Path) -> tuple[int, int]:
    number = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise BadInput(f"{path} is truncated or not a SentencePiece model", hint="fetch it again")


def _as_bytes(value: bytes | int, path: Path) -> bytes:
    if isinstance(value, int):
        raise BadInput(f"{path} is not a SentencePiece model: a number where text was expected")
    return value


def _as_number(value: bytes | int, path: Path) -> int:
    if isinstance(value, bytes):
        raise BadInput(f"{path} is not a SentencePiece model: text where a number was expected")
    return value


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


# ── what both kinds share ──


class _Tokens:
    """The token list under construction: ids that nothing names become unused padding."""

    def __init__(self, vocab: int, folder: Path) -> None:
        self.folder = folder
        self.texts = [f"[PAD{number}]" for number in range(vocab)]
        self.types = [UNUSED] * vocab
        self.scores = [_MISSING_SCORE] * vocab
        self.ids: dict[str, int] = {}

    def put(self, number: int, text: str, kind: int, score: float = 0.0) -> None:
        if not 0 <= number < len(self.texts):
            raise BadInput(
                f"{self.folder}: token {text!r} has the id {number}, the model {len(self.texts)} embeddings",
                hint="tokenizer and weights are not of the same model",
            )
        self.texts[number], self.types[number], self.scores[number] = text, kind, score

    def entries(self, *, scores: bool) -> Iterator[Entry]:
        if len(set(self.texts)) != len(self.texts):
            twice = next(text for text in self.texts if self.texts.count(text) > 1)
            raise BadInput(
                f"{self.folder}: two ids have the same token {twice!r}, which llama.cpp cannot load"
            )
        yield Entry(key="tokenizer.ggml.tokens", kind="str", value=self.texts)
        if scores:
            yield Entry(key="tokenizer.ggml.scores", kind="f32", value=self.scores)
        yield Entry(key="tokenizer.ggml.token_type", kind="i32", value=self.types)


def _special(files: _Files, tokens: _Tokens) -> Iterator[Entry]:
    """Ids of bos, eos, unk and pad as far as they are named, and whether bos and eos are put around a text."""
    numbers = {text: number for number, text in enumerate(tokens.texts)}
    found: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        text = files.settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        number = numbers.get(text) if isinstance(text, str) else None
        if number is None:
            configured = files.config.get(f"{name}_token_id")
            number = configured if isinstance(configured, int) and not isinstance(configured, bool) else None
        if number is None:
            number = tokens.ids.get(name)
        if number is not None and 0 <= number < len(tokens.texts):
            found[name] = number
    around = _around(files)
    for name, text in around.items():
        if isinstance(text, str) and text in numbers:
            found.setdefault(name, numbers[text])
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, number in found.items():
        yield Entry(key=f"tokenizer.ggml.{keys[name]}_token_id", kind="u32", value=number)
    for name, wanted in around.items():
        yield Entry(key=f"tokenizer.ggml.add_{name}_token", kind="bool", value=bool(wanted) and name in found)


def _around(files: _Files) -> Mapping[Literal["bos", "eos"], str | bool]:
    """What is put before and after a text: the post-processor's token, else whether the settings say so."""
    for part in files.parts("post_processor", "processors"):
        single = part.get("single")
        if part.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            return {"bos": _special_token(single[0]), "eos": _special_token(single[-1])}
    first, last = files.settings.get("add_bos_token"), files.settings.get("add_eos_token")
    return {"bos": first if isinstance(first, bool) else files.tokenizer is None, "eos": last is True}


def _special_token(step: object) -> str | bool:
    """Text of the special token of a template's step; False when the step is the text itself."""
    match step:
        case {"SpecialToken": {"id": str(text)}}:
            return text
        case _:
            return False


def _chat_template(files: _Files) -> Iterator[Entry]:
    jinja = files.folder / "chat_template.jinja"
    template: object = files.settings.get("chat_template")
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if isinstance(template, str) and template:
        yield Entry(key="tokenizer.chat_template", kind="str", value=template)


def _vocabulary(files: _Files, model: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise BadInput(f"{files.folder}: tokenizer.json has no model.vocab")
    for text, number in vocabulary.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise BadInput(f"{files.folder}: tokenizer.json gives token {text!r} the id {number!r}")
        yield text, number


def _merges(files: _Files, model: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Pairs in order; tokenizer.json has them as "a b" or as ["a", "b"]."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise BadInput(f"{files.folder}: tokenizer.json has no model.merges")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadInput(f"{files.folder}: tokenizer.json has the merge {merge!r}")
        yield pair[0], pair[1]


def _added_tokens(files: _Files, vocab: int) -> Iterator[tuple[int, str, bool]]:
    """(id, text, special) of tokens that are matched whole: tokenizer.json's, else tokenizer_config.json's.

    Those past the embeddings are left out: the model can neither read nor write them (Gemma 3 1B has one).
    """
    rows: list[tuple[object, object]] = []
    if files.tokenizer is not None:
        added = files.tokenizer.get("added_tokens")
        rows = (
            [(row.get("id"), row) for row in added if isinstance(row, dict)]
            if isinstance(added, list)
            else []
        )
    decoder = files.settings.get("added_tokens_decoder")
    if isinstance(decoder, dict) and files.tokenizer is None:
        rows = [(int(key) if key.isdigit() else key, row) for key, row in decoder.items()]
    for number, row in rows:
        text = row.get("content") if isinstance(row, dict) else None
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(text, str) or number < 0:
            raise BadInput(
                f"{files.folder}: the tokenizer has the added token {row!r} with the id {number!r}"
            )
        if number < vocab:
            yield number, text, isinstance(row, dict) and row.get("special") is True


def _kind(files: _Files) -> Literal["bpe", "spm", "none"]:
    if files.tokenizer is None:
        return "none"
    model = files.part("model")
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        raise Unsupported(
            f"{files.folder}: tokenizer.json is of type {model.get('type')!r}; known is BPE "
            "(byte-level, or SentencePiece with byte_fallback)"
        )
    return "spm" if model.get("byte_fallback") is True else "bpe"


def _json(path: Path) -> Mapping[str, object] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable JSON: {error}", hint="fetch it again") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not a JSON object")
    return value
