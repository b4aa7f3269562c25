"""transformers, predicted against measured: the 192 rows of the Qwen2.5 and Qwen3 tables, none left out."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from statistics import median

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import measured_memory  # beside the package, see the line above
from measured_memory import Row


@cache
def rows() -> tuple[Row, ...]:
    return tuple(measured_memory.rows())


def clean(table: str) -> list[Row]:
    return [row for row in rows() if row.table.startswith(table) and not measured_memory.reason(row)]


def test_no_row_is_left_out() -> None:
    assert len(rows()) == 112 + 80
    assert len({row.name for row in rows()}) == 192


def test_every_row_lies_in_the_interval_or_has_a_reason() -> None:
    outside = [row for row in rows() if not measured_memory.inside(row)]

    assert [row.name for row in outside if not measured_memory.reason(row)] == []
    assert len(outside) <= 15


@pytest.mark.parametrize(
    ("table", "middle", "nine_of_ten", "worst"),
    [("qwen25", 0.005, 0.03, 0.07), ("qwen3_", 0.003, 0.02, 0.03)],
)
def test_errors_with_the_constants_shipped(
    table: str, middle: float, nine_of_ten: float, worst: float
) -> None:
    errors = sorted(abs(row.error) for row in clean(table))

    assert median(errors) < middle
    assert errors[int(0.9 * len(errors))] < nine_of_ten
    assert errors[-1] < worst


@pytest.mark.parametrize("table", ["qwen25", "qwen3_"])
def test_a_workspace_fitted_on_half_of_the_rows_predicts_the_other_half(table: str) -> None:
    fitted, tested = clean(table)[::2], clean(table)[1::2]
    constant = median(row.rest for row in fitted)

    errors = sorted(abs((row.weights + row.beside + constant) / row.measured - 1) for row in tested)

    assert median(errors) < 0.005
    assert errors[int(0.9 * len(errors))] < 0.035


def test_a_prompt_costs_what_three_ffns_and_four_hiddens_do() -> None:
    """All six sizes of the Qwen2.5 table on one card, in bf16: 0.996 to 1.015 of it per token."""
    last = [
        row
        for row in rows()
        if row.table.startswith("qwen25") and row.prompt == 30720 and row.scheme == "bf16" and row.cards == 1
    ]

    slopes = [measured_memory.slope(row, list(rows())) for row in last]

    assert len(slopes) == 6
    assert all(0.99 < slope < 1.02 for slope in slopes)


def test_reasons_are_given_to_few_rows_and_each_to_one_kind() -> None:
    given = [measured_memory.reason(row) for row in rows() if measured_memory.reason(row)]

    assert len(given) == 31
    assert len(set(given)) == len(measured_memory.REASONS)
