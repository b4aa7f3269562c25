"""Whatever the device: `plan --profile P --json` answers, in sorted JSON, with what fits by its upper end."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from click.testing import CliRunner

from edgepack import profile, serde
from edgepack.cli import cli
from edgepack.plan import Plan

NAMES = profile.names()


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
