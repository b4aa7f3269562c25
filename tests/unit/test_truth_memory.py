"""Published sizes as a gate: what other people's files and logs say, to the digit they print.

tests/truth/memory.jsonl holds the rows that must come out exactly; tests/truth/observational.jsonl lists
apart what has no closed form here: whole-system readings, other runtimes, files that are no stock scheme.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import architectures, layouts, modelspec, schemes
from edgepack.modelspec import KvLayers, ModelSpec
from edgepack.runtimes import llama_cpp, vllm
from edgepack.settings import Settings
from edgepack.units import GIB, KIB, MIB, Bytes

TRUTH = Path(__file__).parent.parent / "truth"
UNITS = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "bpw": 1}

Row = Mapping[str, Any]  # one line of the truth file; its values are what the source printed


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (TRUTH / name).read_text().splitlines()]


GATE = rows("memory.jsonl")
SIZES = [r for r in GATE if r["quantity"] in ("bits_per_weight", "model_size", "file_size")]
CACHES = [r for r in GATE if r["quantity"].startswith("kv_cache")]
STATES = [r for r in GATE if r["quantity"] in ("recurrent_state", "context_total")]
BUFFERS = [r for r in GATE if r["quantity"] == "compute_buffer_device"]
POOLS = [r for r in GATE if r["quantity"].startswith("kv_pool_tokens_for_")]
LOADS = [r for r in GATE if r["quantity"] in ("model_load_memory", "weights_bytes")]


def ids(row: Row) -> str:
    return f"{row['id']}-{row['model']}-{row.get('quant') or row.get('kv_type')}-{row['quantity']}"


@pytest.mark.parametrize("row", SIZES, ids=ids)
def test_size_is_what_was_printed(row: Row) -> None:
    spec, scheme = spec_of(row), row["quant"]
    imatrix = "imatrix used" in row.get("note", "") or schemes.needs_imatrix(scheme)

    if row["quantity"] == "bits_per_weight":
        got = schemes.bits_per_weight(spec, scheme, imatrix=imatrix)
    elif row["quantity"] == "model_size":
        got = schemes.weights_bytes(spec, scheme, imatrix=imatrix) / UNITS[row["unit"]]
    else:
        got = schemes.file_bytes(spec, scheme, imatrix=imatrix)[0] / UNITS[row["unit"]]

    assert got == pytest.approx(row["value"], rel=0, abs=half_a_digit(row))


@pytest.mark.parametrize("row", CACHES, ids=ids)
def test_kv_cache_is_what_was_printed(row: Row) -> None:
    layers = cache_of(row)
    settings = settings_of(row)

    got = sum(per_token(kind, settings) * row["ctx"] if row["ctx"] % 256 else
              llama_cpp.layer_kv_bytes(kind, settings) for kind in layers)  # fmt: skip

    assert got / UNITS[row["unit"]] == pytest.approx(row["value"], rel=0, abs=half_a_digit(row))


@pytest.mark.parametrize("row", BUFFERS, ids=ids)
def test_compute_buffer_of_a_gpu_is_what_was_printed(row: Row) -> None:
    """Logs from before the server limited its outputs: one row of logits for every token of a batch."""
    settings = replace(settings_of(row), ubatch=row["n_ubatch"], gpu_layers=99)

    rows = llama_cpp.output_rows(settings, "library")
    room = llama_cpp.compute(spec_of(row), settings, "cuda", outputs=rows)

    assert room.device / MIB == pytest.approx(row["value"], abs=half_a_digit(row))


@pytest.mark.parametrize("row", STATES, ids=ids)
def test_recurrent_state_is_what_was_printed(row: Row) -> None:
    """context_total: the cache and the state together, in whole MiB rounded down."""
    caches, slots = caches_of(row), row["batch"]

    state = caches.recurrent_bytes * slots / MIB

    if row["quantity"] == "recurrent_state":
        assert state == pytest.approx(row["value"], rel=0, abs=half_a_digit(row))
    else:
        settings = replace(settings_of(row), unified_kv=True)  # what llama-server does with four slots
        cache = sum(llama_cpp.layer_kv_bytes(kind, settings) for kind in caches.kv) / MIB
        assert int(cache + state) == row["value"]


@pytest.mark.parametrize("row", POOLS, ids=ids)
def test_vllm_prints_this_pool_for_the_memory_it_prints(row: Row) -> None:
    """The log rounds the memory to hundredths of a GiB; the tokens it prints are those of a size that rounds so."""
    spec = paged(row)
    gib = float(row["quantity"].removeprefix("kv_pool_tokens_for_").removesuffix("GiB"))

    fewest, nominal, most = (tokens(spec, row, int((gib + d) * GIB)) for d in (-0.005, 0.0, 0.005))

    assert fewest <= row["value"] <= most
    assert row["value"] in {tokens(spec, row, int((gib + d / 10000) * GIB)) for d in range(-50, 51)}
    assert nominal == pytest.approx(row["closed_form"], abs=vllm.BLOCK)


def tokens(spec: ModelSpec, row: Row, available: int) -> int:
    length = row["ctx"] or 4096
    pool = vllm.pool(
        spec, available=available, max_model_len=length, kv_type="bf16", batched=2048, backend="cuda"
    )
    return pool.group_tokens


@pytest.mark.parametrize("row", LOADS, ids=ids)
def test_weights_are_what_vllm_loaded_or_the_checkpoint_holds(row: Row) -> None:
    """FP16 and FP8 of Llama-3.1-8B to the digits of the closed form; gpt-oss-120b to the byte.

    The FP8 checkpoint is modelopt's, with an f32 scale for a matrix where ours has 16 bits for a row.
    """
    spec = paged(row) if row["model"] == "gpt-oss-120b" else spec_of(row)

    if row["quant"].startswith("MXFP4"):
        held = ("MXFP4" if t.name.endswith("_exps.weight") else "BF16" for t in spec.tensors)
        assert (
            sum(schemes.tensor_bytes(k, t.shape) for k, t in zip(held, spec.tensors, strict=True))
            == row["value"]
        )
        return
    fp8 = row["quant"].startswith("FP8")
    scales = sum(4 - 2 * t.shape[1] for t in spec.tensors if layouts.is_linear(t)) if fp8 else 0
    got = (schemes.weights_bytes(spec, "fp8" if fp8 else "bf16", imatrix=False) + scales) / GIB

    assert got == pytest.approx(row["closed_form"], abs=2e-6)
    assert got == pytest.approx(row["value"], rel=within(row))


def within(row: Row) -> float:
    """The share that a row's check allows, "within_0.04%", and the rounding of the percentage itself."""
    return (float(row["check"].removeprefix("within_").removesuffix("%")) + 0.01) / 100


