"""Questions with known answers: multiple choice in the shape of MMLU and C-Eval, and exact match.

A choice is scored by the log-likelihood of its text after the question, divided by its bytes, so that long choices
and other tokenizers are no handicap (lm-evaluation-harness calls it acc_norm). An exact-match item is decoded
greedily to the end of its line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepack import workspace
from edgepack.errors import BadInput, NotFound
from edgepack.evaluation import Accuracy
from edgepack.progress import Progress
from edgepack.scoring import Model
from edgepack.scoring.intervals import wilson
from edgepack.scoring.reference import likelihood

MORE_TOKENS = 8
"""Tokens that an exact-match answer may be longer than the right one before it is cut."""
_LETTERS = "ABCDEFGHIJ"
_SHOWN = 20
VERSION = 1
"""Raised when items are put to a model otherwise, so that old answers are not taken for new ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    line: int
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    line: int
    prompt: str
    answer: str


Item = Choice | Exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    name: str
    sha256: str
    items: tuple[Item, ...]


def read(path: Path) -> Tasks:
    """Items of a .jsonl file: {"question", "choices": [...], "answer": index or letter}, {"question", "A", "B", ...,
    "answer": letter}, or {"prompt", "answer"} for an exact match.

    Raises NotFound, and BadInput with every line that is none of these.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path}", hint="--tasks FILE: one JSON object a line")
    raw = path.read_bytes()
    items: list[Item] = []
    problems = []
    try:
        rows = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})", hint="convert it") from error
    for number, line in enumerate(rows, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(number, json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: no JSON: {error.msg}")
        except _Wrong as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise _bad(path.name, problems)
    if not items:
        raise BadInput(f"{path} has no items")
    return Tasks(name=path.name, sha256=hashlib.sha256(raw).hexdigest(), items=tuple(items))


def answer(tasks: Tasks, scorer: Model, progress: Progress, *, title: str) -> tuple[bool, ...]:
    """Whether the model answers each item right. Raises BadInput with every item longer than the model's context."""
    found, problems = [], []
    with progress.bar(f"asking {title}", len(tasks.items)) as advance:
        for item in tasks.items:
            try:
                found.append(_right(item, scorer))
            except _Wrong as error:
                problems.append(f"line {item.line}: {error}")
            advance(1)
    if problems:
        raise _bad(tasks.name, problems)
    return tuple(found)


def remember(name: str, right: Sequence[bool]) -> None:
    """Keeps a parent's answers in the cache."""
    workspace.write_text(_kept(name), json.dumps(list(right)))


def recall(name: str) -> tuple[bool, ...] | None:
    """A parent's answers, when they are in the cache."""
    place = _kept(name)
    return tuple(json.loads(place.read_text(encoding="utf-8"))) if place.is_file() else None


def key(revision: str, runtime: str, tasks: Tasks) -> str:
    """Name of a parent's answers: different for every input that changes them."""
    inputs = (revision, runtime, tasks.sha256, str(VERSION))
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:24]


def accuracy(tasks: Tasks, right: Sequence[bool], parent: Sequence[bool] | None) -> Accuracy:
    """The figures of an artifact's answers, beside its parent's."""
    pairs = [] if parent is None else list(zip(right, parent, strict=True))
    return Accuracy(
        name=tasks.name,
        sha256=tasks.sha256,
        items=len(right),
        right=sum(right),
        accuracy=wilson(sum(right) / len(right), len(right)),
        parent=None if parent is None else wilson(sum(parent) / len(parent), len(parent)),
        lost=None if parent is None else sum(theirs and not ours for ours, theirs in pairs),
        gained=None if parent is None else sum(ours and not theirs for ours, theirs in pairs),
    )


# ── one item ──


class _Wrong(ValueError):
    """What is wrong with an item."""


def _right(item: Item, scorer: Model) -> bool:
    match item:
        case Choice():
            scores = [_score(item.question, choice, scorer) for choice in item.choices]
            return int(np.argmax(scores)) == item.answer
        case Exact():
            return _tidy(_greedy(item, scorer)) == _tidy(item.answer)


