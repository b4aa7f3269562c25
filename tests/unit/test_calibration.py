"""Calibration data: every format and every problem, drawn by a seed, packed into windows, told from other texts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import calibration, heldout, modelspec, serde
from edgepack.calibration import Calibration, Sampling, chat, scripts
from edgepack.calibration.chat import ChatTemplate
from edgepack.calibration.encoder import Encoder, encoder
from edgepack.errors import BadInput, EdgepackError, NotFound

DEMO = Path(calibration.__file__).parents[1] / "models" / "demo"

CHATML = ChatTemplate(
    source=(
        "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    tokens={"bos_token": "<s>", "eos_token": "<|im_end|>"},
)

WORDS = [f"word{number}" for number in range(5000)]


def rows(path: Path, *given_rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given_rows), encoding="utf-8")
    return path


def prose(words: int, *, seed: int = 0) -> str:
    """Lines of ten random words."""
    chosen = random.Random(seed).choices(WORDS, k=words)
    return "\n".join(" ".join(chosen[i : i + 10]) for i in range(0, words, 10))


def by_word(*, begin: int | None = None, end: int | None = None) -> Encoder:
    """A tokenizer with a token per word."""

    def encode(text: str) -> list[int]:
        return [10 + WORDS.index(word) for word in text.split()]

    return Encoder(encode=encode, begin=begin, end=end, vocabulary=6000)


def read(*files: Path, windows: int = 8, length: int = 16, seed: int = 0) -> Calibration:
    sampling = Sampling(windows=windows, length=length, seed=seed)
    return calibration.read(files, template=CHATML, sampling=sampling)


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────


def test_every_shape_of_row_becomes_the_same_conversation_in_the_models_template(tmp_path: Path) -> None:
    rendered = "<|im_start|>user\nHow?\n\nSo.<|im_end|>\n<|im_start|>assistant\nThus.<|im_end|>\n"
    shapes: Sequence[object] = (
        {"messages": [{"role": "user", "content": "How?\n\nSo."}, {"role": "assistant", "content": "Thus."}]},
        {"conversations": [{"from": "human", "value": "How?\n\nSo."}, {"from": "gpt", "value": "Thus."}]},
        {"instruction": "How?", "input": "So.", "output": "Thus."},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "How?\n\nSo."}]},
                      {"role": "assistant", "content": "Thus."}]},
        {"text": rendered},
    )  # fmt: skip

    for number, row in enumerate(shapes):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([row]), encoding="utf-8")

        assert [p.rstrip() for p in read(path).passages] == [rendered.rstrip()], row


def test_a_text_file_of_any_name_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_bytes("\ufeff# Größe\r\n\r\nÄpfel\r\n".encode())

    data = read(path)

    assert data.passages == ("# Größe\n\nÄpfel",)
    assert [(source.name, source.documents) for source in data.sources] == [("notes.md", 1)]


def test_without_a_template_turns_are_written_plainly_and_said_so(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", {"instruction": "How?", "output": "Thus."})

    data = calibration.read((path,), template=None)

    assert data.passages == ("user: How?\nassistant: Thus.",)
    assert data.warnings == (
        "the model has no chat template: the turns of a chat are written as 'role: content'",
    )


def test_all_problems_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "model.bin").write_bytes(b"GGUF\0\0")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "list.json").write_text('{"text": "a"}')
    (tmp_path / "cut.json").write_text('[{"text": "a"},\n')
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    lines = [
        '{"text": "good"}',
        '{"text": "cut',
        '["a"]',
        '{"prompt": "a", "completion": "b"}',
        '{"text": 3}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        '{"conversations": [{"from": "narrator", "value": "x"}]}',
        '{"text": "half \\ud83d"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    names = ("empty.txt", "model.bin", "latin.txt", "list.json", "cut.json", "none.jsonl", "rows.jsonl")

    with pytest.raises(BadInput) as raised:
        read(*(tmp_path / name for name in names))

    assert raised.value.message.replace(f"{tmp_path}/", "").splitlines() == [
        "empty.txt is empty",
        "model.bin is binary: byte 4 is 0",
        "latin.txt is not UTF-8 text: byte 3 is 0xe9",
        "list.json is not a list of rows",
        "cut.json is not JSON: Expecting value at line 2 column 1",
        "none.jsonl has no row with text in it",
        "rows.jsonl line 2 is not JSON: Unterminated string starting at at column 10",
        "rows.jsonl line 3: is not a set of fields",
        "rows.jsonl line 4: has none of the known keys; its keys: 'completion', 'prompt'",
        "rows.jsonl line 5: 'text' is int, not text",
        "rows.jsonl line 6: 'messages' is not a list of turns",
        "rows.jsonl line 7: turn 1 of 'messages' is not {'role': …, 'content': …}",
        "rows.jsonl line 8: 'content' has a part of type 'image'; only text is used",
        "rows.jsonl line 9: turn 1 is from 'narrator', not from one of "
        "human, user, gpt, chatgpt, assistant, system, tool",
        "rows.jsonl line 10: 'text' has half of a character (an escape of D800 to DFFF)",
    ]
    assert raised.value.hint is not None and "jsonl" in raised.value.hint


def test_many_problems_are_counted(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", *({"prompt": "x"} for _ in range(30)))

    with pytest.raises(BadInput) as raised:
        read(path)

    assert raised.value.message.splitlines()[-1] == "and 10 more"


def test_a_file_that_memory_would_not_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate(3 * 1024**3)

    with pytest.raises(BadInput, match=r"a\.jsonl has 3\.00 GiB; the limit is 1\.00 GiB"):
        read(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no data file .*a\.txt, .*b\.txt"):
        read(tmp_path / "a.txt", tmp_path / "b.txt")


@given(st.binary(max_size=200), st.sampled_from([".txt", ".json", ".jsonl"]))
@settings(max_examples=100)
def test_no_file_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, raw: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(raw)

    try:
        data = read(path)
    except EdgepackError as error:
        assert str(path) in error.message
    else:
        assert data.characters > 0


# ── chat templates ───────────────────────────────────────────────────────────────────────────────────


def test_a_begin_of_text_token_is_left_to_the_tokenizer() -> None:
    assert CHATML.render([{"role": "user", "content": "a <s> b"}]) == "<|im_start|>user\na <s> b<|im_end|>\n"


def test_templates_find_the_helpers_that_they_are_written_for() -> None:
    source = (
        "{%- for message in messages %}{%- if loop.index0 > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ message | tojson }}{% endgeneration %}\n{%- endfor %} {{ strftime_now('%d %b %Y') }}"
        "{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ tools is none }}"
    )
    template = ChatTemplate(source=source, tokens={})

    said = template.render([{"role": "user", "content": "<é>"}] * 3)

    assert said == '{"role": "user", "content": "<é>"}' * 2 + " 26 Jul 20242True"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this: roles must alternate"),
        ("{% for x in %}", "damaged: line 1"),
        ("{{ messages[7]['content'] + 'x' }}", "refuses this"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this"),
        ("{{ messages.append(1) }}", "refuses this"),
        ("{{ 1 + 'a' }}", "refuses this"),
    ],
)
def test_what_a_template_refuses_is_named_with_its_line(source: str, reason: str, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", {"text": "fine"}, {"instruction": "a", "output": "b"})

    with pytest.raises(BadInput, match=rf"a\.jsonl line 2: the chat template (is )?{re.escape(reason)}"):
        calibration.read((path,), template=ChatTemplate(source=source, tokens={}))


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"chat_template": "X", "bos_token": "<s>"}},
        {"tokenizer_config.json": {"chat_template": "Y", "bos_token": {"content": "<s>"}}, "chat_template.jinja": "X"},
        {"tokenizer_config.json": {
            "chat_template": [{"name": "tool_use", "template": "Y"}, {"name": "default", "template": "X"}],
            "bos_token": "<s>",
        }},
    ],
    ids=["text", "file of its own", "list"],
)  # fmt: skip
def test_a_folder_s_template_is_found(files: dict[str, object], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    assert chat.template(tmp_path) == ChatTemplate(source="X", tokens={"bos_token": "<s>"})


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert chat.template(tmp_path) is None
    assert chat.template(DEMO) is None

    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(BadInput, match=r"tokenizer_config\.json is not JSON"):
        chat.template(tmp_path)


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_seed_draws_the_same_and_another_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(4000))

    one, again, other = read(path, seed=1), read(path, seed=1), read(path, seed=2)

    assert one == again
    assert one.sha256 != other.sha256
    windows = [calibration.windows(data, by_word()).ids for data in (one, again, other)]
    assert (windows[0] == windows[1]).all()
    assert not (windows[0] == windows[2]).all()


def test_the_order_of_files_and_rows_changes_nothing(tmp_path: Path) -> None:
    texts = [{"text": f"word{number} word{number}"} for number in range(40)]
    a, b = rows(tmp_path / "a.jsonl", *texts[:20]), rows(tmp_path / "b.jsonl", *texts[20:])
    c = rows(tmp_path / "c.jsonl", *reversed(texts))

    assert read(a, b).sha256 == read(b, a).sha256 == read(c).sha256


@pytest.mark.parametrize("other", [{"windows": 9}, {"length": 17}, {"seed": 1}])
def test_the_digest_is_of_text_and_settings(other: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one line")

    assert read(path).sha256 != read(path, **other).sha256


def test_the_record_goes_to_json_and_back_and_says_nothing_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(2000))
    kept = calibration.record(read(path))

    text = serde.to_json(kept)

    assert serde.load(calibration.Record, json.loads(text), source="record") == kept
    assert "word" not in text


def test_large_data_are_drawn_from_all_over_and_stay_small(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [f"line {number} " + "x" * 90 for number in range(20_000)]
    path.write_text("\n".join(lines))

    data = read(path, windows=64, length=64)

    assert 16 * 64 * 64 <= data.characters < 17 * 64 * 64
    numbers = sorted(int(passage.split()[1]) for passage in data.passages)
    assert numbers[0] < 2000 and numbers[-1] > 18_000
    assert all(passage.startswith("line ") for passage in data.passages)


def test_a_text_without_line_ends_is_cut_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("天" * 1000)

    data = read(path)

    assert "".join(data.passages) == "天" * 1000
    assert max(map(len, data.passages)) <= 2 * 4 * 16


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────


def test_windows_fit_the_model_s_context_and_are_more_for_wide_layers(tmp_path: Path) -> None:
    spec = modelspec.read(DEMO)
    wide = [
        replace(t, shape=(20_000, *t.shape[1:])) if t.name == "blk.0.ffn_down.weight" else t
        for t in spec.tensors
    ]
    (tmp_path / "a.txt").write_text(prose(2000))

    def sampled(like: modelspec.ModelSpec, sampling: Sampling | None = None) -> Sampling:
        return calibration.of(DEMO, like, (tmp_path / "a.txt",), sampling=sampling).sampling

    assert sampled(spec) == Sampling(windows=128, length=512)
    assert sampled(replace(spec, context_train=256)) == Sampling(windows=128, length=256)
    assert sampled(replace(spec, tensors=tuple(wide))) == Sampling(windows=157, length=512)
    assert sampled(replace(spec, tensors=tuple(wide)), Sampling(windows=4)) == Sampling(windows=4)


def test_windows_are_packed_with_what_the_tokenizer_puts_around_texts(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", {"text": "word1 word2 word3"}, {"text": "word4 word5 word6 word7"})
    data = read(path, windows=3, length=5)
    first, second = ([int(word[4:]) + 10 for word in passage.split()] for passage in data.passages)

    plain = calibration.windows(replace(data, sampling=Sampling(windows=1, length=7)), by_word())
    marked = calibration.windows(data, by_word(begin=1, end=2))

    assert plain.ids.tolist() == [first + second]
    stream = [*first, 2, 1, *second, 2, 1]
    assert marked.ids.tolist() == [[1, *stream[:4]], [1, *stream[4:8]]]
    assert marked.ids.dtype == np.int32


def test_windows_are_written_as_the_ids_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(200))
    found = calibration.windows(read(tmp_path / "a.txt"), by_word())

    calibration.save(found, tmp_path / "windows.npy")

    back = np.load(tmp_path / "windows.npy", allow_pickle=False)
    assert back.dtype == np.int32 and (back == found.ids).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "windows.npy"]


def test_no_token_is_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(WORDS))

    found = calibration.windows(read(path, windows=100, length=40), by_word())

    assert found.ids.shape == (100, 40)
    assert np.unique(found.ids).size == found.ids.size


def test_too_little_is_said_with_figures(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(100))

    few = calibration.windows(read(path, windows=128, length=16), by_word())
    for_its_layers = calibration.windows(read(path, windows=6, length=16), by_word(), columns=64)

    assert few.ids.shape == (6, 16)
    assert few.warnings == ("the calibration data give 96 tokens, and 2048 were asked for",)
    assert [re.findall(r"\d+", warning)[:2] for warning in for_its_layers.warnings] == [["96", "64"]]
    assert calibration.windows(read(path, windows=6, length=16), by_word(), columns=8).warnings == ()


def test_less_than_a_window_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word1 word2")

    with pytest.raises(BadInput, match="are 2 tokens, less than one window of 16"):
        calibration.windows(read(path), by_word())
    with pytest.raises(BadInput, match="0 windows"):
        read(path, windows=0)


def test_the_built_in_text_fills_the_default_and_is_no_heldout_text() -> None:
    spec = modelspec.read(DEMO)
    data = calibration.of(DEMO, spec, ())

    found = calibration.windows(data, encoder(DEMO), columns=calibration.widest(spec))
    shared = heldout.shared(heldout.read().content, calibration.record(data).fingerprints)

    assert data.builtin and data.warnings == () and found.warnings == ()
    assert found.ids.shape == (128, 512)
    assert found.ids.min() >= 0 and found.ids.max() < 2048
    assert shared == 0
    assert {"Latin", "Han", "Cyrillic", "Kana"} <= set(scripts.found("".join(data.passages)))


def test_a_tokenizer_that_does_not_know_the_text_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("什么是量化？量化是把模型的权重换成更少位数的整数。\n" * 100)

    found = calibration.windows(calibration.of(DEMO, modelspec.read(DEMO), (path,)), encoder(DEMO))

    assert any("100% of the calibration data have fewer than 2 bytes per token" in w for w in found.warnings)


def test_a_tokenizer_that_adds_a_token_says_so(tmp_path: Path) -> None:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))

    made = encoder(tmp_path)

    assert (made.begin, made.end) == (0, None)
    assert (encoder(DEMO).begin, encoder(DEMO).end) == (None, 0)
    assert made.encode("a<|endoftext|>")[-1] == 0
    assert 0 not in made.encode("a")


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        encoder(tmp_path)

    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(BadInput, match="is no tokenizer"):
        encoder(tmp_path)


# ── languages ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("card", "codes"),
    [
        ("---\nlanguage:\n- en\n- zh\nlicense: mit\n---\n# A", ("en", "zh")),
        ("---\nlanguage: [EN, fr]\n---\n", ("en", "fr")),
        ("---\nlanguage: no\n---\n", ("no",)),
        ("---\nlicense: mit\n---\n", ()),
        ("---\nlanguage: [en\n---\n", ()),
        ("# no front matter", ()),
    ],
)
def test_the_card_says_the_languages(card: str, codes: tuple[str, ...], tmp_path: Path) -> None:
    assert scripts.languages(tmp_path) == ()
    (tmp_path / "README.md").write_text(card)

    assert scripts.languages(tmp_path) == codes


@pytest.mark.parametrize(
    ("text", "codes", "warns"),
    [
        ("Hello there, world", ("en",), False),
        ("Hello there, world", ("zh",), True),
        ("你好世界 hello", ("en",), False),
        ("你好世界，今天天气很好 hi", ("en",), True),
        ("你好世界，今天天气很好 hi", ("en", "zh"), False),
        ("今日はいい天気です", ("ja",), False),
        ("안녕하세요 여러분", ("ko",), False),
        ("Привет, мир", ("en", "de"), True),
        ("Привет, мир", ("ru",), False),
        ("नमस्ते दुनिया", ("hi",), False),
        ("مرحبا بالعالم", ("en",), True),
        ("Привет, мир", ("multilingual",), False),
        ("Привет, мир", (), False),
        ("1234 --- 567", ("zh",), False),
    ],
)
def test_data_in_other_letters_than_the_model_s_are_noticed(
    text: str, codes: tuple[str, ...], warns: bool
) -> None:
    assert bool(scripts.mismatch(text, codes)) == warns


def test_the_warning_says_which_letters() -> None:
    (warning,) = scripts.mismatch("Привет, мир ok", ("en",))

    assert warning == (
        "the calibration data are 82% Cyrillic, and the model's card says en: 18% of the letters are Latin"
    )
