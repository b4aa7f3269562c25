"""Documents become exactly the values they say, or every problem is named at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import serde
from edgepack.errors import BadInput, NotFound
from edgepack.profile import DeviceProfile
from edgepack.units import MIB, Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    kind: Literal["disk"] = "disk"
    size: Bytes
    """Free bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    kind: Literal["card"] = "card"
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box
    of things."""

    name: str
    memory: Bytes
    colour: Literal["red", "green"] = "red"
    weight: float = 1.0
    ready: bool = False
    pair: tuple[int, str] = (0, "")
    words: tuple[str, ...] = ()
    scores: Mapping[str, float] | None = None
    store: Disk | Card | None = None
    inner: Box | None = None


def write(folder: Path, text: str) -> Path:
    path = folder / "box.yaml"
    path.write_text(text, encoding="utf-8")
    return path


texts = st.text(max_size=20)
boxes = st.builds(
    Box,
    name=texts,
    memory=st.integers(0, 2**50).map(Bytes),
    colour=st.sampled_from(["red", "green"]),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    ready=st.booleans(),
    pair=st.tuples(st.integers(), texts),
    words=st.lists(texts, max_size=3).map(tuple),
    scores=st.none() | st.dictionaries(texts, st.floats(0, 100), max_size=3),
    store=st.none()
    | st.builds(Disk, size=st.integers(0, 9).map(Bytes))
    | st.builds(Card, slot=st.integers(0, 9)),
    inner=st.none() | st.builds(Box, name=texts, memory=st.just(Bytes(1))),
)


@given(boxes)
def test_a_value_survives_json(box: Box) -> None:
    text = serde.to_json(box)

    again = serde.load(Box, json.loads(text), source="memory")

    assert again == box
    assert serde.to_json(again) == text


@given(boxes)
def test_a_value_survives_yaml(box: Box) -> None:
    data, _ = serde.parse_yaml(serde.to_yaml(box), source="memory")

    assert serde.load(Box, data, source="memory") == box


@given(boxes)
def test_sizes_written_for_people_are_read_back_exactly(box: Box) -> None:
    assert serde.load(Box, serde.dump(box, sizes_as_text=True), source="memory") == box


def test_sizes_for_people_are_whole_mebibytes_or_kibibytes() -> None:
    sizes = [serde.dump(Disk(size=Bytes(n)), sizes_as_text=True) for n in (7620 * MIB, 3072, 1000, 0)]

    assert [row["size"] for row in sizes if isinstance(row, dict)] == ["7620 MiB", "3 KiB", 1000, 0]


def test_json_is_sorted_and_ends_with_a_newline() -> None:
    text = serde.to_json({"b": (1,), "a": Path("x")})

    assert text == '{\n  "a": "x",\n  "b": [\n    1\n  ]\n}\n'


def test_all_problems_of_a_yaml_file_come_at_once_with_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name: 7\nmemroy: 8 GiB\ncolour: grean\nweight: true\nready: no\n"
        "words:\n  - a\n  - 3\ninner:\n  name: x\n",
    )

    with pytest.raises(BadInput) as caught:
        serde.load_yaml(Box, path)

    assert caught.value.message.splitlines() == [
        f"{path} has 8 problems:",
        "  line 1: name: 7 is not text",
        "  line 1: memory: is missing",
        "  line 2: memroy: unknown field; did you mean 'memory'?",
        "  line 3: colour: 'grean' is not one of red, green; did you mean 'green'?",
        "  line 4: weight: true is not a number",
        "  line 5: ready: 'no' is not true or false",
        "  line 8: words[1]: 3 is not text",
        "  line 9: inner.memory: is missing",
    ]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("memory", True, "true is not a size"),
        ("memory", 1.5, "1.5 is not a size"),
        ("memory", "8 gigs", "not a number with a unit"),
        ("pair", [True, "x"], "pair[0]: true is not a whole number"),
        ("pair", [1.0, "x"], "pair[0]: 1.0 is not a whole number"),
        ("pair", [1], "has 1 items instead of 2"),
        ("weight", float("nan"), "nan is not a finite number"),
        ("weight", 10**400, "is not a finite number"),
        ("words", "abc", "'abc' is not a list"),
        ("scores", {"a": "1"}, "scores.a: '1' is not a number"),
        ("name", None, "null is not text"),
        ("store", {"kind": "card", "size": 3}, "store.size: unknown field"),
    ],
)
def test_types_are_strict(field: str, value: object, said: str) -> None:
    document = {"name": "a", "memory": 1, field: value}

    with pytest.raises(BadInput) as caught:
        serde.load(Box, document, source="memory")

    assert said in caught.value.message


def test_sizes_may_be_written_with_units() -> None:
    box = serde.load(Box, {"name": "a", "memory": "7620 MiB"}, source="memory")

    assert box.memory == 7620 * MIB


def test_a_rule_judges_what_loaded_together_with_the_other_problems() -> None:
    def rule(loaded: Mapping[str, object]) -> list[tuple[serde.Place, str]]:
        return [(("memory",), "must not be 0")] if loaded.get("memory") == 0 else []

    with pytest.raises(BadInput) as caught:
        serde.load(Box, {"memory": 0}, source="memory", rule=rule)

    assert "name: is missing" in caught.value.message
    assert "memory: must not be 0" in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b\n", "line 2: name: is given twice, first on line 1"),
        ("a: &x [1]\nb: *x\n", "line 1: b: aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]\n", "2002:python/object/apply:os.system' is not"),
        ("a: [1,\n", "is not YAML: line"),
        ("? [1]\n: 2\n", "a field's name must be plain text"),
        ("- a\n", "a list is not a set of fields"),
        ("", "null is not a set of fields"),
        ("[" * 5000, "is n"),
    ],
)
def test_yaml_that_could_mean_harm_or_two_things_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)

    with pytest.raises(BadInput) as caught:
        serde.load_yaml(Box, path)

    assert said in caught.value.message


def test_an_alias_bomb_is_refused_without_growing(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]

    with pytest.raises(BadInput, match="aliases are not allowed"):
        serde.read_yaml(write(tmp_path, "\n".join(rows)))


def test_plain_words_follow_yaml_1_2() -> None:
    text = "a: no\nb: 12:30\nc: 010\nd: 1e3\ne: ~\nf: true\ng: '5'\nh: 2024-01-01\ni: -4\nj: .5\n"

    data, lines = serde.parse_yaml(text, source="memory")

    assert data == {
        "a": "no", "b": "12:30", "c": 10, "d": 1000.0, "e": None, "f": True,
        "g": "5", "h": "2024-01-01", "i": -4, "j": 0.5,
    }  # fmt: skip
    assert lines[("d",)] == 4


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', "{", "[" * 100_000])
def test_json_that_means_two_things_or_nothing_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(BadInput, match="JSON"):
        serde.read_json(path)


def test_a_missing_file_and_a_file_of_other_bytes_are_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"\xff\xfe")

    with pytest.raises(NotFound, match="does not exist"):
        serde.read_yaml(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="not UTF-8"):
        serde.read_yaml(other)
    with pytest.raises(BadInput, match="folder"):
        serde.read_json(tmp_path)


def test_a_schema_describes_fields_with_the_notes_under_them() -> None:
    schema = serde.json_schema(DeviceProfile)

    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    assert set(definitions) >= {"PowerMode", "Accelerator", "Reserves", "Software", "Match"}
    mode = definitions["PowerMode"]
    assert mode["additionalProperties"] is False
    assert mode["required"][:2] == ["name", "bandwidth_gbs"]
    assert "10^9 bytes per second" in mode["properties"]["bandwidth_gbs"]["description"]


@settings(deadline=None)  # the first call imports jsonschema
@given(boxes)
def test_documents_obey_their_schema(box: Box) -> None:
    import jsonschema

    schema = serde.json_schema(Box)

    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(serde.dump(box))
