"""Architectures that are planned for only: a GGUF says what its config says, and none is built from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepack import architectures, memory, modelspec, pipeline, plan, profile, quantization, schemes
from edgepack.builders import convert
from edgepack.errors import BadInput, Unsupported
from edgepack.plan import Request
from edgepack.progress import Silent
from edgepack.runtimes import llama_cpp
from edgepack.units import GIB, MIB
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


def test_every_architecture_has_a_graph_or_an_interval() -> None:
    known = {*llama_cpp.EXACT_GRAPHS, *llama_cpp.OTHER_GRAPHS}

    assert {*modelspec.CONVERTED, *architectures.PLANNED} == known
    assert {*architectures.PLANNED, "llama"} == {spec(name).architecture for name in PLANNED}


# Weights as the models' makers or their safetensors indexes count them, and those of one token: tables of rope factors
# and what only drafts left out. Active counts hold the whole embedding, which the makers' "A3B" leaves out.
COUNTED = {
    "granite-4.0-h-micro": (3_191_396_096, 3_191_396_096),
    "granite-4.0-h-tiny": (6_939_037_248, 1_465_470_528),
    "nemotron-nano-9b-v2": (8_888_227_328, 8_888_227_328),
    "nemotron-3-nano-30b": (31_577_940_288, 3_580_076_352),
    "falcon-h1-0.5b": (521_411_104, 521_411_104),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    "llama-4-scout": (107_769_861_120, 17_172_894_720),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "qwen3.5-35b-a3b": (34_660_610_688, 3_454_988_928),
    "qwen3.5-4b-with-mtp": (4_205_751_296, 4_205_751_296),
    "qwen3-vl-2b": (1_720_574_976, 1_720_574_976),
    "gemma-2b": (2_506_172_416, 2_506_172_416),
    "exaone-4-1.2b": (1_279_391_488, 1_279_391_488),
    "exaone-4-32b": (32_003_216_384, 32_003_216_384),
    "olmo-3-7b": (7_298_011_136, 7_298_011_136),
    "gpt-2-xl": (1_557_611_200, 1_557_611_200),
}


@pytest.mark.parametrize("name", COUNTED)
def test_shapes_sum_to_the_published_parameters_and_to_those_of_one_token(name: str) -> None:
    model = spec(name)

    counted = [t for t in model.tensors if model.loaded(t) and not t.name.startswith("rope_f")]

    assert sum(t.elements for t in counted) == COUNTED[name][0]
    assert sum(t.elements * model.read_share(t) for t in counted) == COUNTED[name][1]


def test_deepseek_v3_keeps_576_numbers_a_layer_and_has_671_billion_weights() -> None:
    """Row m155 of the truth: 61 x 576 x 2 bytes a token; 671,026,419,200 is transformers' own count."""
    values = {
        **PLANNED["deepseek-v3-of-four-layers"], "num_hidden_layers": 61, "hidden_size": 7168,
        "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
        "q_lora_rank": 1536, "first_k_dense_replace": 3, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    }  # fmt: skip

    model = modelspec.from_config(values, name="deepseek-v3")

    assert llama_cpp.kv_bytes(model, settings(256)) == 256 * 70_272
    assert model.parameters == 671_026_419_200
    assert schemes.active_bytes(model, "Q8_0", imatrix=False) < 0.06 * schemes.weights_bytes(
        model, "Q8_0", imatrix=False
    )


def test_the_states_of_a_slot_are_the_published_ones() -> None:
    """Row m194 of the truth (four slots); llama.cpp's own figures for Qwen3.6-27B and Qwen3-Next-80B."""
    wide = {**PLANNED["qwen3.5-4b"], "num_hidden_layers": 64, "linear_num_value_heads": 48}

    assert 4 * spec("qwen3.5-35b-a3b").recurrent_bytes == 251.25 * MIB
    assert modelspec.from_config(wide, name="27b").recurrent_bytes == pytest.approx(
        149.62 * MIB, abs=0.005 * MIB
    )
    assert spec("qwen3-next-80b").recurrent_bytes == pytest.approx(75.4 * MIB, abs=0.05 * MIB)


@pytest.mark.parametrize("name", ["qwen3.5-4b-with-mtp", "qwen3.5-35b-a3b"])
def test_an_mtp_block_lies_in_the_file_and_not_in_memory(name: str) -> None:
    with_block = spec(name)
    without = modelspec.from_config({**PLANNED[name], "mtp_num_hidden_layers": 0}, name=name)

    one = memory.estimate(with_block, "Q8_0", settings(), backend="cpu")
    other = memory.estimate(without, "Q8_0", settings(), backend="cpu")

    assert with_block.draft_layers == 1
    assert with_block.layers == without.layers
    assert one.file_bytes - other.file_bytes > 100_000_000
    assert one.parts == other.parts