def test_nvfp4_is_what_its_layout_says_and_less_than_what_vllm_loaded() -> None:
    """m244: blocks at 4.5 bits and 16-bit embeddings are 5.61 GiB; vLLM reported 6.07."""
    row = next(r for r in rows("observational.jsonl") if r["id"] == "m244")
    spec = spec_of(row)

    held = ("NVFP4" if t.name.startswith("blk.") and len(t.shape) > 1 else "BF16" for t in spec.tensors)
    got = sum(schemes.tensor_bytes(k, t.shape) for k, t in zip(held, spec.tensors, strict=True)) / GIB

    assert got == pytest.approx(5.61, abs=0.005)
    assert row["value"] - got == pytest.approx(0.46, abs=0.005)


def test_every_row_of_the_gate_is_tested() -> None:
    lists = (SIZES, CACHES, STATES, BUFFERS, POOLS, LOADS)

    assert sum(len(listed) for listed in lists) == len(GATE) == 135
    assert all(row["source"] for row in GATE)
    assert all(row["check"] == "exact" or row["id"] in {r["id"] for r in (*POOLS, *LOADS)} for row in GATE)


def test_what_is_not_gated_is_listed_apart_with_its_reason() -> None:
    reasons = {row["id"]: reason(row) for row in rows("observational.jsonl")}

    assert len(reasons) == 41
    assert "" not in reasons.values(), [key for key, value in reasons.items() if not value]


