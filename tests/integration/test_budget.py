"""A GGUF that fills its budget: the costs are the divergence that comes, the knapsack is exact, the bytes are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from random_model import write_tokenizer

from edgepack import allocation, calibration, ggufheader, plan, profile, schemes, toolchain
from edgepack.allocation import Item, Limits, Option
from edgepack.artifact import Checkpoint
from edgepack.builders import budget, convert, imatrix, sensitivity
from edgepack.calibration import Sampling
from edgepack.errors import BadInput, Unsupported
from edgepack.modelspec import ModelSpec, read
from edgepack.plan import Candidate, ModelRef, Plan, Request
from edgepack.progress import Silent
from edgepack.units import Bytes
from tests.integration.test_convert_parity import CONFIGS, VOCAB

pytestmark = pytest.mark.integration

_TYPES = ("Q3_K", "Q4_K", "Q6_K")


# -- the knapsack -------------------------------------------------------------------------------------------

options = st.builds(
    lambda file, extra, loss: Option(kind="Q4_K", file=32 * file, memory=32 * (file + extra), loss=loss),
    st.integers(1, 60),
    st.sampled_from([0, 0, 5]),
    st.integers(0, 1000).map(lambda n: n / 100),
)
problems = st.lists(
    st.lists(options, min_size=1, max_size=4).map(lambda found: tuple(sorted(found, key=lambda o: o.memory))),
    min_size=1,
    max_size=5,
)


@settings(max_examples=80)
@given(problem=problems, file=st.integers(1, 300), memory=st.integers(1, 300))
def test_the_solver_finds_the_least_loss_of_all_choices_within_both_limits(
    problem: list[Item], file: int, memory: int
) -> None:
    limits = Limits(file=32 * file, memory=32 * memory)
    least = min((allocation.lost(c) for c in product(*problem) if limits.hold(c)), default=None)

    if least is None:
        with pytest.raises(Unsupported):
            allocation.solve(problem, limits)
        return
    chosen = allocation.solve(problem, limits)

    assert limits.hold(chosen)
    assert allocation.lost(chosen) == pytest.approx(least, rel=1e-5, abs=1e-6)


def test_a_budget_below_the_smallest_types_is_refused_with_both_figures() -> None:
    item = (Option(kind="Q2_K", file=2048, memory=2048, loss=1.0),)

    with pytest.raises(Unsupported, match=r"take 4\.0 KiB of file, and 1\.0 KiB are left"):
        allocation.solve([item, item], Limits(file=1024, memory=None))


# -- the costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    checkpoint: Checkpoint
    spec: ModelSpec
    windows: Path
    matrix: Path
    model: Any
    """The same model in transformers."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda name: make_case(name, tmp_path_factory.mktemp("budget")))


@pytest.fixture(scope="module", params=["llama", "qwen2, tied", "gemma3"])
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def make_case(name: str, place: Path) -> Case:
    import torch
    import transformers

    kind, values = CONFIGS[name]
    torch.manual_seed(7)
    model = (
        transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values)).float().eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = place / "model"
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB)
    spec = replace(read(folder), header_bytes=convert.header_size(folder))
    windows = place / "windows.npy"
    np.save(windows, np.random.default_rng(1).integers(0, VOCAB - 3, (12, 64), dtype=np.int32))
    whole = convert.convert(folder, place / "whole.gguf", outtype="F16", progress=Silent())
    text = place / "text.txt"
    text.write_text("Well, Prince, so Genoa and Lucca are now just family estates. " * 60, encoding="utf-8")
    data = calibration.read((text,), template=None, sampling=Sampling(windows=4, length=128))
    matrix = imatrix.compute(whole, data, place / "m.gguf", toolchain=toolchain.find(), progress=Silent())
    checkpoint = Checkpoint(path=folder, source=str(folder), revision="sha256:test", license="none")
    return Case(checkpoint=checkpoint, spec=spec, windows=windows, matrix=matrix, model=model)


def measure(case: Case, folder: Path, kinds: dict[str, tuple[str, ...]]) -> sensitivity.Costs:
    return sensitivity.measure(
        case.checkpoint, case.spec, kinds, folder, windows=case.windows, matrix=case.matrix,
        toolchain=toolchain.find(), progress=Silent(),
    )  # fmt: skip


