"""Calibration data against the libraries whose ways they must be in: transformers' templates and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgepack import calibration, modelspec
from edgepack.calibration import Sampling, chat
from edgepack.calibration.encoder import encoder

pytestmark = pytest.mark.integration

DEMO = Path(calibration.__file__).parents[1] / "models" / "demo"

TEMPLATES = {
    "turns, with a date and a default system prompt": """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = 'You help.' %}
{%- endif %}
{%- if strftime_now is not defined %}{{ raise_exception('no clock') }}{% endif %}
{{- '<|system|>' + system + eos_token }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}{% continue %}{% endif %}
    {{- '<|' ~ message['role'] ~ '|>' }}
{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}
{%- endfor %}
""",
    "blocks with trimmed lines and JSON": """\
  {% for message in messages %}
    {# a comment #}
  {{ message | tojson(indent=2) }}
  {% if loop.last %}
end
  {% else %}
--
  {% endif %}
  {% endfor %}
""",
}
CONVERSATION = [
    {"role": "system", "content": " Be <brief> & kind.\n"},
    {"role": "user", "content": "Größe? 你好 'x' \"y\" \\n"},
    {"role": "assistant", "content": "  two\n\nlines "},
    {"role": "tool", "content": "3"},
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_conversation_reads_as_transformers_writes_it(name: str, count: int, model: Path) -> None:
    from transformers import AutoTokenizer

    (model / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    theirs = tokenizer.apply_chat_template(CONVERSATION[:count], tokenize=False)

    template = chat.template(model)

    assert template is not None
    assert template.render(CONVERSATION[:count]) == theirs.removeprefix(tokenizer.bos_token)


def test_windows_hold_the_tokens_that_transformers_reads(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text[:1500]}), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)

    data = calibration.of(
        model, modelspec.read(model), (tmp_path / "a.jsonl",), sampling=Sampling(windows=1, length=256)
    )
    found = calibration.windows(data, encoder(model))

    (passage,) = data.passages
    assert found.ids.tolist() == [tokenizer(passage)["input_ids"][:256]]
