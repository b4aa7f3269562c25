"""YAML and JSON to frozen values and back: strict, all problems at once, with line and "did you mean"."""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NewType, TypeVar, get_args, get_origin, is_typeddict

from edgepack.errors import BadInput, NotFound
from edgepack.units import KIB, MIB, Bytes, parse_bytes

T = TypeVar("T")
Place = tuple[str | int, ...]
"""Where a value stands in a document: field names and list positions from the top."""
Lines = Mapping[Place, int]
"""The line, counted from 1, on which the value at each place starts."""
Rule = Callable[[Mapping[str, object]], Iterable[tuple[Place, str]]]
"""Judges the top-level fields that loaded (all others are absent); yields (place, problem)."""

MAX_YAML_BYTES = 4 * 1024**2
_BAD = object()
_SAFE_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge", "value")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    place: Place
    text: str
    line: int | None


# ── values to documents ──────────────────────────────────────────────────────────────────────────────


def dump(value: object, *, sizes_as_text: bool = False) -> object:
    """A value as what JSON can say: dataclasses become dicts, tuples lists, paths text.

    With ``sizes_as_text``, for people, byte counts become "7620 MiB" where they are whole MiB or KiB. Raises
    TypeError for a value that no document can hold (a bug, not a user's mistake).
    """
    if is_dataclass(value) and not isinstance(value, type):
        kinds = _fields(type(value)) if sizes_as_text else {}
        result: dict[str, object] = {}
        for f in fields(value):
            item = getattr(value, f.name)
            if f.name in kinds and isinstance(item, int) and _is_size(kinds[f.name][0]):
                result[f.name] = _size_text(item)
            else:
                result[f.name] = dump(item, sizes_as_text=sizes_as_text)
        return result
    if isinstance(value, Mapping):
        return {str(key): dump(item, sizes_as_text=sizes_as_text) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [dump(item, sizes_as_text=sizes_as_text) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _is_size(kind: object) -> bool:
    return kind is Bytes or Bytes in get_args(kind)


def _size_text(count: int) -> str | int:
    for unit, scale in (("MiB", MIB), ("KiB", KIB)):
        if count > 0 and count % scale == 0:
            return f"{count // scale} {unit}"
    return count


def to_json(value: object) -> str:
    """Canonical text of a value: two spaces, sorted keys, a newline at the end; same value, same bytes."""
    return json.dumps(dump(value), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def to_yaml(value: object) -> str:
    """A value as YAML for people, fields in the order in which the dataclass names them."""
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # chosen at run time
        """Quotes text that this module would read as something else."""

    def text(dumper: Dumper, value: str) -> object:
        style = None if _scalar(value) is value else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    written: str = yaml.dump(
        dump(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100
    )
    return written


# ── documents to values ──────────────────────────────────────────────────────────────────────────────


def load(
    cls: type[T],
    data: object,
    *,
    source: str,
    lines: Lines | None = None,
    rule: Rule | None = None,
    hint: str | None = None,
) -> T:
    """``data`` (from JSON or ``read_yaml``) as a ``cls``, strictly: a bool is no int, an int no text.

    ``source`` names the document in messages; ``rule`` judges fields against each other. Raises BadInput
    that lists all problems, each with its dotted path and, where ``lines`` knows it, its line.
    """
    problems: list[Problem] = []
    reader = _Reader(lines or {}, problems)
    value = reader.dataclass_value(cls, data, (), rule)
    if problems or value is _BAD:
        raise BadInput(_listing(source, problems), hint=hint)
    return typing.cast(T, value)  # built by cls itself; the reader is untyped inside


def load_json(cls: type[T], path: Path) -> T:
    """A JSON file as a ``cls``. Raises NotFound, and BadInput with all problems of the file."""
    return load(cls, read_json(path), source=str(path))


def load_yaml(cls: type[T], path: Path, *, rule: Rule | None = None) -> T:
    """A YAML file as a ``cls``. Raises NotFound, and BadInput with all problems of the file."""
    data, lines = read_yaml(path)
    return load(cls, data, source=str(path), lines=lines, rule=rule)


def read_json(path: Path) -> object:
    """The document in a JSON file; duplicate keys, NaN and Infinity are refused."""
    try:
        return json.loads(_text(path), object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
    except (_Refused, RecursionError) as error:
        raise BadInput(f"{path} is not usable JSON: {error}") from error


def read_object(path: Path) -> dict[str, object]:
    """The fields of a JSON file that must hold an object; raises BadInput when it holds anything else."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise BadInput(f"{path} is not a set of fields")
    return document


def read_yaml(path: Path) -> tuple[object, Lines]:
    """The document in a YAML file and the line of each value.

    Plain scalars follow YAML 1.2's core schema (``no`` and ``12:30`` are text). Duplicate keys, aliases,
    tags and documents above 4 MiB are refused. Raises NotFound and BadInput.
    """
    return parse_yaml(_text(path), source=str(path))


def parse_yaml(text: str, *, source: str) -> tuple[object, Lines]:
    """Like ``read_yaml`` for text that was read already."""
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise BadInput(f"{source} has {len(text)} characters; the limit is {MAX_YAML_BYTES}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        root = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"{source} is not YAML: {where}{what}") from error
    except RecursionError as error:
        raise BadInput(f"{source} is nested too deeply") from error
    if root is None:
        return None, {}
    problems: list[Problem] = []
    lines: dict[Place, int] = {}
    data = _plain(root, (), lines, problems, set())
    if problems:
        raise BadInput(_listing(source, problems))
    return data, lines


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'memory'?"``, or nothing when no known word is near."""
    import difflib

    folded = {name.lower(): name for name in known}
    longer = [name for name in folded if len(word) > 2 and name.startswith(word.lower())]
    near = sorted(longer, key=len) or difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


class _Reader:
    """One pass over one document; problems are collected and never stop it."""

    def __init__(self, lines: Lines, problems: list[Problem]) -> None:
        self.lines = lines
        self.problems = problems

    def problem(self, place: Place, text: str) -> object:
        self.problems.append(Problem(place=place, text=text, line=self._line(place)))
        return _BAD

    def wrong(self, place: Place, data: object, wanted: str) -> object:
        return self.problem(place, f"{_show(data)} is not {wanted}")

    def _line(self, place: Place) -> int | None:
        while place not in self.lines and place:
            place = place[:-1]
        return self.lines.get(place)

    def value(self, kind: object, data: object, place: Place) -> object:
        if kind is Bytes:
            return self.size(data, place)
        if isinstance(kind, NewType):
            return self.value(kind.__supertype__, data, place)
        if kind is object or kind is typing.Any:
            return data
        if kind is None or kind is type(None):
            return None if data is None else self.wrong(place, data, "null")
        if kind in (bool, int, float, str):
            return self.scalar(kind, data, place)
        if kind is Path:
            return Path(data) if isinstance(data, str) else self.wrong(place, data, "a path")
        if is_dataclass(kind) and isinstance(kind, type):
            return self.dataclass_value(kind, data, place, None)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Literal:
            return self.choice(arguments, data, place)
        if origin in (typing.Union, types.UnionType):
            return self.union(arguments, data, place)
        if origin is tuple:
            return self.sequence(arguments, data, place)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self.mapping(arguments[1], data, place)
        if isinstance(origin, type) and issubclass(origin, Sequence):
            return self.sequence((arguments[0], ...), data, place)
        raise TypeError(f"serde does not know the type {kind!r} (at {_dotted(place)})")

    def size(self, data: object, place: Place) -> object:
        if isinstance(data, bool) or not isinstance(data, (int, str)):
            return self.wrong(place, data, "a size such as 7620 MiB")
        try:
            return parse_bytes(data)
        except BadInput as error:
            return self.problem(place, f"{error.message}; {error.hint}")

    def scalar(self, kind: object, data: object, place: Place) -> object:
        if kind is bool:
            return data if isinstance(data, bool) else self.wrong(place, data, "true or false")
        if kind is str:
            return data if isinstance(data, str) else self.wrong(place, data, "text")
        if kind is int:
            whole = isinstance(data, int) and not isinstance(data, bool)
            return data if whole else self.wrong(place, data, "a whole number")
        if isinstance(data, bool) or not isinstance(data, (int, float)):
            return self.wrong(place, data, "a number")
        try:
            number = float(data)
        except OverflowError:
            number = math.inf
        return number if math.isfinite(number) else self.wrong(place, data, "a finite number")

    def choice(self, allowed: tuple[object, ...], data: object, place: Place) -> object:
        for option in allowed:
            if data == option and type(data) is type(option):
                return option
        names = ", ".join(str(option) for option in allowed)
        near = did_you_mean(data, (str(option) for option in allowed)) if isinstance(data, str) else ""
        return self.problem(place, f"{_show(data)} is not one of {names}{near}")

    def union(self, kinds: tuple[object, ...], data: object, place: Place) -> object:
        if data is None:
            return None if type(None) in kinds else self.problem(place, "nothing is given")
        kinds = tuple(kind for kind in kinds if kind is not type(None))
        if len(kinds) == 1:
            return self.value(kinds[0], data, place)
        if isinstance(data, Mapping):
            records = [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
            if records:
                nearest = max(records, key=lambda kind: _overlap(kind, data))
                return self.dataclass_value(nearest, data, place, None)
        trials: list[list[Problem]] = []
        for kind in kinds:
            trial: list[Problem] = []
            value = _Reader(self.lines, trial).value(kind, data, place)
            if not trial:
                return value
            trials.append(trial)
        fewest: list[Problem] = min(trials, key=len)
        self.problems.extend(fewest)
        return _BAD

    def sequence(self, kinds: tuple[object, ...], data: object, place: Place) -> object:
        if not isinstance(data, (list, tuple)):
            return self.wrong(place, data, "a list")
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(data)
        elif len(kinds) != len(data):
            return self.problem(place, f"has {len(data)} items instead of {len(kinds)}")
        items = [
            self.value(kind, item, (*place, at))
            for at, (kind, item) in enumerate(zip(kinds, data, strict=True))
        ]
        return _BAD if any(item is _BAD for item in items) else tuple(items)

    def mapping(self, kind: object, data: object, place: Place) -> object:
        if not isinstance(data, Mapping):
            return self.wrong(place, data, "a set of named values")
        result: dict[str, object] = {}
        for key, item in data.items():
            if not isinstance(key, str):
                self.problem((*place, str(key)), f"the name {_show(key)} is not text; quote it")
                continue
            result[key] = self.value(kind, item, (*place, key))
        return _BAD if any(item is _BAD for item in result.values()) else result

    def dataclass_value(self, cls: type, data: object, place: Place, rule: Rule | None) -> object:
        if not isinstance(data, Mapping):
            return self.wrong(place, data, "a set of fields")
        before = len(self.problems)
        known = _fields(cls)
        for key in data:
            if key not in known:
                self.problem((*place, str(key)), f"unknown field{did_you_mean(str(key), known)}")
        values: dict[str, object] = {}
        for name, (kind, required) in known.items():
            if name in data:
                value = self.value(kind, data[name], (*place, name))
                if value is not _BAD:
                    values[name] = value
            elif required:
                self.problem((*place, name), "is missing")
        if rule is not None:
            for inner, text in rule(values):
                self.problem((*place, *inner), text)
        if len(self.problems) > before:
            return _BAD
        return cls(**values)


@cache
def _fields(cls: type) -> dict[str, tuple[object, bool]]:
    """Name -> (type, required) of a dataclass; evaluating the annotations is the slow part, so kept."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(cls)
        if f.init
    }


def _overlap(cls: type, data: Mapping[object, object]) -> tuple[int, int, int]:
    """How well a document fits a dataclass: its literals first, then shared names, then missing ones."""
    known = _fields(cls)
    common = sum(1 for key in data if key in known)
    constant = sum(
        1
        for name, (kind, _) in known.items()
        if get_origin(kind) is Literal and data.get(name) in get_args(kind)
    )
    missing = sum(1 for name, (_, required) in known.items() if required and name not in data)
    return constant, common, -missing


def _listing(source: str, problems: Sequence[Problem]) -> str:
    rows = []
    for problem in sorted(problems, key=lambda problem: problem.line or 0):
        line = f"line {problem.line}: " if problem.line is not None else ""
        where = f"{_dotted(problem.place)}: " if problem.place else ""
        rows.append(f"{line}{where}{problem.text}")
    if len(rows) == 1:
        return f"{source}: {rows[0]}"
    return "\n  ".join((f"{source} has {len(rows)} problems:", *rows))


def _dotted(place: Place) -> str:
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text


def _show(data: object) -> str:
    if isinstance(data, Mapping):
        return "a set of fields"
    if isinstance(data, (list, tuple)):
        return "a list"
    if data is None:
        return "null"
    if isinstance(data, bool):
        return "true" if data else "false"
    text = repr(data) if isinstance(data, str) else str(data)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist", hint="check the path") from error
    except IsADirectoryError as error:
        raise BadInput(f"{path} is a folder, not a file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


class _Refused(ValueError):
    """JSON that parses and yet is not one document with one meaning."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise _Refused(f"{key!r} is given twice")
        result[key] = value
    return result


def _no_constant(name: str) -> object:
    raise _Refused(f"{name} is not a JSON number")


# ── YAML nodes ───────────────────────────────────────────────────────────────────────────────────────

_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_WORDS: Mapping[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def _plain(
    node: typing.Any,  # yaml.Node; the stubs type its value loosely
    place: Place,
    lines: dict[Place, int],
    problems: list[Problem],
    seen: set[int],
) -> object:
    """A composed node as plain data. A node met twice was reached through an alias."""
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    if id(node) in seen:
        problems.append(Problem(place=place, text="aliases are not allowed; write the value out", line=line))
        return None
    seen.add(id(node))
    if node.tag not in _SAFE_TAGS:
        problems.append(Problem(place=place, text=f"the tag {node.tag!r} is not allowed", line=line))
        return None
    if node.id == "scalar":
        return node.value if node.style else _scalar(node.value)
    if node.id == "sequence":
        return [_plain(item, (*place, at), lines, problems, seen) for at, item in enumerate(node.value)]
    result: dict[str, object] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if key_node.id != "scalar" or id(key_node) in seen:
            problems.append(Problem(place=place, text="a field's name must be plain text", line=key_line))
            continue
        key = key_node.value
        inner = (*place, key)
        if key in result:
            text = f"is given twice, first on line {lines[inner]}"
            problems.append(Problem(place=inner, text=text, line=key_line))
            continue
        lines[inner] = key_line
        result[key] = _plain(value_node, inner, lines, problems, seen)
    return result


def _scalar(text: str) -> object:
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= 40:  # longer digits are no number anyone writes, and int() of them is slow
        if _INT.match(text):
            return int(text)
        if _FLOAT.match(text):
            return float(text)
    return text


# ── JSON Schema ──────────────────────────────────────────────────────────────────────────────────────


Also = Mapping[type, Mapping[str, object]]
"""What a writer adds to the fields of a class, wherever that stands in its document: name -> type."""


def json_schema(cls: type) -> dict[str, object]:
    """JSON Schema 2020-12 of what `load` takes as a dataclass, with its docstrings and field notes as descriptions."""
    return _Schemas(written=False, also={}).root(cls)


def written_schema(cls: type, also: Also | None = None) -> dict[str, object]:
    """JSON Schema 2020-12 of what `dump` makes of a dataclass, or of a TypedDict, which is written as it is.

    Stricter than what is read: no field is missing, sizes are whole numbers.
    """
    return _Schemas(written=True, also=also or {}).root(cls)


class _Schemas:
    """The schemas of one document's types; those of records inside it are shared by name."""

    def __init__(self, *, written: bool, also: Also) -> None:
        self._written = written
        self._also = also
        self._names: dict[type, str] = {}
        self._definitions: dict[str, dict[str, object]] = {}

    def root(self, cls: type) -> dict[str, object]:
        record = self._record(cls)
        schema: dict[str, object] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **record}
        if self._definitions:
            schema["$defs"] = {name: self._definitions[name] for name in sorted(self._definitions)}
        return schema

    def _record(self, cls: type) -> dict[str, object]:
        notes = _field_notes(cls)
        known = {
            **self._fields(cls),
            **{name: (kind, True) for name, kind in self._also.get(cls, {}).items()},
        }
        properties: dict[str, object] = {}
        for name, (kind, _) in known.items():
            schema = self.of(kind)
            properties[name] = {**schema, "description": notes[name]} if name in notes else schema
        record: dict[str, object] = {"title": cls.__name__, "type": "object", "properties": properties}
        doc = cls.__doc__ or ""
        if doc and not doc.startswith(f"{cls.__name__}("):  # dataclass writes that one itself
            record["description"] = " ".join(doc.split())
        required = [name for name, (_, needed) in known.items() if needed]
        if required:
            record["required"] = required
        record["additionalProperties"] = False
        return record

    def _fields(self, cls: type) -> Mapping[str, tuple[object, bool]]:
        if is_typeddict(cls):
            return {name: (kind, True) for name, kind in typing.get_type_hints(cls).items()}
        return {name: (kind, needed or self._written) for name, (kind, needed) in _fields(cls).items()}

    def of(self, kind: object) -> dict[str, object]:
        if kind is Bytes and not self._written:
            return {"type": ["integer", "string"], "pattern": r"^\s*\d+(\.\d+)?\s*([KMGT]i?B|B)?\s*$"}
        if isinstance(kind, NewType):
            return self.of(kind.__supertype__)
        simple = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
        if isinstance(kind, type) and kind in simple:
            return {"type": simple[kind]}
        if kind is None or kind is type(None):
            return {"type": "null"}
        if kind is object or kind is typing.Any:
            return {}
        if isinstance(kind, type) and (is_dataclass(kind) or is_typeddict(kind)):
            return {"$ref": f"#/$defs/{self._defined(kind)}"}
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (typing.Union, types.UnionType):
            return {"anyOf": [self.of(argument) for argument in arguments]}
        if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
            count = len(arguments)
            items = [self.of(argument) for argument in arguments]
            return {"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if isinstance(origin, type) and issubclass(origin, (tuple, Sequence)):
            return {"type": "array", "items": self.of(arguments[0])}
        raise TypeError(f"serde does not know the type {kind!r}")

    def _defined(self, cls: type) -> str:
        """The name of a record's definition; two classes of one name are told apart by their modules."""
        if cls not in self._names:
            taken = cls.__name__ in self._definitions
            name = f"{cls.__module__}.{cls.__name__}" if taken else cls.__name__
            self._names[cls] = name
            self._definitions[name] = {}  # taken, so that a type that holds itself ends
            self._definitions[name] = self._record(cls)
        return self._names[cls]


@cache
def _field_notes(cls: type) -> Mapping[str, str]:
    """The text under each field, from the source; a class without one (a REPL's) has no notes."""
    import ast
    import inspect
    import itertools
    import textwrap

    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    notes: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            note = following.value.value
            if isinstance(note, str):
                notes[statement.target.id] = " ".join(note.split())
    return notes
