"""The loss of distillation against its definition in double precision, and against what is often computed instead."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional

from edgepack.builders.distill import Divergence, Objective
from edgepack.builders.distill import loss as distill
from edgepack.builders.distill.loss import Online, Soft
from edgepack.errors import BadInput

KINDS: tuple[Divergence, ...] = ("forward", "reverse", "js")
Doubles = NDArray[np.float64]


# ── the definition, in doubles ──


def probabilities(logits: Doubles, temperature: float) -> Doubles:
    scaled = logits / temperature
    powers = np.exp(scaled - scaled.max(-1, keepdims=True))
    found: Doubles = powers / powers.sum(-1, keepdims=True)
    return found


def divergence(teacher: Doubles, student: Doubles, kind: Divergence) -> Doubles:
    """Of probabilities, over the last dimension; 0 log 0 is 0."""

    def kl(p: Doubles, q: Doubles) -> Doubles:
        ratio = np.log(np.where(p > 0, p, 1.0)) - np.log(np.where(p > 0, q, 1.0))
        found: Doubles = (p * ratio).sum(-1)
        return found

    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    middle = (teacher + student) / 2
    return kl(teacher, middle) / 2 + kl(student, middle) / 2


def bucketed(chances: Doubles, ids: NDArray[np.int64], smallest: float = 0.0) -> Doubles:
    """k outcomes, and all the others as one of at least ``smallest``; nothing more where these are all."""
    inside = np.take_along_axis(chances, ids, -1)
    if ids.shape[-1] == chances.shape[-1]:
        return inside
    rest = chances.copy()
    np.put_along_axis(rest, ids, 0.0, -1)
    return np.concatenate([inside, np.maximum(rest.sum(-1, keepdims=True), smallest)], -1)


@dataclass(frozen=True)
class Case:
    """A batch as a trainer has it."""

    student: Doubles
    """[batch, length, V]"""
    teacher: Doubles
    """[batch, length, V'], from the same tokens."""
    tokens: NDArray[np.int64]
    """[batch, length]"""
    response: NDArray[np.bool_]
    k: int | None
    objective: Objective


def reference(case: Case) -> float:
    """The mean over tokens of responses, one at a time: what the position before it says of it."""
    common = min(case.student.shape[-1], case.teacher.shape[-1])
    t = case.objective.temperature
    total, count = 0.0, 0
    for example in range(len(case.tokens)):
        for position in range(1, case.tokens.shape[1]):
            if not case.response[example, position]:
                continue
            student, teacher = case.student[example, position - 1], case.teacher[example, position - 1]
            entropy = -math.log(probabilities(student, 1.0)[case.tokens[example, position]])
            q, p = probabilities(teacher[:common], t), probabilities(student[:common], t)
            if case.k is not None:
                ids = np.argsort(-teacher[:common], kind="stable")[: case.k]
                q, p = bucketed(q, ids, distill.SMALLEST_TAIL), bucketed(p, ids)
            apart = float(divergence(q, p, case.objective.divergence))
            total += case.objective.alpha * entropy + (1 - case.objective.alpha) * t * t * apart
            count += 1
    return total / count


def numeric_gradient(case: Case, entries: NDArray[np.int64], step: float = 1e-5) -> Doubles:
    """Central differences of `reference` by some of the student's logits (flat indices)."""
    found = []
    for entry in entries:
        values = []
        for sign in (1, -1):
            moved = case.student.copy()
            moved.flat[entry] += sign * step
            values.append(reference(Case(**{**vars(case), "student": moved})))
        found.append((values[0] - values[1]) / (2 * step))
    return np.array(found)


# ── ours ──


def soft_of(teacher: torch.Tensor, k: int, vocabulary: int, temperature: float) -> Soft:
    """What is kept of full logits [n, V']."""
    cut = teacher[:, :vocabulary].double()
    cut = cut - cut.max(1, keepdim=True).values
    logits, ids = cut.sort(dim=1, descending=True, stable=True)
    return Soft(
        ids=ids[:, :k], logits=logits[:, :k], lse=cut.logsumexp(1), lse_t=(cut / temperature).logsumexp(1),
        temperature=temperature, vocabulary=vocabulary,
    )  # fmt: skip


def ours(case: Case, student: torch.Tensor) -> torch.Tensor:
    tokens, response = torch.from_numpy(case.tokens), torch.from_numpy(case.response)
    logits, targets = distill.select(student, tokens, response)
    full, _ = distill.select(torch.from_numpy(case.teacher), tokens, response)
    common = min(case.student.shape[-1], case.teacher.shape[-1])
    soft = full if case.k is None else soft_of(full, case.k, common, case.objective.temperature)
    entropy, apart = distill.token_losses(logits, targets, soft, case.objective)
    return distill.combined(entropy, apart, case.objective).mean()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    common, spread = draw(st.integers(3, 12)), draw(st.sampled_from([0.1, 2.0, 8.0]))
    extra_student, extra_teacher = draw(st.sampled_from([(0, 0), (3, 0), (0, 3)]))
    tokens = random.integers(0, common, (batch, length))
    response = random.random((batch, length)) < 0.6  # prompts, other turns, and padding at the end
    response[:, 0] = False
    response[0, 1] = True
    return Case(
        student=random.normal(0, spread, (batch, length, common + extra_student)),
        teacher=random.normal(0, spread, (batch, length, common + extra_teacher)),
        tokens=tokens,
        response=response,
        k=draw(st.none() | st.integers(1, common)),
        objective=Objective(
            alpha=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
            temperature=draw(st.sampled_from([1.0, 2.0, 4.0])),
            divergence=draw(st.sampled_from(KINDS)),
        ),
    )


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_the_loss_and_its_gradient_are_those_of_the_definition_in_doubles(case: Case) -> None:
    student = torch.from_numpy(case.student).requires_grad_()

    value = ours(case, student)
    value.backward()

    assert student.grad is not None
    assert value.item() == pytest.approx(reference(case), rel=1e-9, abs=1e-9)
    entries = np.random.default_rng(0).choice(case.student.size, min(12, case.student.size), replace=False)
    expected = numeric_gradient(case, entries)
    np.testing.assert_allclose(student.grad.numpy().flat[entries], expected, rtol=1e-4, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_prompts_and_padding_have_no_gradient(case: Case) -> None:
    student = torch.from_numpy(case.student).requires_grad_()

    ours(case, student).backward()

    assert student.grad is not None
    silent = np.ones(case.tokens.shape, bool)
    silent[:, :-1] = ~case.response[:, 1:]
    assert not student.grad.numpy()[silent].any()


# ── what is often computed instead (each is measured in the notes on distillation of this field) ──


@pytest.fixture(scope="module")
def batch() -> Case:
    """8 x 32 tokens: a prompt, a response, padding; a teacher and a student that is close to it."""
    random = np.random.default_rng(7)
    teacher = random.normal(0, 3, (8, 32, 64))
    tokens = random.integers(0, 64, (8, 32))
    response = np.zeros((8, 32), bool)
    for row in range(8):
        response[row, 16 : 20 + row] = True
    # Positions outside of responses differ more: a student is not trained on them.
    student = teacher + random.normal(0, 0.2, teacher.shape)
    student[:, 28:] += random.normal(0, 3, (8, 4, 64))
    return Case(
        student=student, teacher=teacher, tokens=tokens, response=response, k=None,
        objective=Objective(alpha=0.0),
    )  # fmt: skip


def logs(values: Doubles) -> torch.Tensor:
    return torch.from_numpy(values).log_softmax(-1)


def test_it_is_a_mean_over_tokens_and_not_over_examples_or_over_ids(batch: Case) -> None:
    answered = ours(batch, torch.from_numpy(batch.student)).item()

    teacher, student = logs(batch.teacher), logs(batch.student)
    by_examples = functional.kl_div(student, teacher, reduction="batchmean", log_target=True).item()
    by_ids = functional.kl_div(student, teacher, reduction="none", log_target=True).mean().item()
    assert answered == pytest.approx(reference(batch), rel=1e-9)
    assert by_examples > 30 * answered
    assert by_ids < answered / 2


def test_padding_and_prompts_are_not_averaged_in(batch: Case) -> None:
    answered = ours(batch, torch.from_numpy(batch.student)).item()

    teacher, student = logs(batch.teacher), logs(batch.student)
    everywhere = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean().item()
    assert everywhere > 2 * answered
    other = batch.student.copy()
    other[:, 28:] = 0  # padding
    other[:, :14] = 0  # prompts
    assert ours(batch, torch.from_numpy(other)).item() == answered


def test_teacher_and_student_are_shifted_once_and_alike(batch: Case) -> None:
    answered = ours(batch, torch.from_numpy(batch.student)).item()

    shifted = np.roll(batch.teacher, -1, axis=1)
    twice = ours(Case(**{**vars(batch), "teacher": shifted}), torch.from_numpy(batch.student)).item()
    assert twice > 10 * answered
    same = ours(batch, torch.from_numpy(batch.teacher)).item()
    assert same == pytest.approx(0, abs=1e-12)


def test_labels_are_shifted_once() -> None:
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    knows_the_next = functional.one_hot(tokens.roll(-1, 1), 8).double() * 50
    response = torch.tensor([[False, False, True, True, True]])

    logits, targets = distill.select(knows_the_next, tokens, response)
    entropy, _ = distill.token_losses(logits, targets, None, Objective())

    assert targets.tolist() == [4, 1, 5]
    assert entropy.max().item() < 1e-9


def test_logarithms_are_compared_and_so_it_is_never_negative(batch: Case) -> None:
    answered = ours(batch, torch.from_numpy(batch.student)).item()

    chances, teacher = logs(batch.student).exp(), logs(batch.teacher).exp()
    of_chances = functional.kl_div(chances, teacher, reduction="none").sum(-1).mean().item()
    assert of_chances < 0 < answered


def test_what_only_one_side_has_is_cut_before_the_softmax(batch: Case) -> None:
    padding = np.full((8, 32, 16), 9.0)  # rows that were never trained may say anything
    padded = Case(**{**vars(batch), "teacher": np.concatenate([batch.teacher, padding], -1)})

    answered = ours(padded, torch.from_numpy(batch.student)).item()

    assert answered == pytest.approx(ours(batch, torch.from_numpy(batch.student)).item(), rel=1e-12)
    after = logs(padded.teacher)[..., :64].exp()
    wrong = (after * (after.log() - logs(batch.student))).sum(-1).mean().item()
    assert wrong < 0
    wide = np.concatenate([batch.student, padding], -1)
    assert ours(batch, torch.from_numpy(wide)).item() == pytest.approx(answered, rel=1e-12)


def test_the_gradient_keeps_its_size_at_a_high_temperature(batch: Case) -> None:
    """It goes to (z - v) / N as T grows (Hinton et al., equation 4), and to nothing without T²."""
    norms = []
    for temperature in (1.0, 32.0, 64.0):
        case = Case(**{**vars(batch), "objective": Objective(alpha=0.0, temperature=temperature)})
        student = torch.from_numpy(batch.student).requires_grad_()

        ours(case, student).backward()

        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[2] == pytest.approx(norms[1], rel=0.05)
    assert norms[2] > norms[0] / 10


# ── what each divergence is ──


def test_each_direction_is_the_one_that_it_is_called() -> None:
    """Two outcomes, the teacher 1/2 and 1/2, the student 1/4 and 3/4."""
    teacher = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    found = {
        kind: distill.token_losses(student, torch.tensor([0]), teacher, Objective(divergence=kind))[1].item()
        for kind in KINDS
    }

    assert found["forward"] == pytest.approx(0.5 * math.log(4 / 3))
    assert found["reverse"] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    middle = (3 / 8, 5 / 8)
    one = 0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1])
    other = 0.25 * math.log(0.25 / middle[0]) + 0.75 * math.log(0.75 / middle[1])
    assert found["js"] == pytest.approx((one + other) / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_forward_kl_is_the_difference_of_probabilities(temperature: float) -> None:
    random = np.random.default_rng(3)
    teacher, values = random.normal(0, 2, (5, 9)), random.normal(0, 2, (5, 9))
    student = torch.from_numpy(values).requires_grad_()
    objective = Objective(alpha=0.0, temperature=temperature)

    entropy, apart = distill.token_losses(
        student, torch.zeros(5, dtype=torch.int64), torch.from_numpy(teacher), objective
    )
    distill.combined(entropy, apart, objective).sum().backward()

    assert student.grad is not None
    expected = temperature * (probabilities(values, temperature) - probabilities(teacher, temperature))
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-12)


