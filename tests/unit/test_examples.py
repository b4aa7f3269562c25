"""A user's data as examples: what is a response, where texts are cut, who is held out, and that bytes repeat."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as config
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from edgepack.builders.distill import examples
from edgepack.builders.distill.examples import About, Examples, Prepared
from edgepack.calibration.chat import PLAIN
from edgepack.errors import BadInput
from edgepack.progress import Silent

DEMO = Path(__file__).parents[2] / "edgepack" / "models" / "demo"

QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|mid|>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|mid|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>{{ parts[0].split('<think>')[-1] if parts | length > 1 else '\n\n' }}</think>{% endif %}"
    "{{ parts[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "<|mid|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|mid|><think>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""Writes no prompt: what it is asked for one is what it writes anyway."""
TEMPLATES = {
    "qwen2.5": QWEN25, "llama-3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3, "r1": R1, "llama-2": LLAMA2,
    "plain": PLAIN.source,
}  # fmt: skip
MARKERS = ("<|im_start|>", "<|im_end|>", "<|mid|>", "<s>")

Turn = tuple[str, str]


def folder(
    place: Path, *, template: str | None = None, begins: bool = False, trims: bool = False, rows: int = 2100
) -> Path:
    """A model's folder but for its weights: the built-in tokenizer with chat markers and, if it ``begins``, a <s>."""
    place.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.add_special_tokens(list(MARKERS))
    parts: list[object] = [processors.ByteLevel(trim_offsets=True)] if trims else []
    if begins:
        parts.append(
            processors.TemplateProcessing("<s> $A", "$A $B", [("<s>", tokenizer.token_to_id("<s>"))])
        )
    if parts:
        tokenizer.post_processor = processors.Sequence(parts)
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    if template is not None:
        settings["chat_template"] = template
    (place / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (place / "config.json").write_text(json.dumps({"vocab_size": rows}), encoding="utf-8")
    return place


def form(model: Path, length: int = 64) -> examples.Form:
    return examples.form(model, length)


def messages(*turns: Turn) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def chats(path: Path, *rows: Sequence[Turn]) -> Path:
    path.write_text("\n".join(json.dumps({"messages": messages(*row)}) for row in rows), encoding="utf-8")
    return path


def prepare(
    model: Path, out: Path, *files: Path, length: int = 64, held_out: float = 0.3, seed: int = 0
) -> Prepared:
    return examples.prepare(
        model, files, length=length, held_out=held_out, seed=seed, folder=out, progress=Silent()
    )


def decoded(tokens: Sequence[int] | examples.Tokens, model: Path) -> str:
    return str(loaded(model).decode([int(token) for token in tokens], skip_special_tokens=False))


@cache
def loaded(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def told(model: Path, *turns: Turn) -> list[tuple[str, list[str]]]:
    """Of each example of a conversation: all of it, and its responses, as text."""
    found = []
    for tokens, marks in examples.conversation(messages(*turns), form(model)):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], marks, [False])).astype(int)))
        spans = [decoded(tokens[a:b], model) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        found.append((decoded(tokens, model), spans))
    return found


# ── conversations ──

TWO_TURNS: Sequence[Turn] = (
    ("system", "Be brief."),
    ("user", "How?"),
    ("assistant", "Thus:\n\n    so 🙂"),
    ("user", "Why?"),
    ("assistant", " So.\n"),
)


def test_qwen_responses_are_the_assistants_words_with_the_end_of_turn(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=QWEN25)

    found = told(model, *TWO_TURNS)

    assert found == [(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
        "Thus:\n\n    so 🙂<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n So.\n<|im_end|>\n",
        ["Thus:\n\n    so 🙂<|im_end|>", " So.\n<|im_end|>"],
    )]  # fmt: skip


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("begins", [False, True])
def test_llama_3_begins_once_whoever_puts_the_begin_of_text(
    tmp_path: Path, begins: bool, trims: bool
) -> None:
    model = folder(tmp_path / "m", template=LLAMA3, begins=begins, trims=trims)

    (found,) = told(model, *TWO_TURNS)

    assert (
        found[0].startswith("<s><|im_start|>system<|mid|>\n\nBe brief.<|im_end|>")
        and found[0].count("<s>") == 1
    )
    assert found[1] == ["Thus:\n\n    so 🙂<|im_end|>", "So.<|im_end|>"]


def test_a_tokenizer_begins_a_chat_whose_template_does_not(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=QWEN25, begins=True)

    (found,) = told(model, ("user", "How?"), ("assistant", "Thus."))

    assert found == (
        "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n"
        "<|im_start|>assistant\nThus.<|im_end|>\n",
        ["Thus.<|im_end|>"],
    )


def test_gemma_has_the_system_turn_in_the_users(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=GEMMA, begins=True)

    (found,) = told(model, *TWO_TURNS)

    assert found == (
        "<s><|im_start|>user\nBe brief.\n\nHow?<|im_end|>\n<|im_start|>model\nThus:\n\n    so 🙂<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>model\nSo.<|im_end|>\n",
        ["Thus:\n\n    so 🙂<|im_end|>", "So.<|im_end|>"],
    )


def test_a_template_that_drops_earlier_thoughts_gives_an_example_for_each_turn(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=QWEN3)

    found = told(
        model,
        ("user", "A?"),
        ("assistant", "<think>a</think>B."),
        ("user", "C?"),
        ("assistant", "<think>c</think>D."),
    )

    assert found == [
        ("<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n<think>a</think>B.<|im_end|>\n",
         ["<think>a</think>B.<|im_end|>"]),
        ("<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
         "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n<think>c</think>D.<|im_end|>\n",
         ["<think>c</think>D.<|im_end|>"]),
    ]  # fmt: skip


def test_a_prompt_that_opens_a_thought_the_turn_does_not_have_is_no_part_of_it(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=R1)

    found = told(model, ("user", "A?"), ("assistant", "<b>"), ("user", "C?"), ("assistant", "D"))

    assert found == [
        (
            "<s><|im_start|>A?<|mid|><b><|im_end|><|im_start|>C?<|mid|>D<|im_end|>",
            ["<b><|im_end|>", "D<|im_end|>"],
        )
    ]


def test_a_template_without_prompts_marks_what_is_said(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=LLAMA2)

    (found,) = told(model, ("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D."))

    assert found[0] == "<s>[INST] A? [/INST] B. <|endoftext|><s>[INST] C? [/INST] D. <|endoftext|>"
    assert found[1] == [" B. <|endoftext|>", " D. <|endoftext|>"]


def test_without_a_template_turns_are_lines_and_responses_end_the_text(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")

    (found,) = told(model, ("user", "How?"), ("assistant", "Thus."), ("user", "Why?"), ("assistant", "So."))

    assert found[0] == "user: How?\nassistant: Thus.<|endoftext|>\nuser: Why?\nassistant: So.<|endoftext|>"
    assert found[1] == [" Thus.<|endoftext|>", " So.<|endoftext|>"]


words = st.text(st.sampled_from("ab Z.\n\t🙂é<>{}中"), min_size=0, max_size=12)


@config(max_examples=60)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3), name=st.sampled_from(sorted(TEMPLATES)),
       trims=st.booleans())  # fmt: skip
