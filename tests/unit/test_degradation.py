"""The loss law predicts published losses that it was not fitted on, and follows types, not names."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import catalog, degradation, layouts, modelspec, schemes
from edgepack.degradation import Constants, Loss
from edgepack.errors import Unsupported
from edgepack.modelspec import ModelSpec
from tests import shapes

SCRIPTS = Path(__file__).parents[2] / "scripts"
FIT = runpy.run_path(str(SCRIPTS / "fit_degradation.py"))
MEASURE = runpy.run_path(str(SCRIPTS / "quantization_error.py"))
LLAMA_3_8B: ModelSpec = FIT["spec"]("Llama-3-8B")


@functools.cache
def left_out(key: str) -> list[Any]:
    return [p for found in FIT["left_out"](key).values() for p in found]


@pytest.mark.parametrize("key", ["table", "family"])
def test_intervals_cover_nine_of_ten_losses_of_tables_and_families_left_out(key: str) -> None:
    perplexities = [p for p in left_out(key) if FIT["is_perplexity"](p)]
    accuracies = [p for p in left_out(key) if not FIT["is_perplexity"](p)]

    assert len(perplexities) == 89
    assert len(accuracies) == (115 if key == "table" else 163)
    assert FIT["coverage"](perplexities) >= 0.9
    assert FIT["coverage"](accuracies) >= 0.9


@pytest.mark.parametrize("key", ["table", "family"])
def test_tables_and_families_left_out_are_predicted_within_a_factor_and_within_points(key: str) -> None:
    """So that the intervals are no wider than they need be: coverage alone could be had with endless ones."""
    assert FIT["median_factor"](left_out(key)) < 1.45
    assert FIT["median_points"](left_out(key)) < 1.2
    assert degradation.SPREAD < degradation.SPREAD_UNKNOWN <= 2.5


def test_the_shipped_constants_are_those_the_tables_give() -> None:
    fitted: Constants = FIT["fitted"](FIT["cases"]())

    shipped = FIT["pack"](degradation.FITTED)
    assert shipped == pytest.approx(FIT["pack"](fitted), abs=0.01)
    assert pytest.approx(FIT["cache_cost"](), rel=0.01) == degradation.CACHE_COST


def test_every_row_is_predicted_or_its_method_is_none_of_ours() -> None:
    missing = FIT["unpredicted"]()

    assert len(FIT["cases"]()) + len(missing) == len(FIT["read"]("quality.jsonl")) == 289
    assert {row["scheme"].split("-")[0] for row, _ in missing} == {
        "IQ4_K", "hqq", "omniquant", "qlora", "spinquant",
    }  # fmt: skip
    assert all(row["scheme"] in why for row, why in missing)


def test_measured_errors_of_integers_and_floats_come_out_again() -> None:
    for key, errors in MEASURE["integer_errors"]().items():
        assert degradation.INTEGER_ERROR[key] == pytest.approx(errors, rel=1e-3)
    assert pytest.approx(MEASURE["float_errors"](), rel=1e-3) == degradation.FLOAT_ERROR


@pytest.mark.parametrize("imatrix", [False, True])
def test_published_losses_of_the_reference_model_lie_inside_the_stated_interval(imatrix: bool) -> None:
    rows = [
        row for row in FIT["read"]("quality.jsonl")
        if row["table"] == "llama3_8b_gguf" and ("imatrix" in row) == imatrix
    ]  # fmt: skip
    for row in rows:
        stated = gguf_loss(LLAMA_3_8B, row["scheme"], imatrix=imatrix, family="Llama-3")

        assert stated.perplexity_low <= row["value"] <= stated.perplexity_high, row["scheme"]


def gguf_loss(spec: ModelSpec, scheme: str, *, imatrix: bool = False, family: str | None = None) -> Loss:
    types = schemes.tensor_types(spec, scheme, imatrix=imatrix)
    return degradation.loss(spec.tensors, types, parameters=spec.parameters, imatrix=imatrix, family=family)


def format_loss(scheme: str, *, spec: ModelSpec = LLAMA_3_8B, family: str | None = "Llama-3") -> Loss:
    how = (
        FIT["published"](scheme) if scheme.startswith("rtn") else degradation.format_of(layouts.parse(scheme))
    )
    return degradation.loss_of(how, spec.tensors, parameters=spec.parameters, family=family)


def test_fallbacks_count_by_their_real_types() -> None:
    """Hidden size 896 is no multiple of 256: its Q4_K_M is Q5_0 and Q8_0 and loses less than its name says."""
    types = schemes.tensor_types(shapes.spec("qwen2.5-0.5b"), "Q4_K_M", imatrix=False)

    error = degradation.rounding(shapes.spec("qwen2.5-0.5b").tensors, types)

    assert error.values + error.downs + error.others < degradation.ROUNDING_ERROR["Q4_K"]


def test_smaller_models_lose_more() -> None:
    types = schemes.tensor_types(LLAMA_3_8B, "Q4_0", imatrix=False)

    kept = [
        degradation.loss(LLAMA_3_8B.tensors, types, parameters=n, imatrix=False).retention
        for n in (10**8, 10**9, 10**10)
    ]

    assert kept == sorted(kept)
    assert len(set(kept)) == 3


def test_an_unknown_family_has_the_widest_interval() -> None:
    known, unknown = (gguf_loss(LLAMA_3_8B, "Q4_K_M", family=f) for f in ("Qwen3", None))

    def width(loss: Loss) -> float:
        return math.log(loss.perplexity_high) / math.log(loss.perplexity_low)

    assert width(unknown) > width(known)


def test_knowledge_and_answers_suffer_more_than_easy_choices() -> None:
    types = schemes.tensor_types(LLAMA_3_8B, "Q3_K_M", imatrix=False)
    parameters = LLAMA_3_8B.parameters

    choice, answers = (
        degradation.loss(
            LLAMA_3_8B.tensors, types, parameters=parameters, imatrix=False, family="Llama-3", measure=measure
        )
        for measure in ("choice", "answers")
    )

    assert choice.perplexity_ratio == answers.perplexity_ratio
    assert choice.retention > answers.retention


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen2.5"), ("qwen3-8b", "Qwen3"), ("qwen3.5-4b", None),
        ("qwen3-30b-a3b", None), ("qwen3-next-80b", None),
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama-3"), ("llama-2-7b-chat", "Llama-2"),
        ("deepseek-r1-distill-qwen-1.5b", None), ("gemma-3-4b-it", None),
    ],
)  # fmt: skip
def test_a_family_is_read_from_the_name_only_where_its_losses_are_published(
    model: str, family: str | None
) -> None:
    assert degradation.family_of(model) == family
    assert family is None or family in degradation.FITTED.families


@pytest.mark.parametrize(
    "order",
    [
        # The orders seen when every method was run on one small model; what they share is stable.
        ("bf16", "gptq-int8-g128", "gptq-int4-g128", "rtn-int4-g128-sym", "gptq-int3-g128", "rtn-int3-g128-sym",
         "gptq-int2-g128", "rtn-int2-g128-sym"),
        ("autoround-int2-g128", "gptq-int2-g128", "rtn-int2-g128"),
        ("awq-int4-g128", "rtn-int4-g128"),
        ("rtn-int4-g32", "rtn-int4-g64", "rtn-int4-g128", "rtn-int4-gall"),
        ("rtn-int4-g128-asym", "rtn-int4-g128-sym"),
        ("ct-w8a16", "ct-w8a8", "ct-w4a16-g128"),
        ("bf16", "bnb-int8", "fp8", "bnb-nf4"),
        ("onnx-int8", "onnx-int4", "onnx-int4-rtn"),
    ],
    ids=lambda order: order[-1],
)  # fmt: skip
def test_methods_come_in_the_order_that_was_measured(order: tuple[str, ...]) -> None:
    lost = [format_loss(scheme).perplexity_ratio for scheme in order]

    assert lost == sorted(lost)
    assert len(set(lost)) == len(lost)


def test_the_unquantized_model_loses_nothing() -> None:
    assert format_loss("bf16") == Loss(
        retention=1.0, low=1.0, high=1.0, perplexity_ratio=1.0, perplexity_low=1.0, perplexity_high=1.0
    )


def test_nf4_is_as_good_as_the_best_four_bits_in_groups() -> None:
    """On the small model, NF4 in blocks of 64 lost what asymmetric rounding to nearest in groups of 128 lost."""
    nf4, nearest = (math.log(format_loss(s).perplexity_ratio) for s in ("bnb-nf4", "rtn-int4-g128"))

    assert 0.6 < nf4 / nearest < 1.1


def test_activations_order_is_told_apart_by_name_and_costs_the_same() -> None:
    plain, ordered = (
        degradation.format_of(layouts.parse(name)) for name in ("gptq-int4-g128", "gptq-int4-g128-actorder")
    )

    assert ordered == replace(plain, actorder=True)
    assert format_loss("gptq-int4-g128") == format_loss("gptq-int4-g128-actorder")


@pytest.mark.parametrize("scheme", schemes.GGUF)
def test_every_type_that_a_scheme_gives_has_a_measured_error(scheme: str) -> None:
    given = set()
    for model, imatrix in itertools.product(map(shapes.spec, shapes.CONFIGS), (False, True)):
        with contextlib.suppress(Unsupported):  # shapes that llama-quantize itself refuses
            given |= set(schemes.tensor_types(model, scheme, imatrix=imatrix))

    assert given
    assert given <= set(degradation.ROUNDING_ERROR)


def test_a_type_of_which_nothing_is_known_is_refused_by_name() -> None:
    types = ["I8"] * len(LLAMA_3_8B.tensors)

    with pytest.raises(Unsupported, match=r"what I8 costs in quality is not known \(output\.weight\)"):
        degradation.rounding(LLAMA_3_8B.tensors, types)


@pytest.mark.parametrize(
    ("three", "half", "words"),
    [("Q4_K_M", "Q6_K", "first"), ("Q3_K_M", "Q6_K", "cannot tell"), ("Q2_K", "Q6_K", "cannot tell"),
     ("IQ2_XXS", "Q6_K", "second"), ("Q3_K_M", "Q2_K", "first")],
)  # fmt: skip
def test_3b_at_three_bits_against_1_5b_at_six_cannot_be_told(three: str, half: str, words: str) -> None:
    """Qwen2.5: at four bits the larger is surely better, at three it is 84 % likely, at under two surely worse."""

    def candidate(name: str, scheme: str) -> tuple[float, Loss]:
        model = catalog.find(name)
        assert model is not None
        scores = model.panels["qwen25_instruct"]
        loss = gguf_loss(
            modelspec.from_config(model.config, name=name), scheme,
            imatrix=schemes.needs_imatrix(scheme), family=degradation.family_of(name),
        )  # fmt: skip
        return sum(scores.values()) / len(scores), loss

    first, second = candidate("qwen2.5-3b-instruct", three), candidate("qwen2.5-1.5b-instruct", half)
    verdict = degradation.compare(first, second)

    assert verdict.words == words
    turned = degradation.compare(second, first)
    assert turned.first == pytest.approx(1 - verdict.first)
    assert turned.words == {"first": "second", "second": "first"}.get(words, words)


def test_a_quantized_cache_costs_what_was_published() -> None:
    rows = [row for row in FIT["read"]("cache_quality.jsonl") if "not rounded" not in row.get("note", "")]
    assert len(rows) == 24

    for row in rows:
        loss = degradation.cache_loss(f"{row['k']}/{row['v']}")
        noise = 1.645 * row["standard_error"]
        if row["quantity"] == "kept":
            assert loss.low - noise <= row["value"] <= loss.high + noise, row["id"]
        else:
            assert loss.perplexity_low - noise <= row["value"] <= loss.perplexity_high + noise, row["id"]


def test_eight_bits_of_cache_are_free_and_four_cost_points() -> None:
    assert degradation.cache_loss("f16").retention > 0.9999
    assert degradation.cache_loss("q8_0").low > 0.999
    assert 0.97 < degradation.cache_loss("q4_0").retention < 0.995
    assert degradation.cache_loss("q8_0/q4_0").retention > degradation.cache_loss("q4_0").retention
    with pytest.raises(Unsupported, match="a KV cache of type q9_9"):
        degradation.cache_loss("q9_9")
