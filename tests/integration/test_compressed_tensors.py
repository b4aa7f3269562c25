"""Compressed-tensors checkpoints of llmcompressor, loaded by plain transformers in a process that did not make them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepack import modelspec, schemes
from edgepack.artifact import Artifact
from edgepack.builders import safetensors
from edgepack.errors import BadInput
from tests import quantized
from tests.quantized import DEMO, build

pytestmark = pytest.mark.integration

SCHEMES = ("ct-w8a16", "ct-w8a8", "fp8", "ct-w4a16-g128")
SPEC = modelspec.read(DEMO)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.windows(tmp_path_factory.mktemp("calibration"), count=16, tokens=128)


@pytest.fixture(scope="module")
def artifacts(windows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("ct")
    return {s: build(s, folder, windows=windows if s == "ct-w4a16-g128" else None) for s in SCHEMES}


def test_a_fresh_process_answers_as_the_unquantized_model_but_for_rounding(
    artifacts: dict[str, Artifact],
) -> None:
    reference = quantized.logits(DEMO, 0, 96)
    answers = quantized.reloaded(artifacts, tokens=96)

    far = {scheme: quantized.divergence(reference, said) for scheme, said in answers.items()}

    assert all(np.isfinite(said).all() for said in answers.values())
    assert [scheme for scheme, _ in sorted(far.items(), key=lambda item: item[1])] == list(SCHEMES)
    assert far["ct-w8a16"] < 0.001
    assert far["ct-w4a16-g128"] < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tensors_have_the_predicted_bytes(artifacts: dict[str, Artifact], scheme: str) -> None:
    stored = safetensors.checkpoint(artifacts[scheme].path)

    assert sum(t.bytes for t in stored.values()) == schemes.weights_bytes(SPEC, scheme, imatrix=False)
    predicted, _ = schemes.file_bytes(SPEC, scheme, imatrix=False)
    assert predicted == pytest.approx((artifacts[scheme].path / "model.safetensors").stat().st_size, abs=6000)


@pytest.mark.parametrize(
    ("scheme", "layout", "dynamic"),
    [
        ("ct-w8a16", "pack-quantized", None),
        ("ct-w4a16-g128", "pack-quantized", None),
        ("ct-w8a8", "int-quantized", True),
        ("fp8", "float-quantized", True),
    ],
)
def test_config_json_says_what_vllm_looks_for(
    artifacts: dict[str, Artifact], scheme: str, layout: str, dynamic: bool | None
) -> None:
    config = quantized.document(artifacts[scheme].path / "config.json")["quantization_config"]
    group = config["config_groups"]["group_0"]

    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors", layout, ["lm_head"],
    )  # fmt: skip
    assert (group["input_activations"] or {}).get("dynamic") == dynamic
    assert not (artifacts[scheme].path / "recipe.yaml").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_job_gives_the_same_bytes_wherever_it_is_done(
    artifacts: dict[str, Artifact], windows: Path, scheme: str, tmp_path: Path
) -> None:
    elsewhere = quantized.copied(DEMO, tmp_path / "copy of the model")

    again = quantized.build(scheme, tmp_path / "out", source=elsewhere, windows=windows)

    assert again.sha256 == artifacts[scheme].sha256


def test_four_bits_want_calibration_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="ct-w4a16-g128 needs calibration data"):
        build("ct-w4a16-g128", tmp_path)
