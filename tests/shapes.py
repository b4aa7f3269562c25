"""Shapes of known models as config.json values, for tests of the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgepack import architectures, modelspec, schemes
from edgepack.architectures import Config
from edgepack.builders import ggufwriter
from edgepack.ggufheader import FILE_TYPES, Entry
from edgepack.modelspec import ModelSpec
from edgepack.settings import Settings


def config(
    model_type: str, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: object
) -> dict[str, object]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        **more,
    }


TIED = {"tie_word_embeddings": True}
LLAMA3 = {"rope_scaling": {"rope_type": "llama3"}}

CONFIGS: Mapping[str, Mapping[str, object]] = {
    "qwen2.5-0.5b": config("qwen2", 24, 896, 4864, 14, 2, 151936, **TIED),
    "qwen2.5-1.5b": config("qwen2", 28, 1536, 8960, 12, 2, 151936, **TIED),
    "qwen2.5-3b": config("qwen2", 36, 2048, 11008, 16, 2, 151936, **TIED),
    "qwen2.5-7b": config("qwen2", 28, 3584, 18944, 28, 4, 152064),
    "qwen2.5-72b": config("qwen2", 80, 8192, 29568, 64, 8, 152064),
    "qwen3-0.6b": config("qwen3", 28, 1024, 3072, 16, 8, 151936, head_dim=128, **TIED),
    "llama-3.2-1b": config("llama", 16, 2048, 8192, 32, 8, 128256, head_dim=64, **TIED, **LLAMA3),
    "llama-3-70b": config("llama", 80, 8192, 28672, 64, 8, 128256),
    "gemma-3-1b": config("gemma3_text", 26, 1152, 6912, 4, 1, 262144, head_dim=256, sliding_window=512),
    "gemma-3-4b": config("gemma3_text", 34, 2560, 10240, 8, 4, 262208, head_dim=256, sliding_window=1024),
    "gemma-3-12b": config("gemma3_text", 48, 3840, 15360, 16, 8, 262208, head_dim=256, sliding_window=1024),
    "gemma-3-27b": config("gemma3_text", 62, 5376, 21504, 32, 16, 262208, head_dim=128, sliding_window=1024),
    "gemma-3-eleven": config("gemma3_text", 11, 640, 2048, 4, 1, 32000, head_dim=256, sliding_window=512),
    "stories260k": config("llama", 5, 64, 172, 8, 4, 512),
    "odd-biased": config("llama", 3, 320, 840, 5, 5, 1000, head_dim=64, attention_bias=True, mlp_bias=True),
    "odd-heads": config("llama", 7, 288, 768, 6, 6, 32000),
    "qwen3-8-experts": config(
        "qwen3_moe", 16, 1024, 3072, 16, 4, 32000,
        head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=768,
    ),
}  # fmt: skip

_DELTA_NET = {
    "head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
_GEMMA4 = {
    "head_dim": 256, "global_head_dim": 512, "hidden_size_per_layer_input": 256, "sliding_window": 512,
    "layer_types": [("full_attention" if il % 6 == 5 else "sliding_attention") for il in range(42)],
}  # fmt: skip

_GRANITE_H = {
    "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4,
}  # fmt: skip
_NEMOTRON = {"ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4}
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

PLANNED: Mapping[str, Mapping[str, object]] = {
    "gemma-2-2b": config("gemma2", 26, 2304, 9216, 8, 4, 256000, head_dim=256, sliding_window=4096),
    "gemma-3n-e2b": config(
        "gemma3n_text", 30, 2048, 8192, 8, 2, 262400, head_dim=256, sliding_window=512, num_kv_shared_layers=10
    ),
    "gemma-4-e4b": config("gemma4_text", 42, 2560, 10240, 8, 2, 262144, num_kv_shared_layers=18, **_GEMMA4),
    "qwen3.5-4b": config("qwen3_5_text", 32, 2560, 9216, 16, 4, 248320, **_DELTA_NET),
    "qwen3-next-80b": config(
        "qwen3_next", 48, 2048, 5120, 16, 2, 151936,
        num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        **_DELTA_NET,
    ),
    "phi-3.5-mini": config(
        "phi3", 32, 3072, 8192, 32, 32, 32064, tie_word_embeddings=False, rope_scaling={"type": "longrope"}
    ),
    "phi-4-mini": config(
        "phi3", 32, 3072, 8192, 24, 8, 200064,
        partial_rotary_factor=0.75, rope_scaling={"type": "longrope"}, **TIED,
    ),
    "granite-4.0-micro": config("granite", 40, 2560, 8192, 40, 8, 100352),
    "smollm3-3b": config("smollm3", 36, 2048, 11008, 16, 4, 128256),
    "minicpm-2b": config("minicpm", 40, 2304, 5760, 36, 36, 122753),
    "ministral-3-3b": config("ministral3", 26, 3072, 9216, 32, 8, 131072, head_dim=128),
    "lfm2-350m": config(
        "lfm2", 16, 1024, 4608, 16, 8, 65536,
        layer_types=[("full_attention" if il in (2, 5, 8, 10, 12, 14) else "conv") for il in range(16)],
    ),
    "command-r7b": config("cohere2", 32, 4096, 14336, 32, 8, 256000),
    "olmo-2-1b": config("olmo2", 16, 2048, 8192, 16, 16, 100352, tie_word_embeddings=False),
    "gpt-oss-20b": config(
        "gpt_oss", 24, 2880, 2880, 64, 8, 201088,
        head_dim=64, num_local_experts=32, num_experts_per_tok=4, sliding_window=128,
    ),
    "granite-4.0-h-micro": config(
        "granitemoehybrid", 40, 2048, 8192, 32, 8, 100352, shared_intermediate_size=8192, mamba_n_heads=64,
        layer_types=[("attention" if il % 10 == 5 else "mamba") for il in range(40)], **_GRANITE_H, **TIED,
    ),
    "granite-4.0-h-tiny": config(
        "granitemoehybrid", 40, 1536, 512, 12, 4, 100352, shared_intermediate_size=1024, mamba_n_heads=48,
        num_local_experts=64, num_experts_per_tok=6,
        layer_types=[("attention" if il % 10 == 5 else "mamba") for il in range(40)], **_GRANITE_H, **TIED,
    ),
    "granite-3.1-3b-a800m": config(
        "granitemoe", 32, 1536, 512, 24, 8, 49155, num_local_experts=40, num_experts_per_tok=8, **TIED
    ),
    "nemotron-nano-9b-v2": config(
        "nemotron_h", 56, 4480, 15680, 40, 8, 131072, head_dim=128, mamba_num_heads=128, mamba_head_dim=80,
        hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", **_NEMOTRON,
    ),
    "nemotron-3-nano-30b": config(
        "nemotron_h", 52, 2688, 1856, 32, 2, 131072, head_dim=128, mamba_num_heads=64, mamba_head_dim=64,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712, **_NEMOTRON,
    ),
    "nemotron-with-latent-experts-and-mtp": config(
        "nemotron_h", 6, 512, 256, 8, 2, 32000, head_dim=64, mamba_num_heads=16, mamba_head_dim=64,
        hybrid_override_pattern="MEM*EM", n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=512, moe_latent_size=256, num_nextn_predict_layers=1, **_NEMOTRON,
    ),
    "falcon-h1-0.5b": config(
        "falcon_h1", 36, 1024, 2048, 8, 2, 32784, head_dim=64, mamba_d_ssm=1536, mamba_n_heads=24,
        mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_d_conv=4,
    ),
    "deepseek-v2-lite": config(
        "deepseek_v2", 27, 2048, 10944, 16, 16, 102400, q_lora_rank=None, first_k_dense_replace=1,
        moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, **_MLA,
    ),
    "deepseek-v3-of-four-layers": config(
        "deepseek_v3", 4, 1536, 4608, 16, 16, 32000, q_lora_rank=512, first_k_dense_replace=1,
        moe_intermediate_size=512, n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=8,
        topk_method="noaux_tc", **_MLA,
    ),
    "llama-4-scout": config(
        "llama4_text", 48, 5120, 8192, 40, 8, 202048, head_dim=128, intermediate_size_mlp=16384,
        num_local_experts=16, num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=8192,
        **LLAMA3,
    ),
    "llama-4-of-eight-layers": config(
        "llama4_text", 8, 1024, 1024, 8, 2, 32000, head_dim=128, intermediate_size_mlp=2048,
        num_local_experts=8, num_experts_per_tok=1, interleave_moe_layer_step=2,
    ),
    "mixtral-8x7b": config(
        "mixtral", 32, 4096, 14336, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen3.5-35b-a3b": config(
        "qwen3_5_moe_text", 40, 2048, 512, 16, 2, 248320, num_experts=256, num_experts_per_tok=8,
        moe_intermediate_size=512, shared_expert_intermediate_size=512, tie_word_embeddings=False,
        mtp_num_hidden_layers=1, **_DELTA_NET,
    ),
    "qwen3.5-4b-with-mtp": config(
        "qwen3_5_text", 32, 2560, 9216, 16, 4, 248320, mtp_num_hidden_layers=1, **_DELTA_NET
    ),
    "qwen3-vl-2b": config("qwen3_vl_text", 28, 2048, 6144, 16, 8, 151936, head_dim=128, **TIED),
    "gemma-4-31b": config(
        "gemma4_text", 60, 5376, 21504, 32, 16, 262144, attention_k_eq_v=True, num_global_key_value_heads=4,
        head_dim=256, global_head_dim=512, sliding_window=1024,
        layer_types=[("full_attention" if il % 6 == 5 else "sliding_attention") for il in range(60)],
    ),
    "gemma-4-26b-a4b": config(
        "gemma4_text", 30, 2816, 2112, 16, 8, 262144, attention_k_eq_v=True, num_global_key_value_heads=2,
        head_dim=256, global_head_dim=512, sliding_window=1024, enable_moe_block=True, num_experts=128,
        top_k_experts=8, moe_intermediate_size=704,
        layer_types=[("full_attention" if il % 6 == 5 else "sliding_attention") for il in range(30)],
    ),
    "gemma-2b": config("gemma", 18, 2048, 16384, 8, 1, 256000, head_dim=256),
    "exaone-4-1.2b": config("exaone4", 30, 2048, 4096, 32, 8, 102400, head_dim=64, **TIED, **LLAMA3),
    "exaone-4-32b": config(
        "exaone4", 64, 5120, 27392, 40, 8, 102400, head_dim=128, sliding_window=4096,
        sliding_window_pattern="LLLG", **LLAMA3,
    ),
    "olmo-3-7b": config("olmo3", 32, 4096, 11008, 32, 32, 100278, sliding_window=4096),
    "smallthinker-4b": config(
        "smallthinker", 32, 1536, 768, 12, 2, 151936, head_dim=128, moe_num_primary_experts=32,
        moe_num_active_primary_experts=4, moe_ffn_hidden_size=768, sliding_window_size=4096,
        sliding_window_layout=[int(il % 4 != 0) for il in range(32)],
    ),
    "gpt-2-xl": {
        "model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257, "n_positions": 1024
    },
}  # fmt: skip
"""Architectures that are planned for and not converted."""


def spec(name: str) -> ModelSpec:
    return modelspec.from_config(CONFIGS.get(name) or PLANNED[name], name=name)


def settings(
    context: int = 4096,
    *,
    slots: int = 1,
    kv_type: str = "f16",
    ubatch: int = 512,
    flash_attention: bool = True,
    unified_kv: bool = False,
    gpu_layers: int = 0,
    load_mode: str = "none",
    repack: bool = True,
) -> Settings:
    return Settings(
        context=context,
        slots=slots,
        kv_type=kv_type,
        batch=max(2048, ubatch),
        ubatch=ubatch,
        flash_attention=flash_attention,
        unified_kv=unified_kv,
        threads=2,
        gpu_layers=gpu_layers,
        load_mode=load_mode,
        repack=repack,
    )


_REALS = {
    "cohere2": {"logit_scale": 1.0, "attention.layer_norm_epsilon": 1e-5},
    "granite": {"logit_scale": 8.0},
    "granitemoe": {"logit_scale": 8.0},
    "gpt2": {"attention.layer_norm_epsilon": 1e-5},
    "nemotron_h": {"attention.layer_norm_epsilon": 1e-5},
    "nemotron_h_moe": {"attention.layer_norm_epsilon": 1e-5},
}
"""Hyperparameters that llama.cpp wants and no size depends on."""
_GATING = {"smallthinker": {"expert_gating_func": 2}}
_FLAGS = ("attention.sliding_window_pattern", "attention.recurrent_layers")
_ZEROES = ("embedding_length_per_layer_input", "feed_forward_length")
"""Keys that llama.cpp wants even where they are 0."""


def write_gguf(path: Path, model: ModelSpec, scheme: str, *, with_file_type: bool = True) -> Path:
    """A GGUF of header and hole that llama.cpp loads without its weights; it has no tokenizer."""
    arch = model.architecture
    numbers: dict[str, architectures.Key] = {
        "block_count": model.layers,
        "context_length": model.context_train,
        "embedding_length": model.hidden,
        "feed_forward_length": model.ffn,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "rope.dimension_count": model.head_dim,
        "vocab_size": model.vocab,
        "expert_count": model.experts,
        "expert_used_count": model.experts_used,
        "expert_feed_forward_length": model.expert_ffn,
        "attention.sliding_window": max((kind.window or 0 for kind in model.kv), default=0),
    }
    if model.name in PLANNED:
        values = PLANNED[model.name]
        layout = architectures.read(str(values["model_type"]), Config(values, model.name))
        assert layout is not None
        numbers |= layout.keys
    numbers |= _GATING.get(arch, {})
    file_type = next(n for n, name in FILE_TYPES.items() if name == scheme)
    entries = [
        Entry(key="general.architecture", kind="str", value=arch),
        *([Entry(key="general.file_type", kind="u32", value=file_type)] if with_file_type else []),
        Entry(key="general.quantization_version", kind="u32", value=2),
        *(
            Entry(key=f"{arch}.{key}", kind="bool" if key in _FLAGS else "u32", value=value)
            for key, value in numbers.items()
            if value or key in _ZEROES
        ),
        *(Entry(key=f"{arch}.{key}", kind="f32", value=value) for key, value in _REALS.get(arch, {}).items()),
        Entry(key=f"{arch}.attention.layer_norm_rms_epsilon", kind="f32", value=1e-6),
        Entry(key="tokenizer.ggml.model", kind="str", value="none"),
    ]
    kinds = schemes.tensor_types(model, scheme, imatrix=False)
    infos = ggufwriter.layout([(t.name, k, t.shape) for t, k in zip(model.tensors, kinds, strict=True)])
    header = ggufwriter.header(entries, infos)
    last = infos[-1]
    size = last.offset + schemes.tensor_bytes(last.type, last.shape)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + -(-size // 32) * 32)
    return path
