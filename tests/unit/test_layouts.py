"""Schemes that are no GGUF: names that exist, and sizes that were published or seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as config
from hypothesis import strategies as st

from edgepack import degradation, layouts, modelspec, schemes
from edgepack.errors import Unsupported
from edgepack.modelspec import ModelSpec
from edgepack.profile import Backend
from tests import shapes
from tests.shapes import spec

WIDE = (4096, 4096)
"""A matrix wide enough for 32/out to be 0.008 bits."""


def bits(kind: str, shape: tuple[int, ...] = WIDE) -> float:
    return layouts.kind_bytes(kind, shape) * 8 / (shape[0] * shape[1])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GPTQ4-G128", 4 + 4 / 128 + 16 / 128 + 32 / 4096),
        ("GPTQ8-G128", 8 + 8 / 128 + 16 / 128 + 32 / 4096),
        ("GPTQ3-G32", 3 + 3 / 32 + 16 / 32 + 32 / 4096),
        ("AWQ4-G128", 4.15625),
        ("AUTOROUND2-G128", 2 + 2 / 128 + 16 / 128 + 32 / 4096),
        ("CT4-G128", 4.125 + 128 / 4096**2),
        ("CT8-ROW", 8 + 16 / 4096 + 128 / 4096**2),
        ("INT8", 8 + 16 / 4096),
        ("FP8", 8 + 16 / 4096),
        ("NF4", 4.5 + (64 + 82) * 8 / 4096**2),
        ("LLM.INT8", 8 + 32 / 4096 + 8 / 4096**2),
        ("ONNX4-G32-F16", 4.5),
        ("ONNX4-G32-F32", 5.0),
        ("ONNX4-G32-F32-ZP", 5.125),
        ("ONNX4-G128-F16", 4.125),
        ("ONNX4-G128-F32", 4.25),
        ("NVFP4", 4.5),
    ],
)
def test_bits_per_weight_of_a_layout(kind: str, expected: float) -> None:
    got = schemes.tensor_bytes(kind, WIDE) * 8 / (WIDE[0] * WIDE[1])

    assert got == pytest.approx(expected, abs=1e-9)


STDLIB = modelspec.from_config(
    shapes.config("llama", 6, 256, 512, 4, 2, 2048, tie_word_embeddings=False), name="4.59M"
)
"""The model the quantizers were tried on: 4.59 M parameters, untied."""


@pytest.mark.parametrize(
    ("scheme", "megabytes"),
    [
        ("gptq-int4-g128", 4.01), ("awq-int4-g128", 3.96), ("gptq-int3-g128", 3.56), ("gptq-int2-g128", 3.12),
        ("gptq-int8-g128", 5.79), ("bf16", 9.2),
    ],
)  # fmt: skip
def test_files_are_as_large_as_gptqmodel_wrote_them(scheme: str, megabytes: float) -> None:
    size, provenance = schemes.file_bytes(STDLIB, scheme, imatrix=False)

    assert size / 1e6 == pytest.approx(megabytes, abs=0.011 if megabytes < 9 else 0.05)
    assert provenance == "fitted", "the header's size is estimated"


TRIED = modelspec.from_config(
    shapes.config("qwen2", 4, 256, 768, 4, 2, 4096, tie_word_embeddings=False), name="5.25M"
)
"""The model onnxruntime-genai's builder was tried on: 5.25 M parameters, 32768 positions."""


@pytest.mark.parametrize(
    ("scheme", "backend", "megabytes"),
    [
        ("onnx-int4-rtn", "cpu", 15.26), ("onnx-int8", "cpu", 17.35), ("onnx-int4", "cpu", 16.21),
        ("onnx-int4-rtn", "cuda", 8.7), ("onnx-int8", "cuda", 10.8), ("onnx-fp16", "cuda", 14.7),
    ],
)  # fmt: skip
def test_onnx_files_are_as_large_as_the_builder_wrote_them(
    scheme: str, backend: Backend, megabytes: float
) -> None:
    """With the table of cosines and sines, 8.4 MB in fp32."""
    file, _ = schemes.file_bytes(TRIED, scheme, imatrix=False, backend=backend)

    assert file / 1e6 == pytest.approx(megabytes, abs=0.01 if megabytes * 100 % 10 else 0.06)