def every_kind(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    return {t.name: _TYPES for t in spec.tensors if schemes.quantizable(t)}


@pytest.fixture(scope="module")
def costs(case: Case, tmp_path_factory: pytest.TempPathFactory) -> sensitivity.Costs:
    return measure(case, tmp_path_factory.mktemp("costs"), every_kind(case.spec))


def test_a_cost_is_the_divergence_that_rounding_that_tensor_brings(
    case: Case, costs: sensitivity.Costs
) -> None:
    """The whole model in transformers, one tensor rounded at a time: another way than the builder's."""
    import torch

    rounding = sensitivity.Rounding(toolchain.find().package, 1)
    importances = imatrix.read(case.matrix)
    ids = torch.from_numpy(np.load(case.windows)).long()
    names = convert.hf_names(case.spec)

    def chances() -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(case.model(ids).logits, -1)

    parent = chances()
    for tensor in (
        "token_embd.weight",
        "blk.0.attn_v.weight",
        "blk.1.ffn_down.weight",
        "blk.2.attn_q.weight",
    ):
        parameter = case.model.get_parameter(names[tensor])
        kept = parameter.data
        parameter.data = torch.from_numpy(rounding(kept.numpy(), "Q4_K", importances.get(tensor)))
        diverged = float((parent.exp() * (parent - chances())).sum(-1).mean())
        parameter.data = kept
        assert costs[tensor]["Q4_K"] == pytest.approx(diverged, rel=0.35), tensor


def test_more_bits_cost_less_and_every_tensor_has_its_line(case: Case, costs: sensitivity.Costs) -> None:
    assert costs.keys() == every_kind(case.spec).keys()
    for tensor, found in costs.items():
        assert found["Q3_K"] > found["Q4_K"] > found["Q6_K"] > 0, tensor


# -- the artifact -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(cases: Callable[[str], Case]) -> Case:
    return cases("llama")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that builds share, so that costs are measured once."""
    return tmp_path_factory.mktemp("shared")


def plan_of(case: Case, size: int) -> Plan:
    reference = ModelRef(
        id="tiny", source=str(case.checkpoint.path), revision=None, architecture=case.spec.architecture,
        parameters=case.spec.parameters, license="none",
    )  # fmt: skip
    asked = Request(
        profile=profile.load("intel-n100"), scheme=schemes.canonical(f"gguf-budget-{size}"), context=128
    )
    found = next(iter(plan.survey(asked, [Candidate(model=reference, spec=case.spec, panels={})])))
    assert isinstance(found, Plan)
    return found


def build(case: Case, size: int, folder: Path) -> budget.Filled:
    return budget.build(
        plan_of(case, size), case.checkpoint, case.spec, folder, windows=case.windows, data=case.matrix,
        toolchain=toolchain.find(), progress=Silent(),
    )  # fmt: skip


def sizes(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(int(schemes.file_bytes(spec, s, imatrix=True)[0]) for s in ("Q4_K_M", "Q5_K_M"))


def test_budgets_are_filled_and_kept_and_the_second_takes_the_costs_of_the_first(
    llama: Case, shared: Path
) -> None:
    first, second = sizes(llama.spec)

    made = build(llama, first, shared)
    table = next(shared.glob("*-sensitivity.jsonl"))
    before = table.stat().st_mtime_ns
    larger = build(llama, second, shared)

    assert table.stat().st_mtime_ns == before
    for found, size in ((made, first), (larger, second)):
        header = ggufheader.parse(found.artifact.path)
        assert found.spec.recipe is not None
        assert tuple(t.type for t in header.tensors) == found.spec.recipe.types
        assert 0.995 * size <= found.artifact.bytes <= size
        planned = plan_of(llama, size)
        exact = plan.with_spec(planned, found.spec, planned.model)
        assert exact.memory.file_bytes == found.artifact.bytes
        assert exact.memory.file_provenance == "exact"
        assert exact.memory.high <= planned.memory.high
    assert larger.nats < made.nats


def test_the_same_inputs_give_the_same_bytes(llama: Case, shared: Path, tmp_path: Path) -> None:
    size = sizes(llama.spec)[0]

    first, second = build(llama, size, shared), build(llama, size, tmp_path)

    assert first.artifact.path != second.artifact.path
    assert first.artifact.sha256 == second.artifact.sha256


def test_a_killed_measurement_goes_on_where_it_was(llama: Case, shared: Path, tmp_path: Path) -> None:
    size = sizes(llama.spec)[0]
    build(llama, size, shared)
    table = next(shared.glob("*-sensitivity.jsonl"))
    whole = sensitivity.read(table)
    lines = table.read_bytes().splitlines(keepends=True)
    marked = json.loads(lines[0])
    marked["nats"]["Q3_K"] = 42.0
    half = json.dumps(marked).encode() + b"\n" + b"".join(lines[1:9]) + lines[9][:20]
    (tmp_path / table.name).write_bytes(half)

    build(llama, size, tmp_path)

    again = sensitivity.read(tmp_path / table.name)

    assert again[marked["tensor"]]["Q3_K"] == 42.0, "what was there was not measured again"
    assert {**again, marked["tensor"]: whole[marked["tensor"]]} == whole


def test_windows_of_another_tokenizer_are_refused(llama: Case, tmp_path: Path) -> None:
    windows = tmp_path / "windows.npy"
    np.save(windows, np.full((2, 32), VOCAB, dtype=np.int32))

    with pytest.raises(BadInput, match=f"has the token {VOCAB}, and model knows {VOCAB}"):
        measure(replace(llama, windows=windows), tmp_path, every_kind(llama.spec))


def test_more_than_the_best_types_everywhere_is_not_needed(llama: Case, shared: Path) -> None:
    size = Bytes(int(schemes.file_bytes(llama.spec, "Q8_0", imatrix=True)[0]) * 2)

    made = build(llama, size, shared)

    assert made.spec.recipe is not None
    assert {
        k for k, t in zip(made.spec.recipe.types, made.spec.tensors, strict=True) if schemes.quantizable(t)
    } == {"Q8_0"}
    assert made.used < 0.6
