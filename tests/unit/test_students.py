"""Students as values: every config that a teacher is cut to is a real and smaller one, and nonsense is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as config
from hypothesis import strategies as st

from edgepack import catalog, modelspec, schemes, students
from edgepack.errors import BadInput, Unsupported
from edgepack.runtimes import vllm
from edgepack.students import Prune

DEMO: Mapping[str, object] = json.loads(
    (catalog.built_in()["demo"] / "config.json").read_text(encoding="utf-8")
)


def cuts(config: Mapping[str, object]) -> bool:
    try:
        students.ladder(config)
    except Unsupported:
        return False
    return True


TEACHERS = {
    model.id: model.config for model in catalog.models() if model.parameters < 20e9 and cuts(model.config)
}
QWEN_7B = TEACHERS["qwen2.5-7b-instruct"]

shares = st.floats(0.01, 1.0)
counts = st.integers(1, 40000)
prunes = st.builds(
    Prune,
    layers=st.none() | shares | counts,
    ffn=st.none() | shares | counts,
    heads=st.none() | shares | counts,
    hidden=st.none() | shares | counts,
).filter(lambda prune: prune != Prune())


def parameters(config: Mapping[str, object]) -> int:
    return modelspec.from_config(config, name="x").parameters


def test_the_catalog_has_teachers_of_every_family_that_is_cut_in_a_user_s_hands() -> None:
    families = {str(config["model_type"]) for config in TEACHERS.values()}

    assert families >= {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "granite", "smollm3"}


@given(prune=prunes)
def test_a_label_reads_back_as_what_it_was_made_from(prune: Prune) -> None:
    assert students.parse(students.label(prune)) == prune


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a dimension"),
        ("width=0.5", "'width' is not a dimension"),
        ("layers", "neither a share"),
        ("layers=half", "neither a share"),
        ("layers=-1", "neither a share"),
        ("layers=nan", "neither a share"),
        ("layers=0", "at least 1"),
        ("layers=0.0", "no share"),
        ("layers=1.5", "no share"),
        ("layers=1,layers=2", "given twice"),
    ],
)
def test_nonsense_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        students.parse(text)


def test_a_number_with_a_point_is_a_share_and_one_without_a_count() -> None:
    assert students.parse("ffn=512, layers=0.5") == Prune(layers=0.5, ffn=512)
    assert students.parse("layers=1") == Prune(layers=1)
    assert students.label(Prune(ffn=512, layers=0.5)) == "layers=0.5,ffn=512"


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        (Prune(layers=7), "layers=7 is more than the teacher has: 6"),
        (
            Prune(layers=6),
            "keeps everything: 6 layers, an FFN of 1024, 2 groups of heads, a hidden size of 256",
        ),
        (Prune(layers=1.0, ffn=1024), "keeps everything"),
        (Prune(), "nothing keeps everything"),
        (Prune(hidden=0.5), "hidden of 256 cannot be cut: it goes in steps of 256"),
        (Prune(heads=1), "heads of 2 cannot be cut: it goes in steps of 2"),
        (Prune(ffn=2.0), "no share"),
        (Prune(layers=-1), "at least 1 must stay"),
    ],
)
def test_what_the_teacher_cannot_be_cut_to_is_refused(prune: Prune, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        students.shrunk(DEMO, prune)


def test_sizes_are_the_nearest_that_quantizers_have_blocks_for() -> None:
    assert students.sizes(DEMO, Prune(layers=0.5, ffn=0.5)) == Prune(layers=3, ffn=512)
    assert students.sizes(DEMO, Prune(ffn=500)) == Prune(ffn=512)
    assert students.sizes(DEMO, Prune(ffn=0.99)) == Prune(ffn=768)
    assert students.sizes(DEMO, Prune(ffn=1)) == Prune(ffn=256)
    # 28 heads of 128 in 4 groups: a row of 3584 = 14 * 256, so groups go two by two
    assert students.sizes(QWEN_7B, Prune(heads=0.6, hidden=0.5)) == Prune(heads=2, hidden=1792)
    # 896 = 7 * 128
    qwen = TEACHERS["qwen2.5-0.5b-instruct"]
    assert students.sizes({**qwen, "model_type": "qwen3", "head_dim": 64}, Prune(hidden=0.7)) == Prune(
        hidden=640
    )


@pytest.mark.parametrize("name", TEACHERS)
@given(prune=prunes)
@config(max_examples=40, deadline=None)
def test_a_student_is_smaller_and_a_real_model(name: str, prune: Prune) -> None:
    teacher = TEACHERS[name]
    try:
        found = students.sizes(teacher, prune)
    except (BadInput, Unsupported):
        return  # what is refused has tests of its own

    student = students.shrunk(teacher, prune)

    before, after = (modelspec.from_config(c, name="x") for c in (teacher, student))
    assert after.parameters < before.parameters
    assert (after.vocab, after.tied, after.head_dim) == (before.vocab, before.tied, before.head_dim)
    assert after.heads * before.kv_heads == before.heads * after.kv_heads
    assert after.layers == (found.layers or before.layers)
    assert after.ffn == (found.ffn or before.ffn)
    assert after.kv_heads == (found.heads or before.kv_heads)
    assert after.hidden == (found.hidden or before.hidden)
    assert students.shrunk(teacher, found) == student
    assert sum(layers.count for layers in after.kv) == after.layers
    for was, now in ((before.hidden, after.hidden), (before.ffn, after.ffn)):
        assert was % 256 or not now % 256
    assert (before.heads * before.head_dim) % 256 or not (after.heads * after.head_dim) % 256


@pytest.mark.parametrize("name", TEACHERS)
def test_a_ladder_falls_and_keeps_near_its_rungs(name: str) -> None:
    teacher = TEACHERS[name]

    ladder = students.ladder(teacher)

    shares = [parameters(students.shrunk(teacher, prune)) / parameters(teacher) for prune in ladder]
    assert max(shares, default=0.5) < 1
    assert shares == sorted(set(shares), reverse=True)
    assert all(min(abs(share / rung - 1) for rung in (0.75, 0.5, 0.375, 0.25)) < 0.25 for share in shares)
    assert all(students.sizes(teacher, prune) == prune for prune in ladder)


def test_ladders_of_two_teachers() -> None:
    assert [students.label(prune) for prune in students.ladder(DEMO)] == [
        "layers=4", "layers=3", "layers=3,ffn=512", "layers=2,ffn=512",
    ]  # fmt: skip
    assert [students.label(prune) for prune in students.ladder(QWEN_7B)] == [
        "layers=20", "layers=14,ffn=15360", "layers=13,ffn=9472", "layers=7,ffn=8192",
    ]  # fmt: skip


def test_the_demo_s_students_keep_to_k_quants_and_vllm_counts_their_pages() -> None:
    for prune in students.ladder(DEMO):
        spec = modelspec.from_config(students.shrunk(DEMO, prune), name="student")

        kinds = schemes.tensor_types(spec, "Q4_K_M", imatrix=False)
        groups = vllm.groups(spec, "bf16", backend="cuda")

        matrices = {kind for tensor, kind in zip(spec.tensors, kinds, strict=True) if len(tensor.shape) > 1}
        assert matrices <= {"Q4_K", "Q6_K"}
        assert groups.block_bytes == spec.layers * 2 * 2 * 64 * 2 * groups.block


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": None}])
def test_what_does_not_change_is_left_alone(fields: dict[str, Any]) -> None:
    teacher = {**DEMO, **fields, "a_field_of_the_user": {"x": [1, 2]}}

    student = students.shrunk(teacher, Prune(layers=3, ffn=512))

    changed = {"num_hidden_layers": 3, "intermediate_size": 512}
    assert student == {**teacher, **changed}


def test_lists_with_a_value_per_layer_are_cut_with_the_layers() -> None:
    qwen = {
        **TEACHERS["qwen3-0.6b"], "num_hidden_layers": 4, "max_window_layers": 2, "eos_token_id": [1, 2, 3, 4],
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip

    student = students.shrunk(qwen, Prune(layers=3), layers=(0, 2, 3))

    assert student["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert student["max_window_layers"] == 1
    assert student["eos_token_id"] == [1, 2, 3, 4]


def test_a_list_per_layer_that_is_not_known_is_refused() -> None:
    teacher = {**DEMO, "clip_by_layer": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}

    with pytest.raises(Unsupported, match="clip_by_layer"):
        students.shrunk(teacher, Prune(layers=3))
    assert students.shrunk(teacher, Prune(ffn=512))["clip_by_layer"] == teacher["clip_by_layer"]


def test_head_dim_is_written_out_when_it_no_longer_follows_from_the_hidden_size() -> None:
    teacher = {**TEACHERS["llama-3.2-1b-instruct"], "head_dim": None}

    narrow = students.shrunk(teacher, Prune(hidden=1536))
    fewer = students.shrunk(teacher, Prune(heads=4))

    assert (narrow["head_dim"], narrow["num_attention_heads"]) == (64, 32)
    assert (fewer["head_dim"], fewer["num_attention_heads"], fewer["num_key_value_heads"]) == (64, 16, 4)


def test_heads_and_hidden_size_of_qwen2_go_together() -> None:
    with pytest.raises(Unsupported, match="wants both alike") as refused:
        students.shrunk(QWEN_7B, Prune(hidden=0.5))
    assert refused.value.hint == "cut both: hidden=3584,heads=4"

    student = students.shrunk(QWEN_7B, Prune(hidden=1792, heads=2))

    assert (student["hidden_size"], student["num_attention_heads"], student["head_dim"]) == (1792, 14, 128)


def test_transformers_llama_wants_a_multiple_of_the_heads() -> None:
    teacher = TEACHERS["llama-3.2-3b-instruct"]  # 24 heads of 128 in 8 groups

    with pytest.raises(Unsupported, match="24 heads and a hidden size of 1792") as refused:
        students.shrunk(teacher, Prune(hidden=1792))
    assert refused.value.hint == "hidden sizes of 768 and its multiples go with 24 heads"
    assert students.shrunk(teacher, Prune(hidden=0.5))["hidden_size"] == 1536


def test_gemma_s_layers_go_by_periods_so_that_each_stays_what_it_is() -> None:
    gemma = TEACHERS["gemma-3-1b-it"]  # 26 layers, every sixth a full one

    student = students.shrunk(gemma, Prune(layers=0.5))

    assert student["num_hidden_layers"] == 14
    for kept in students.contiguous(gemma, 14):
        assert students.in_kind(gemma, kept)
        assert [at % 6 for at in kept] == [at % 6 for at in range(14)]
    assert students.every_kth(gemma, 14) is None
    with pytest.raises(BadInput, match="come to places of other kinds"):
        students.shrunk(gemma, Prune(layers=14), layers=(*range(13), 24))


def test_the_first_and_the_last_layer_stay_wherever_neighbors_are_left_out() -> None:
    assert students.contiguous(DEMO, 3) == ((0, 4, 5), (0, 1, 5))
    assert students.contiguous(DEMO, 5)[-1] == (0, 1, 2, 3, 5)
    assert students.contiguous(DEMO, 1) == ((5,), (0,))
    assert students.contiguous(DEMO, 6) == ((0, 1, 2, 3, 4, 5),)
    assert students.every_kth(DEMO, 3) == (0, 2, 4)


@pytest.mark.parametrize("layers", [(0, 1), (0, 1, 6), (0, 2, 1), (0, 0, 1), (-1, 0, 1)])
def test_layers_that_are_not_there_or_out_of_order_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="are not 3 of 6 in their order"):
        students.shrunk(DEMO, Prune(layers=3), layers=layers)


@pytest.mark.parametrize(
    ("fields", "prune", "words"),
    [
        ({"model_type": "gpt2"}, Prune(layers=1), "learned positions"),
        ({"model_type": "lfm2"}, Prune(layers=1), "several kinds"),
        ({"model_type": "something"}, Prune(layers=1), "nobody has tried"),
        ({"quantization_config": {"bits": 4}}, Prune(layers=3), "already quantized"),
        ({"model_type": "gemma", "head_dim": 64}, Prune(hidden=0.5), "scaled by the root of the hidden size"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
            Prune(ffn=512),
            "whole layers",
        ),
        ({"model_type": "olmo2"}, Prune(heads=1), "over all heads at once"),
    ],
)
def test_what_is_not_cut_says_why(fields: dict[str, Any], prune: Prune, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        students.shrunk({**DEMO, **fields}, prune)


def test_a_mixture_of_experts_loses_whole_layers() -> None:
    fields = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}

    ladder = students.ladder({**DEMO, **fields})

    assert ladder
    assert all(prune.ffn is None and prune.layers for prune in ladder)


@given(teacher=st.integers(10**6, 10**11), a=st.floats(0.01, 1), b=st.floats(0.01, 1))
def test_the_expected_loss_falls_with_the_student_s_size_to_nothing(teacher: int, a: float, b: float) -> None:
    small, large = sorted((max(1, int(a * teacher)), max(1, int(b * teacher))))

    loss, less = students.expected(teacher, small), students.expected(teacher, large)

    assert 0 <= less.nats <= loss.nats
    assert 0 <= loss.low <= loss.nats <= loss.high
    assert students.expected(teacher, teacher) == students.Expected(nats=0, low=0, high=0)


@pytest.mark.parametrize(
    ("teacher", "student", "nats", "why"),
    [
        (6_425_856, 3_475_200, 0.473, "the built-in teacher cut to three layers and distilled"),
        (124e6, 82e6, 0.258, "DistilGPT2"),
        (13.0e9, 6.74e9, 0.110, "LLaMA 13B and 7B"),
        (65.2e9, 32.5e9, 0.150, "LLaMA 65B and 33B"),
    ],
)
def test_known_pairs_lie_within_what_is_expected(
    teacher: float, student: float, nats: float, why: str
) -> None:
    found = students.expected(int(teacher), int(student))

    assert found.low < nats < found.high, why


@pytest.mark.parametrize(("teacher", "student"), [(10, 11), (10, 0)])
def test_a_larger_student_or_none_is_refused(teacher: int, student: int) -> None:
    with pytest.raises(BadInput):
        students.expected(teacher, student)
