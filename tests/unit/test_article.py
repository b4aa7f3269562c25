"""What the article claims, held against the plan: cases/plans.yaml says what agrees, what does not, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from edgepack import modelspec, pipeline, plan, profile, schemes, serde
from edgepack.errors import NothingFits
from edgepack.plan import Plan, Request
from edgepack.runtimes import llama_cpp
from edgepack.units import GIB, MIB, parse_bytes

CASES = Path(__file__).parents[1] / "cases" / "plans.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    profile: str
    model: str | None = None
    scheme: str | None = None
    runtime: str | None = None
    context: int | None = None
    slots: int = 1
    goal: plan.Goal = "quality"
    disk: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Article:
    decode: float
    memory_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    memory: Literal["holds", "unsure", "fails"]
    decode: Literal["sure", "possible", "fails"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    scheme: str
    kv_type: str
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    why: str
    request: Asked
    article: Article | None = None
    verdict: Verdict | Literal["refused"] | None = None
    chosen: Chosen | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cases:
    cases: tuple[Case, ...] = field(default=())


def cases() -> list[Case]:
    rows, _ = serde.read_yaml(CASES)
    return list(serde.load(_Cases, {"cases": rows}, source=str(CASES)).cases)


def planned(asked: Asked) -> Plan:
    request = Request(
        profile=profile.load(asked.profile),
        scheme=schemes.canonical(asked.scheme) if asked.scheme else None,
        runtime=asked.runtime,
        context=asked.context,
        slots=asked.slots,
        goal=asked.goal,
        disk=parse_bytes(asked.disk) if asked.disk else None,
        min_decode=1.0,
    )
    return pipeline.make_plan(request, pipeline.candidates(asked.model, None))


@pytest.mark.parametrize("case", [c for c in cases() if c.article], ids=lambda case: case.name)
def test_a_claim_is_judged_as_the_case_says(case: Case) -> None:
    assert case.article is not None
    if case.verdict == "refused":
        with pytest.raises(NothingFits, match="most goes to device: weights"):
            planned(case.request)
        return

    found = planned(case.request)

    unified = found.budget.unified
    low, high = (
        (found.memory.low, found.memory.high)
        if unified
        else (sum(p.low for p in found.memory.parts if p.place == "device"), found.memory.at("device"))
    )
    claim = case.article.memory_gb * 1e9
    memory: Literal["holds", "unsure", "fails"]
    memory = "holds" if high <= claim else "unsure" if low <= claim else "fails"
    many = case.request.slots > 1
    slowest = found.speed.decode_all_low if many else found.speed.decode_low
    fastest = found.speed.decode_all if many else found.speed.decode_high
    decode: Literal["sure", "possible", "fails"]
    decode = (
        "sure"
        if slowest >= case.article.decode
        else "possible"
        if fastest >= case.article.decode
        else "fails"
    )
    assert Verdict(memory=memory, decode=decode) == case.verdict


@pytest.mark.parametrize("case", [c for c in cases() if c.chosen], ids=lambda case: case.name)
def test_a_rule_is_decided_by_the_arithmetic(case: Case) -> None:
    assert case.chosen is not None

    found = planned(case.request)

    assert (found.scheme, found.settings.kv_type) == (case.chosen.scheme, case.chosen.kv_type)
    assert case.chosen.model in (None, found.model.id)


def test_int4_decodes_two_to_three_times_as_fast_as_fp16() -> None:
    """The article's 2-3x, on a card whose bandwidth decides."""
    asked = Asked(profile="rtx-3060-12gb", model="qwen2.5-1.5b-instruct", scheme="F16")

    whole = planned(asked).speed.decode
    four = planned(Asked(profile=asked.profile, model=asked.model, scheme="Q4_K_M")).speed.decode

    assert 2.0 <= four / whole <= 3.0


def test_the_articles_cache_of_llama_2_is_right_and_its_formula_is_not_for_grouped_queries() -> None:
    """2 x layers x hidden x tokens x 2 bytes: 512 MiB for 1024 tokens of Llama-2-7B, 32 GiB for 64 users. Qwen2.5-7B
    has 4 KV heads for 28, so that the same formula is seven times too large."""

    def cache(of: modelspec.ModelSpec, slots: int) -> int:
        return llama_cpp.kv_bytes(
            of, llama_cpp.cpu_settings(context=1024 * slots, slots=slots, kv_type="f16")
        )

    llama = modelspec.from_config(
        {
            "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096,
        },
        name="llama-2-7b",
    )  # fmt: skip
    qwen = pipeline.named("qwen2.5-7b-instruct").spec

    assert cache(llama, 1) == 512 * MIB
    assert cache(llama, 64) == 32 * GIB
    assert 7 * cache(qwen, 1) == 2 * qwen.layers * qwen.hidden * 1024 * 2
