"""System calls of the enrolled agent that fail or are its last (python -m tests.sysfaults tries every one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import services
from tests.managed import changed
from tests.sysfaults.strace import Missed, Point, injected
from tests.sysfaults.trial import FAULTS, Mode, flushing, managed, stage, trial

pytestmark = pytest.mark.integration


def test_whatever_call_fails_or_is_the_last_a_whole_release_stays_and_a_rerun_ends_well(
    tmp_path: Path,
) -> None:
    on = stage(tmp_path)

    found = [*trial(on, tmp_path, each=60)]

    assert [result for result in found if result.faults] == []
    assert {result.fault for result in found} == {*FAULTS}
    assert {result.command for result in found} == {command.name for command in on.commands}
    assert len({result.point.call for result in found}) >= 5


@pytest.mark.parametrize(("mode", "names"), [("user", ["enroll again"]), ("system", ["bad release"])])
def test_whatever_fails_beside_a_service_manager_the_server_runs_again_from_a_whole_release(
    tmp_path: Path, mode: Mode, names: list[str]
) -> None:
    on = stage(tmp_path, mode=mode)
    quick: list[services.Fault] = ["fails", "killed-before", "killed-after"]

    found = [
        *trial(on, tmp_path, each=30, names=names),
        *managed(on, tmp_path, each=4, names=names, faults=quick),
    ]

    assert [result for result in found if result.faults] == []
    assert {result.fault for result in found} == {*FAULTS, *quick}


@pytest.mark.parametrize(
    ("change", "command", "at", "fault", "told"),
    [
        pytest.param(
            ('return "=yes" in told', "return False"), "install", 3, "killed-before", "was started by",
            id="units that systemd has not read",
        ),
        pytest.param(
            ("if not self.down or", "if True or"), "bad release", 11, "fails", "None runs",
            id="what ran before is not started again when its start failed",
        ),
    ],
)  # fmt: skip
def test_an_agent_that_leaves_the_service_manager_behind_is_found_out(
    tmp_path: Path, change: tuple[str, str], command: str, at: int, fault: services.Fault, told: str
) -> None:
    on = stage(tmp_path, mode="system", code=changed(change))

    (found,) = managed(on, tmp_path, names=[command], faults=[fault], at=at)

    assert any(told in one for one in found.faults)


def test_a_flush_that_fails_or_is_the_last_beside_the_upload_loses_nothing(tmp_path: Path) -> None:
    found = [*flushing(tmp_path)]

    assert [result for result in found if result.faults] == []
    assert [result.fault for result in found] == [*FAULTS]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(
            ("        lay_out(store, head)\n",
             '        point(store.path("current"), "releases/" + release)\n        lay_out(store, head)\n'),
            "corrupt", id="current before there is a release",
        ),
        pytest.param(
            ("    new = fresh(store.release(release))\n    new_folder(new)\n    write_head(new, head)\n    folders",
             "    new = store.release(release)\n    new_folder(new)\n    write_head(new, head)\n    folders"),
            "corrupt", id="a release under its name before it is whole",
        ),
    ],
)  # fmt: skip
def test_an_agent_that_does_things_in_another_order_is_found_out(
    tmp_path: Path, change: tuple[str, str], told: str
) -> None:
    on = stage(tmp_path, code=changed(change))

    found = [*trial(on, tmp_path, each=40, names=["install"])]

    assert any(fault.startswith(told) for result in found for fault in result.faults)


def test_a_fault_that_hit_another_call_is_no_result(tmp_path: Path) -> None:
    command = ["python3", "-c", f"import os; os.mkdir({str(tmp_path / 'one')!r})"]
    elsewhere = Point(call="mkdir", when=1, what=("two",))

    with pytest.raises(Missed):
        injected(command, b"", tmp_path, tmp_path / "log", elsewhere, "EIO")
    with pytest.raises(Missed):
        injected(command, b"", tmp_path, tmp_path / "log", Point(call="rmdir", when=1, what=("one",)), "KILL")