# ── the tail ──


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("teacher_tail", "student_tail"), [(-200.0, 0.0), (0.0, -200.0), (-200.0, -200.0), (30.0, 30.0), (0, 30)]
)
def test_a_tail_of_nothing_or_of_everything_has_a_finite_loss_and_gradient(
    kind: Divergence, teacher_tail: float, student_tail: float
) -> None:
    """Logits of the ids that are not kept, far below or far above the others."""
    teacher = torch.zeros(1, 12)
    teacher[:, :4] = torch.tensor([3.0, 2.0, 1.0, 0.5])
    shifted = teacher - 3
    shifted[:, 4:] = teacher_tail - 3
    soft = Soft(
        ids=torch.arange(4)[None], logits=shifted[:, :4], lse=shifted.logsumexp(1),
        lse_t=(shifted / 2).logsumexp(1), temperature=2.0, vocabulary=12,
    )  # fmt: skip
    values = teacher.clone()
    values[:, 4:] = student_tail
    student = values.requires_grad_()

    _, apart = distill.token_losses(student, torch.tensor([0]), soft, Objective(divergence=kind))
    apart.sum().backward()

    assert student.grad is not None
    assert torch.isfinite(apart).all()
    assert apart.item() >= -1e-6
    assert torch.isfinite(student.grad).all()
    assert student.grad.sum().item() == pytest.approx(0, abs=1e-5)  # logits matter up to a constant


