"""The table of flags against vLLM's own parser, and every profile's rendered flags read by it."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import pytest

from edgepack import pipeline, plan, profile
from edgepack.plan import Plan, Request
from edgepack.runtimes import vllm, vllm_flags
from tests.vllm.conftest import Parse

DEMO = str(Path(__file__).parents[2] / "edgepack" / "models" / "demo")
HERE = version(vllm.CPU_PACKAGE)


@pytest.fixture(scope="module")
def options() -> dict[str, argparse.Action]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return {name: action for action in parser._actions for name in action.option_strings}


def test_the_version_is_the_one_that_bundles_ask_for() -> None:
    assert HERE == vllm.CPU_VERSION


@pytest.mark.parametrize("flag", vllm_flags.FLAGS, ids=lambda flag: flag.name)
def test_a_row_says_what_the_parser_knows(flag: vllm_flags.Flag, options: dict[str, argparse.Action]) -> None:
    top = f"--{flag.name.partition('.')[0]}"

    assert (top in options) == vllm_flags.has(flag.name, HERE)
    if top not in options or "." in flag.name:
        return
    action = options[top]
    assert (action.nargs == 0) == (flag.kind == "switch")
    assert (action.nargs == "+") == (flag.kind == "ints") or flag.name == "served-model-name"
    assert (f"--no-{flag.name}" in options) == (flag.negated is not None)
    if action.choices is not None:
        assert set(flag.choices) <= set(action.choices)


@pytest.mark.parametrize("device", profile.names())
@pytest.mark.parametrize("slots", [1, 4])
def test_the_flags_of_every_profile_are_read_as_they_are_meant(device: str, slots: int, parse: Parse) -> None:
    request = Request(
        profile=profile.load(device), runtime=vllm.NAME, scheme="gptq-int4-g128", slots=slots, context=slots * 1024,
        force=True, min_decode=0.0,
    )  # fmt: skip
    found = plan.survey(request, [pipeline.named("qwen2.5-1.5b-instruct")])
    chosen = next(outcome for outcome in found if isinstance(outcome, Plan))
    backend = chosen.profile.backend

    read = parse(
        [
            *("--model", "folder", "--host", "127.0.0.1", "--port", "8080"),
            *vllm.launch(chosen.settings, alias="m", backend=backend, start_up=chosen.start_up, version=HERE),
        ]
    )

    assert read.max_model_len == 1024
    assert read.max_num_seqs == slots
    assert read.max_num_batched_tokens == chosen.settings.batch
    assert read.max_num_queued_reqs == slots + vllm.QUEUE
    assert read.kv_cache_memory_bytes == chosen.memory.part("kv_cache")
    assert read.block_size == chosen.start_up["block_size"]
    assert read.enable_prefix_caching is True
    assert read.enable_chunked_prefill is True
    assert read.enable_log_requests is False
    assert read.enable_prompt_tokens_details is True
    assert read.generation_config == "vllm"
    assert read.load_format == "safetensors"
    assert read.served_model_name == ["m"]
    assert read.enforce_eager is False
    if backend != "cpu":
        assert read.gpu_memory_utilization == chosen.start_up["gpu_memory_utilization"]
        assert read.cudagraph_capture_sizes == ([1] if slots == 1 else [1, 2, 4])
        assert read.compilation_config.cudagraph_mode.name == "FULL_DECODE_ONLY"


@pytest.mark.parametrize("device", ["rtx-4060-laptop-8gb", "jetson-orin-nx-16gb", "x86-laptop"])
def test_the_engines_configuration_accepts_the_flags_and_keeps_their_numbers(
    device: str, parse: Parse
) -> None:
    """Of a GPU's flags all but the graphs, which a CPU has none of."""
    from vllm.engine.arg_utils import EngineArgs

    request = Request(
        profile=profile.load(device), runtime=vllm.NAME, scheme="bf16", slots=4, context=2000, force=True,
        min_decode=0.0,
    )  # fmt: skip
    chosen = next(
        found for found in plan.survey(request, [pipeline.named("demo")]) if isinstance(found, Plan)
    )
    words = vllm.launch(
        chosen.settings, alias="m", backend=chosen.profile.backend, start_up=chosen.start_up, version=HERE
    )

    made = EngineArgs.from_cli_args(parse(["--model", DEMO, *words])).create_engine_config()

    assert made.cache_config.kv_cache_memory_bytes == chosen.memory.part("kv_cache")
    assert made.cache_config.block_size == chosen.start_up["block_size"]
    assert made.cache_config.enable_prefix_caching is True
    assert made.model_config.max_model_len == 500
    assert made.scheduler_config.max_num_seqs == 4
    assert made.scheduler_config.max_num_batched_tokens == chosen.settings.batch
    assert made.scheduler_config.enable_chunked_prefill is True


@pytest.mark.parametrize(
    "words",
    [
        ["--swap-space", "4"],
        ["--max-cpu-cache-buffer", "2"],
        ["--chunked-prefill-tokens", "512"],
        ["--use-beam-search"],
        ["--max-model-len", "many"],
    ],
    ids=lambda words: words[0],
)
def test_the_parser_refuses_what_the_table_refuses(words: list[str], parse: Parse) -> None:
    with pytest.raises(SystemExit):
        parse(["--model", "folder", *words])