def test_every_response_is_marked_once_and_no_word_of_a_prompt_is(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]], name: str, trims: bool
) -> None:
    model = folder(tmp_path_factory.mktemp("p") / "m", template=TEMPLATES[name], begins=True, trims=trims)
    # Digits are of prompts, and letters that no prompt has are of responses.
    rows: list[Turn] = []
    for number, (asked, said) in enumerate(turns):
        rows += [("user", f"7{asked.strip()}7"), ("assistant", f"Q{number}x{said}yQ")]

    found = told(model, *rows)

    marked = [span for _, spans in found for span in spans]
    assert len(marked) == len(turns)
    for number, (span, (_, said)) in enumerate(zip(marked, turns, strict=True)):
        assert f"Q{number}x{said}yQ" in span and "7" not in span and span.count("Q") == 2
    assert sum(whole.count("Q") for whole, _ in found[-1:]) == 2 * len(turns)


# ── sets ──


def test_a_chat_that_is_too_long_is_cut_and_one_without_an_answer_left_out(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=QWEN25)
    long = [("system", "Hm."), ("user", "How?"), ("assistant", "so " * 100)]
    asked = [("user", "word " * 100), ("assistant", "No.")]
    data = chats(tmp_path / "a.jsonl", long, asked, [("user", "only")], *[
        [("user", f"Number {n}?"), ("assistant", f"It is {n}.")] for n in range(30)
    ])  # fmt: skip

    found = prepare(model, tmp_path / "out", data)

    assert found.warnings == (
        "2 of 33 conversations are longer than 64 tokens and were cut",
        "2 of 33 conversations have no response within 64 tokens and were left out",
    )
    both = [Examples.open(place) for place in (found.train, found.held_out)]
    assert sum(map(len, both)) == 31
    assert max(len(example.tokens) for side in both for example in side) == 64
    assert all(example.response[-1] and not example.response[0] for side in both for example in side)


