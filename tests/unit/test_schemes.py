"""Schemes: what llama-quantize gives each tensor, worked by hand; the oracle test asks llama.cpp itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import modelspec, schemes
from edgepack.errors import Unsupported
from edgepack.ggufheader import BLOCKS
from edgepack.modelspec import ModelSpec
from edgepack.units import Bytes
from tests.shapes import CONFIGS, config, spec

FAMILIES = (
    ("F32", "F16", "Q8_0", "Q5_0", "Q4_0"),
    ("BF16", "Q8_0", "Q5_1", "Q4_1"),
    ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_L", "Q3_K_M", "Q3_K_S"),
    ("Q5_K_M", "Q5_K_S", "Q4_K_S", "Q2_K"),
    ("IQ4_NL", "IQ3_XXS", "IQ2_XXS", "IQ1_S"),
)
"""Schemes that only get smaller, whatever the shape."""

shapes = st.builds(
    lambda kind, layers, heads, group, dim, ffn, vocab, tied: modelspec.from_config(
        config(
            kind, layers, heads * dim, ffn, heads, heads // group, vocab,
            head_dim=dim, tie_word_embeddings=tied,
        ),
        name="any",
    ),
    st.sampled_from(["llama", "qwen2", "qwen3"]),
    st.integers(1, 12),
    st.sampled_from([4, 8, 16]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([32, 64, 96, 128]),
    st.sampled_from([256, 640, 864, 1024, 2816]),
    st.sampled_from([512, 1000, 4096]),
    st.booleans(),
)  # fmt: skip


def types(model: ModelSpec, scheme: str, *, imatrix: bool = False) -> dict[str, str]:
    kinds = schemes.tensor_types(model, scheme, imatrix=imatrix)
    return {t.name: kind for t, kind in zip(model.tensors, kinds, strict=True)}


def test_blocks_hold_what_ggml_says() -> None:
    def bits(kind: str) -> float:
        return BLOCKS[kind][2] * 8 / BLOCKS[kind][1]

    assert (bits("Q8_0"), bits("Q4_0"), bits("Q6_K"), bits("Q4_K")) == (8.5, 4.5, 6.5625, 4.5)
    assert bits("Q8_K") == 9.125, "hf-mem says 8.03"


def test_q4_k_m_spends_more_bits_on_half_of_the_values_and_downs() -> None:
    got = types(spec("llama-3.2-1b"), "Q4_K_M")
    better = [0, 1, 4, 7, 10, 13, 14, 15]

    assert [i for i in range(16) if got[f"blk.{i}.ffn_down.weight"] == "Q6_K"] == better
    assert [i for i in range(16) if got[f"blk.{i}.attn_v.weight"] == "Q6_K"] == better
    assert got["token_embd.weight"] == "Q6_K", "tied: it is the output"
    assert got["output_norm.weight"] == "F32"


def test_rows_that_256_does_not_divide_fall_back() -> None:
    """Qwen2.5-0.5B has 896 columns: its Q4_K_M is mostly Q5_0 and Q8_0, and Q2_K saves nothing over Q4_0."""
    model = spec("qwen2.5-0.5b")

    assert Counter(types(model, "Q4_K_M").values())["Q5_0"] > 100
    assert types(model, "Q4_K_M")["blk.12.ffn_down.weight"] == "Q4_K", "4864 is 19 x 256"
    assert schemes.bits_per_weight(model, "Q4_K_M", imatrix=False) == pytest.approx(6.35, abs=0.005)
    assert schemes.bits_per_weight(model, "Q2_K", imatrix=False) == pytest.approx(5.39, abs=0.005)


def test_rows_that_32_does_not_divide_stay_f16() -> None:
    assert types(spec("stories260k"), "Q4_K_M")["blk.0.ffn_down.weight"] == "F16"


def test_embeddings_and_norms_are_not_counted_at_the_nominal_bits() -> None:
    """Parameters times nominal bits is what accelerate prints; Llama-3.2-1B as Q4_0 is a fifth more."""
    model = spec("llama-3.2-1b")

    assert schemes.weights_bytes(model, "Q4_0", imatrix=False) > 1.15 * model.parameters * 4.0 / 8


def test_a_70b_gives_its_shared_values_more() -> None:
    assert types(spec("llama-3-70b"), "Q4_K_S")["blk.40.attn_v.weight"] == "Q5_K"
    assert types(spec("qwen2.5-72b"), "Q3_K_S")["blk.40.attn_v.weight"] == "Q5_K"


def test_an_importance_matrix_changes_the_first_downs() -> None:
    model = spec("qwen2.5-1.5b")

    assert types(model, "Q4_0", imatrix=True)["blk.0.ffn_down.weight"] == "Q4_1"
    assert types(model, "Q4_0")["blk.0.ffn_down.weight"] == "Q4_0"
    assert types(model, "IQ4_XS")["blk.0.ffn_down.weight"] == "Q5_K"
    assert types(model, "IQ4_XS", imatrix=True)["blk.0.ffn_down.weight"] == "IQ4_XS"


def test_eight_experts_keep_their_attention_wide() -> None:
    got = types(spec("qwen3-8-experts"), "Q4_K_M")

    assert got["blk.5.attn_k.weight"] == "Q8_0"
    assert got["blk.5.attn_output.weight"] == "Q5_K"
    assert got["blk.5.ffn_gate_inp.weight"] == "F32"
    assert types(spec("qwen3-8-experts"), "MXFP4_MOE")["blk.5.ffn_up_exps.weight"] == "MXFP4"


def test_very_low_bits_need_an_importance_matrix() -> None:
    needy = {s for s in schemes.GGUF if schemes.needs_imatrix(s)}

    assert needy == {
        "IQ3_XXS", "IQ3_XS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S",
    }  # fmt: skip


def test_names_are_taken_in_any_spelling_and_unknown_ones_refused() -> None:
    assert schemes.canonical("q4_k") == "Q4_K_M"
    with pytest.raises(Unsupported, match="q9"):
        schemes.canonical("q9")


def test_a_shape_that_llama_quantize_refuses_is_refused() -> None:
    with pytest.raises(Unsupported, match="no fallback for Q1_0"):
        schemes.tensor_types(spec("stories260k"), "Q1_0", imatrix=False)


def test_the_file_is_estimated_without_a_tokenizer_and_exact_with_its_header() -> None:
    model = spec("qwen2.5-0.5b")

    size, provenance = schemes.file_bytes(model, "Q8_0", imatrix=False)
    exact = schemes.file_bytes(replace(model, header_bytes=Bytes(5_945_312)), "Q8_0", imatrix=False)

    assert provenance == "fitted"
    assert exact[1] == "exact"
    assert size == pytest.approx(exact[0], rel=0.001)


@pytest.mark.parametrize(
    ("name", "header"), [("qwen3-0.6b", 5_957_216), ("gemma-3-1b", 6_533_248), ("llama-3.2-1b", 7_800_000)]
)
def test_the_estimated_header_is_near_published_ones(name: str, header: int) -> None:
    assert schemes.header_estimate(spec(name)) == pytest.approx(header, rel=0.02)


@given(shapes, st.sampled_from(schemes.GGUF), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_file_is_never_smaller_than_its_weights(model: ModelSpec, scheme: str, imatrix: bool) -> None:
    try:
        weights = schemes.weights_bytes(model, scheme, imatrix=imatrix)
    except Unsupported:
        return

    assert schemes.file_bytes(model, scheme, imatrix=imatrix)[0] >= weights


@given(shapes, st.sampled_from(FAMILIES))
@settings(max_examples=60, deadline=None)
def test_fewer_bits_never_weigh_more(model: ModelSpec, family: tuple[str, ...]) -> None:
    weights = [schemes.weights_bytes(model, scheme, imatrix=True) for scheme in family]

    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_scheme_gives_every_tensor_a_type_its_rows_can_have(name: str) -> None:
    model = spec(name)
    for scheme in schemes.GGUF:
        if scheme == "Q1_0" and any(t.shape[0] % 128 for t in model.tensors if schemes.quantizable(t)):
            continue

        assert schemes.weights_bytes(model, scheme, imatrix=True) > 0