def test_one_token_reads_the_experts_that_are_used() -> None:
    mixtral, micro = spec("mixtral-8x7b"), spec("granite-4.0-h-micro")

    assert schemes.active_bytes(mixtral, "F16", imatrix=False) < 0.3 * schemes.weights_bytes(
        mixtral, "F16", imatrix=False
    )
    assert schemes.active_bytes(micro, "F16", imatrix=False) == schemes.weights_bytes(
        micro, "F16", imatrix=False
    )


def test_mixtral_is_a_llama_that_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLANNED["mixtral-8x7b"]), encoding="utf-8")

    with pytest.raises(Unsupported, match="mixtral, which edgepack plans for and does not convert"):
        convert.convert(tmp_path, tmp_path / "out.gguf", outtype="F16", progress=Silent())


def test_latent_keys_and_values_are_one_cache_of_one_type() -> None:
    with pytest.raises(Unsupported, match="cannot be q8_0 and f16"):
        llama_cpp.kv_bytes(spec("deepseek-v2-lite"), settings(kv_type="q8_0/f16"))


def test_a_multimodal_config_says_outside_whether_embeddings_are_tied() -> None:
    text = PLANNED["llama-4-of-eight-layers"]

    model = modelspec.from_config(
        {"model_type": "llama4", "tie_word_embeddings": True, "text_config": text}, name="nested"
    )

    assert model.tied


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


@pytest.mark.parametrize(
    ("name", "change", "missing"),
    [
        ("granite-4.0-h-micro", {"shared_intermediate_size": 4096}, "is not intermediate_size 8192"),
        ("granite-4.0-h-micro", {"mamba_n_heads": 32}, "2048 wide are not twice hidden_size 2048"),
        ("granite-4.0-h-micro", {"layer_types": ["mamba"] * 39 + ["mlstm"]}, "kind 'mlstm' is not known"),
        ("nemotron-nano-9b-v2", {"hybrid_override_pattern": "MX"}, "kind 'X' is not known"),
        ("nemotron-3-nano-30b", {"hybrid_override_pattern": "ME-" * 17 + "*"}, "this config has both"),
        ("nemotron-3-nano-30b", {"num_nextn_predict_layers": 2}, "2 MTP layers"),
        ("nemotron-3-nano-30b", {"block_configs": [{}]}, "block_configs"),
        ("falcon-h1-0.5b", {"projectors_bias": True}, "projectors_bias = True"),
        ("deepseek-v2-lite", {"q_lora_rank": 1536}, "q_lora_rank 1536 with 27 layers"),
        ("deepseek-v3-of-four-layers", {"q_lora_rank": None}, "no q_lora_rank with 4 layers"),
        ("llama-4-scout", {"attention_chunk_size": 4096}, "attention_chunk_size = 4096"),
        ("llama-4-scout", {"no_rope_layers": [1] * 48}, "no_rope_layers"),
        ("exaone-4-1.2b", {"sliding_window": 4096, "sliding_window_pattern": 4}, "with 64 layers only"),
        ("smallthinker-4b", {"sliding_window_size": 1024}, "sliding_window_size = 1024"),
        ("gpt-2-xl", {"n_inner": 1600}, "an MLP of 1600"),
        ("gemma-4-31b", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3.5-4b", {"linear_value_head_dim": 64}, "linear attention with keys and values"),
        ("qwen3.5-4b", {"model_type": "glm_moe_dsa"}, "sparse attention's indexer"),
        ("qwen3.5-4b", {"model_type": "mamba9"}, "'mamba9' is not known$"),
    ],
)
def test_what_is_not_known_is_named(name: str, change: dict[str, object], missing: str) -> None:
    with pytest.raises(Unsupported, match=missing):
        modelspec.from_config({**PLANNED[name], **change}, name=name)


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(BadInput, match="layer_types is missing"):
        modelspec.from_config({**PLANNED["lfm2-350m"], "layer_types": None}, name="lfm2")
    with pytest.raises(BadInput, match="neither hybrid_override_pattern nor layers_block_type"):
        modelspec.from_config(
            {**PLANNED["nemotron-nano-9b-v2"], "hybrid_override_pattern": None}, name="nemotron"
        )


def test_a_checkpoint_that_is_only_planned_for_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLANNED["smollm3-3b"]), encoding="utf-8")

    with pytest.raises(Unsupported, match="smollm3, which edgepack plans for and does not convert"):
        convert.convert(tmp_path, tmp_path / "out.gguf", outtype="F16", progress=Silent())


def test_a_build_of_it_ends_before_anything_is_fetched() -> None:
    device = profile.load("jetson-orin-nano-8gb")
    chosen = pipeline.make_plan(Request(profile=device), [pipeline.named("smollm3-3b")])

    with pytest.raises(Unsupported, match="plans for and does not convert"):
        options = pipeline.BuildOptions(out=Path("nowhere"), quantization=quantization.Options())
        pipeline.build(chosen, options, Silent())


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
