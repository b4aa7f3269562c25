"""The catalog: shapes that sum to the published counts, panels from one source each, pinned revisions."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from edgepack import catalog, pipeline, profile, tables
from edgepack.catalog import CatalogModel
from edgepack.plan import Request

# Parameters as keras-hub@71453d08 or the model card count them; KV bytes per token = 2 x layers x kv heads x
# head_dim x 2, from the configs in litgpt@26857050 and torchtune@bd2a0fc7; layers that share a cache are not counted
# and Gemma 4's global layers have heads of 512. Where a count is the sum of the shapes only, the YAML file says so.
PUBLISHED = {
    "deepseek-r1-distill-qwen-1.5b": (1_777_088_000, 28_672),
    "deepseek-r1-distill-qwen-7b": (7_615_616_512, 57_344),
    "gemma-2-2b-it": (2_614_341_888, 106_496),
    "gemma-3-270m-it": (268_098_176, 18_432),
    "gemma-3-1b-it": (999_885_952, 26_624),
    "gemma-3-4b-it": (3_880_263_168, 139_264),
    "gemma-3n-e2b-it": (4_458_122_848, 40_960),
    "gemma-3n-e4b-it": (6_868_990_448, 40_960),
    "gemma-4-e2b-it": (4_628_569_379, 18_432),
    "gemma-4-e4b-it": (7_463_013_418, 57_344),
    "granite-4.0-micro": (3_402_836_480, 81_920),
    "lfm2-350m": (354_483_968, 12_288),
    "lfm2-700m": (742_489_344, 12_288),
    "lfm2-1.2b": (1_170_340_608, 12_288),
    "llama-3.2-1b-instruct": (1_235_814_400, 32_768),
    "llama-3.2-3b-instruct": (3_212_749_824, 114_688),
    "tinyllama-1.1b-chat": (1_100_048_384, 22_528),
    "llama-2-7b-chat": (6_738_415_616, 524_288),
    "llama-3.1-8b-instruct": (8_030_261_248, 131_072),
    "minicpm-2b-sft": (2_724_880_896, 368_640),
    "ministral-3-3b-instruct": (3_429_006_336, 106_496),
    "mistral-7b-instruct-v0.3": (7_248_023_552, 131_072),
    "phi-3.5-mini-instruct": (3_821_079_552, 393_216),
    "phi-4-mini-instruct": (3_836_021_760, 131_072),
    "qwen2.5-0.5b-instruct": (494_032_768, 12_288),
    "qwen2.5-1.5b-instruct": (1_543_714_304, 28_672),
    "qwen2.5-3b-instruct": (3_085_938_688, 36_864),
    "qwen2.5-7b-instruct": (7_615_616_512, 57_344),
    "qwen2.5-14b-instruct": (14_770_033_664, 196_608),
    "qwen3.5-0.8b": (752_393_024, 12_288),
    "qwen3.5-2b": (1_881_825_088, 12_288),
    "qwen3.5-4b": (4_205_751_296, 32_768),
    "qwen3-0.6b": (596_049_920, 114_688),
    "qwen3-1.7b": (1_720_574_976, 114_688),
    "qwen3-4b": (4_022_468_096, 147_456),
    "qwen3-8b": (8_190_735_360, 147_456),
    "smollm2-135m-instruct": (134_515_008, 23_040),
    "smollm2-360m-instruct": (361_821_120, 40_960),
    "smollm2-1.7b-instruct": (1_711_376_384, 196_608),
    "smollm3-3b": (3_075_098_624, 73_728),
}
HOSTED = [model for model in catalog.models() if model.repo not in catalog.built_in()]


def weights(model: CatalogModel) -> int:
    """rope_freqs and rope_factors are tables that the GGUF carries and no published count includes."""
    return sum(t.elements for t in model.spec().tensors if not t.name.startswith("rope_f"))


@pytest.mark.parametrize("model", HOSTED, ids=lambda model: model.id)
def test_shapes_sum_to_the_published_parameters_and_kv_bytes(model: CatalogModel) -> None:
    spec = model.spec()

    parameters, kv_bytes = PUBLISHED[model.id]

    assert model.parameters == parameters
    assert weights(model) == parameters
    assert sum(kv.count * kv.heads * (kv.key_dim + kv.value_dim) * 2 for kv in spec.kv) == kv_bytes


@pytest.mark.parametrize("model", HOSTED, ids=lambda model: model.id)
def test_a_hosted_model_has_a_licence_and_a_commit_where_it_is_known(model: CatalogModel) -> None:
    assert model.revision is None or re.fullmatch("[0-9a-f]{40}", model.revision)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.repo)
    assert model.license
    assert catalog.find(model.repo.upper()) == model


def test_what_could_not_be_pinned_or_scored_is_counted() -> None:
    assert [model.id for model in HOSTED if model.revision is None] == ["lfm2-700m", "minicpm-2b-sft"]
    revisions = [model.revision for model in HOSTED if model.revision]
    assert len(set(revisions)) == len(revisions)
    assert [model.id for model in HOSTED if not model.panels] == [
        "gemma-2-2b-it", "gemma-3-270m-it", "gemma-3-4b-it", "gemma-3n-e2b-it", "gemma-3n-e4b-it",
        "gemma-4-e2b-it", "gemma-4-e4b-it", "granite-4.0-micro", "tinyllama-1.1b-chat", "llama-2-7b-chat",
        "minicpm-2b-sft", "ministral-3-3b-instruct", "mistral-7b-instruct-v0.3", "qwen3.5-0.8b", "qwen3.5-2b",
        "qwen3.5-4b",
    ]  # fmt: skip


def test_students_name_their_teacher() -> None:
    teachers = {model.id: model.teacher for model in HOSTED if model.teacher}

    assert (
        teachers["deepseek-r1-distill-qwen-7b"] == teachers["deepseek-r1-distill-qwen-1.5b"] == "DeepSeek-R1"
    )
    assert teachers["llama-3.2-1b-instruct"] == teachers["llama-3.2-3b-instruct"] == "Llama-3.1-8B"
    assert {model for model, teacher in teachers.items() if teacher == "Qwen3-32B"} == {
        model.id for model in HOSTED if model.id.startswith("qwen3-")
    }


def test_a_plan_names_the_teacher_and_warns_of_a_licence_that_forbids_commercial_use() -> None:
    device = profile.load("jetson-orin-nano-8gb")

    student = pipeline.make_plan(Request(profile=device), [pipeline.named("deepseek-r1-distill-qwen-1.5b")])
    forbidden = pipeline.make_plan(Request(profile=device), [pipeline.named("qwen2.5-3b-instruct")])

    assert "licence MIT; distilled by its makers from DeepSeek-R1\n" in tables.plan(student, None)
    assert "Qwen-RESEARCH forbids commercial use of qwen2.5-3b-instruct" in forbidden.warnings
    assert "distilled" not in tables.plan(forbidden, None)
    assert not [text for text in student.warnings if "commercial" in text]


@pytest.mark.parametrize("model", HOSTED, ids=lambda model: model.id)
def test_a_score_is_in_a_known_panel_which_it_fills(model: CatalogModel) -> None:
    for name, scores in model.panels.items():
        assert tuple(scores) == catalog.panels()[name].benchmarks
        assert all(0 <= score <= 100 for score in scores.values())


def test_every_panel_compares_at_least_two_models() -> None:
    for name in {name for model in HOSTED for name in model.panels}:
        assert sum(name in model.panels for model in HOSTED) >= 2


def test_one_panel_compares_all_built_in_models_and_no_other() -> None:
    """The half and the quarter are not there before their training."""
    scored = {model.id for model in catalog.models() if "demo_heldout" in model.panels}

    assert scored == set(catalog.built_in())
    assert catalog.panels()["demo_heldout"].measure == "tokens"
    assert {panel.measure for name, panel in catalog.panels().items() if name != "demo_heldout"} == {
        "answers"
    }


def test_only_the_research_licence_forbids_commercial_use() -> None:
    assert [model.id for model in catalog.models() if not model.commercial] == ["qwen2.5-3b-instruct"]


@pytest.mark.parametrize(
    ("license", "allows"),
    [
        ("Apache-2.0", True), ("mit", True), ("llama3.1", True), ("unknown", True), ("gemma", True),
        ("cc-by-nc-4.0", False), ("CC-BY-NC-SA-4.0", False), ("cc-by-nc-nd-4.0", False), ("mnpl-0.1", False),
        ("fair-noncommercial-research-license", False), ("qwen-research", False),
        ("Apache-2.0 AND cc-by-nc-4.0", False),
        ("hippocratic-uncommon", True), ("cc-by-4.0", True),
    ],
)  # fmt: skip
def test_a_licence_that_says_so_in_its_name_forbids_commercial_use(license: str, allows: bool) -> None:
    assert catalog.allows_commerce(license) is allows


def test_ids_and_repositories_name_one_model_each_and_unknown_ones_none() -> None:
    ids = [name for model in catalog.models() for name in sorted({model.id, model.repo.lower()})]

    assert len(set(ids)) == len(ids)
    assert {model.id for model in HOSTED} == set(PUBLISHED)
    assert {model.id for model in catalog.models()} - set(PUBLISHED) == set(catalog.built_in())
    assert catalog.find("qwen9") is None


def test_a_built_in_model_takes_its_shapes_from_its_own_folder_and_is_left_out_without_one(
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
    (tmp_path / "demo-half").mkdir()
    (tmp_path / "demo-half" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(catalog, "MODELS", tmp_path)
    catalog.models.cache_clear()

    model, others = catalog.find("demo-half"), (catalog.find("demo"), catalog.find("demo-quarter"))

    catalog.models.cache_clear()
    assert others == (None, None)
    assert model is not None
    assert (model.repo, model.revision, model.license) == ("demo-half", None, "Apache-2.0")
    assert model.teacher == "demo"
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

    assert best < 0.06
