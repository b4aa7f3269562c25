"""Hostile bundles and streams against the installer (python -m tests.hostile runs more of them)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.trial import Stage, stage, trial, whole

pytestmark = pytest.mark.integration


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path) as found:
        yield found


def test_hostile_bundles_and_streams_change_nothing(made: Stage) -> None:
    outcome = trial(made, count=600, seed=7)

    assert outcome.faults == []
    assert len(outcome.tried) >= 12
    assert whole(made)


def test_a_device_that_takes_what_it_must_not_is_found_out(
    made: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepack.device import agent

    monkeypatch.setattr(agent, "verify_signature", lambda bundle, signers: {"state": "verified"})

    outcome = trial(made, count=150, seed=7)

    assert any("it was not refused" in fault for fault in outcome.faults)
