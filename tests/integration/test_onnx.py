"""ONNX models as onnxruntime-genai's builder makes them, run by onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepack import modelspec, schemes
from edgepack.artifact import Artifact
from edgepack.errors import BadInput
from edgepack.layouts import rope_table_bytes
from tests import quantized
from tests.quantized import DEMO, build

pytestmark = pytest.mark.integration

SPEC = modelspec.read(DEMO)
TOKENS = 96


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("onnx")
    return {scheme: build(scheme, folder) for scheme in ("onnx-int8", "onnx-int4", "onnx-int4-rtn")}


def say(artifact: Artifact) -> quantized.Floats:
    """Logits of the first tokens of the held-out text, [tokens, vocabulary]."""
    import onnxruntime_genai as og

    model = og.Model(str(artifact.path))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(quantized.heldout()[None, :TOKENS])
    said: quantized.Floats = generator.get_output("logits")[0]
    return said


def greedy(artifact: Artifact, prompt: np.ndarray[Any, np.dtype[np.int32]], count: int) -> list[int]:
    import onnxruntime_genai as og

    model = og.Model(str(artifact.path))
    options = og.GeneratorParams(model)
    options.set_search_options(do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(prompt[None])
    for _ in range(count):
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def initializer_bytes(folder: Path) -> int:
    """Bytes of the graph's tensors as its external data lists them; none may be inside the graph file itself."""
    total = 0
    for tensor in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.initializer:
        assert not tensor.raw_data
        total += int({entry.key: entry.value for entry in tensor.external_data}["length"])
    return total


def test_onnxruntime_genai_runs_what_the_builder_made(artifacts: dict[str, Artifact]) -> None:
    reference = quantized.logits(DEMO, 0, TOKENS)

    far = {scheme: quantized.divergence(reference, say(artifact)) for scheme, artifact in artifacts.items()}

    assert 0 <= far["onnx-int8"] < 0.001
    assert far["onnx-int8"] < far["onnx-int4"] < far["onnx-int4-rtn"] < 0.1


def test_eight_bits_answer_word_for_word_as_the_unquantized_model(artifacts: dict[str, Artifact]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    for start in (0, 400, 800):
        prompt = quantized.heldout()[start : start + 24]
        ids = torch.from_numpy(prompt[None].astype(np.int64))
        told = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)

        assert greedy(artifacts["onnx-int8"], prompt, 16) == told[0, 24:].tolist()


@pytest.mark.parametrize("scheme", ["onnx-int8", "onnx-int4", "onnx-int4-rtn"])
def test_the_tensors_have_the_predicted_bytes(artifacts: dict[str, Artifact], scheme: str) -> None:
    folder = artifacts[scheme].path

    predicted = schemes.weights_bytes(SPEC, scheme, imatrix=False, backend="cpu")

    assert initializer_bytes(folder) == predicted + rope_table_bytes(SPEC, half=False)
    assert (folder / "model.onnx.data").stat().st_size == initializer_bytes(folder)


def test_the_cache_is_as_long_as_the_plan_says(artifacts: dict[str, Artifact]) -> None:
    search = quantized.document(artifacts["onnx-int4"].path / "genai_config.json")["search"]

    assert (search["max_length"], search["past_present_share_buffer"]) == (256, True)


def test_the_same_job_gives_the_same_bytes_wherever_it_is_done(
    artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    again = build(
        "onnx-int4", tmp_path / "out", source=quantized.copied(DEMO, tmp_path / "copy of the model")
    )

    assert again.sha256 == artifacts["onnx-int4"].sha256


def test_a_context_that_the_model_was_not_trained_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a context of 513 is more than the 512 positions"):
        build("onnx-int4", tmp_path, context=513)

    assert list(tmp_path.iterdir()) == []
