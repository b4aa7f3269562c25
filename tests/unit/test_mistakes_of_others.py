"""What other estimators get wrong, as their own issues and their users' figures show it, and we must not.

Ten families of mistakes, numbered in each docstring. The parts of 8 to 10 that only exist inside vLLM or MLX (its
start-up check, expanded caches) are tested here as far as our own arithmetic and our own checks can make them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgepack import architectures, memory, modelspec, schemes
from edgepack.device import agent
from edgepack.ggufheader import BLOCKS
from edgepack.modelspec import ModelSpec
from edgepack.runtimes import llama_cpp
from edgepack.units import GIB, KIB, MIB
from tests.shapes import config, settings, spec


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
    """1. gguf-parser takes il % 6 == 0: one layer too many (6, 5 and 11 in 4B, 1B and 27B)."""
    assert [kind.count for kind in spec(name).kv if kind.window is None] == [layers]


def test_mla_caches_one_latent_row_and_no_values() -> None:
    """2. gguf-parser counts (192 + 128) x 128 heads, 71 times as much for DeepSeek V3; hf-mem (6) does as well."""
    keys = {
        "block_count": 61, "embedding_length": 7168, "attention.head_count": 128, "attention.head_count_kv": 1,
        "attention.key_length": 576, "attention.value_length": 512,
        "attention.key_length_mla": 192, "attention.value_length_mla": 128,
    }  # fmt: skip

    kinds = architectures.caches("deepseek2", keys, name="v3").kv

    assert sum(k.count * k.heads * (k.key_dim + k.value_dim) * 2 for k in kinds) == 70_272


def test_full_attention_interval_is_heeded() -> None:
    """3. gguf-parser (issue 28, PR 29) gives the linear layers of Qwen3.5 a cache: four times too much. 6. hf-mem takes
    "linear_attention" in layer_types for a sliding layer without a window: the same four times."""
    assert per_token(spec("qwen3.5-4b")) == 32_768
    assert llama_cpp.recurrent_bytes(spec("qwen3.5-4b"), settings()) / MIB == 50.25


def test_kv_heads_that_differ_by_layer_are_read_layer_by_layer() -> None:
    """3. gguf-parser (PR 33) reads LFM2's list as one number, and finds no cache."""
    assert per_token(spec("lfm2-350m")) == 12_288


def test_a_quantized_cache_has_scales() -> None:
    """4. ollama and llmfit count 1.0 and 0.5 bytes: 6 and 12 % too little."""
    f16 = per_token(spec("llama-3.2-1b"))

    assert per_token(spec("llama-3.2-1b"), "q8_0") / f16 * 2 == 1.0625
    assert per_token(spec("llama-3.2-1b"), "q4_0") / f16 * 2 == 0.5625


def test_head_size_is_read_not_divided() -> None:
    """5. hf-mem (GGUF) divides hidden_size by the heads: 64 for Qwen3-0.6B, which has 128."""
    assert per_token(spec("qwen3-0.6b")) == 114_688


def test_windows_bound_the_cache_of_sliding_layers() -> None:
    """5. hf-mem gives every layer the whole context; 3. gguf-parser's table of windows had gaps (PR 34)."""
    assert per_token(spec("gemma-2-2b")) == 53_248
    assert per_token(spec("gemma-3-1b")) == 4_096


def test_the_context_asked_for_counts_not_the_one_trained_for() -> None:
    """5. hf-mem always takes the trained context, and so did llmfit (issue 302): 26.3 GB for a Qwen3.5-9B at 262,144
    tokens, on a laptop whose 8 GB card runs it."""
    model = spec("qwen3.5-4b")
    trained = replace(model, context_train=262_144)

    assert (
        llama_cpp.kv_bytes(trained, settings(4096)) == llama_cpp.kv_bytes(model, settings(4096)) == 128 * MIB
    )


def test_layers_that_share_a_cache_are_counted_once() -> None:
    assert [kind.count for kind in spec("gemma-4-e4b").kv] == [4, 20]
    assert sum(kind.count for kind in spec("gemma-3n-e2b").kv) == 20


