"""A flash by the real agent, recorded in a virtual machine and cut at many places (python -m tests.powercut)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.powercut import guest, replay, scenario
from tests.powercut.replay import Asked, State
from tests.powercut.scenario import CONSUME, PHASES, SWITCH, Job, Without

pytestmark = pytest.mark.integration

Disk = tuple[str, Without, Job]
ASKED: Mapping[Disk, Asked] = {
    ("ext4", "", "flash"): Asked(states=110, rerun_each=11),
    ("xfs", "", "flash"): Asked(states=110, rerun_each=11),
    ("ext4", "all", "flash"): Asked(states=40, rerun_each=20, steps=SWITCH),
    ("ext4", "", "consume"): Asked(states=24, rerun_each=1, steps=CONSUME),
    ("ext4", "all", "consume"): Asked(states=24, rerun_each=1, steps=CONSUME),
}


@pytest.fixture(scope="module")
def states() -> Iterator[Mapping[Disk, list[State]]]:
    with tempfile.TemporaryDirectory(dir=scenario.memory_folder()) as work:
        disks = [scenario.Asked(filesystem=name, without=without, job=job) for name, without, job in ASKED]
        recordings = scenario.recorded(guest.guest(), scenario.whats(Path(work)), disks, Path(work))
        found = replay.replayed(recordings, [*ASKED.values()])
        yield dict(zip(ASKED, found, strict=True))


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_after_any_cut_the_device_has_the_old_release_or_the_new_one_and_a_rerun_ends_well(
    states: Mapping[Disk, list[State]], filesystem: str
) -> None:
    found = states[filesystem, "", "flash"]

    assert [state for state in found if state.faults] == []
    assert len(found) == 110
    assert {state.step for state in found} >= {"receive", "resume", "install", "receive-again"}
    assert {state.current for state in found} == {"first", "second"}
    assert [state.reruns is not None for state in found].count(True) == 10


def test_without_fsync_the_same_cuts_leave_broken_releases(states: Mapping[Disk, list[State]]) -> None:
    found = states["ext4", "all", "flash"]

    kinds = {fault.kind for state in found for fault in state.faults}

    assert "corrupt" in kinds
    assert "undone" in kinds
    assert sum(bool(state.faults) for state in found) >= 5


def test_after_any_cut_a_bundle_that_is_consumed_is_whole_enough_to_go_on(
    states: Mapping[Disk, list[State]],
) -> None:
    found = states["ext4", "", "consume"]

    assert [state for state in found if state.faults] == []
    assert {state.step for state in found} == {*CONSUME}
    assert {state.reruns for state in found} <= {1, 2}  # what the cut spoiled of a part is refused once


def test_without_fsync_a_bundle_that_is_consumed_is_lost(states: Mapping[Disk, list[State]]) -> None:
    found = states["ext4", "all", "consume"]

    assert "stuck" in {fault.kind for state in found for fault in state.faults}


def test_every_step_of_the_job_says_what_may_be_current() -> None:
    named = [
        line.split()[1].rstrip(";") for line in scenario.JOB.splitlines() if line.startswith("    mark ")
    ]

    assert [*dict.fromkeys(named)] == [*PHASES]
