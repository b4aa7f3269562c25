"""A build whose model is still to be made: once it is made, it goes the way of any local checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgepack import hub, pipeline, profile, quantization
from edgepack.artifact import Checkpoint
from edgepack.bundle import inspect
from edgepack.plan import TO_BE_MADE, Plan, Request
from edgepack.progress import Progress, Silent
from edgepack.students import parse
from tests import checkpoints

pytestmark = pytest.mark.integration


def test_the_bundle_of_a_student_names_the_student_and_no_longer_the_teachers_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in for `distillation` cuts layers off and teaches nothing."""

    def student(chosen: Plan, options: pipeline.BuildOptions, progress: Progress) -> Checkpoint:
        layers = parse(str(chosen.model.prune)).layers
        assert isinstance(layers, int)
        folder = checkpoints.first_layers(tmp_path / "student", layers)
        return replace(hub.resolve(str(folder), progress=progress), license=chosen.model.license)

    monkeypatch.setattr(pipeline, "_student", student)
    shorter = [
        candidate
        for candidate in pipeline.candidates(None, "demo", distill=True)
        if str(candidate.model.prune).startswith("layers=") and "," not in str(candidate.model.prune)
    ]
    chosen = pipeline.make_plan(Request(profile=profile.load("x86-laptop"), scheme="Q8_0"), shorter)
    options = pipeline.BuildOptions(
        out=tmp_path / "out", quantization=quantization.Options(measured=False), offline=True
    )

    exact, made = pipeline.build(chosen, options, Silent())

    inspected = inspect(made.path)
    carried = json.loads((tmp_path / "out" / f"{exact.name}.plan.json").read_text(encoding="utf-8"))
    revision = hub.content_revision(tmp_path / "student", Silent())
    assert exact.model.parameters == chosen.model.parameters
    assert carried["model"]["revision"] == revision
    assert carried["model"]["source"] == str(tmp_path / "student")
    assert (carried["model"]["teacher"], carried["model"]["lesson"]) == ("demo", None)
    assert not [text for text in carried["warnings"] if text.startswith(TO_BE_MADE)]
    assert revision in json.dumps(dict(inspected.annotations))
    assert pipeline.read_plan(tmp_path / "out" / f"{exact.name}.plan.json") == exact
