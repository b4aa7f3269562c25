"""ONNX models as onnxruntime-genai's builder makes them, run by onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepack import layouts, modelspec, schemes
from edgepack.artifact import Artifact
from edgepack.errors import BadInput
from edgepack.layouts import rope_table_bytes
from edgepack.profile import Backend
from edgepack.units import Bytes
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

    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


WINDOW = 256
OFFERED: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": WINDOW},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 256},
    "granite": {"tie_word_embeddings": True},
}


def test_every_architecture_that_is_offered_is_tried_here() -> None:
    assert {*OFFERED, "llama"} - {"mistral"} == set(layouts.ONNX_DECODERS)


@pytest.mark.parametrize("model_type", OFFERED)
def test_graphs_of_every_architecture_have_the_predicted_bytes_for_cpu_and_cuda(
    model_type: str, tmp_path: Path
) -> None:
    """The builder's own check compares the bytes. CUDA's graphs are built here without a GPU, and not run."""
    source = quantized.random_model(tmp_path / "model", model_type, **OFFERED[model_type])
    jobs: list[tuple[str, Backend]] = [
        ("onnx-int4", "cpu"), ("onnx-int8", "cuda"), ("onnx-int4-b64-rtn", "cuda"), ("onnx-fp16", "cuda"),
    ]  # fmt: skip

    for scheme, backend in jobs:
        out = tmp_path / f"{scheme}-{backend}"
        quantized.quantize_here(scheme, out, source=source, backend=backend)
        graph = (out / "model.onnx").stat().st_size
        table = rope_table_bytes(modelspec.read(source), half=backend == "cuda")
        estimated = layouts.container_bytes(modelspec.read(source), scheme, half=backend == "cuda") - table
        assert estimated == pytest.approx(graph, rel=0.2), (scheme, backend)

    said = divergence_of(tmp_path / "onnx-int4-cpu", source)
    assert 0 <= said < 0.01


def divergence_of(built: Path, source: Path) -> float:
    artifact = Artifact(
        path=built,
        scheme="",
        sha256="",
        bytes=Bytes(0),
        imatrix_sha256=None,
        calibration_sha256=None,
        tool="",
    )
    return quantized.divergence(quantized.logits(source, 0, TOKENS), say(artifact))


def test_every_second_layer_slides_and_prompts_longer_than_the_window_are_read_right(tmp_path: Path) -> None:
    source = quantized.random_model(
        tmp_path / "model", "gemma2", **{**OFFERED["gemma2"], "sliding_window": TOKENS // 2}
    )

    quantized.quantize_here("onnx-int8", tmp_path / "out", source=source)

    assert 0 <= divergence_of(tmp_path / "out", source) < 0.0005


def test_a_context_beyond_a_window_that_every_layer_has_is_refused(tmp_path: Path) -> None:
    source = quantized.random_model(
        tmp_path / "model", "mistral", tie_word_embeddings=False, sliding_window=64
    )

    with pytest.raises(BadInput, match="more than the window of 64 that every layer") as refused:
        quantized.quantize_here("onnx-int8", tmp_path / "out", source=source)

    assert "--context 64" in str(refused.value.hint)


def test_a_cuda_graph_says_so(tmp_path: Path) -> None:
    quantized.quantize_here("onnx-int4", tmp_path / "out", source=DEMO, backend="cuda")

    options = quantized.document(tmp_path / "out" / "genai_config.json")["model"]["decoder"][
        "session_options"
    ]
    assert [list(provider) for provider in options["provider_options"]] == [["cuda"]]
