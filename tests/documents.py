"""JSON that edgepack wrote, held against the schemas that it publishes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema

from edgepack import documents


@cache
def validator(name: str) -> Any:
    """A validator of the published schema of this name, which is itself a valid one."""
    schema = documents.schema(documents.named(name))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def obeys(name: str, written: str | bytes) -> Any:
    """The document in a text, which the schema ``name`` must allow."""
    document = json.loads(written)
    validator(name).validate(document)
    return document
