"""Whatever the device: `plan --profile P --json` answers, in sorted JSON, with what fits by its upper end."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgepack import profile, serde
from edgepack.cli import cli
from edgepack.plan import Plan

NAMES = profile.names()
DOCS = Path(__file__).parents[2] / "docs"


def sorted_object(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    names = [name for name, _ in pairs]
    assert names == sorted(names)
    return dict(pairs)


def test_all_28_devices_and_the_one_under_windows_are_listed_by_name() -> None:
    listed = json.loads(CliRunner().invoke(cli, ["profiles", "list", "--json"]).stdout)["profiles"]

    assert [row["name"] for row in listed] == sorted(NAMES)
    assert len([name for name in NAMES if not name.endswith("-wsl")]) == 28


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_for_it_is_sorted_json_and_fits_by_its_upper_end(name: str) -> None:
    done = CliRunner().invoke(cli, ["plan", "--profile", name, "--json"])

    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout, object_pairs_hook=sorted_object)
    assert document["profile"]["name"] == name
    chosen = serde.load(Plan, document, source=name)
    room = profile.budget(profile.load(name))
    if room.unified:
        assert chosen.memory.high < room.device
    else:
        assert chosen.memory.at("device") < room.device
        assert chosen.memory.at("host") < room.host
    assert chosen.speed.decode_full_low >= 5
    assert {(o.model, o.scheme, o.kv_type) for o in chosen.rejected}.isdisjoint(
        {(chosen.model.id, chosen.scheme, chosen.settings.kv_type)}
    )


def test_the_table_of_choices_in_the_docs_is_todays(update_golden: bool) -> None:
    """A change of what is chosen is read as a diff before it lands."""
    page = DOCS / "choosing.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split("<!-- choices: python scripts/choices.py -->\n")
    shown, after = rest.split("<!-- end of choices -->\n")

    today = runpy.run_path(str(DOCS.parent / "scripts" / "choices.py"))["table"]()

    if update_golden:
        page.write_text(
            f"{before}<!-- choices: python scripts/choices.py -->\n{today}<!-- end of choices -->\n{after}",
            encoding="utf-8",
        )
    else:
        assert shown == today
