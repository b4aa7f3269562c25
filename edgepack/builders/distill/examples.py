"""Examples: a user's texts and chats as tokens, with a mark on each token that the model is to predict.

Chats are written by the model's own template and their responses are marked; of plain text every token is predicted.
The same data and seed give the same bytes, and a document is on the same side of train and held-out whatever files it
comes with.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os.path
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepack import serde
from edgepack.calibration import Source, chat, encoder, formats
from edgepack.calibration.chat import PLAIN, ChatTemplate, Message
from edgepack.calibration.formats import Document
from edgepack.errors import BadInput, NotFound
from edgepack.progress import Progress
from edgepack.workspace import require_space, sha256_file, whole_dir

_PASSAGE = 4000
"""Characters, about a thousand tokens: a longer document is on both sides, passage by passage."""
_SIDES = 1869
"""Draws who is held out. Any number would do, and another one would mix what earlier students were measured on."""
_LEAST = 4
"""Tokens of an example: a begin-of-text, one that was predicted before, and some to predict."""
_HELD_OUT = 2
"""Examples from which an interval can be had."""

Tokens = NDArray[np.int32]
Marks = NDArray[np.bool_]
Marked = tuple[Tokens, Marks]
"""An example: tokens [n], and which of them are responses [n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sequence of a set."""

    tokens: Tokens
    """[n]"""
    response: Marks
    """[n]; True: predicted from the tokens before it. Never the first."""
    first_row: int
    """Responses of the examples before it: where its own start among the teacher's rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a set was made from."""

    part: Literal["train", "held-out"] | None = None
    tokenizer: str = ""
    """sha256 of tokenizer.json."""
    template: str | None = None
    """sha256 of the chat template; None where none was used."""
    length: int = 0
    """Tokens of the longest example that was allowed."""
    held_out: float = 0.0
    seed: int = 0
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """A set of examples on disk, memory-mapped: any number of processes read it."""

    folder: Path
    digest: str
    """sha256 over the arrays."""
    about: About
    tokens: Tokens
    """[total], one example after the other."""
    response: Marks
    """[total]"""
    starts: NDArray[np.int64]
    """[examples + 1]: where each starts in the two above."""
    rows: NDArray[np.int64]
    """[examples + 1]: responses before each; the teacher's row r is of the r-th response."""

    @classmethod
    def open(cls, folder: Path) -> Examples:
        """Raises BadInput for a folder that is no set of examples."""
        try:
            facts = serde.load_json(_Facts, folder / "about.json")
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("tokens", "response", "starts")
            }
        except (NotFound, OSError, ValueError) as error:
            raise BadInput(f"{folder} is no set of examples: {error}") from error
        starts: NDArray[np.int64] = arrays["starts"]
        each = np.add.reduceat(arrays["response"], starts[:-1], dtype=np.int64)
        return cls(
            folder=folder,
            digest=facts.digest,
            about=facts.about,
            **arrays,
            rows=np.concatenate(([0], each.cumsum())),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, at: int) -> Example:
        if not 0 <= at < len(self):
            raise IndexError(at)
        part = slice(int(self.starts[at]), int(self.starts[at + 1]))
        return Example(tokens=self.tokens[part], response=self.response[part], first_row=int(self.rows[at]))

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    @property
    def response_tokens(self) -> int:
        return int(self.rows[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A user's data, ready to be trained on."""

    train: Path
    held_out: Path
    sources: tuple[Source, ...]
    """In an order of their own, whatever order the files came in."""
    chats: bool
    """Whether there are conversations among them."""
    warnings: tuple[str, ...]


def prepare(
    model: Path,
    files: Sequence[Path],
    *,
    length: int,
    held_out: float,
    seed: int,
    folder: Path,
    progress: Progress,
) -> Prepared:
    """The data in a model's tokens, as two sets of examples below ``folder``.

    ``model``: a Hugging Face folder, for its tokenizer and template. ``files``: text, .jsonl and .json as calibration
    takes them (formats.py). ``length``: tokens of the longest example. ``held_out``: share of the documents, and of a
    long text's passages, that is kept from training; drawn by ``seed`` and their content. Raises NotFound, MissingTool,
    NoSpace, and BadInput with all problems of the data.
    """
    if not files:
        raise BadInput("there are no data to train on", hint="--data FILE")
    if length < _LEAST or not 0 < held_out < 1:
        raise BadInput(
            f"examples of {length} tokens with a share of {held_out:g} held out are nothing to train on",
            hint=f"at least {_LEAST} tokens, and a share between 0 and 1",
        )
    shape = form(model, length)
    read = formats.read_all(files)
    documents = [document for found, _ in read for document in found]
    found = _examples(documents, shape, held_out, seed, progress)
    _require_enough(found, len(documents), held_out)
    _require_known(found, shape, model)
    sources = [
        Source(name=path.name, sha256=digest, documents=len(rows))
        for path, (rows, digest) in zip(files, read, strict=True)
    ]
    about = About(
        tokenizer=sha256_file(model / "tokenizer.json"),
        template=hashlib.sha256(shape.template.source.encode()).hexdigest() if found.chats else None,
        length=length,
        held_out=held_out,
        seed=seed,
        sources=tuple(sorted(sources, key=lambda source: (source.name, source.sha256))),
    )
    train, aside = folder / "train", folder / "held-out"
    write(_shuffled(found.train, seed), train, replace(about, part="train"))
    write(_shuffled(found.held_out, seed), aside, replace(about, part="held-out"))
    return Prepared(
        train=train,
        held_out=aside,
        sources=about.sources,
        chats=found.chats > 0,
        warnings=_warnings(found, shape),
    )


def write(examples: Iterable[tuple[Any, Any]], folder: Path, about: About | None = None) -> Examples:
    """Puts examples, each a sequence of tokens and one of marks, into a folder that appears whole.

    A folder that holds the same is left alone, and another set in it is replaced. Raises ValueError for an example
    that is empty or whose first token is a response, NoSpace.
    """
    tokens, response, starts = array("i"), bytearray(), array("q", [0])
    for ids, marks in examples:
        if not len(ids) or len(ids) != len(marks) or marks[0]:
            raise ValueError(f"example {len(starts)} has {len(ids)} tokens and {len(marks)} marks")
        tokens.frombytes(np.asarray(ids, dtype=np.int32).tobytes())
        response += np.asarray(marks, dtype=np.bool_).tobytes()
        starts.append(len(tokens))
    if len(starts) < 2:
        raise ValueError("no example")
    arrays: Mapping[str, NDArray[Any]] = {
        "tokens": np.frombuffer(tokens, dtype=np.int32),
        "response": np.frombuffer(response, dtype=np.bool_),
        "starts": np.frombuffer(starts, dtype=np.int64),
    }
    facts = _Facts(
        digest=_digest(arrays.values()),
        examples=len(starts) - 1,
        tokens=len(tokens),
        responses=int(arrays["response"].sum()),
        about=about or About(),
    )
    if _holds(folder, facts):
        return Examples.open(folder)
    require_space(folder, sum(values.nbytes for values in arrays.values()))
    shutil.rmtree(folder, ignore_errors=True)
    with whole_dir(folder) as place:
        for name, values in arrays.items():
            np.save(place / f"{name}.npy", values, allow_pickle=False)
        (place / "about.json").write_text(serde.to_json(facts), encoding="utf-8")
    return Examples.open(folder)


def same_tokens(teacher: Path, student: Path) -> None:
    """Raises BadInput with the first difference that makes two models read a text, or a token, differently.

    Tokens that only one of them defines are none: a later version adds some, and rows of padding have no name.
    """
    # As the library writes them, so that files of different versions of it are comparable.
    pair = [json.loads(encoder.load(model).to_str()) for model in (teacher, student)]
    difference = next(_differences(*pair), None)
    if difference is not None:
        raise BadInput(
            f"the tokenizers of {teacher} and {student} differ: {difference}",
            hint="a student of the teacher's own family, or one cut out of it with --prune, has its tokenizer",
        )


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Between two tokenizer.json: what tokens are, then what makes them of a text."""
    pair = (ours, theirs)
    words = [_words(tokenizer["model"]["vocab"]) for tokenizer in pair]
    added = [{row["id"]: row for row in tokenizer["added_tokens"]} for tokenizer in pair]
    tables = [
        known | {at: row["content"] for at, row in more.items()}
        for known, more in zip(words, added, strict=True)
    ]
    for at in sorted(tables[0].keys() & tables[1].keys()):
        if tables[0][at] != tables[1][at]:
            yield f"token {at} is {tables[0][at]!r} in one and {tables[1][at]!r} in the other"
    places = [{word: at for at, word in table.items()} for table in tables]
    for word in sorted(places[0].keys() & places[1].keys()):
        if places[0][word] != places[1][word]:
            yield f"{word!r} is token {places[0][word]} in one and {places[1][word]} in the other"
    for at in sorted((words[0].keys() ^ words[1].keys()) - added[0].keys() - added[1].keys()):
        yield f"token {at}, {(words[0] | words[1])[at]!r}, is in one of them only"
    for at in sorted(added[0].keys() & added[1].keys()):
        # "special" only says what is hidden when tokens become text.
        if {**added[0][at], "special": None} != {**added[1][at], "special": None}:
            yield f"the added token {added[0][at]['content']!r} is matched by other rules"
    for at, rules in enumerate(zip_longest(*(tokenizer["model"].get("merges", ()) for tokenizer in pair))):
        if rules[0] != rules[1]:
            yield f"merge {at} is {rules[0]} in one and {rules[1]} in the other"
    for name in ("normalizer", "pre_tokenizer", "model"):
        told = [json.dumps(_rules(tokenizer, name), ensure_ascii=False) for tokenizer in pair]
        if told[0] != told[1]:
            yield f"the {name} is {told[0][:200]} in one and {told[1][:200]} in the other"


def _words(vocabulary: Mapping[str, int] | Sequence[tuple[str, float]]) -> dict[int, str]:
    """Id to word; a Unigram model lists its words, with their scores, in the order of their ids."""
    if isinstance(vocabulary, Mapping):
        return {at: word for word, at in vocabulary.items()}
    return {at: word for at, (word, _) in enumerate(vocabulary)}


def _rules(tokenizer: Mapping[str, Any], name: str) -> object:
    """A part of a tokenizer.json without what was compared already, and without what is for training only."""
    part = tokenizer[name]
    if name != "model":
        return part
    known = ("merges", "dropout", *(("vocab",) if isinstance(part["vocab"], Mapping) else ()))
    return {key: value for key, value in part.items() if key not in known}


# ── documents to examples ──


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """All examples of the data, in no order yet."""

    train: list[Marked]
    held_out: list[Marked]
    chats: int
    silent: int
    """Conversations without a response that is short enough."""
    cut: int
    """Conversations that are longer than an example may be."""
    texts: bool


def _examples(
    documents: Sequence[Document], form: Form, held_out: float, seed: int, progress: Progress
) -> _Found:
    chats = [document for document in documents if document.messages]
    texts = [run for document in documents if not document.messages for run in _runs(document, held_out)]
    said: dict[bool, list[Marked]] = {False: [], True: []}
    pieces: dict[bool, list[Marked]] = {False: [], True: []}
    problems: list[str] = []
    silent, long = 0, 0
    with progress.bar("reading the data", len(chats) + len(texts)) as advance:
        for document in chats:
            advance(1)
            try:
                whole = conversation(formats.turns(document), form)
            except BadInput as error:
                problems.append(f"{document.place}: {error.message}")
                continue
            kept = [
                example
                for example in (_cut(example, form.length) for example in whole)
                if example is not None
            ]
            silent += not kept
            long += any(len(tokens) > form.length for tokens, _ in whole)
            said[_side(document, held_out)] += kept
        for run in sorted(texts, key=lambda run: _order([run.text, run.ends], seed)):
            advance(1)
            pieces[run.held_out] += windows(run.text, form, ends=run.ends)
    formats.raise_all(problems)
    return _Found(
        train=said[False] + pack(pieces[False], form.length),
        held_out=said[True] + pieces[True],  # not packed: documents are the units that an interval is over
        chats=len(chats),
        silent=silent,
        cut=long,
        texts=bool(texts),
    )


def _require_enough(found: _Found, documents: int, held_out: float) -> None:
    if not found.train and not found.held_out:
        raise BadInput(
            f"the data have no response tokens: {found.silent} of {found.chats} conversations have no turn of the "
            "assistant that is short enough",
            hint='plain text and turns of the role "assistant" are trained on; long prompts need a larger length',
        )
    for side, least, name, share in (
        (found.held_out, _HELD_OUT, "held-out", "larger"),
        (found.train, 1, "training", "smaller"),
    ):
        if len(side) < least:
            raise BadInput(
                f"{documents} documents, {held_out:g} of them held out, give {len(side)} {name} examples; "
                f"the least is {least}",
                hint=f"more documents (rows of jsonl; a text file is one), or a {share} held_out in a recipe",
            )


def _require_known(found: _Found, form: Form, model: Path) -> None:
    most = max(int(tokens.max()) for tokens, _ in [*found.train, *found.held_out])
    if form.rows is not None and most >= form.rows:
        raise BadInput(
            f"the tokenizer of {model} gives the token {most}, and the model knows {form.rows}",
            hint="take the tokenizer that the model was trained with",
        )


def _warnings(found: _Found, form: Form) -> tuple[str, ...]:
    told = []
    if found.chats and not form.own:
        told.append("the model has no chat template: the turns of a chat are written as 'role: content'")
    if found.texts and form.end is None:
        told.append("the tokenizer names no end-of-text: nothing stands between the documents of an example")
    if found.cut:
        told.append(
            f"{found.cut} of {found.chats} conversations are longer than {form.length} tokens and were cut"
        )
    if found.silent:
        told.append(
            f"{found.silent} of {found.chats} conversations have no response within {form.length} tokens "
            "and were left out"
        )
    return tuple(told)


# ── conversations ──


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a model's examples are written."""

    tokenizer: Any
    """A tokenizers.Tokenizer"""
    template: ChatTemplate
    own: bool
    """Whether the template is the model's."""
    begin: int | None
    """What the tokenizer puts in front of a text."""
    end: int | None
    """Ends a document."""
    rows: int | None
    """Of the model's embedding, where its configuration says."""
    length: int


def form(model: Path, length: int) -> Form:
    """Of a Hugging Face folder. Raises MissingTool, and BadInput without a sound tokenizer.json."""
    around = encoder.encoder(model)
    own = chat.template(model)
    tokens = chat.special_tokens(chat.tokenizer_settings(model))
    return Form(
        tokenizer=encoder.load(model),
        template=own or replace(PLAIN, tokens=tokens),
        own=own is not None,
        begin=around.begin,
        end=around.end,
        rows=embedding_rows(model),
        length=length,
    )


def embedding_rows(model: Path) -> int | None:
    """Tokens that a model has rows for, padding included; None where its configuration does not say."""
    place = model / "config.json"
    if not place.is_file():
        return None
    config = serde.read_object(place)
    inner = config.get("text_config")
    rows = inner.get("vocab_size") if isinstance(inner, dict) else config.get("vocab_size")
    return rows if isinstance(rows, int) else None


def conversation(messages: Sequence[Message], form: Form) -> list[Marked]:
    """Its examples: one, or one for each of the assistant's turns where the template rewrites earlier ones.

    A response ends with the token that ends the turn. Raises BadInput for what the template refuses.
    """
    begin = form.template.tokens.get("bos_token", "")
    found = []
    for text, spans in responses(messages, form.template):
        body = text.removeprefix(begin)
        shift = len(text) - len(body)
        encoding = form.tokenizer.encode(body, add_special_tokens=False)
        ids = encoding.ids
        marks = _marks(body, encoding.offsets, [(first - shift, last - shift) for first, last in spans])
        first = form.tokenizer.token_to_id(begin) if form.begin is None and shift else form.begin
        if first is not None and ids[:1] != [first]:
            ids, marks = [first, *ids], [False, *marks]
        found.append((np.array(ids, dtype=np.int32), np.array(marks, dtype=np.bool_)))
    return found


Spans = Sequence[tuple[int, int]]
"""First character of each response, and the one behind it."""


def responses(messages: Sequence[Message], template: ChatTemplate) -> list[tuple[str, Spans]]:
    """Texts of a conversation with what the assistant says in each, up to the white space behind its end-of-turn.

    Templates such as Qwen3's drop the thinking of earlier turns, so what a turn was answered to is not what the whole
    conversation says: then there is a text for each turn of the assistant, that ends with it.
    """
    whole = template.write(messages)
    alone: list[tuple[str, Spans]] = []
    for count, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            text = template.write(messages[:count])
            alone.append((text, [(_start(messages[:count], text, template), len(text.rstrip()))]))
    if all(whole.startswith(text[: spans[0][1]]) for text, spans in alone):
        return [(whole, [span for _, spans in alone for span in spans])]
    return alone


def _start(messages: Sequence[Message], text: str, template: ChatTemplate) -> int:
    """Where the last message begins to be the model's own: behind the prompt for it.

    Where the template writes no prompt, or one that its own turns do not start with (DeepSeek-R1's, which opens a
    thought), it is where two turns that differ in their content begin to differ.
    """
    before = messages[:-1]
    try:
        bare, prompt = template.write(before), template.write(before, prompt=True)
    except BadInput:  # some refuse to write nothing, or a system's turn alone; the turn itself was written
        bare = prompt = ""
    if prompt != bare and text.startswith(prompt):
        return len(prompt)
    probes = [template.write([*before, {**messages[-1], "content": probe}]) for probe in ("a", "b")]
    same = os.path.commonprefix(probes)
    if not text.startswith(same):
        raise BadInput(
            "the chat template writes a turn differently by what it says: its start cannot be told"
        )
    return len(same)


def _marks(text: str, offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Which tokens are of the spans: by where the first character that is not white space stands.

    So a space that belongs to a word goes with the word, whichever side the template counts it to.
    """
    found, reached, at = [], 0, 0
    for first, last in offsets:
        # Some tokenizers leave white space out of offsets, and several tokens of one character have the same ones.
        low, reached = min(first, reached), max(first, last, reached)
        seen = text[low:last]
        visible = last - len(seen.lstrip()) if seen.strip() else low
        while at < len(spans) and visible >= spans[at][1]:
            at += 1
        found.append(low < last and at < len(spans) and visible >= spans[at][0])
    return found


def _cut(example: Marked, length: int) -> Marked | None:
    """Its first tokens, up to the last response in them; None without one. The first token cannot be predicted."""
    tokens, marks = example
    marks[:1] = False
    there = np.flatnonzero(marks[:length])
    if not len(there):
        return None
    return tokens[: there[-1] + 1], marks[: there[-1] + 1]


# ── plain text ──


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Passages of a document that follow each other and are on one side."""

    text: str
    ends: bool
    """Whether the document ends with it."""
    held_out: bool


def _runs(document: Document, held_out: float) -> Iterator[_Run]:
    """A document that is longer than two passages is split, for there may be no other."""
    text = document.text
    sides = [
        (start, end, _side(replace(document, text=text[start:end].strip()), held_out))
        for start, end in formats.cuts(text, _PASSAGE)
    ]
    start = 0
    for number, (_, end, side) in enumerate(sides):
        if number + 1 < len(sides) and sides[number + 1][2] == side:
            continue
        if text[start:end].strip():
            yield _Run(text=text[start:end], ends=end == len(text), held_out=side)
        start = end


def windows(text: str, form: Form, *, ends: bool) -> list[Marked]:
    """A text as examples of at most the form's length, each of its tokens a response of exactly one of them.

    Each starts with what the tokenizer puts in front of a text, and with the token before, which is not predicted
    again; so the first token of a text is predicted only where something stands in front of it.
    """
    ids = form.tokenizer.encode(text, add_special_tokens=False).ids
    lead = [] if form.begin is None else [form.begin]
    if lead and ids[:1] == lead:
        ids = ids[1:]
    if ends and form.end is not None and ids[-1:] != [form.end]:
        ids = [*ids, form.end]
    stream = np.array(ids, dtype=np.int32)
    found = []
    at = 0 if lead else 1
    while at < len(stream):
        known = np.concatenate((np.array(lead, dtype=np.int32), stream[max(0, at - 1) : at]))
        told = stream[at : at + form.length - len(known)]
        found.append((np.concatenate((known, told)), np.arange(len(known) + len(told)) >= len(known)))
        at += len(told)
    return found


def pack(pieces: Sequence[Marked], length: int) -> list[Marked]:
    """Joins them to as few examples of at most ``length`` tokens as best-fit-decreasing finds; none is cut.

    Nothing is cut that need not be, which costs quality (Ding et al., arXiv 2404.10830).
    """
    packed: list[list[Marked]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece[0])):
        size = len(piece[0])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            room, number = length, len(packed)
            packed.append([])
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        packed[number].append(piece)
        left = room - size
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(number)
    return [
        (np.concatenate([t for t, _ in parts]), np.concatenate([m for _, m in parts])) for parts in packed
    ]


# ── order ──


def _side(document: Document, held_out: float) -> bool:
    """Whether a document is held out: by its content alone, so that copies of it never are on both sides, and what an
    earlier student was measured on is never what a later one is trained on."""
    drawn = int.from_bytes(_order([document.text, document.messages], _SIDES)[:8], "big")
    return drawn < held_out * 2**64


def _order(content: object, seed: int) -> bytes:
    text = json.dumps(content, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=16).digest()


def _shuffled(examples: Iterable[Marked], seed: int) -> list[Marked]:
    """In an order that depends on the seed and on nothing but their content."""

    def place(example: Marked) -> bytes:
        tokens, marks = example
        drawn = hashlib.blake2b(tokens.tobytes(), key=str(seed).encode(), digest_size=16)
        drawn.update(marks.tobytes())
        return drawn.digest()

    return sorted(examples, key=place)


# ── files ──


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """about.json"""

    digest: str
    examples: int
    tokens: int
    responses: int
    about: About
    schema_version: Literal[1] = 1


def _digest(arrays: Iterable[NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for values in arrays:
        digest.update(values.data)
    return digest.hexdigest()


def _holds(folder: Path, facts: _Facts) -> bool:
    """Folders appear whole, so what about.json says is there is there."""
    place = folder / "about.json"
    return place.is_file() and place.read_text(encoding="utf-8") == serde.to_json(facts)
