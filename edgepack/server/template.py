"""A model's chat template: where it is found, and its text for a conversation, rendered in jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

PLAIN = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
"""For a model without a template: one line a message, "role: content", and "assistant:" for the answer."""

LONGEST = 1 << 22
"""Characters that a template may write; far more than any slot holds."""


class TemplateRefused(Exception):
    """The template does not accept this conversation, or is itself at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """What a model's folder says about chats. ``source`` is None where it says nothing."""

    source: str | None
    bos: str
    eos: str


def render(template: str | None, messages: Sequence[Mapping[str, str]], *, bos: str, eos: str) -> str:
    """The text of a conversation up to where the assistant answers; PLAIN where there is no template.

    The text holds its own beginning-of-sequence token, so it is tokenized without adding one. Templates find
    what transformers gives them (transformers/utils/chat_template_utils.py): raise_exception, strftime_now,
    tojson, loop controls and the generation block. Raises TemplateRefused.
    """
    try:
        parts = _compiled(PLAIN if template is None else template).generate(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            bos_token=bos,
            eos_token=eos,
            tools=None,
            documents=None,
        )
        text, length = [], 0
        for part in parts:
            length += len(part)
            if length > LONGEST:
                raise TemplateRefused(f"the chat template wrote more than {LONGEST} characters")
            text.append(part)
        return "".join(text)
    except TemplateRefused:
        raise
    # A template is a program of the model's makers: it can fail in any way, and none of them is the server's.
    except Exception as error:
        raise TemplateRefused(f"the chat template refuses this conversation: {error}") from error


def read(folder: Path) -> ChatTemplate:
    """The chat template and special tokens of a model's folder.

    chat_template.jinja is preferred to "chat_template" in tokenizer_config.json, of which a list means the one
    named "default" (as transformers reads them). Raises OSError and ValueError for files that cannot be read.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    own = folder / "chat_template.jinja"
    if own.is_file():
        source: object = own.read_text(encoding="utf-8")
    else:
        source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{path}: chat_template is neither text nor a list with one named default")
    return ChatTemplate(
        source=source, bos=_token(config.get("bos_token")), eos=_token(config.get("eos_token"))
    )


def _token(value: object) -> str:
    """The text of a special token, written as a string or as an object with "content"; "" where there is none."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


class _Generation(Extension):
    """The block that marks an assistant's words for training: here its content and nothing more."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON that is not made safe for HTML, unlike jinja2's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
