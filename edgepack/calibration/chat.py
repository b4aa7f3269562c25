"""A model's chat template, run as Hugging Face does it, in a sandbox and always with the same result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgepack import ggufheader
from edgepack.errors import BadInput

Message = Mapping[str, str]
"""{"role": …, "content": …}"""

TODAY = date(2024, 7, 26)
"""What templates that write the date are told: the same bytes every day. It is the date that Llama 3.2's own template
falls back to."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A Jinja template and the special tokens that it may name."""

    source: str
    tokens: Mapping[str, str]
    """bos_token, eos_token and their like: name to text."""

    def render(self, messages: Sequence[Message]) -> str:
        """``write`` without a begin-of-text token in front: the tokenizer adds that."""
        return self.write(messages).removeprefix(self.tokens.get("bos_token", ""))

    def write(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The conversation as text, all of it; ``prompt``: up to where the model speaks next.

        Raises BadInput with the template's own words for what it refuses, such as roles that do not take turns.
        """
        try:
            return _compiled(self.source).render(
                messages=[dict(message) for message in messages], tools=None, documents=None,
                add_generation_prompt=prompt, **self.tokens,
            )  # fmt: skip
        except TemplateSyntaxError as error:
            raise BadInput(f"the chat template is damaged: line {error.lineno}: {error.message}") from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise BadInput(f"the chat template refuses this: {error}") from error


PLAIN = ChatTemplate(
    source="{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    tokens={},
)
"""Lines "role: content", for a model without a template; with an eos_token the model's turns end with it."""


def template(model: Path) -> ChatTemplate | None:
    """The template of a Hugging Face folder (chat_template.jinja, else tokenizer_config.json) or of a GGUF.

    None when there is none. Raises BadInput for a damaged tokenizer_config.json.
    """
    if model.is_file():
        source = ggufheader.parse(model).values.get("tokenizer.chat_template")
        if not isinstance(source, str) or not source:
            return None
        return ChatTemplate(source=source, tokens=gguf_tokens(model))
    settings = tokenizer_settings(model)
    tokens = special_tokens(settings)
    beside = model / "chat_template.jinja"
    if beside.is_file():
        return ChatTemplate(source=beside.read_text(encoding="utf-8"), tokens=tokens)
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {row.get("name"): row.get("template") for row in found if isinstance(row, dict)}
        found = named.get("default")
    return ChatTemplate(source=found, tokens=tokens) if isinstance(found, str) and found else None


def tokenizer_settings(folder: Path) -> Mapping[str, object]:
    """tokenizer_config.json; empty without one."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise BadInput(f"{path} is not a set of fields")
    return settings


def special_tokens(settings: Mapping[str, object]) -> Mapping[str, str]:
    """The tokens that tokenizer_config.json names, as text: each is a text or a row with "content"."""
    found = {}
    for name in _SPECIAL:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def gguf_tokens(path: Path) -> Mapping[str, str]:
    """The bos_token and eos_token of a GGUF, as text."""
    values = ggufheader.parse(path).values
    table = values.get("tokenizer.ggml.tokens")
    if not isinstance(table, ggufheader.Array) or table.kind != "str":
        return {}
    known = ggufheader.texts(path, table)
    found = {}
    for name in ("bos", "eos"):
        number = values.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(number, int) and 0 <= number < len(known):
            found[f"{name}_token"] = known[number]
    return found


class _Generation(Extension):
    """``{% generation %}`` marks what the model says, for training; here it is its content only."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as a class variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compiled(source: str) -> Template:
    """Trimming, extensions and helpers are those of transformers' chat_template_utils.py."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(source)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: object) -> str:
    """Unlike Jinja's own it leaves HTML characters alone."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # type: ignore[arg-type]  # as given


def _raise(message: str) -> str:
    raise TemplateError(message)
