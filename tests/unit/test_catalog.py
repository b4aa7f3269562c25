"""The catalog: shapes that sum to the published counts, panels from one source each, pinned revisions."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from edgepack import catalog
from edgepack.catalog import CatalogModel

# Parameters as keras-hub@71453d08 or the model card count them; KV bytes per token = 2 x layers x kv heads x
# head_dim x 2, from the configs in litgpt@26857050 and torchtune@bd2a0fc7.
PUBLISHED = {
    "qwen2.5-0.5b-instruct": (494_032_768, 12_288),
    "qwen2.5-1.5b-instruct": (1_543_714_304, 28_672),
    "qwen2.5-3b-instruct": (3_085_938_688, 36_864),
    "qwen2.5-7b-instruct": (7_615_616_512, 57_344),
    "qwen3-0.6b": (596_049_920, 114_688),
    "qwen3-1.7b": (1_720_574_976, 114_688),
    "qwen3-4b": (4_022_468_096, 147_456),
    "llama-3.2-1b-instruct": (1_235_814_400, 32_768),
    "llama-3.2-3b-instruct": (3_212_749_824, 114_688),
}
HOSTED = [model for model in catalog.models() if model.repo != catalog.BUILT_IN]


def weights(model: CatalogModel) -> int:
    """rope_freqs is a table that the GGUF carries and no published count includes."""
    return sum(t.elements for t in model.spec().tensors if t.name != "rope_freqs.weight")


@pytest.mark.parametrize("model", HOSTED, ids=lambda model: model.id)
def test_shapes_sum_to_the_published_parameters_and_kv_bytes(model: CatalogModel) -> None:
    spec = model.spec()

    parameters, kv_bytes = PUBLISHED[model.id]

    assert model.parameters == parameters
    assert weights(model) == parameters
    assert sum(kv.count * kv.heads * (kv.key_dim + kv.value_dim) * 2 for kv in spec.kv) == kv_bytes


@pytest.mark.parametrize("model", HOSTED, ids=lambda model: model.id)
def test_a_hosted_model_is_pinned_licensed_and_scored(model: CatalogModel) -> None:
    assert model.revision is not None and re.fullmatch("[0-9a-f]{40}", model.revision)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.repo)
    assert model.license
    assert model.panels
    assert catalog.find(model.repo.upper()) == model


@pytest.mark.parametrize("model", HOSTED, ids=lambda model: model.id)
def test_a_score_is_in_a_known_panel_which_it_fills(model: CatalogModel) -> None:
    for name, scores in model.panels.items():
        assert tuple(scores) == catalog.panels()[name].benchmarks
        assert all(0 <= score <= 100 for score in scores.values())


def test_every_panel_compares_at_least_two_models() -> None:
    for name in catalog.panels():
        assert sum(name in model.panels for model in catalog.models()) >= 2


def test_only_the_research_licence_forbids_commercial_use() -> None:
    assert [model.id for model in catalog.models() if not model.commercial] == ["qwen2.5-3b-instruct"]


def test_ids_and_repositories_name_one_model_each_and_unknown_ones_none() -> None:
    ids = [name for model in catalog.models() for name in sorted({model.id, model.repo.lower()})]

    assert len(set(ids)) == len(ids)
    assert {model.id for model in HOSTED} == set(PUBLISHED)
    assert {model.id for model in catalog.models()} - set(PUBLISHED) <= {"demo"}
    assert catalog.find("qwen9") is None


def test_the_built_in_model_takes_its_shapes_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(catalog, "built_in_folder", lambda: tmp_path)
    catalog.models.cache_clear()

    model = catalog.find("demo")

    catalog.models.cache_clear()
    assert model is not None
    assert (model.repo, model.revision, model.license) == ("demo", None, "Apache-2.0")
    assert model.config == config
    assert model.parameters == weights(model) == 4096 * 256 + 6 * (256 * 256 * 3 + 3 * 256 * 768 + 512) + 256


def test_the_whole_catalog_is_read_in_a_blink() -> None:
    catalog.models.cache_clear()
    best = 1.0
    for _ in range(5):
        catalog.models.cache_clear()
        start = time.perf_counter()
        catalog.models()
        best = min(best, time.perf_counter() - start)

    assert best < 0.04
