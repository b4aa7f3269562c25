"""What other estimators get wrong, as their own issues and their users' figures show it, and we must not."""

from __future__ import annotations

import pytest

from edgepack import architectures, schemes
from edgepack.ggufheader import BLOCKS
from edgepack.modelspec import ModelSpec
from edgepack.runtimes import llama_cpp
from edgepack.units import MIB
from tests.shapes import settings, spec


def per_token(model: ModelSpec, kv_type: str = "f16") -> int:
    """Bytes that one more token takes in the layers without a window."""
    grown = llama_cpp.kv_bytes(model, settings(65536, kv_type=kv_type))
    return (grown - llama_cpp.kv_bytes(model, settings(32768, kv_type=kv_type))) // 32768


@pytest.mark.parametrize(
    ("name", "layers"), [("gemma-3-1b", 4), ("gemma-3-4b", 5), ("gemma-3-12b", 8), ("gemma-3-27b", 10)]
)
def test_gemma_3_has_full_attention_in_every_sixth_layer_not_in_the_first_of_six(
    name: str, layers: int
) -> None:
    """gguf-parser takes il % 6 == 0: one layer too many."""
    assert [kind.count for kind in spec(name).kv if kind.window is None] == [layers]


def test_mla_caches_one_latent_row_and_no_values() -> None:
    """gguf-parser counts (192 + 128) x 128 heads: 71 times as much for DeepSeek V3."""
    keys = {
        "block_count": 61, "embedding_length": 7168, "attention.head_count": 128, "attention.head_count_kv": 1,
        "attention.key_length": 576, "attention.value_length": 512,
        "attention.key_length_mla": 192, "attention.value_length_mla": 128,
    }  # fmt: skip

    kinds = architectures.caches("deepseek2", keys, name="v3").kv

    assert sum(k.count * k.heads * (k.key_dim + k.value_dim) * 2 for k in kinds) == 70_272


def test_full_attention_interval_is_heeded() -> None:
    """gguf-parser (issue 28) and hf-mem give the linear layers of Qwen3.5 a cache: four times too much."""
    assert per_token(spec("qwen3.5-4b")) == 32_768
    assert llama_cpp.recurrent_bytes(spec("qwen3.5-4b"), settings()) / MIB == 50.25


def test_kv_heads_that_differ_by_layer_are_read_layer_by_layer() -> None:
    """gguf-parser reads LFM2's list as one number, and finds no cache."""
    assert per_token(spec("lfm2-350m")) == 12_288


def test_a_quantized_cache_has_scales() -> None:
    """ollama and llmfit count 1.0 and 0.5 bytes."""
    f16 = per_token(spec("llama-3.2-1b"))

    assert per_token(spec("llama-3.2-1b"), "q8_0") / f16 * 2 == 1.0625
    assert per_token(spec("llama-3.2-1b"), "q4_0") / f16 * 2 == 0.5625


def test_head_size_is_read_not_divided() -> None:
    """hf-mem divides hidden_size by the heads: 64 for Qwen3-0.6B, which has 128."""
    assert per_token(spec("qwen3-0.6b")) == 114_688


def test_windows_bound_the_cache_of_sliding_layers() -> None:
    """hf-mem gives every layer the whole context."""
    assert per_token(spec("gemma-2-2b")) == 53_248
    assert per_token(spec("gemma-3-1b")) == 4_096


def test_layers_that_share_a_cache_are_counted_once() -> None:
    assert [kind.count for kind in spec("gemma-4-e4b").kv] == [4, 20]
    assert sum(kind.count for kind in spec("gemma-3n-e2b").kv) == 20


def test_q8_k_has_a_float_scale_and_sums() -> None:
    """hf-mem: 8.03 bits per weight."""
    _, weights, size = BLOCKS["Q8_K"]

    assert size * 8 / weights == 9.125


def test_four_bits_are_more_than_half_a_byte_per_parameter() -> None:
    """accelerate counts parameters x bits, without scales and with small embeddings."""
    model = spec("qwen2.5-0.5b")

    assert schemes.weights_bytes(model, "Q4_0", imatrix=False) > 1.3 * model.parameters / 2


def test_active_parameters_are_not_what_lies_in_memory() -> None:
    """A mixture of experts is resident whole: 80B, of which 3B are read per token."""
    assert schemes.weights_bytes(spec("qwen3-next-80b"), "Q4_K_M", imatrix=False) > 79e9 * 4.5 / 8