TIED = modelspec.from_config(
    shapes.config("qwen2", 4, 256, 768, 4, 2, 32000, tie_word_embeddings=True, max_position_embeddings=8192),
    name="tied",
)


@pytest.mark.parametrize(
    ("scheme", "backend", "size"),
    [
        ("onnx-int4-rtn", "cpu", 9_235_779), ("onnx-int4-b128-rtn", "cpu", 8_172_872),
        ("onnx-int4-rtn", "cuda", 7_469_390), ("onnx-int8", "cpu", 47_672_250), ("onnx-int4", "cpu", 13_979_837),
        ("onnx-fp16", "cuda", 23_760_141),
    ],
)  # fmt: skip
def test_a_tied_onnx_model_shares_a_table_of_four_bits_and_keeps_two_of_eight(
    scheme: str, backend: Backend, size: int
) -> None:
    """What onnxruntime-genai 0.18's builder wrote for one random model; all but the graph's nodes to the byte."""
    file, _ = schemes.file_bytes(TIED, scheme, imatrix=False, backend=backend)

    assert file == pytest.approx(size, abs=8_000)


def test_only_the_matrices_of_blocks_are_quantized() -> None:
    of_model = spec("qwen2.5-1.5b")

    kinds = dict(
        zip(
            (t.name for t in of_model.tensors),
            layouts.kinds(of_model, "gptq-int4-g128", backend="cuda"),
            strict=True,
        )
    )

    assert (
        kinds["token_embd.weight"] == kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "BF16"
    )
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.27.ffn_down.weight"] == "GPTQ4-G128"


def test_a_tied_head_is_not_counted_twice_and_an_untied_one_keeps_16_bits() -> None:
    tied, untied = spec("qwen2.5-0.5b"), spec("qwen2.5-7b")

    embedding, _ = schemes.lookup_bytes(tied, "awq-int4-g128", imatrix=False)
    kinds = layouts.kinds(untied, "awq-int4-g128", backend="cuda")

    assert embedding == 2 * 896 * 151936
    assert [k for t, k in zip(untied.tensors, kinds, strict=True) if t.name == "output.weight"] == ["BF16"]
    assert schemes.weights_bytes(tied, "bf16", imatrix=False) == 2 * tied.parameters


def test_experts_are_matrices_of_their_own() -> None:
    one, eight = (64, 128), (64, 128, 8)

    assert layouts.kind_bytes("GPTQ4-G32", eight) == 8 * layouts.kind_bytes("GPTQ4-G32", one)
    assert layouts.kind_bytes("LLM.INT8", eight) == 8 * layouts.kind_bytes("LLM.INT8", one)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("awq-int8-g128", "awq packs 4 bits, not 8"),
        ("awq-int4-g128-actorder", "awq has no act order"),
        ("autoround-int4-g128-actorder", "autoround has no act order"),
        ("gptq-int5-g128", "gptq packs 2, 3, 4, 8 bits, not 5"),
        ("ct-w8a8-g128", "one scale per output channel"),
        ("ct-w4a8-g128", "as large as W8A8 and as coarse as W4A16"),
        ("onnx-int8-k-quant-mixed", "mixes 8 bits into 4"),
        ("onnx-int8-b64-rtn", "8 bits are always rounded to nearest"),
        ("onnx-bf16", "did you mean 'onnx-fp16'"),
        ("gguf-bugdet", "did you mean 'gguf-budget'"),
        ("gptq-int4-g129", "no kernel reads groups of 129"),
        ("awq-4-g128", "did you mean 'awq-int4-g128'"),
        ("bnb-nf5", "did you mean 'bnb-nf4'"),
        ("Q4_KM", "did you mean 'Q4_K_M'"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(Unsupported) as refused:
        schemes.canonical(name)

    assert reason in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    "name",
    [
        *layouts.EXAMPLES, "gptq-int2-gall", "gptq-int3-g64-actorder", "ct-w4a16", "onnx-int8-b64", "onnx-int4-b64-rtn",
    ],
)  # fmt: skip
def test_names_come_back_as_they_are_from_any_case(name: str) -> None:
    assert schemes.canonical(name) == name
    assert not schemes.is_gguf(name)
    if name != "bf16":
        assert schemes.canonical(name.upper()) == name


