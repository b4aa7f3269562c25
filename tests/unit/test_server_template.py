"""Chat templates: what they find, what they may do, where they are read from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgepack.server.template import ChatTemplate, TemplateRefused, read, render

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\n"
    "You are a helper.<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "<b> {{ 1 }} é"}]


def rendered(template: str | None) -> str:
    return render(template, HELLO, bos="<s>", eos="</s>")


def test_a_template_gets_the_messages_as_they_are() -> None:
    text = rendered(CHATML)

    assert text == (
        "<|im_start|>system\nYou are a helper.<|im_end|>\n<|im_start|>user\n<b> {{ 1 }} é<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_system_message_is_kept() -> None:
    text = render(CHATML, [{"role": "system", "content": "Be brief."}, *HELLO], bos="", eos="")

    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_a_model_without_a_template_gets_one_line_a_message() -> None:
    assert rendered(None) == "<s>user: <b> {{ 1 }} é\nassistant:"


def test_templates_find_what_transformers_gives_them() -> None:
    template = (
        "{{ bos_token }}{{ messages[0] | tojson }}{% generation %}{{ eos_token }}{% endgeneration %}"
        "{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}"
        "{{ tools is none }}{{ strftime_now('%Y') }}"
    )

    text = rendered(template)

    assert re.fullmatch(r'<s>\{"role": "user", "content": "<b> \{\{ 1 \}\} é"\}</s>1True\d{4}', text)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}",
            "4194304 characters",
        ),
        ("{% if %}", "Expected"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at_all }}", "undefined"),
    ],
)
def test_what_a_template_must_not_do_is_refused(template: str, why: str) -> None:
    with pytest.raises(TemplateRefused, match=why):
        rendered(template)


def test_a_file_of_its_own_is_preferred_to_the_tokenizers_configuration(tmp_path: Path) -> None:
    config = {"chat_template": "old", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    before = read(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("new", encoding="utf-8")
    after = read(tmp_path)

    assert before == ChatTemplate(source="old", bos="<s>", eos="</s>")
    assert after == ChatTemplate(source="new", bos="<s>", eos="</s>")


def test_of_several_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}), encoding="utf-8")

    assert read(tmp_path).source == "b"


def test_a_folder_that_says_nothing_has_no_template(tmp_path: Path) -> None:
    assert read(tmp_path) == ChatTemplate(source=None, bos="", eos="")


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}', encoding="utf-8")

    with pytest.raises(ValueError, match="neither text nor a list"):
        read(tmp_path)
