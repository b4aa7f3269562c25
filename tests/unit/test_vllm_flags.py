"""The table of vLLM's flags: none that a version lacks passes, and each setting of 2024 maps or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepack.errors import BadInput, Unsupported
from edgepack.runtimes import vllm, vllm_flags
from edgepack.runtimes.vllm_flags import FLAGS, FORMER, READ, checked, has, translate

TODAY = vllm.VERSION


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("swap-space", "0.6.2", "0.17.1"),
        ("kv-cache-memory-bytes", "0.10.2", "0.33.0"),
        ("cudagraph-capture-sizes", "0.12.0", "0.33.0"),
        ("cuda-graph-sizes", "0.9.2", "0.12.0"),
        ("max-num-queued-reqs", "0.29.0", "0.33.0"),
        ("generation-config", "0.8.5", "0.33.0"),
        ("disable-log-requests", "0.6.2", "0.14.0"),
        ("enable-log-requests", "0.10.2", "0.33.0"),
        ("max-seq-len-to-capture", "0.6.2", "0.10.2"),
    ],
)
def test_a_flag_is_there_from_its_first_version_to_its_last(name: str, first: str, last: str) -> None:
    there = [version for version in READ if has(name, version)]

    assert (there[0], there[-1]) == (first, last)
    assert there == [v for v in READ if READ.index(first) <= READ.index(v) <= READ.index(last)]


def test_between_two_versions_that_were_read_a_new_flag_counts_as_missing() -> None:
    assert not has("max-num-queued-reqs", "0.28.0")
    assert not has("swap-space", "0.17.2")
    assert has("kv-cache-memory-bytes", "0.22.1")
    assert has("max-model-len", "0.8.5.post2")


@pytest.mark.parametrize("version", ["0.6.1", "0.34.0", "1.0.0", "latest", "0.33"])
def test_versions_that_were_not_read_are_refused(version: str) -> None:
    with pytest.raises(Unsupported, match=r"are not known here|is no version of vLLM"):
        checked(("--max-model-len", "512"), version)


@pytest.mark.parametrize(
    ("flags", "version", "said"),
    [
        (("--swap-space", "4"), "0.18.0", r"seen from 0\.6\.2 to 0\.17\.1"),
        (("--max-cpu-cache-buffer", "2"), TODAY, "not known to have --max-cpu-cache-buffer"),
        (("--model-dir", "x"), TODAY, "not known to have"),
        (("--kv-cache-memory-bytes", "1024"), "0.8.5", r"seen from 0\.10\.2"),
        (("--no-enforce-eager",), "0.8.5", "not known to take --no-enforce-eager"),
        (("--no-disable-log-stats",), TODAY, "not known to take"),
        (("--kv-cache-dtype", "q8_0"), TODAY, "not known"),
        (("--kv-cache-dtype", "float16"), "0.17.1", r"seen from 0\.18\.0 on"),
        (("--dtype", "int8"), TODAY, "not known"),
        (("--compilation-config.cudagraph_mode", "SOME"), TODAY, "not known"),
    ],
)
def test_what_a_version_lacks_does_not_pass(flags: tuple[str, ...], version: str, said: str) -> None:
    with pytest.raises(Unsupported, match=said) as refused:
        checked(flags, version)

    assert refused.value.hint


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-model-len", "4k"), "not a whole number"),
        (("--max-model-len", "0"), "at least 1"),
        (("--max-model-len",), "takes one value"),
        (("--max-model-len", "1", "2"), "takes one value"),
        (("--gpu-memory-utilization", "1.01"), "at most 1"),
        (("--gpu-memory-utilization", "0"), "at least 0.01"),
        (("--gpu-memory-utilization", "nan"), "not a number"),
        (("--gpu-memory-utilization", "90%"), "not a number"),
        (("--enforce-eager", "true"), "takes no value"),
        (("--cudagraph-capture-sizes",), "takes whole numbers"),
        (("--cudagraph-capture-sizes", "1", "2.5"), "not a whole number"),
        (("--cudagraph-capture-sizes", "1,2"), "not a whole number"),
        (("--no-max-model-len", "3"), r"not known to take|takes one value"),
        (("512",), "belongs to no flag"),
        (("--max-num-seqs", "2", "--max-num-seqs", "3"), "given twice"),
        (("--enforce-eager", "--no-enforce-eager"), "given twice"),
    ],
)
def test_a_value_of_the_wrong_kind_does_not_pass(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises((BadInput, Unsupported), match=said):
        checked(flags, TODAY)


def test_what_is_right_passes_as_it_is() -> None:
    flags = (
        "--max-model-len", "512", "--cudagraph-capture-sizes", "1", "2", "4", "--no-enable-log-requests",
        "--gpu-memory-utilization", "0.41", "--kv-cache-dtype", "fp8", "--enforce-eager", "--max-logprobs", "-1",
    )  # fmt: skip

    assert checked(flags, TODAY) == flags


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_row_names_versions_that_were_read(flag: vllm_flags.Flag) -> None:
    versions = [flag.since, *filter(None, (flag.until, flag.negated)), *flag.choices.values()]

    assert set(versions) <= set(READ)
    assert READ.index(flag.since) <= READ.index(flag.until or READ[-1])
    assert flag.negated is None or flag.kind == "switch"
    assert not flag.choices or flag.kind == "text"
    assert [row.name for row in FLAGS].count(flag.name) == 1


RECORDS = Path(__file__).parents[1] / "data" / "vllm_options"
"""What the parsers of wheels said (scripts/vllm_options.py)."""


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if "." not in flag.name], ids=lambda flag: flag.name)
@pytest.mark.parametrize("version", sorted(path.stem for path in RECORDS.glob("*.json")))
def test_a_row_says_what_the_parser_of_a_version_took(version: str, flag: vllm_flags.Flag) -> None:
    record = json.loads((RECORDS / f"{version}.json").read_text(encoding="utf-8"))
    assert record["wheel"].startswith(f"vllm-{version}-")

    option = record["options"].get(flag.name)

    assert (option is not None) == has(flag.name, version)
    if option is None:
        return
    assert (option["nargs"] == 0) == (flag.kind == "switch")
    assert (option["nargs"] == "+") == (flag.kind == "ints") or flag.name == "served-model-name"
    assert option["negated"] == (flag.negated is not None and not vllm_flags.before(version, flag.negated))
    if option["choices"] is not None:
        assert {value for value in flag.choices if vllm_flags.takes(flag.name, value, version)} == (
            set(flag.choices) & set(option["choices"])
        )


# -- the article's settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "flags"),
    [
        ("gpu_memory_utilization", 0.9, ("--gpu-memory-utilization", "0.9")),
        ("max_num_seqs", 64, ("--max-num-seqs", "64")),
        ("max_num_batched_tokens", 4096, ("--max-num-batched-tokens", "4096")),
        ("tensor_parallel_size", 1, ("--tensor-parallel-size", "1")),
        ("enable_chunked_prefill", True, ("--enable-chunked-prefill",)),
        ("enable_chunked_prefill", False, ("--no-enable-chunked-prefill",)),
        ("quantization", "gptq", ("--quantization", "gptq")),
        ("dtype", "float16", ("--dtype", "float16")),
        ("chunked_prefill_tokens", 512, ("--enable-chunked-prefill", "--max-num-batched-tokens", "512")),
        ("model_dir", "./models/m", ("--model", "./models/m")),
        ("--max-model-len", "4096", ("--max-model-len", "4096")),
        ("disable_log_requests", True, ("--no-enable-log-requests",)),
        ("cuda_graph_sizes", 8, ("--cudagraph-capture-sizes", "8")),
        ("disable_log_stats", False, ()),
    ],
)
def test_a_setting_of_2024_as_todays_flags(
    name: str, value: str | float | bool, flags: tuple[str, ...]
) -> None:
    assert translate(name, value, TODAY) == flags


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("swap_space", 4, r"removed in 0\.18\.0"),
        ("max_cpu_cache_buffer", 2, "never was in vLLM"),
        ("use_beam_search", False, r"left SamplingParams in 0\.6\.3"),
        ("trust_remote_code", True, "runs Python out of the model's folder"),
        ("use_v2_block_manager", True, "one block manager"),
        ("max_seq_len_to_capture", 8192, "by batch size"),
        ("num_speculative_wishes", 3, "not known to be a setting"),
    ],
)
def test_a_setting_without_a_flag_is_refused_with_the_reason(
    name: str, value: float | bool, why: str
) -> None:
    with pytest.raises(Unsupported, match=why) as refused:
        translate(name, value, TODAY)

    assert refused.value.hint


def test_a_version_that_still_has_the_old_flag_keeps_it() -> None:
    assert translate("disable_log_requests", True, "0.13.0") == ("--disable-log-requests",)
    assert translate("cuda_graph_sizes", 8, "0.11.0") == ("--cuda-graph-sizes", "8")


@pytest.mark.parametrize(
    ("name", "value"),
    [("gpu_memory_utilization", 9), ("max_num_seqs", 2.5), ("enforce_eager", "yes"), ("max_num_seqs", True)],
)
def test_a_setting_with_a_value_of_the_wrong_kind_is_refused(name: str, value: str | float | bool) -> None:
    with pytest.raises(BadInput):
        translate(name, value, TODAY)


def test_what_a_former_name_becomes_is_known_today() -> None:
    for row in FORMER:
        assert row.becomes or row.instead
        if row.becomes:
            assert checked([part.format(1) for part in row.becomes], TODAY)
