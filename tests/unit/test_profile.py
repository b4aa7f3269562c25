"""Profiles: what ships leaves the budgets it promises, and a bad file is explained whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import pytest

from edgepack import profile, serde
from edgepack.errors import BadInput, NotFound
from edgepack.profile import DeviceProfile, budget
from edgepack.units import MIB, Bytes, show

CASES = Path(__file__).parent.parent / "cases" / "profiles.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    aliases: tuple[str, ...]
    headless: int
    desktop: int
    host_headless: int | None = None
    """System memory beside a card of its own; None where both are one pool."""
    host_desktop: int | None = None
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    facts: str
    why: str


def cases() -> list[Case]:
    data, _ = serde.read_yaml(CASES)
    assert isinstance(data, list)
    return [serde.load(Case, row, source=CASES.name) for row in data]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_built_in_profile_leaves_the_budget_it_was_written_for(case: Case) -> None:
    loaded = profile.load(case.name)

    assert loaded.name == case.name
    assert loaded.aliases == case.aliases
    assert budget(loaded, "headless").device == case.headless * MIB, case.why
    assert budget(loaded, "desktop").device == case.desktop * MIB, case.why
    host = (case.host_headless or case.headless, case.host_desktop or case.desktop)
    assert (budget(loaded, "headless").host, budget(loaded, "desktop").host) == (host[0] * MIB, host[1] * MIB)
    assert {name: loaded.mode(name).bandwidth_gbs for name in case.bandwidth} == case.bandwidth


def test_every_built_in_profile_has_a_case_and_every_alias_one_profile() -> None:
    aliases = [alias for name in profile.names() for alias in profile.load(name).aliases]

    assert sorted(case.name for case in cases()) == list(profile.names())
    assert len(set(aliases)) == len(aliases)
    assert not set(aliases) & set(profile.names())
    for alias in aliases:
        assert alias in profile.load(alias).aliases


@pytest.mark.parametrize("name", profile.names())
def test_a_built_in_profile_survives_json_and_says_where_its_numbers_come_from(name: str) -> None:
    loaded = profile.load(name)
    text = (profile.folder() / f"{name}.yaml").read_text(encoding="utf-8")

    assert serde.load(DeviceProfile, json.loads(serde.to_json(loaded)), source=name) == loaded
    said = "a profile names the image that its compose file runs, unless it is for planning only"
    assert bool(loaded.software.images) == loaded.deployable, said
    assert text.startswith("#") and text.count("#") >= 3


def test_what_no_bundle_can_serve_is_for_planning_only() -> None:
    for_planning = {name for name in profile.names() if not profile.load(name).deployable}

    assert for_planning == {
        "android-snapdragon-8-elite",
        "android-snapdragon-8-gen-3",
        "jetson-xavier-nx",
        "mac-mini-m4",
        "rk3588",
        "steam-deck",
    }
    for name in set(profile.names()) - for_planning:
        assert profile.load(name).backend in ("cuda", "cpu"), "check knows no other server"


@pytest.mark.parametrize("name", profile.names())
def test_the_terms_of_a_budget_add_up_to_it(name: str) -> None:
    loaded = profile.load(name)

    for session in get_args(profile.Session):
        left = budget(loaded, session)
        assert sum(value for _, value in left.arithmetic) == left.device
        assert sum(value for _, value in left.host_arithmetic) == left.host
        assert left.unified == loaded.unified
        assert left.host == left.device or not left.unified


def test_a_budget_without_its_terms_says_what_it_is() -> None:
    left = budget(profile.load("jetson-orin-nano-8gb"))

    assert left.equation("device").startswith(f"{show(left.device)} = 7.43 GiB ")
    assert left.equation("device").count(" - ") == 3
    assert replace(left, arithmetic=()).equation("device") == show(left.device)


def test_a_mode_with_constants_of_its_own_overrides_the_profiles() -> None:
    orin = profile.load("jetson-agx-orin-64gb")

    slow, fast = orin.constants("30W"), orin.constants("MAXN")

    assert slow is not None and fast is not None
    assert (slow.prefill_tflops, fast.prefill_tflops) == (8.229, 12.83)
    assert orin.constants("15W") is None  # nobody's reading: the class's law
    assert orin.constants() == slow  # 30W is the factory's default


def test_an_unknown_name_lists_what_there_is_and_the_nearest() -> None:
    with pytest.raises(NotFound) as caught:
        profile.load("jetson-orn")

    assert "did you mean 'jetson-orin'?" in caught.value.message
    assert "raspberry-pi-5-4gb" in (caught.value.hint or "")


def test_five_mistakes_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    good = (profile.folder() / "raspberry-pi-5-8gb.yaml").read_text(encoding="utf-8")
    bad = (
        good.replace("memory: 8050 MiB", "memroy: 8050 MiB", 1)
        .replace("arch: aarch64", "arch: arm64")
        .replace("cpu_cores: 4 ", "cpu_cores: true ")
        .replace("bandwidth_gbs: 17.1", "bandwidth_gbs: fast")
        .replace("default_mode: default", "default_mode: default\ndisk: 32 GigaBytes")
    )
    path = write(tmp_path, "pi", bad)
    starts = {text.split(":")[0].strip(" -"): at for at, text in enumerate(bad.splitlines(), 1)}

    with pytest.raises(BadInput) as caught:
        profile.load(str(path))

    rows = caught.value.message.splitlines()
    assert rows[0] == f"{path} has 6 problems:"
    assert f"  line {starts['memroy']}: memroy: unknown field; did you mean 'memory'?" in rows
    assert any("memory: is missing" in row for row in rows)
    assert f"  line {starts['arch']}: arch: 'arm64' is not one of x86_64, aarch64" in "\n".join(rows)
    assert f"  line {starts['cpu_cores']}: cpu_cores: true is not a whole number" in rows
    assert f"  line {starts['bandwidth_gbs']}: power_modes[0].bandwidth_gbs: 'fast' is not a number" in rows
    assert any(row.startswith(f"  line {starts['disk']}: disk: size '32 GigaBytes'") for row in rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("default_mode: turbo", "default_mode: 'turbo' is not one of default"),
        ("unified: false", "unified: is true for a device of class cpu"),
        ("device_class: jetson", "accelerator: is missing; a device of class jetson has one"),
        ("accelerator: {name: x, backend: cuda}", "accelerator: a device of class cpu has none"),
        ("power_modes: []", "power_modes: is empty"),
        ("power_modes: [{name: a, bandwidth_gbs: 0}]", "bandwidth_gbs: 0.0 is not a bandwidth"),
        ("cpu_cores: 0", "cpu_cores: 0 is not a number of cores"),
        (
            "memory: 1 GiB",
            "reserves: take 1.42 GiB, all the 1.00 GiB of memory the system reports, headless",
        ),
        ("reserves: {os_desktop: 9 GiB}", "of memory the system reports, desktop"),
        ("name: My Pi", "name: 'My Pi' must be lower-case"),
        ("uncertain: [reserves.saftey]", "uncertain[0]: 'reserves.saftey' is not a field"),
        ("speed: {decode_efficiency: 1.4, layer_overhead_us: 1}", "1.4 is not above 0 and at most 1"),
        (
            "speed: {decode_efficiency: 0.4, layer_overhead_us: 1, prefill_tflops: 0}",
            "speed.prefill_tflops: 0.0 is not a rate",
        ),
        (
            "speed: {decode_efficiency: 0.4, layer_overhead_us: 1, readings: -1}",
            "speed.readings: -1 is below 0",
        ),
        (
            "power_modes: [{name: default, bandwidth_gbs: 9, fp32_tflops: -1}]",
            "power_modes[0].fp32_tflops: -1.0 is not a rate",
        ),
        ("software: {images: [{runtime: a, reference: r.io/b}]}", "'r.io/b' has no tag"),
        ("software: {images: [{runtime: a, reference: 'r.io/b:latest'}]}", "the tag 'latest' moves"),
        ("software: {images: [{runtime: a, reference: 'r/b:1', digest: sha256:1}]}", "is neither sha256:"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, change: str, said: str) -> None:
    text = change if change.startswith("name:") else f"name: mine\n{change}"

    with pytest.raises(BadInput) as caught:
        profile.load(str(write(tmp_path, "mine", f"extends: raspberry-pi-5-8gb\n{text}\n")))

    assert said in caught.value.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("memory: 1 GiB", "of memory the system reports, headless"),
        ("reserves: {display_desktop: 9 GiB}", "of memory the card reports, desktop"),
        ("reserves: {os_desktop: 40 GiB}", "of memory the system reports, desktop"),
    ],
)
def test_reserves_leave_something_of_either_memory_in_either_session(
    tmp_path: Path, change: str, said: str
) -> None:
    with pytest.raises(BadInput) as caught:
        profile.load(str(write(tmp_path, "mine", f"extends: rtx-4060-8gb\nname: mine\n{change}\n")))

    assert said in caught.value.message


def test_extends_merges_fields_replaces_lists_and_drops_aliases(tmp_path: Path) -> None:
    write(tmp_path, "base", "extends: jetson-orin\nname: base\nreserves: {safety: 1 GiB}\naliases: [b]\n")
    path = write(tmp_path, "mine", "extends: base.yaml\nname: mine\nsoftware: {l4t: ['36', '39']}\n")

    mine = profile.load(str(path))

    orin = profile.load("jetson-orin")
    assert mine.reserves == replace(orin.reserves, safety=Bytes(1024 * MIB))
    assert mine.software == replace(orin.software, l4t=("36", "39"))
    assert mine.aliases == ()
    assert mine.uncertain == orin.uncertain


def test_extends_that_goes_in_a_circle_or_nowhere_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path, "one", "extends: two.yaml\nname: one\n")
    write(tmp_path, "two", "extends: one.yaml\nname: two\n")
    lost = write(tmp_path, "lost", "extends: raspberri-pi-5-8gb\nname: lost\n")

    with pytest.raises(BadInput, match=r"extends itself through one[.]yaml -> two[.]yaml -> one[.]yaml"):
        profile.load(str(one))
    with pytest.raises(NotFound, match="did you mean 'raspberry-pi-5-8gb'"):
        profile.load(str(lost))


@pytest.mark.parametrize("name", profile.names())
def test_every_built_in_file_obeys_the_published_schema(name: str) -> None:
    import jsonschema

    data, _ = serde.read_yaml(profile.folder() / f"{name}.yaml")

    jsonschema.Draft202012Validator.check_schema(profile.schema())
    jsonschema.Draft202012Validator(profile.schema()).validate(data)


def test_the_published_schema_refuses_what_load_refuses() -> None:
    import jsonschema

    validator = jsonschema.Draft202012Validator(profile.schema())

    assert not validator.is_valid({"name": "x"})
    assert not validator.is_valid({"extends": "jetson-orin", "name": "x", "memroy": 1})
    assert not validator.is_valid({"extends": "jetson-orin", "name": "x", "memory": "8 gigs"})
    assert validator.is_valid({"extends": "jetson-orin", "name": "x", "memory": "8 GiB"})
    whole, _ = serde.read_yaml(profile.folder() / "raspberry-pi-5-8gb.yaml")
    assert isinstance(whole, dict)
    assert not validator.is_valid({**whole, "reserves": {"safety": 1}})
    assert validator.is_valid({**whole, "extends": "jetson-orin", "reserves": {"safety": 1}})
