"""`edgepack calibrate --run`: the real llama-bench runs two models that were written here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgepack import calibrate, profile, toolchain
from edgepack.progress import Silent

pytestmark = pytest.mark.integration

SHAPES = {
    "small": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8},
    "larger": {
        "num_hidden_layers": 2,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
    },
}


def test_two_models_are_measured_here(tmp_path: Path) -> None:
    device = profile.load("x86-laptop-ddr5")
    tools = toolchain.find()

    readings, refused = calibrate.measure(device, tools, tmp_path, Silent(), shapes=SHAPES)

    assert refused == []
    assert [(r.model, r.scheme) for r in readings] == [("small", "Q4_K_M"), ("larger", "Q4_K_M")]
    assert all(r.decode > 0 and r.prefill is not None and r.prefill > 0 for r in readings)


def test_a_cpu_build_says_nothing_of_a_card(tmp_path: Path) -> None:
    device = profile.load("rtx-4060-8gb")
    small = {"small": SHAPES["small"]}

    readings, refused = calibrate.measure(device, toolchain.find(), tmp_path, Silent(), shapes=small)

    assert readings == []
    assert "it ran on the CPU" in refused[0].reason


def test_constants_of_this_machine_come_out_of_its_own_runs(tmp_path: Path) -> None:
    """A machine of unknown bandwidth: more than it has, so that nothing is called implausible."""
    device = profile.load("x86-laptop-ddr5")
    device = replace(device, power_modes=(replace(device.mode(), bandwidth_gbs=300.0),))
    readings, _ = calibrate.measure(device, toolchain.find(), tmp_path, Silent(), shapes=SHAPES)

    found = calibrate.calibrate(device, device.mode(), readings[1:])

    assert found.constants.readings == 1
    assert found.residuals[0].predicted == pytest.approx(readings[1].decode, rel=0.01)