def test_a_small_tail_of_the_student_is_exact_in_32_bits() -> None:
    """One of 1e-12 is far below what is left of 1 less the other probabilities."""
    student = torch.tensor([[0.0, -1.0, -28.0, -29.0]])
    exact = torch.tensor([[0.0, -1.0, -28.0, -29.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -1.0, -3.0, -3.5]], dtype=torch.float64)
    soft = soft_of(teacher, 2, 4, 1.0)

    _, apart = distill.token_losses(student, torch.tensor([0]), soft, Objective())

    q = bucketed(probabilities(teacher.numpy(), 1.0), soft.ids.numpy())
    p = bucketed(probabilities(exact.numpy(), 1.0), soft.ids.numpy())
    assert apart.item() == pytest.approx(float(divergence(q, p, "forward")[0]), rel=1e-6)


def test_what_was_kept_for_other_temperatures_or_of_more_ids_is_refused() -> None:
    soft = soft_of(torch.randn(2, 10), 3, 10, 2.0)
    targets = torch.tensor([0, 1])

    with pytest.raises(BadInput, match="the temperatures 1 and 2, not for 4"):
        distill.token_losses(torch.randn(2, 10), targets, soft, Objective(temperature=4.0))
    with pytest.raises(BadInput, match="over 10 ids and the student has 8"):
        distill.token_losses(torch.randn(2, 8), targets, soft, Objective())