def test_data_without_responses_are_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=QWEN25)
    data = chats(tmp_path / "a.jsonl", [("user", "a")], [("user", "b"), ("assistant", "x")])

    with pytest.raises(BadInput, match="the data have no response tokens: 2 of 2 conversations") as raised:
        prepare(model, tmp_path / "out", data, length=8)

    assert raised.value.hint is not None and "assistant" in raised.value.hint
    assert not (tmp_path / "out").exists()


def test_too_little_to_hold_out_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=QWEN25)
    data = chats(tmp_path / "a.jsonl", [("user", "b"), ("assistant", "x")])

    with pytest.raises(
        BadInput, match=r"1 documents, 0\.3 of them held out, give [01] held-out examples"
    ) as raised:
        prepare(model, tmp_path / "out", data)

    assert raised.value.hint == (
        "more documents (rows of jsonl; a text file is one), or a larger held_out in a recipe"
    )


def test_what_a_template_refuses_is_named_by_file_and_line(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=GEMMA)
    data = chats(
        tmp_path / "a.jsonl", [("user", "b"), ("assistant", "x")], [("assistant", "x"), ("user", "b")]
    )

    with pytest.raises(
        BadInput, match=r"a\.jsonl line 2: the chat template refuses this: roles must take turns"
    ):
        prepare(model, tmp_path / "out", data)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=QWEN25, rows=2049)
    data = chats(tmp_path / "a.jsonl", *[[("user", f"{n}"), ("assistant", f"{n}")] for n in range(30)])

    with pytest.raises(BadInput, match="gives the token 2049, and the model knows 2049"):
        prepare(model, tmp_path / "out", data)


def test_documents_stay_on_their_side_whatever_they_come_with_and_bytes_repeat(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", template=QWEN25)
    rows = [[("user", f"Number {n}?"), ("assistant", f"It is {n}.")] for n in range(60)]
    one = chats(tmp_path / "one.jsonl", *rows[:40])
    two = chats(tmp_path / "two.jsonl", *rows[30:])
    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"Line {n} of a text." for n in range(2000)), encoding="utf-8")

    forward = prepare(model, tmp_path / "f", one, two, text)
    backward = prepare(model, tmp_path / "b", text, two, one)
    first = prepare(model, tmp_path / "1", one)
    other = prepare(model, tmp_path / "2", one, two, text, seed=1)

    for side in ("train", "held-out"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "f" / side).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "b" / side).iterdir()}
    assert forward.sources == backward.sources and [source.documents for source in forward.sources] == [
        40,
        1,
        30,
    ]
    held, trained = texts(forward.held_out, model), texts(forward.train, model)
    assert not set(held) & set(trained)
    assert set(texts(first.held_out, model)) <= set(held)
    assert set(texts(first.train, model)) <= set(trained)
    assert set(texts(other.held_out, model)) == set(held)


def test_a_set_that_is_there_is_left_alone_and_another_one_replaced(tmp_path: Path) -> None:
    one = examples.write([([1, 2, 3], [False, True, True]), ([4, 5], [False, True])], tmp_path / "a")
    node = (tmp_path / "a" / "tokens.npy").stat().st_ino

    same = examples.write(((example.tokens, example.response) for example in one), tmp_path / "a")

    assert (tmp_path / "a" / "tokens.npy").stat().st_ino == node
    assert (same.digest, same.rows.tolist(), same.response_tokens) == (one.digest, [0, 2, 3], 3)
    assert (same[1].tokens.tolist(), same[1].response.tolist(), same[1].first_row) == (
        [4, 5],
        [False, True],
        2,
    )
    other = examples.write([([1, 2], [False, True])], tmp_path / "a", About(seed=3))
    assert (len(other), Examples.open(tmp_path / "a").about.seed) == (1, 3)
    assert other.digest != one.digest


