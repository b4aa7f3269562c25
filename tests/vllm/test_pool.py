"""The pool that a plan counts with is the one that vLLM makes of the rendered flags, block for block."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepack import pipeline, plan, profile
from edgepack.plan import Plan, Request
from edgepack.runtimes import vllm
from tests.vllm.conftest import Parse

DEMO = Path(__file__).parents[2] / "edgepack" / "models" / "demo"
PROMPT = [5, 17, 99, 3] * 10

_SHAPE = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "max_position_embeddings": 2048, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "llama, 8 heads on 1": {**_SHAPE, "model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 1},
    "llama, a cache for every head": {**_SHAPE, "model_type": "llama", "num_key_value_heads": 4},
    "qwen3, 3 layers": {**_SHAPE, "model_type": "qwen3", "num_hidden_layers": 3},
    "mistral, windows only": {**_SHAPE, "model_type": "mistral", "sliding_window": 256},
    "gemma 3, 5 windows and 1 whole": {
        **_SHAPE, "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 256, "head_dim": 64,
        "query_pre_attn_scalar": 64,
    },
    "gemma 3, 10 layers": {
        **_SHAPE, "model_type": "gemma3_text", "num_hidden_layers": 10, "sliding_window": 128, "head_dim": 64,
        "query_pre_attn_scalar": 64,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of each shape, with the built-in model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {"demo": DEMO}
    for number, (name, shape) in enumerate(SHAPES.items()):
        folder = tmp_path_factory.mktemp(f"shape{number}")
        torch.manual_seed(number)
        kind = str(shape["model_type"])
        config = AutoConfig.for_model(
            kind, **{key: value for key, value in shape.items() if key != "model_type"}
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO / file, folder / file)
        made[name] = folder
    return made


def planned(folder: Path, *, kv_type: str, context: int, slots: int, ubatch: int = 256) -> Plan:
    request = Request(
        profile=profile.load("x86-laptop"), runtime=vllm.NAME, scheme="bf16", kv_type=kv_type, context=context,
        slots=slots, ubatch=ubatch, force=True, min_decode=0.0,
    )  # fmt: skip
    (found,) = plan.survey(request, [pipeline.named(str(folder))])
    assert isinstance(found, Plan)
    return found


@contextmanager
def engine(folder: Path, chosen: Plan, parse: Parse) -> Iterator[Any]:
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    words = vllm.launch(
        chosen.settings, alias="m", backend="cpu", start_up=chosen.start_up, version=vllm.CPU_VERSION
    )
    started = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parse(["--model", str(folder), *words])))
    try:
        yield started
    finally:
        started.engine_core.shutdown()
        cleanup_dist_env_and_memory()


CASES = [
    ("demo", "f16", 512, 1, 256),
    ("demo", "f16", 2048, 4, 512),
    ("demo", "f32", 1000, 3, 256),
    ("demo", "fp8", 1024, 2, 256),
    ("llama, 8 heads on 1", "f16", 4096, 2, 512),
    ("llama, a cache for every head", "f32", 777, 1, 128),
    ("qwen3, 3 layers", "f16", 6000, 5, 256),
    ("mistral, windows only", "f16", 2048, 1, 256),
    ("mistral, windows only", "f16", 2048, 2, 1024),
    ("gemma 3, 5 windows and 1 whole", "f32", 2048, 1, 256),
    ("gemma 3, 5 windows and 1 whole", "f32", 2000, 2, 128),
    ("gemma 3, 10 layers", "f32", 1536, 1, 512),
]


@pytest.mark.parametrize(("model", "kv_type", "context", "slots", "ubatch"), CASES)
def test_blocks_tokens_and_concurrency_are_the_plans(
    model: str, kv_type: str, context: int, slots: int, ubatch: int, shapes: dict[str, Path], parse: Parse
) -> None:
    folder = shapes[model]
    chosen = planned(folder, kv_type=kv_type, context=context, slots=slots, ubatch=ubatch)

    told = chosen.start_up
    with engine(folder, chosen, parse) as started:
        cache = started.vllm_config.cache_config
        assert cache.num_gpu_blocks == told["num_blocks"]
        assert cache.kv_cache_size_tokens == told["kv_cache_tokens"]
        assert round(cache.kv_cache_max_concurrency, 2) == told["max_concurrency"]
        assert allocated(started) == chosen.memory.part("kv_cache")
        answer = ask(started)

    assert len(answer) == 4


def allocated(started: Any) -> int:
    """Bytes of the tensors that hold the cache; layers share some."""
    runner = started.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    storages = [tensor.untyped_storage() for tensor in runner.kv_caches]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def ask(started: Any) -> list[int]:
    """Four tokens after a prompt of forty."""
    from vllm import SamplingParams

    started.add_request("1", {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=4, ignore_eos=True))
    answered: list[Any] = []
    while started.has_unfinished_requests():
        answered += started.step()
    return list(answered[-1].outputs[0].token_ids)


def test_a_byte_less_is_refused_by_vllm(parse: Parse) -> None:
    """What the plan allows is the least that vLLM takes for one slot: its null block is in it."""
    chosen = planned(DEMO, kv_type="f16", context=512, slots=1)
    less = {**chosen.start_up, "kv_cache_memory_bytes": chosen.memory.part("kv_cache") - 1}

    with (
        pytest.raises(ValueError, match="estimated maximum model length is 384"),
        engine(DEMO, replace(chosen, start_up=less), parse),
    ):
        pass
