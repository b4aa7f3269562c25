"""The quality probe: where its texts come from, and what changes on the build machine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import selftest
from edgepack.artifact import Artifact
from edgepack.device import agent
from edgepack.errors import BadInput
from edgepack.progress import Silent
from edgepack.units import Bytes
from tests.plans import example_plan


def test_the_built_in_text_gives_different_probes_of_whole_words() -> None:
    text = selftest.heldout()

    pieces = selftest.probes(text)

    flat = " ".join(text.split())
    assert len(set(pieces)) == selftest.PROBES
    assert all(f" {piece} " in f" {flat} " for piece in pieces)
    assert max(map(len, pieces)) <= selftest.PROBE_CHARACTERS


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.text(alphabet="abc", min_size=1, max_size=90), min_size=800, max_size=900))
def test_any_long_text_gives_as_many_probes_each_longer_than_the_one_it_grows_from(words: list[str]) -> None:
    text = " ".join(words)

    pieces = selftest.probes(text)

    assert len(pieces) == selftest.PROBES
    for shorter, longer in itertools.pairwise(pieces):
        grows = longer.startswith(shorter) and len(shorter) < len(longer)
        assert grows or len(longer) <= selftest.STEP_CHARACTERS


def test_a_text_without_spaces_is_cut_anyway() -> None:
    pieces = selftest.probes("春眠不觉晓处处闻啼鸟夜来风雨声花落知多少" * 100)

    assert [len(piece) for piece in pieces[: selftest.STEPS]] == [12, 24, 36, 48, 60, 72]


def test_a_short_text_is_refused_with_what_is_needed() -> None:
    with pytest.raises(BadInput, match="576 are needed"):
        selftest.probes("too short")


def test_recording_changes_nothing_that_changes_answers() -> None:
    planned = example_plan("jetson-orin-nano-8gb")

    here = selftest.recording(planned)

    settings = here.settings
    assert settings.context >= selftest.PROBE_CHARACTERS + selftest.DECODE_TOKENS
    assert settings.threads <= planned.settings.threads
    same = replace(
        settings,
        context=planned.settings.context,
        slots=planned.settings.slots,
        threads=planned.settings.threads,
        gpu_layers=99,
    )
    assert replace(here, settings=same) == planned


@pytest.mark.parametrize("runtime", ["onnx-genai", "transformers", "vllm"])
def test_other_runtimes_record_within_the_planned_context_and_without_an_absent_card(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_gpus", lambda: None)
    planned = replace(example_plan("rtx-4060-8gb"), runtime=runtime)
    short = replace(planned.settings, context=600, slots=3, batch=600, ubatch=600)

    here = selftest.recording(replace(planned, settings=short))

    assert (here.settings.context, here.settings.slots) == (200, 1)
    assert (here.settings.batch, here.settings.ubatch) == (200, 200)
    assert here.profile.backend == "cpu"


def test_without_a_program_that_runs_it_nothing_is_recorded_and_that_is_said(tmp_path: Path) -> None:
    plan = replace(example_plan("rtx-4060-8gb"), runtime="vllm", runtime_version="0.33.0")
    artifact = Artifact(
        path=tmp_path, scheme="bf16", sha256="0" * 64, bytes=Bytes(1), imatrix_sha256=None, tool="none"
    )

    document = selftest.record(artifact, plan, None, tmp_path, Silent())

    assert document["probes"] == []
    assert document["runtime"] == "vllm 0.33.0"
    assert document["about"] == "not recorded: no vllm on the build machine"
    assert list(tmp_path.iterdir()) == []
