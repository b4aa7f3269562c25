"""Tokens and marks of a conversation next to those that transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from edgepack.builders.distill import examples
from edgepack.calibration.chat import ChatTemplate
from tests.unit.test_examples import GEMMA, LLAMA3, QWEN3, QWEN25, TWO_TURNS, folder, messages

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("template", "begins"), [(QWEN25, False), (LLAMA3, True), (LLAMA3, False), (GEMMA, True), (QWEN3, False)]
)
def test_tokens_are_those_that_transformers_gives_a_chat(tmp_path: Path, template: str, begins: bool) -> None:
    model = folder(tmp_path / "m", template=template, begins=begins)
    theirs = PreTrainedTokenizerFast.from_pretrained(model)

    tokens, _ = examples.conversation(messages(*TWO_TURNS), examples.form(model, 512))[-1]

    assert tokens.tolist() == theirs.apply_chat_template(messages(*TWO_TURNS), return_dict=False)


def test_marks_are_those_of_a_template_that_says_what_is_generated(tmp_path: Path) -> None:
    said = QWEN25.replace(
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
    )
    model = folder(tmp_path / "m", template=said)
    theirs = PreTrainedTokenizerFast.from_pretrained(model).apply_chat_template(
        messages(*TWO_TURNS), return_dict=True, return_assistant_tokens_mask=True
    )

    ((tokens, marks),) = examples.conversation(messages(*TWO_TURNS), examples.form(model, 512))

    assert ChatTemplate(source=said, tokens={}).write(messages(*TWO_TURNS)).count("<|im_end|>") == 5
    assert tokens.tolist() == theirs["input_ids"]
    assert marks.astype(int).tolist() == theirs["assistant_masks"] and marks.any()
