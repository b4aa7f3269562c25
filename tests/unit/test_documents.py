"""Every JSON document obeys its published schema, and the schemas refuse what is no such document."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner

from edgepack import check, documents, fleet, serde
from edgepack.bundle import sign
from edgepack.cli import cli
from edgepack.errors import NothingFits
from tests import releases
from tests.documents import obeys, validator
from tests.plans import example_plan

TESTS = Path(__file__).parents[1]
CASES = TESTS / "cases" / "check"
CAPTURED = TESTS / "captures" / "jetson-orin-nano-8gb"
MODEL = ("--model", "qwen2.5-1.5b-instruct")
ORIN = ("--profile", "jetson-orin")


def said(*words: object, status: int = 0) -> str:
    """What a command with --json prints."""
    done = CliRunner().invoke(cli, ["-q", *map(str, words), "--json"])
    assert done.exit_code == status, done.output
    return done.stdout


def leaves(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for part, inner in command.commands.items():
        yield from leaves(inner, f"{name} {part}".strip())


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    sign.new_key(path)
    path.with_suffix(".signers").write_text(sign.allowed_signer(path))
    return path


@pytest.fixture(scope="module")
def bundle(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases.bundle(tmp_path_factory.mktemp("bundle") / "b.tar", key)


# ── the schemas ──


def test_every_command_with_json_has_a_schema() -> None:
    written = [by for document in documents.DOCUMENTS for by in document.written_by]
    spoken = {
        name for name, command in leaves(cli) if any("--json" in option.opts for option in command.params)
    }

    assert len(spoken) >= 16
    assert {by.split(" --")[0] for by in written if by.endswith(" --json")} == spoken


def test_every_schema_is_proved_by_a_document_in_some_test() -> None:
    texts = [path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")]

    proved = {name for text in texts for name in re.findall(r'obeys\(\s*"([a-z-]+)"', text)}

    assert proved == {document.name for document in documents.DOCUMENTS}


@pytest.mark.parametrize("name", [document.name for document in documents.DOCUMENTS])
def test_schemas_are_valid_have_an_id_and_forbid_what_they_do_not_name(name: str) -> None:
    schema = validator(name).schema

    assert schema["$id"] == f"urn:edgepack:schema:{name}:1"
    assert schema["title"] == documents.named(name).title
    records = [schema, *schema.get("$defs", {}).values()]
    for record in records:
        assert record["additionalProperties"] is False
        assert record.get("required", []) == list(record["properties"])


def test_a_description_comes_from_the_code() -> None:
    quality = validator("plan").schema["$defs"]["Quality"]["properties"]

    assert "what the scheme keeps" in quality["score"]["description"]


@pytest.mark.parametrize("name", ["plan", "fit", "profiles", "doctor"])
def test_a_schema_refuses_a_missing_a_foreign_and_a_wrong_field(name: str) -> None:
    words = {
        "plan": ("plan", *ORIN, *MODEL), "fit": ("fit", *ORIN, *MODEL), "profiles": ("profiles", "list"),
        "doctor": ("doctor", "--symptom", "killed"),
    }  # fmt: skip
    whole = json.loads(said(*words[name]))
    validator(name).validate(whole)

    for place, key in places(whole):
        missing, foreign, wrong = (copy.deepcopy(whole) for _ in range(3))
        del at(missing, place)[key]
        at(foreign, place)["surprise"] = 1
        at(wrong, place)[key] = {"not": ["what", "it", "is"]}
        for bad in (missing, foreign, wrong):
            with pytest.raises(jsonschema.ValidationError):
                validator(name).validate(bad)


def places(document: dict[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    """Each field of the document, and the first field of the first record in each of its lists."""
    found: list[tuple[tuple[str | int, ...], str]] = [((), key) for key in document]
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found.append(((key, 0), next(iter(value[0]))))
    return found


def at(document: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        document = document[step]
    return document


def test_an_unknown_schema_names_a_near_one() -> None:
    done = CliRunner().invoke(cli, ["schema", "chekc"])

    assert done.exit_code == 3
    assert "did you mean 'check'?" in done.output


def test_the_command_prints_the_list_and_each_schema() -> None:
    listed = obeys("schemas", said("schema"))
    plain = CliRunner().invoke(cli, ["schema"]).stdout

    names = [row["name"] for row in listed["schemas"]]
    assert names == [document.name for document in documents.DOCUMENTS]
    assert all(re.search(rf"^{name} ", plain, re.M) for name in names)
    printed = json.loads(CliRunner().invoke(cli, ["schema", "check"]).stdout)
    assert printed == validator("check").schema


# ── the documents ──


@pytest.mark.parametrize(
    "words",
    [
        (*ORIN, *MODEL, "--scheme", "Q4_K_M"),
        ("--profile", "laptop-gpu", *MODEL, "--runtime", "vllm", "--scheme", "gptq-int4-g128"),
        ("--profile", "raspberry-pi-5-4gb", "--model", "qwen2.5-7b-instruct", "--scheme", "Q8_0"),
        (*MODEL, "--scheme", "Q8_0"),
    ],
)
def test_fit(words: tuple[str, ...]) -> None:
    refused = "raspberry-pi-5-4gb" in words
    found = obeys("fit", said("fit", *words, status=NothingFits.exit_code if refused else 0))

    assert (found["fits"] is False) is refused


def test_a_report(tmp_path: Path) -> None:
    """Without other contexts: whole, with its sweep, is held in test_report.py to the figures."""
    plan = tmp_path / "plan.json"
    plan.write_text(said("plan", *ORIN, *MODEL, "--explain"), encoding="utf-8")
    done = CliRunner().invoke(cli, ["-q", "report", str(plan), "--format", "json"])

    assert done.exit_code == 0, done.output
    assert obeys("report", done.stdout)["subjects"]


@pytest.mark.parametrize("more", [(), ("--pareto",), ("--goal", "throughput", "--slots", 4)])
def test_plan(more: tuple[object, ...], tmp_path: Path) -> None:
    planned = said("plan", *ORIN, *more, "-o", tmp_path / "plan.json")

    obeys("plan", planned)
    assert obeys("plan", (tmp_path / "plan.json").read_bytes()) == json.loads(planned)


def test_plan_explained() -> None:
    found = obeys("plan-explained", said("plan", *ORIN, "--explain"))

    assert found["explanation"]["why"]


def test_a_plan_for_a_student_that_is_to_be_made() -> None:
    words = (
        "--profile",
        "raspberry-pi-5-4gb",
        "--teacher",
        "demo",
        "--distill",
        "--min-tokens-per-second",
        0,
    )

    found = obeys("plan", said("plan", *words))

    assert found["model"]["lesson"] is not None


def test_a_dry_build_prints_its_plan() -> None:
    obeys("plan", said("build", *ORIN, "--model", "demo", "--dry-run"))


def test_profiles_and_this_machine() -> None:
    obeys("profiles", said("profiles", "list"))
    obeys("profile", said("profiles", "show", "jetson-orin"))
    obeys("probe", said("probe", "--root", CAPTURED))


def test_toolchain() -> None:
    obeys("toolchain", said("toolchain", "status"))


def test_calibrate(tmp_path: Path) -> None:
    rows = [
        {"device": "Raspberry Pi 5", "model": name, "quant": "Q4_K_M", "decode_tps": speed}
        for name, speed in (("Llama-3.2-3B", 4.88), ("llama-3.1-8b", 2.17), ("Nope", 1.0))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    found = obeys("calibrate", said("calibrate", "--profile", "raspberry-pi-5-8gb", tmp_path / "rows.jsonl"))

    assert len(found["residuals"]) == 2
    assert len(found["refused"]) == 1


@pytest.mark.parametrize("case", sorted(CASES.glob("*.facts.json")), ids=lambda path: path.name)
def test_check(case: Path, tmp_path: Path) -> None:
    report = check.evaluate(
        example_plan(releases.PROFILE), check.facts_from(serde.read_json(case), source=case.name)
    )
    told = json.dumps(check.to_document(report))
    (tmp_path / "report.json").write_text(told, encoding="utf-8")

    obeys("check", told)
    obeys("doctor", said("doctor", tmp_path / "report.json"))


def test_inspect(bundle: Path, key: Path) -> None:
    unknown = obeys("inspect", said("inspect", bundle))
    known = obeys("inspect", said("inspect", bundle, "--allowed-signers", key.with_suffix(".signers")))

    assert (unknown["signature"]["state"], known["signature"]["state"]) == ("unenrolled", "verified")


def test_a_device_from_enrolling_to_rolling_back(bundle: Path, key: Path, tmp_path: Path) -> None:
    store = f"{tmp_path}/store"
    again = releases.bundle(tmp_path / "again.tar", key, sequence=2)
    how = ("--force", "--no-self-test")

    obeys("flash-status", said("flash", "--enroll", "--signers", key.with_suffix(".signers"), store))
    planned = obeys("flash", said("flash", bundle, store, "--dry-run", *how))
    first = obeys("flash", said("flash", bundle, store, *how))
    second = obeys("flash", said("flash", again, store, *how))
    status = obeys("flash-status", said("flash", "--status", store))
    whole = obeys("flash-fsck", said("flash", "--fsck", store))
    back = obeys("flash-rollback", said("flash", "--rollback", store))

    assert [planned["outcome"], first["outcome"], second["outcome"]] == ["planned", "good", "good"]
    assert len(status["store"]["releases"]) == 2 and status["journal"]
    assert (whole["bad"], whole["sent"]) == ([], 0)
    assert back["current"] == first["release"]


def test_emit(bundle: Path, key: Path, tmp_path: Path) -> None:
    signers = ("--signers", key.with_suffix(".signers"))

    obeys("emit", said("emit", "--ansible", bundle, *signers, "-o", tmp_path / "fleet"))
    obeys("emit", said("emit", "--signature", bundle, "-o", tmp_path / "signature"))


def test_a_fleet_with_a_check_of_one_host_and_none_of_another() -> None:
    facts = check.facts_from(serde.read_json(CASES / "qwen2.5-0.5b-q8_0.facts.json"), source="facts")
    report = check.evaluate(example_plan(releases.PROFILE), facts)
    row = fleet.HostReport(bundle="b.tar", release="0" * 64, outcome="good", passed=True)
    done = fleet.FleetReport(
        hosts={"a": row, "b": row}, documents={"a": {"report": check.to_document(report)}, "b": {}}
    )

    found = obeys("flash-fleet", json.dumps(fleet.to_document(done)))

    assert found["hosts"]["a"]["report"]["verdict"] == report.verdict
    assert found["hosts"]["b"]["report"] is None