def _score(question: str, choice: str, scorer: Model) -> float:
    """Log-likelihood of a choice after its question, nats a byte."""
    prompt, rest = f"{question}\nAnswer:", f" {choice}"
    start = [] if scorer.facts.bos is None else [scorer.facts.bos]
    alone, tokens = scorer.tokenize(prompt), [*start, *scorer.tokenize(prompt + rest)]
    # Where the choice begins: a tokenizer may join its first characters with the question's last.
    same = zip([*start, *alone], tokens, strict=False)
    begin = next((at for at, (a, b) in enumerate(same) if a != b), len(start) + len(alone))
    begin = max(1, min(begin, len(tokens) - 1))
    _require_room(len(tokens), scorer)
    logits = scorer.logits(tokens[:-1], begin - 1)
    nll = likelihood(logits, np.asarray(tokens[begin:], dtype=np.int32))
    return -float(nll.sum()) / len(rest.encode())


def _greedy(item: Exact, scorer: Model) -> str:
    """The likeliest continuation, token by token: its first line, or as much of it as may be right."""
    start = [] if scorer.facts.bos is None else [scorer.facts.bos]
    tokens = [*start, *scorer.tokenize(item.prompt)]
    room = len(scorer.tokenize(item.answer)) + MORE_TOKENS
    _require_room(len(tokens) + room, scorer)
    begin = len(tokens)
    text = ""
    while len(tokens) < begin + room:
        token = int(scorer.logits(tokens, len(tokens) - 1)[0].argmax())
        if token in scorer.facts.ends:
            break
        tokens.append(token)
        text = scorer.text(tokens[begin:]).lstrip()
        if "\n" in text:
            break
    return text.partition("\n")[0]


def _tidy(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def _require_room(tokens: int, scorer: Model) -> None:
    if tokens > scorer.facts.context:
        raise _Wrong(f"takes {tokens} tokens, the model's context has {scorer.facts.context}")


def _item(number: int, row: object) -> Item:
    if not isinstance(row, Mapping):
        raise _Wrong("is no object")
    if "prompt" in row:
        prompt, right = _text(row, "prompt"), _text(row, "answer")
        if "\n" in right.strip():
            raise _Wrong("the answer has more than one line")
        return Exact(line=number, prompt=prompt, answer=right)
    if "question" not in row:
        raise _Wrong("has neither a question nor a prompt")
    choices = tuple(_choices(row))
    if len(choices) < 2:
        raise _Wrong('has fewer than two choices: a list "choices", or fields A, B, …')
    return Choice(
        line=number,
        question=_text(row, "question"),
        choices=choices,
        answer=_index(row.get("answer"), len(choices)),
    )


def _choices(row: Mapping[str, object]) -> Iterator[str]:
    listed = row.get("choices")
    if listed is None:
        yield from (_text(row, letter) for letter in _LETTERS if letter in row)
        return
    if not isinstance(listed, list) or not all(isinstance(one, str) and one.strip() for one in listed):
        raise _Wrong("choices is no list of texts")
    yield from listed


def _index(right: object, count: int) -> int:
    if isinstance(right, str) and right.strip().isdecimal():
        right = int(right)
    if isinstance(right, str) and len(right.strip()) == 1:
        right = _LETTERS.find(right.strip().upper())
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < count:
        raise _Wrong(f"the answer is none of the {count} choices: give its index from 0, or its letter")
    return right


def _text(row: Mapping[str, object], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(f"{name} is no text")
    return value


def _bad(name: str, problems: Sequence[str]) -> BadInput:
    shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return BadInput(
        f"{name}: {len(problems)} items cannot be used\n{shown}{more}",
        hint='{"question", "choices": […], "answer": index or letter}, or {"prompt", "answer"}',
    )


def _kept(name: str) -> Path:
    return workspace.cache_root() / "reference-answers" / f"{name}.json"
