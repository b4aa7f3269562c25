"""llama.cpp's memory and flags: figures it logged itself, and the mistakes other tools make."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as config
from hypothesis import strategies as st

from edgepack import profile
from edgepack.errors import BadInput, Unsupported
from edgepack.modelspec import KvLayers
from edgepack.profile import Backend
from edgepack.runtimes import llama_cpp, llama_graph
from edgepack.settings import Settings
from edgepack.units import MIB
from tests.shapes import CONFIGS, settings, spec

ONE_LAYER = KvLayers(count=1, heads=1, key_dim=128, value_dim=128)


@pytest.mark.parametrize(
    ("context", "slots", "kv_type", "mib"),
    [
        (512, 1, "f16", 6.0),
        (512, 4, "f16", 12.0),
        (4096, 1, "q8_0", 25.5),
        (4096, 4, "f16", 48.0),
        (16384, 1, "q4_0", 54.0),
        (16384, 4, "f16", 192.0),
    ],
)
def test_kv_cache_of_a_half_billion_model_as_llama_cpp_logs_it(
    context: int, slots: int, kv_type: str, mib: float
) -> None:
    """Four slots of 512 tokens get 256 cells each: padding can give more than was asked for."""
    got = llama_cpp.kv_bytes(spec("qwen2.5-0.5b"), settings(context, slots=slots, kv_type=kv_type))

    assert got == mib * MIB


@pytest.mark.parametrize(
    ("name", "context", "slots", "flash_attention", "mib"),
    [
        ("qwen2.5-0.5b", 512, 1, True, 36.01),
        ("qwen2.5-0.5b", 512, 4, True, 35.76),
        ("qwen2.5-0.5b", 32768, 4, True, 43.51),
        ("qwen2.5-0.5b", 16384, 1, False, 489.26),
        ("qwen2.5-7b", 4096, 1, True, 143.01),
        ("qwen2.5-7b", 32768, 1, False, 1893.01),
        ("llama-3.2-1b", 32768, 4, True, 72.01),
    ],
)
def test_compute_buffer_as_llama_cpp_logs_it(
    name: str, context: int, slots: int, flash_attention: bool, mib: float
) -> None:
    room = llama_cpp.compute(
        spec(name), settings(context, slots=slots, flash_attention=flash_attention), "cpu"
    )

    assert room.device / MIB == pytest.approx(mib, abs=0.006)
    assert room.host == 0


def test_a_front_end_that_keeps_all_logits_pays_for_them() -> None:
    """llama-cpp-python reserves a row of logits for every token; the server one for every slot."""
    model = spec("qwen2.5-0.5b")

    assert llama_cpp.compute(model, settings(), "cpu", outputs=512).device / MIB == pytest.approx(
        300.25, abs=0.006
    )


def test_quantized_kv_costs_its_scales_too() -> None:
    """ollama and llmfit count 1 byte for q8_0 and half a byte for q4_0."""
    plain = llama_cpp.layer_kv_bytes(ONE_LAYER, settings(256))

    assert llama_cpp.layer_kv_bytes(ONE_LAYER, settings(256, kv_type="q8_0")) == plain * 34 / 64
    assert llama_cpp.layer_kv_bytes(ONE_LAYER, settings(256, kv_type="q4_0")) == plain * 18 / 64
    assert llama_cpp.layer_kv_bytes(ONE_LAYER, settings(256, kv_type="q8_0/q4_0")) == plain * 26 / 64


def test_the_window_bounds_the_cache_not_the_context() -> None:
    """gpt-oss: 128 tokens of window, 512 of a batch, padded: 768 cells; 2304 with a batch of 2048."""
    window = replace(ONE_LAYER, window=128)

    assert llama_cpp.cells(settings(131072), 128) == 768
    assert llama_cpp.cells(settings(131072, ubatch=2048), 128) == 2304
    assert llama_cpp.layer_kv_bytes(window, settings(131072)) == 768 * 512


def test_a_unified_cache_holds_every_slots_window() -> None:
    assert llama_cpp.cells(settings(32768, slots=4, unified_kv=True), 1024) == 4608
    assert llama_cpp.cells(settings(32768, slots=4), 1024) == 1536
    assert llama_cpp.kv_bytes(spec("qwen2.5-0.5b"), settings(512, slots=4, unified_kv=True)) == 6 * MIB


def test_keys_without_values_count_once() -> None:
    """MLA keeps one row of 576; gguf-parser multiplies 192 + 128 by the heads."""
    latent = KvLayers(count=61, heads=1, key_dim=576, value_dim=0)

    assert llama_cpp.layer_kv_bytes(latent, settings(256)) == 256 * 70_272


def test_kv_types_that_cannot_be_are_refused_with_a_way_out() -> None:
    with pytest.raises(Unsupported, match="multiple of 32"):
        llama_cpp.kv_bytes(spec("stories260k"), settings(kv_type="q8_0"))
    with pytest.raises(Unsupported, match="flash attention"):
        llama_cpp.kv_bytes(spec("qwen3-0.6b"), settings(kv_type="q8_0", flash_attention=False))
    with pytest.raises(BadInput, match="q3_0"):
        llama_cpp.kv_bytes(spec("qwen3-0.6b"), settings(kv_type="q3_0"))


def test_quantized_kv_on_cuda_is_unpacked_beside_the_attention() -> None:
    """At a long context that takes back what the smaller cache saved (Qwen3.5-4B: 1.30 against 0.31 GiB)."""
    model, plain = spec("llama-3.2-1b"), settings(131072, gpu_layers=99)
    packed = replace(plain, kv_type="q8_0")

    unpacked = 2 * 2 * 8 * 64 * 131072
    extra = llama_cpp.compute(model, packed, "cuda").device - llama_cpp.compute(model, plain, "cuda").device

    assert unpacked - 64 * MIB < extra < unpacked + 64 * MIB


def test_backends_differ_in_alignment_and_in_who_unpacks_a_quantized_cache() -> None:
    model, plain = spec("llama-3.2-1b"), settings(131072, gpu_layers=99)
    packed = replace(plain, kv_type="q8_0")

    def device(backend: Backend, wanted: Settings) -> int:
        return llama_cpp.compute(model, wanted, backend).device

    unpacked = 2 * 2 * 8 * 64 * 131072
    assert 0 <= device("vulkan", plain) - device("cuda", plain) < MIB
    assert device("metal", plain) >= device("cuda", plain) + unpacked - 64 * MIB
    assert device("metal", packed) <= device("cuda", packed)
    assert device("vulkan", packed) < device("vulkan", plain) + 64 * MIB


def test_an_accelerator_leaves_the_inputs_with_the_host() -> None:
    """Qwen3-1.7B at 4096 on a Jetson Orin logged 300.75 MiB for CUDA0, all logits kept."""
    model = replace(spec("qwen3-0.6b"), hidden=2048, ffn=6144)

    room = llama_cpp.compute(model, settings(gpu_layers=99), "cuda", outputs=512)

    assert room.device / MIB == pytest.approx(300.75, abs=0.006)
    assert 8 < room.host / MIB < 16


def test_every_bound_on_memory_is_a_flag() -> None:
    flags = " ".join(llama_cpp.launch(settings(8192, slots=2, kv_type="q8_0/q4_0", ubatch=256), alias="m"))

    for words in (
        "--ctx-size 8192", "--parallel 2", "--no-kv-unified", "--batch-size 2048", "--ubatch-size 256",
        "--flash-attn on", "--cache-type-k q8_0", "--cache-type-v q4_0", "--cache-ram 0", "--ctx-checkpoints 0",
        "--fit off", "--load-mode none", "--lazy-mode off", "--repack", "--gpu-layers 0", "--device none",
        "--threads 2", "--threads-http 38",
    ):  # fmt: skip
        assert words in flags


def test_a_cpu_reads_and_repacks_and_an_accelerator_takes_all_layers() -> None:
    cpu = llama_cpp.settings_for(profile.load("raspberry-pi-5-8gb"), context=4096)
    jetson = llama_cpp.settings_for(profile.load("jetson-orin"), context=4096, slots=2, ubatch=4096)

    assert (cpu.gpu_layers, cpu.load_mode, cpu.repack, cpu.flash_attention) == (0, "none", True, True)
    assert (jetson.gpu_layers, jetson.repack, jetson.batch) == (99, False, 4096)
    with pytest.raises(BadInput):
        llama_cpp.settings_for(profile.load("jetson-orin"), context=0)


names = st.sampled_from([n for n in CONFIGS if n not in ("stories260k", "odd-heads", "odd-biased")])
contexts = st.integers(1, 40000)


@given(names, contexts, contexts, st.integers(1, 8), st.sampled_from(llama_cpp.KV_TYPES), st.booleans())
@config(max_examples=60, deadline=None)
def test_more_context_never_takes_less(
    name: str, one: int, other: int, slots: int, kv_type: str, unified: bool
) -> None:
    short, long = sorted((one, other))

    def cache(context: int) -> int:
        wanted = settings(context, slots=slots, kv_type=kv_type, unified_kv=unified)
        return llama_cpp.kv_bytes(spec(name), wanted)

    assert cache(short) <= cache(long)


@given(names, contexts, st.integers(1, 8), st.sampled_from(llama_cpp.KV_TYPES))
@config(max_examples=60, deadline=None)
def test_more_slots_never_take_less(name: str, context: int, slots: int, kv_type: str) -> None:
    def cache(count: int) -> int:
        return llama_cpp.kv_bytes(spec(name), settings(context * count, slots=count, kv_type=kv_type))

    assert cache(slots) <= cache(slots + 1)
    assert llama_cpp.output_bytes(spec(name), slots) < llama_cpp.output_bytes(spec(name), slots + 1)


@given(
    name=st.sampled_from(sorted(CONFIGS)), slots=st.sampled_from([1, 2, 3, 8]), offloaded=st.booleans(),
    kv_type=st.sampled_from(["f16", "f32", "q8_0", "q8_0/q4_0"]), unpack=st.booleans(), flash=st.booleans(),
    per_slot=st.sampled_from([256, 600, 4096, 9000]), ubatch=st.sampled_from([1, 8, 64, 512, 2048]),
    alignment=st.sampled_from([32, 128, 256]),
)  # fmt: skip
@config(max_examples=150, deadline=None)
def test_a_few_layers_reserve_what_all_of_them_do(
    name: str, slots: int, offloaded: bool, kv_type: str, unpack: bool, flash: bool, per_slot: int, ubatch: int,
    alignment: int,
) -> None:  # fmt: skip
    asked = llama_cpp.cpu_settings(context=per_slot * slots, slots=slots, kv_type=kv_type, ubatch=ubatch)
    if not flash and "q" not in kv_type:
        asked = replace(asked, flash_attention=False)
    batch = llama_cpp.batch(spec(name), asked)

    few = llama_graph.room(batch, offloaded=offloaded, alignment=alignment, unpack=unpack)

    assert few == llama_graph.whole_room(batch, offloaded=offloaded, alignment=alignment, unpack=unpack)