@pytest.mark.parametrize("damage", ["about.json", "tokens.npy"])
def test_a_folder_that_is_no_set_is_named(tmp_path: Path, damage: str) -> None:
    examples.write([([1, 2], [False, True])], tmp_path / "a")
    (tmp_path / "a" / damage).unlink()

    with pytest.raises(BadInput, match="is no set of examples"):
        Examples.open(tmp_path / "a")


@pytest.mark.parametrize("example", [([], []), ([1], [True]), ([1, 2], [False])])
def test_what_is_no_example_is_not_written(tmp_path: Path, example: tuple[list[int], list[bool]]) -> None:
    with pytest.raises(ValueError, match="example 1 has"):
        examples.write([example], tmp_path / "a")


def texts(place: Path, model: Path) -> list[str]:
    return [decoded(example.tokens, model) for example in Examples.open(place)]


# ── plain text ──


@config(max_examples=80)
@given(size=st.integers(1, 300), length=st.integers(4, 40), begins=st.booleans(), ends=st.booleans())
def test_every_token_of_a_text_is_a_response_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, size: int, length: int, begins: bool, ends: bool
) -> None:
    model = folder(tmp_path_factory.mktemp("w") / "m", begins=begins)
    text = "".join(random.Random(size).choices("abcdefgh .\n", k=size))
    shape = form(model, length)
    whole = shape.tokenizer.encode(text, add_special_tokens=False).ids + ([shape.end] if ends else [])

    found = examples.windows(text, shape, ends=ends)

    assert [int(token) for tokens, marks in found for token in tokens[marks]] == (
        whole if begins else whole[1:]
    )
    assert all(len(tokens) <= length and not marks[0] and marks[-1] for tokens, marks in found)
    before = 0 if begins else 1
    for tokens, marks in found:
        context = [int(token) for token in tokens[~marks]]
        assert context == [shape.begin] * begins + whole[max(0, before - 1) : before]
        before += int(marks.sum())


@given(sizes=st.lists(st.integers(2, 20), min_size=1, max_size=40))
def test_packs_hold_every_piece_whole_and_leave_no_two_that_would_fit_in_one(sizes: list[int]) -> None:
    pieces = [
        (np.full(size, number, dtype=np.int32), np.arange(size) > 0) for number, size in enumerate(sizes)
    ]

    packed = examples.pack(pieces, 20)

    runs = [token for tokens, _ in packed for token in dict.fromkeys(tokens.tolist())]
    assert sorted(runs) == list(range(len(sizes)))
    assert sorted(np.concatenate([tokens for tokens, _ in packed]).tolist()) == sorted(
        np.concatenate([tokens for tokens, _ in pieces]).tolist()
    )
    assert sum(int(marks.sum()) for _, marks in packed) == sum(sizes) - len(sizes)
    filled = sorted(len(tokens) for tokens, _ in packed)
    assert filled[-1] <= 20 and (len(filled) < 2 or filled[0] + filled[1] > 20)


def test_one_long_text_is_split_by_passages_and_short_ones_are_packed(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", begins=True)
    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"Line {n} of a long text." for n in range(4000)), encoding="utf-8")
    short = tmp_path / "s.jsonl"
    short.write_text("\n".join(json.dumps({"text": f"Short {n}."}) for n in range(50)), encoding="utf-8")

    long = prepare(model, tmp_path / "long", text, held_out=0.2)
    shorts = prepare(model, tmp_path / "short", short, held_out=0.2)

    train, held = (
        set(re.findall(r"Line (\d+) of a long text\.", "\n".join(texts(side, model))))
        for side in (long.train, long.held_out)
    )
    assert not train & held and len(train | held) > 3000
    assert 0.1 < len(held) / len(train | held) < 0.3
    whole = [tokens for tokens in map(len, (e.tokens for e in Examples.open(long.train))) if tokens == 64]
    assert len(whole) > 0.9 * len(Examples.open(long.train))
    packed = texts(shorts.train, model)
    assert all(part.startswith("Short ") for row in packed for part in row.split("<s>")[1:])
    assert all(
        row.endswith("<|endoftext|>") and row.count("<|endoftext|>") == row.count("<s>") for row in packed
    )
    assert 1 < len(packed) < 25
    assert all(row.count("<s>") == 1 for row in texts(shorts.held_out, model))