def reason(row: Row) -> str:
    """Why a published figure is not a gate; empty when it should be one."""
    if row["id"] in BEYOND:
        return BEYOND[row["id"]]
    if row["check"] == "observational":
        whole = ("jetson_system_ram_after_load", "jetson_peak_memory", "vram_process_total", "peak_memory")
        return "whole-system reading" if row["quantity"] in whole else "no stock scheme, or no closed form"
    return ""


BEYOND = {
    "m162": "a vision tower of 16-bit weights, which edgepack does not plan",
    "m244": "vLLM loads 0.46 GiB more than NVFP4's layout; what it is, the log does not say",
    "m247": "a checkpoint with a vision tower; the row does not give its shapes",
}


# -- from a row to what it speaks of --------------------------------------------------------------------


def spec_of(row: Row) -> ModelSpec:
    arch, model = row["arch_config"], row["model"]
    config = {
        "model_type": model_type(model),
        "num_hidden_layers": arch["layers"],
        "hidden_size": arch["hidden"],
        "num_attention_heads": arch["heads"],
        "num_key_value_heads": arch["kv_heads"],
        "head_dim": arch["head_dim"],
        "intermediate_size": arch.get("intermediate", arch["hidden"]),
        "vocab_size": arch["vocab"],
        "tie_word_embeddings": arch["tied"],
        "max_position_embeddings": 131072,
        "num_experts": arch.get("experts"),
        "num_experts_per_tok": arch.get("experts_used"),
        "moe_intermediate_size": arch.get("expert_intermediate"),
        "rope_scaling": {"rope_type": "llama3"} if model.startswith("Llama-3.") else None,
    }
    spec = modelspec.from_config(config, name=model)
    header = row.get("header_bytes")
    return replace(spec, header_bytes=Bytes(header)) if header else spec


def paged(row: Row) -> ModelSpec:
    """The layers of a row about vLLM; Gemma 4 only by what its row says, 16384 bytes a token in each layer."""
    arch, name = row["arch_config"], row["model"]
    if name == "gpt-oss-120b":
        config = {
            "model_type": "gpt_oss",
            "num_hidden_layers": arch["layers"],
            "hidden_size": arch["hidden"],
            "intermediate_size": arch["hidden"],
            "num_attention_heads": arch["heads"],
            "num_key_value_heads": arch["kv_heads"],
            "head_dim": arch["head_dim"],
            "vocab_size": arch["vocab"],
            "tie_word_embeddings": arch["tied"],
            "max_position_embeddings": 131072,
            "num_local_experts": arch["experts"],
            "num_experts_per_tok": arch["experts_used"],
            "sliding_window": arch["swa_window"],
        }
        return modelspec.from_config(config, name=name)
    if name.startswith("Gemma-4"):
        heads, dim = 16, 256
        full = KvLayers(count=arch["n_global"], heads=heads, key_dim=dim, value_dim=dim)
        sliding = replace(full, count=arch["n_swa"], window=arch["swa_window"])
        return replace(spec_of(TEMPLATE), name=name, layers=arch["layers"], kv=(full, sliding))
    return spec_of(row)


TEMPLATE = next(r for r in GATE if r["model"].startswith("Llama-3.1-8B"))


def model_type(model: str) -> str:
    if model.startswith("Qwen2"):
        return "qwen2"
    if model.startswith("Qwen3"):
        return "qwen3_moe" if "A3B" in model else "qwen3"
    return "llama"


def cache_of(row: Row) -> tuple[KvLayers, ...]:
    """The layers a row's KV figure is about: all, or those with or without a window."""
    arch, quantity = row["arch_config"], row["quantity"]
    if "n_global" in arch or "kv_lora_rank" in arch:
        kinds = caches_of(row).kv
    else:
        dim = arch["head_dim"]
        kinds = (KvLayers(count=arch["layers"], heads=arch["kv_heads"], key_dim=dim, value_dim=dim),)
    if quantity == "kv_cache_global":
        return tuple(kind for kind in kinds if not kind.window)
    if not quantity.startswith("kv_cache_swa"):
        return kinds
    whole = quantity == "kv_cache_swa_full" or "swa_full" in row.get("note", "")
    return tuple(replace(k, window=None if whole else k.window) for k in kinds if k.window)