# ── in chunks ──


@pytest.mark.parametrize("against", ["kept", "online", "nothing"])
def test_chunks_have_the_sums_and_the_gradients_of_the_whole(against: str) -> None:
    torch.manual_seed(0)
    objective = Objective(alpha=0.3, temperature=2.0)
    matrix = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 20, (11,))
    teacher_hidden, teacher_matrix = torch.randn(11, 4).double(), torch.randn(24, 4).double()
    full = teacher_hidden @ teacher_matrix.T
    largest = []

    def head(states: torch.Tensor) -> torch.Tensor:
        largest.append(len(states))
        return states @ matrix.T

    soft = {
        "kept": soft_of(full, 5, 20, 2.0),
        "online": Online(hidden=teacher_hidden, head=lambda states: states @ teacher_matrix.T, vocabulary=20),
        "nothing": None,
    }[against]
    whole = soft.logits() if isinstance(soft, Online) else soft
    entropy, apart = distill.token_losses(hidden @ matrix.T, targets, whole, objective)
    expected = distill.combined(entropy.sum(), apart.sum(), objective)
    wanted = torch.autograd.grad(expected, (hidden, matrix))

    sums = distill.chunked(hidden, head, targets, soft, objective, chunk=4)
    found = torch.autograd.grad(distill.combined(*sums, objective), (hidden, matrix))

    torch.testing.assert_close(sums, (entropy.sum(), apart.sum()), check_dtype=False, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert max(largest) == 4
    assert len(largest) == 6  # each chunk once forward and once backward: nothing of it was held


def test_no_rows_are_a_zero_that_can_be_differentiated() -> None:
    hidden = torch.randn(0, 6, requires_grad=True)

    sums = distill.chunked(
        hidden, lambda states: states, torch.empty(0, dtype=torch.int64), None, Objective(), chunk=4
    )
    sum(sums, torch.zeros(())).backward()

    assert [value.item() for value in sums] == [0.0, 0.0]
    assert hidden.grad is not None
