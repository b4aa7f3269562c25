"""How much of a gap was closed, with an interval; what is measured by processes is in tests/integration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from edgepack import serde
from edgepack.builders.distill import examples
from edgepack.builders.distill.measure import measure, recovered
from edgepack.errors import BadInput
from edgepack.evaluation import Estimate, Reading
from edgepack.progress import Silent


def reading(nats: Iterable[float]) -> Reading:
    nll = Estimate(value=2.0, low=1.5, high=2.5)
    return Reading(
        model="m", tokens=10, nll=nll, kl=None, same_top=None, by_example=tuple(float(x) for x in nats)
    )


def test_a_gap_that_is_closed_alike_everywhere_is_known_exactly() -> None:
    teacher, before = [10.0, 20.0, 30.0, 15.0], [14.0, 28.0, 41.0, 21.0]
    after = [t + 0.25 * (b - t) for t, b in zip(teacher, before, strict=True)]

    found = recovered(reading(before), reading(after), reading(teacher))

    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((0.75, 0.75, 0.75), abs=1e-6)


def test_the_interval_is_fiellers() -> None:
    # Gaps 4, 6, 5, 5 and what is left of them 1, 2, 2, 1: means 5 and 1.5, t(3) = 3.1824.
    teacher = [10.0, 20.0, 30.0, 40.0]

    found = recovered(reading([14.0, 26, 35, 45]), reading([11.0, 22, 32, 41]), reading(teacher))

    assert found is not None and found.value == pytest.approx(0.7)
    for end in (found.low, found.high):
        left = 1 - end
        apart = np.array([1.0, 2, 2, 1]) - left * np.array([4.0, 6, 5, 5])
        assert abs(apart.mean()) / (apart.std(ddof=1) / 2) == pytest.approx(3.1824, rel=1e-6)
    assert found.low < 0.7 < found.high


def test_without_a_sure_gap_there_is_no_share() -> None:
    teacher = reading([10.0, 20.0, 30.0])

    assert recovered(teacher, reading([9.0, 20.0, 30.0]), teacher) is None
    assert recovered(reading([11.0, 19.0, 31.0]), teacher, teacher) is None
    assert recovered(reading([9.0, 19.1, 29.0]), teacher, teacher) is None


def test_the_interval_covers_the_share() -> None:
    random = np.random.default_rng(3)

    def covers() -> bool:
        sizes = random.integers(5, 100, 20)
        gap = sizes * (0.5 + 0.3 * random.standard_normal(20))
        left = 0.4 * gap + sizes * 0.1 * random.standard_normal(20)
        theirs = 3.0 * sizes
        found = recovered(reading(theirs + gap), reading(theirs + left), reading(theirs))
        return found is not None and found.low <= 0.6 <= found.high

    assert 0.90 <= np.mean([covers() for _ in range(400)]) <= 0.99


def test_a_reading_comes_back_from_a_document() -> None:
    found = reading([1.0, 2.5])

    back = serde.load(Reading, serde.dump(found), source="report")

    assert back == found
    assert back.perplexity.low == pytest.approx(math.exp(1.5))


def model(place: Path, rows: int) -> Path:
    place.mkdir()
    (place / "config.json").write_text(f'{{"vocab_size": {rows}}}', encoding="utf-8")
    return place


def test_examples_of_another_vocabulary_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    known = examples.write([([1, 90], [False, True])] * 2, tmp_path / "e")
    teacher, student = model(tmp_path / "t", 100), model(tmp_path / "s", 80)

    with pytest.raises(BadInput, match="has the token 90, and the models have 80 in common"):
        measure([student], teacher, known.folder, progress=Silent())


def test_one_example_is_too_few_for_an_interval(tmp_path: Path) -> None:
    known = examples.write([([1, 9], [False, True])], tmp_path / "e")

    with pytest.raises(BadInput, match="has 1 example, and an interval takes 2"):
        measure([], model(tmp_path / "t", 100), known.folder, progress=Silent())
