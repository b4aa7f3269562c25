"""LLM.int8 and NF4 checkpoints of bitsandbytes, loaded by transformers in a process that did not make them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepack import modelspec, schemes
from edgepack.artifact import Artifact
from edgepack.builders import safetensors
from tests import quantized
from tests.quantized import DEMO, build

pytestmark = pytest.mark.integration

SCHEMES = ("bnb-int8", "bnb-nf4")
SPEC = modelspec.read(DEMO)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("bnb")
    return {scheme: build(scheme, folder) for scheme in SCHEMES}


@pytest.fixture(scope="module")
def answers(artifacts: dict[str, Artifact]) -> dict[str, quantized.Floats]:
    """Logits as fresh processes compute them, by scheme."""
    return quantized.reloaded(artifacts, tokens=96)


def test_a_fresh_process_answers_as_the_unquantized_model_but_for_rounding(
    answers: dict[str, quantized.Floats],
) -> None:
    far = {s: quantized.divergence(quantized.logits(DEMO, 0, 96), said) for s, said in answers.items()}

    assert all(np.isfinite(said).all() for said in answers.values())
    assert 0 <= far["bnb-int8"] < 0.002
    assert far["bnb-int8"] < far["bnb-nf4"] < 0.03


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tensors_have_the_predicted_bytes(artifacts: dict[str, Artifact], scheme: str) -> None:
    stored = safetensors.checkpoint(artifacts[scheme].path)

    assert sum(t.bytes for t in stored.values()) == schemes.weights_bytes(SPEC, scheme, imatrix=False)
    predicted, provenance = schemes.file_bytes(SPEC, scheme, imatrix=False)
    assert provenance == "fitted"
    assert predicted == pytest.approx((artifacts[scheme].path / "model.safetensors").stat().st_size, abs=6000)


def test_embeddings_stay_floats_and_the_threshold_is_that_of_the_paper(
    artifacts: dict[str, Artifact],
) -> None:
    config = quantized.document(artifacts["bnb-int8"].path / "config.json")["quantization_config"]
    stored = safetensors.checkpoint(artifacts["bnb-int8"].path)

    assert (config["llm_int8_threshold"], config["llm_int8_skip_modules"]) == (6.0, ["lm_head"])
    assert stored["model.embed_tokens.weight"].dtype == "BF16"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_job_gives_the_same_bytes_wherever_it_is_done(
    artifacts: dict[str, Artifact], scheme: str, tmp_path: Path
) -> None:
    elsewhere = quantized.copied(DEMO, tmp_path / "copy of the model")

    assert quantized.quantize_here(scheme, tmp_path / "out", source=elsewhere) == artifacts[scheme].sha256