def test_q8_k_has_a_float_scale_and_sums() -> None:
    """5. hf-mem: 8.03 bits per weight."""
    _, weights, size = BLOCKS["Q8_K"]

    assert size * 8 / weights == 9.125


@pytest.mark.parametrize(("context", "gib"), [(32768, 4.5), (262_144, 36.0)])
def test_the_cache_follows_layers_and_kv_heads_not_the_number_of_parameters(context: int, gib: float) -> None:
    """7. llm-checker is 2.4 times too low: a rule of thumb from the number of parameters has no caches in it. The same
    rule in Osmantic/ODS (issue 3324) said at most 3.5 GiB at 32k for 36 layers of 8 heads of 128."""
    shape = config("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128, max_position_embeddings=262_144)
    model = modelspec.from_config(shape, name="8B")

    assert llama_cpp.kv_bytes(model, settings(context)) / GIB == gib


def test_a_server_takes_more_than_its_weights() -> None:
    """7. Also the buffers count: with 32k of context an 8B in four bits takes twice its file."""
    shape = config("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128)
    model = modelspec.from_config(shape, name="8B")

    found = memory.estimate(model, "Q4_K_M", settings(32768), backend="cpu")

    assert {part.name for part in found.parts} == {"weights", "kv_cache", "compute", "output", "process"}
    assert found.total > found.part("weights") + 4.5 * GIB
    assert 1.9 < found.total / found.file_bytes < 2.4


def test_four_bits_are_more_than_half_a_byte_per_parameter() -> None:
    """8. accelerate counts parameters x bits, without scales."""
    model = spec("qwen2.5-0.5b")

    assert schemes.weights_bytes(model, "Q4_0", imatrix=False) > 1.3 * model.parameters / 2


def test_embeddings_stay_wide_where_only_the_blocks_are_quantized() -> None:
    """8. Llama-3.1-8B in FP8 is 8.49 GiB in vLLM's log, not the 7.48 of one byte per parameter."""
    model = modelspec.from_config(config("llama", 32, 4096, 14336, 32, 8, 128256), name="Llama-3.1-8B")

    blocks = sum(t.elements for t in model.tensors if t.name.startswith("blk.") and len(t.shape) > 1)
    outside = sum(t.elements for t in model.tensors) - blocks

    assert (blocks + 2 * outside) / GIB == pytest.approx(8.49, rel=0.01)
    assert model.parameters / GIB == pytest.approx(7.48, rel=0.001)


def test_the_page_cache_is_not_memory_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """9. vLLM's start-up check takes MemFree on unified memory (vllm issue 48140): a Jetson that has just copied a
    bundle has next to none of it."""
    copied = "MemTotal: 7800000 kB\nMemFree: 100000 kB\nMemAvailable: 6400000 kB\nCached: 6300000 kB\n"
    monkeypatch.setattr(agent, "_read", lambda path: copied if path == "/proc/meminfo" else None)

    assert agent.machine_facts()["memory_available"] == 6_400_000 * KIB


def test_the_same_model_has_the_cache_that_the_runtime_gives_it() -> None:
    """10. DeepSeek's cache is one latent row where the runtime knows MLA, and 71 times as much where it expands keys
    and values, as MLX does (lablup/mlxcel PR 172) and as llama.cpp does with files from before it knew."""
    common = {"block_count": 61, "embedding_length": 7168, "attention.head_count": 128}
    latent = common | {
        "attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512,
        "attention.key_length_mla": 192, "attention.value_length_mla": 128,
    }  # fmt: skip
    expanded = common | {
        "attention.head_count_kv": 128, "attention.key_length": 192, "attention.value_length": 128,
    }  # fmt: skip

    elements = [
        sum(
            k.heads * (k.key_dim + k.value_dim) for k in architectures.caches("deepseek2", keys, name="v3").kv
        )
        for keys in (latent, expanded)
    ]

    assert elements == [576, 24_576 + 16_384]


def test_active_parameters_are_not_what_lies_in_memory() -> None:
    """A mixture of experts is resident whole: 80B, of which 3B are read per token."""
    assert schemes.weights_bytes(spec("qwen3-next-80b"), "Q4_K_M", imatrix=False) > 79e9 * 4.5 / 8