def test_a_tokenizer_without_an_end_of_text_is_said(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    (model / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    short = tmp_path / "s.jsonl"
    short.write_text("\n".join(json.dumps({"text": f"Short {n}."}) for n in range(50)), encoding="utf-8")

    found = prepare(model, tmp_path / "out", short)

    assert found.warnings == (
        "the tokenizer names no end-of-text: nothing stands between the documents of an example",
    )


# ── tokenizers of two models ──


def changed(place: Path, **parts: object) -> Path:
    """The built-in tokenizer with parts of its JSON replaced."""
    place.mkdir()
    whole = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    for name, value in parts.items():
        at = whole["model"] if name in ("vocab", "merges", "byte_fallback") else whole
        at[name] = value
    (place / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    return place


def demo_model() -> dict[str, object]:
    model: dict[str, object] = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    return model


def added(at: int, text: str, **flags: bool) -> dict[str, object]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": at, "content": text, **plain, **flags}


END = added(0, "<|endoftext|>")


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"added_tokens": [END, added(2048, "<|extra|>")]},
        {"added_tokens": [{**END, "special": False}]},
        {
            "post_processor": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": False,
                "use_regex": True,
            }
        },
        {"merges": [" ".join(pair) for pair in demo_model()["merges"]]},  # type: ignore[attr-defined]  # as it is
    ],
    ids=["same", "more added", "hidden", "around", "written otherwise"],
)
def test_tokenizers_that_read_the_same_pass(tmp_path: Path, parts: dict[str, object]) -> None:
    examples.same_tokens(DEMO, changed(tmp_path / "other", **parts))
    examples.same_tokens(tmp_path / "other", DEMO)


MODEL = demo_model()
VOCAB: dict[str, int] = MODEL["vocab"]  # type: ignore[assignment]  # as it is
MERGES: list[list[str]] = MODEL["merges"]  # type: ignore[assignment]  # as it is
SWAPPED = {word: {2000: 2001, 2001: 2000}.get(at, at) for word, at in VOCAB.items()}


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"vocab": SWAPPED}, r"token 2000 is '.+' in one and '.+' in the other"),
        ({"merges": [*MERGES[:9], *MERGES[10:], MERGES[9]]}, r"merge 9 is \['.+', '.+'\] in one and"),
        ({"merges": MERGES[:-1]}, f"merge {len(MERGES) - 1} is .* in one and None in the other"),
        ({"normalizer": {"type": "NFC"}}, "the normalizer is null in one and .*NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre_tokenizer is .* in one and .*Whitespace"),
        ({"byte_fallback": True}, "the model is .* in one and"),
        (
            {"added_tokens": [added(0, "<|endoftext|>", lstrip=True)]},
            "added token '<|endoftext|>' is matched by other",
        ),
    ],
)
def test_the_first_difference_of_two_tokenizers_is_named(
    tmp_path: Path, parts: dict[str, object], named: str
) -> None:
    other = changed(tmp_path / "other", **parts)

    with pytest.raises(BadInput, match=named.replace("|", r"\|")) as raised:
        examples.same_tokens(DEMO, other)

    assert str(other) in raised.value.message


def test_an_added_token_that_is_another_one_in_the_student_is_named(tmp_path: Path) -> None:
    one = changed(tmp_path / "one", added_tokens=[END, added(2048, "<|a|>"), added(2049, "<|b|>")])
    two = changed(tmp_path / "two", added_tokens=[END, added(2048, "<|b|>"), added(2049, "<|c|>")])

    with pytest.raises(BadInput, match=r"token 2048 is '<\|a\|>' in one and '<\|b\|>' in the other"):
        examples.same_tokens(one, two)