def caches_of(row: Row) -> architectures.Caches:
    """What llama.cpp makes of the hyperparameters that a row gives."""
    arch = row["arch_config"]
    if "kv_lora_rank" in arch:
        return architectures.caches("deepseek2", latent(row), name=row["model"])
    keys: dict[str, architectures.Key] = {
        "block_count": arch["layers"],
        "embedding_length": arch.get("hidden", 0),
        "attention.head_count": arch.get("heads", 16),
        "attention.head_count_kv": arch["kv_heads"],
        "attention.key_length": arch["head_dim"],
        "attention.value_length": arch["head_dim"],
    }
    if row["model"].startswith("Gemma-4-E4B"):
        keys |= {
            "attention.key_length_swa": arch["swa_head_dim"],
            "attention.value_length_swa": arch["swa_head_dim"],
            "attention.sliding_window": arch["swa_window"],
            "attention.sliding_window_pattern": tuple(int(il % 6 != 5) for il in range(42)),
            "attention.shared_kv_layers": 18,
        }
        return architectures.caches("gemma4", keys, name=row["model"])
    if "ssm_d_conv" in arch:
        keys |= {
            "full_attention_interval": arch["full_attention_interval"],
            "ssm.conv_kernel": arch["ssm_d_conv"],
            "ssm.inner_size": arch["ssm_v_heads"] * arch["ssm_head_dim"],
            "ssm.state_size": arch["ssm_head_dim"],
            "ssm.time_step_rank": arch["ssm_v_heads"],
            "ssm.group_count": arch["ssm_k_heads"],
        }
        return architectures.caches("qwen3next", keys, name=row["model"])
    assert row["model"].startswith("Gemma-2"), f"{row['id']} has no layers"
    return architectures.caches("gemma2", keys, name=row["model"])


def latent(row: Row) -> dict[str, architectures.Key]:
    """DeepSeek: one latent row per token, keys only; before that path was written, keys and values unfolded."""
    arch, old = row["arch_config"], "non-MLA" in row.get("note", "")
    rope = arch["qk_rope_head_dim"]
    unfolded = arch["qk_nope_head_dim"] + rope
    keys: dict[str, architectures.Key] = {
        "block_count": arch["layers"],
        "embedding_length": arch["hidden"],
        "attention.head_count": arch["heads"],
        "attention.head_count_kv": arch["heads"] if old else 1,
        "attention.key_length": unfolded if old else arch["kv_lora_rank"] + rope,
        "attention.value_length": arch["v_head_dim"] if old else arch["kv_lora_rank"],
    }
    return (
        keys
        if old
        else {**keys, "attention.key_length_mla": unfolded, "attention.value_length_mla": arch["v_head_dim"]}
    )


def settings_of(row: Row) -> Settings:
    return Settings(
        context=row["ctx"] if row["ctx"] % 256 == 0 else 256,
        slots=row["batch"] or 1,
        kv_type=row["kv_type"],
        batch=2048,
        ubatch=row.get("n_ubatch", 512),
        flash_attention=True,
        unified_kv=False,
        threads=1,
        gpu_layers=0,
        load_mode="none",
        repack=True,
    )


def per_token(kind: KvLayers, settings: Settings) -> int:
    """Bytes of one token, for figures that are no multiple of llama.cpp's 256 cells."""
    whole = llama_cpp.layer_kv_bytes(replace(kind, window=None), settings)
    assert whole % 256 == 0
    return whole // 256


def half_a_digit(row: Row) -> float:
    """Half a unit of the last place that the row's source prints for this quantity.

    Tables of sizes print all rows alike, so the row with most digits speaks for all ("3.50" is stored as
    3.5); logs print MiB with two; other figures are taken as they stand.
    """
    alike = [r for r in SIZES if (r["source"], r["quantity"]) == (row["source"], row["quantity"])]
    digits = 2 if row["unit"] == "MiB" else max(decimals(r["value"]) for r in [*alike, row])
    return 0.5 * 10.0**-digits + 1e-9


def decimals(value: float) -> int:
    return len(str(value).partition(".")[2]) if value % 1 else 0
