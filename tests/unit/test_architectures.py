"""Architectures that are planned for only: a GGUF says what its config says, and none is built from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgepack import architectures, memory, modelspec, pipeline, plan, profile, schemes
from edgepack.builders import convert
from edgepack.errors import BadInput, Unsupported
from edgepack.plan import Request
from edgepack.progress import Silent
from edgepack.runtimes import llama_cpp
from edgepack.units import GIB
from tests.shapes import PLANNED, settings, spec, write_gguf


@pytest.mark.parametrize("name", PLANNED)
def test_a_gguf_says_what_the_config_says(name: str, tmp_path: Path) -> None:
    ours = spec(name)

    back = modelspec.read(write_gguf(tmp_path / "f16.gguf", ours, "F16"))

    assert (back.kv, back.recurrent_bytes, back.tensors) == (ours.kv, ours.recurrent_bytes, ours.tensors)
    assert (back.heads, back.layers, back.vocab) == (ours.heads, ours.layers, ours.vocab)


@pytest.mark.parametrize("name", PLANNED)
def test_a_graph_that_is_not_modelled_is_never_called_exact(name: str) -> None:
    model = spec(name)

    estimate = memory.estimate(model, "Q4_K_M", settings(), backend="cpu")

    parts = {part.name: part for part in estimate.parts}
    exact = model.architecture in llama_cpp.EXACT_GRAPHS
    assert parts["compute"].provenance == ("exact" if exact else "fitted")
    assert (parts["compute"].low < parts["compute"].bytes < parts["compute"].high) != exact
    assert parts["kv_cache"].provenance == "exact"


def test_an_architecture_with_a_cache_and_no_known_graph_has_the_widest_interval() -> None:
    model = replace(spec("llama-3.2-1b"), architecture="llama4")

    low, high = llama_cpp.compute_range(model, settings(), 1000) or (0, 0)

    assert (low, high) == (300, 4000)


def test_the_embedding_per_layer_stays_on_the_host() -> None:
    model = spec("gemma-3n-e2b")

    estimate = memory.estimate(model, "Q8_0", settings(gpu_layers=99), backend="cuda")

    table = model.vocab * 30 * 256 * 34 // 32
    assert table in [part.bytes for part in estimate.parts if (part.name, part.place) == ("weights", "host")]


def test_llama_4_has_chunks_of_8192_in_three_of_four_layers() -> None:
    keys: dict[str, architectures.Key] = {
        "block_count": 48, "embedding_length": 5120, "attention.head_count": 40, "attention.head_count_kv": 8,
    }  # fmt: skip

    kinds = architectures.caches("llama4", keys, name="scout").kv

    assert [(kind.count, kind.window) for kind in kinds] == [(12, None), (36, 8192)]


def test_what_is_not_known_is_named() -> None:
    values = {**PLANNED["granite-4.0-micro"], "layer_types": ["mamba"] * 40}

    with pytest.raises(Unsupported, match="granitehybrid"):
        modelspec.from_config({**values, "model_type": "granitemoehybrid"}, name="granite-h")
    with pytest.raises(Unsupported, match="'nemotron_h'"):
        modelspec.from_config({**values, "model_type": "nemotron_h"}, name="nemotron")
    with pytest.raises(Unsupported, match="linear attention with keys and values"):
        modelspec.from_config({**PLANNED["qwen3.5-4b"], "linear_value_head_dim": 64}, name="odd")
    with pytest.raises(BadInput, match="layer_types is missing"):
        modelspec.from_config({**PLANNED["lfm2-350m"], "layer_types": None}, name="lfm2")


def test_a_checkpoint_that_is_only_planned_for_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLANNED["smollm3-3b"]), encoding="utf-8")

    with pytest.raises(Unsupported, match="smollm3, which edgepack plans for and does not convert"):
        convert.convert(tmp_path, tmp_path / "out.gguf", outtype="F16", progress=Silent())


def test_a_build_of_it_ends_before_anything_is_fetched() -> None:
    device = profile.load("jetson-orin-nano-8gb")
    chosen = pipeline.make_plan(Request(profile=device), [pipeline.named("smollm3-3b")])

    with pytest.raises(Unsupported, match="plans for and does not convert"):
        pipeline.build(chosen, pipeline.BuildOptions(out=Path("nowhere")), Silent())


def test_the_catalog_is_chosen_from_where_it_can_be_built() -> None:
    everything = pipeline.candidates(None, None)

    assert {candidate.spec.architecture for candidate in everything} <= set(modelspec.CONVERTED)
    assert plan.assign_panels(everything)


def test_a_users_catalog_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "models:\n  - {id: mine, repo: me/mine, license: MIT, commercial: true, config: "
        + json.dumps(dict(PLANNED["smollm3-3b"]))
        + "}\n",
        encoding="utf-8",
    )

    extra = pipeline.extra_models({"catalog": file})

    assert pipeline.named("mine", extra=extra).model.source == "me/mine"
    assert pipeline.named("me/mine", extra=extra).model.parameters == 3_075_098_624
    assert pipeline.extra_models({}) == ()


def test_qwen_3_5_4b_is_as_large_as_its_published_gguf() -> None:
    """Row m228 of the observations: 2.51 GiB, and in its log 5.13 BPW of 4.21 B parameters."""
    model = spec("qwen3.5-4b")

    assert round(schemes.weights_bytes(model, "Q4_K_M", imatrix=False) / GIB, 2) == 2.51
    assert round(schemes.bits_per_weight(model, "Q4_K_M", imatrix=False), 2) == 5.13
    assert round(model.parameters / 1e9, 2) == 4.21
