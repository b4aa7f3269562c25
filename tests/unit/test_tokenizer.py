"""Tokenizers become GGUF keys exactly, or are refused with what is not known about them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import random_model
import stories260k_to_hf

from edgepack.builders import tokenizer
from edgepack.errors import BadInput, Unsupported

VOCAB = 320
STORIES = Path(__file__).parents[1] / "data" / "stories260K" / "tok512.bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model.write_tokenizer(tmp_path, VOCAB)
    return tmp_path


def keys(folder: Path, vocab: int = VOCAB, config: dict[str, object] | None = None) -> dict[str, Any]:
    return {entry.key: entry.value for entry in tokenizer.entries(folder, config or {}, vocab)}


def change(folder: Path, how: Callable[[Any], None], name: str = "tokenizer.json") -> None:
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8"))
    how(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_byte_level_bpe_keeps_ids_types_and_merges(folder: Path) -> None:
    found = keys(folder)

    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.ggml.tokens"][65] == "A"
    assert found["tokenizer.ggml.tokens"][32] == "Ġ"
    assert found["tokenizer.ggml.tokens"][-3:] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert found["tokenizer.ggml.token_type"] == [tokenizer.NORMAL] * (VOCAB - 3) + [tokenizer.CONTROL] * 3
    assert found["tokenizer.ggml.merges"][0] == "Ġ e"
    assert len(found["tokenizer.ggml.merges"]) == VOCAB - 256 - 3
    assert found["tokenizer.ggml.eos_token_id"] == VOCAB - 3
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_rows_that_no_token_names_become_unused_padding(folder: Path) -> None:
    found = keys(folder, VOCAB + 2)

    assert found["tokenizer.ggml.tokens"][-2:] == [f"[PAD{VOCAB}]", f"[PAD{VOCAB + 1}]"]
    assert found["tokenizer.ggml.token_type"][-2:] == [tokenizer.UNUSED] * 2


def test_tokens_beyond_the_embeddings_are_refused_but_added_ones_left_out(folder: Path) -> None:
    assert keys(folder, VOCAB - 1)["tokenizer.ggml.tokens"][-1] == "<|im_start|>"
    with pytest.raises(BadInput, match=f"the model {VOCAB - 4} embeddings"):
        keys(folder, VOCAB - 4)


def test_added_tokens_that_are_not_special_are_user_defined(folder: Path) -> None:
    change(folder, lambda t: t["added_tokens"][1].update(special=False))

    assert keys(folder)["tokenizer.ggml.token_type"][-2] == tokenizer.USER_DEFINED


def test_merges_may_be_pairs(folder: Path) -> None:
    text = keys(folder)["tokenizer.ggml.merges"]
    change(folder, lambda t: t["model"].update(merges=[m.split(" ") for m in t["model"]["merges"]]))

    assert keys(folder)["tokenizer.ggml.merges"] == text


def test_the_post_processor_says_whether_bos_is_added(folder: Path) -> None:
    special = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [special, {"Sequence": {"id": "A"}}], "pair": []}
    change(folder, lambda t: t.update(post_processor={"type": "Sequence", "processors": [template]}))
    change(folder, lambda t: t.update(bos_token="<|endoftext|>"), "tokenizer_config.json")

    found = keys(folder)

    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)


def test_the_chat_template_is_taken_from_its_file_first(folder: Path) -> None:
    change(folder, lambda t: t.update(chat_template="old"), "tokenizer_config.json")
    assert keys(folder)["tokenizer.chat_template"] == "old"
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "listed"}]
    change(folder, lambda t: t.update(chat_template=listed), "tokenizer_config.json")
    assert keys(folder)["tokenizer.chat_template"] == "listed"
    (folder / "chat_template.jinja").write_text("{{ new }}")

    assert keys(folder)["tokenizer.chat_template"] == "{{ new }}"


def split(regex: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize(("known", "name"), tokenizer.PRE_BY_REGEX.items())
def test_every_known_regex_has_its_name(known: tuple[str, bool], name: str, folder: Path) -> None:
    regex, ignore_merges = known
    change(folder, lambda t: t["model"].update(ignore_merges=ignore_merges))
    steps = {"type": "Sequence", "pretokenizers": [split(regex), _LEVEL]}
    change(folder, lambda t: t.update(pre_tokenizer=steps))

    assert keys(folder)["tokenizer.ggml.pre"] == name


_UNKNOWN: list[tuple[str, Callable[[Any], None]]] = [
    (
        "pre_tokenizer",
        lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split("x+"), _LEVEL]}),
    ),
    (
        "pre_tokenizer",
        lambda t: t.update(pre_tokenizer={**_LEVEL, "use_regex": True, "add_prefix_space": True}),
    ),
    ("pre_tokenizer", lambda t: t.update(pre_tokenizer=None)),
    ("ignore_merges True", lambda t: t["model"].update(ignore_merges=True)),
    ("normalizer Lowercase", lambda t: t.update(normalizer={"type": "Lowercase"})),
    ("type 'WordPiece'", lambda t: t["model"].update(type="WordPiece")),
    ("type 'Unigram'", lambda t: t.update(model={"type": "Unigram", "vocab": [["a", 0.0]]})),
]


@pytest.mark.parametrize(("message", "how"), _UNKNOWN)
def test_what_llama_cpp_has_no_equal_of_is_refused(
    message: str, how: Callable[[Any], None], folder: Path
) -> None:
    change(folder, how)

    with pytest.raises(Unsupported, match=message):
        keys(folder)


_DAMAGED: list[tuple[str, Callable[[Any], None]]] = [
    ("the id -1", lambda t: t["model"]["vocab"].update(A=-1)),
    ("the id 'x'", lambda t: t["model"]["vocab"].update(A="x")),
    ("no model.vocab", lambda t: t["model"].update(vocab={})),
    ("the merge", lambda t: t["model"].update(merges=["a b c"])),
    ("the added token", lambda t: t["added_tokens"][0].update(id="x")),
    ("damaged pre_tokenizer", lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 3})),
    ("the same token 'A'", lambda t: t["added_tokens"][0].update(content="A")),
]


@pytest.mark.parametrize(("message", "how"), _DAMAGED)
def test_a_damaged_tokenizer_is_refused(message: str, how: Callable[[Any], None], folder: Path) -> None:
    change(folder, how)

    with pytest.raises(BadInput, match=message):
        keys(folder)


def test_no_tokenizer_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokenizer\.json and no tokenizer\.model"):
        keys(tmp_path)


# ── SentencePiece ──


def stories(folder: Path) -> Path:
    pieces = list(stories260k_to_hf.read_tokens(STORIES, 512))
    path = folder / "tokenizer.model"
    path.write_bytes(stories260k_to_hf.sentencepiece_model(pieces))
    return path


def test_a_sentencepiece_model_is_read_as_sentencepiece_reads_it(tmp_path: Path) -> None:
    import sentencepiece

    path = stories(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

    pieces = tokenizer.read_sentencepiece(path)

    count = processor.get_piece_size()
    assert pieces.texts == tuple(processor.id_to_piece(i) for i in range(count))
    assert pieces.scores == tuple(processor.get_score(i) for i in range(count))
    assert pieces.ids == {"unk": 0, "bos": 1, "eos": 2}
    assert pieces.space_prefix
    assert list(pieces.types[:5]) == [
        tokenizer.UNKNOWN, tokenizer.CONTROL, tokenizer.CONTROL, tokenizer.BYTE, tokenizer.BYTE,
    ]  # fmt: skip


def test_its_keys_carry_scores_and_bos(tmp_path: Path) -> None:
    stories(tmp_path)

    found = keys(tmp_path, 520)

    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert len(found["tokenizer.ggml.scores"]) == 520
    assert found["tokenizer.ggml.tokens"][519] == "[PAD519]"


def test_added_tokens_come_on_top(tmp_path: Path) -> None:
    stories(tmp_path)
    added = {"512": {"content": "<|user|>", "special": True}, "513": {"content": "▁▁", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))

    found = keys(tmp_path, 514)

    assert found["tokenizer.ggml.tokens"][512:] == ["<|user|>", "  "]
    assert found["tokenizer.ggml.token_type"][512:] == [tokenizer.CONTROL, tokenizer.USER_DEFINED]


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x0a\x03\x0a\x01a" + b"\x12\x02\x18\x01")

    with pytest.raises(Unsupported, match="unigram"):
        tokenizer.read_sentencepiece(path)


@example(cut=0, byte=146, at=123)  # a score that says it is a string
@given(cut=st.integers(0, 7900), byte=st.integers(0, 255), at=st.integers(0, 7900))
def test_damage_is_refused_or_read_but_never_crashes(
    cut: int, byte: int, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = stories(tmp_path_factory.mktemp("spm"))
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data[: len(data) - cut])

    try:
        tokenizer.read_sentencepiece(path)
    except (BadInput, Unsupported):
        return