def test_the_builders_name_of_its_mixture_is_another_name_of_onnx_int4() -> None:
    assert schemes.canonical("onnx-int4-k-quant-mixed") == "onnx-int4"
    assert schemes.canonical("onnx-int4-b128-k-quant-mixed") == "onnx-int4-b128"
    assert (layouts.parse("onnx-int4").mixed, layouts.parse("onnx-int4-rtn").mixed) == (True, False)


@pytest.mark.parametrize(
    ("scheme", "backend", "reason"),
    [
        ("onnx-fp16", "cpu", "fails at the next token"),
        ("onnx-int4", "vulkan", "for cpu and cuda, not for vulkan"),
        ("onnx-int8", "metal", "for cpu and cuda, not for metal"),
    ],
)
def test_a_graph_that_does_not_run_on_a_backend_is_refused(
    scheme: str, backend: Backend, reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason) as refused:
        schemes.weights_bytes(TIED, scheme, imatrix=False, backend=backend)

    assert refused.value.hint


def test_bf16_is_a_checkpoint_and_in_capitals_a_gguf() -> None:
    assert (schemes.is_gguf("bf16"), schemes.is_gguf("BF16")) == (False, True)


def test_a_group_that_does_not_divide_a_row_is_refused_with_one_that_does() -> None:
    """Gemma 3 1B has rows of 1152 (9 x 128) and 6912 (54 x 128); 896 + 32 is no multiple of 128."""
    odd = modelspec.from_config(shapes.config("llama", 2, 928, 2048, 29, 29, 1000), name="odd")

    with pytest.raises(Unsupported, match="rows of 928, which groups of 128 do not divide") as refused:
        schemes.weights_bytes(odd, "gptq-int4-g128", imatrix=False)

    assert refused.value.hint == "take g32"
    assert schemes.weights_bytes(odd, "gptq-int4-g32", imatrix=False) > 0


def test_a_model_whose_matrices_are_not_known_is_refused_but_for_bf16() -> None:
    hybrid = spec("qwen3.5-4b")

    with pytest.raises(Unsupported, match="which matrices of qwen35"):
        schemes.weights_bytes(hybrid, "gptq-int4-g128", imatrix=False)
    assert schemes.weights_bytes(hybrid, "bf16", imatrix=False) == 2 * hybrid.parameters


PLAIN = sorted(
    name for name in {*shapes.CONFIGS, *shapes.PLANNED} if spec(name).architecture in layouts.PLAIN_DECODERS
)


@given(st.sampled_from(PLAIN), st.sampled_from([32, 64, 128]))
@config(max_examples=40, deadline=None)
def test_fewer_bits_and_larger_groups_never_weigh_more(name: str, group: int) -> None:
    of_model = spec(name)

    def weight(scheme: str) -> int:
        try:
            return schemes.weights_bytes(of_model, scheme, imatrix=False)
        except Unsupported:
            return 0

    sizes = [weight(f"gptq-int{bits}-g{group}") for bits in (2, 3, 4, 8)]
    groups = [weight(f"gptq-int4-g{g}") for g in ("all", 128, 64, 32)]

    assert sizes == sorted(sizes)
    there = [size for size in groups if size]
    assert there == sorted(there)
    assert all(size < schemes.weights_bytes(of_model, "bf16", imatrix=False) for size in sizes)


@given(st.sampled_from(PLAIN), st.sampled_from(layouts.EXAMPLES), st.sampled_from(["cpu", "cuda"]))
@config(max_examples=60, deadline=None)
def test_a_file_holds_its_tensors_and_the_scheme_has_a_price_in_quality(
    name: str, scheme: str, backend: Backend
) -> None:
    of_model: ModelSpec = spec(name)
    try:
        layouts.kinds(of_model, scheme, backend=backend)
    except Unsupported as refused:
        assert refused.hint
        return

    file, _ = schemes.file_bytes(of_model, scheme, imatrix=False, backend=backend)

    assert file > schemes.weights_bytes(of_model, scheme, imatrix=False, backend=backend)
    lost = degradation.loss_of(
        degradation.format_of(layouts.parse(scheme)), of_model.tensors, parameters=of_model.parameters
    )
    assert 0.0 < lost.low <= lost.retention <= lost.high <= 1.0
