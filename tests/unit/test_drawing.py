"""Curves as SVG: well-formed, the same for the same figures, and what is drawn is where its value is."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.drawing import HEIGHT, WIDTH, Series, curves

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*series: Series) -> ElementTree.Element:
    return ElementTree.fromstring(curves("held-out <loss>", series, x="step", y="nats & more"))


def points(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = [line.get("points", "").split() for line in svg.iter(f"{SVG}polyline")]
    return [[(float(p.split(",")[0]), float(p.split(",")[1])) for p in line] for line in lines]


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_every_point_is_inside_and_higher_values_are_higher_up(values: list[float], scale: float) -> None:
    svg = drawn(Series(name="a", points=tuple((float(at), v * scale) for at, v in enumerate(values))))

    (line,) = points(svg)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    highest, lowest = values.index(max(values)), values.index(min(values))
    assert line[highest][1] <= line[lowest][1]


def test_ticks_are_at_the_values_they_name() -> None:
    svg = drawn(Series(name="a", points=((0.0, 2.0), (100.0, 4.0))))

    texts = {text.text: text for text in svg.iter(f"{SVG}text")}
    assert {"0", "20", "100", "2", "3", "4"} <= texts.keys()
    (line,) = points(svg)
    assert float(texts["100"].get("x", "nan")) == pytest.approx(line[1][0])
    assert float(texts["4"].get("y", "nan")) == pytest.approx(line[1][1] + 4)


def test_names_are_escaped_and_what_is_not_finite_is_left_out() -> None:
    svg = drawn(Series(name="KL < 1", points=((0.0, 1.0), (1.0, math.nan), (2.0, 3.0))))

    assert any(text.text == "KL < 1" for text in svg.iter(f"{SVG}text"))
    assert len(points(svg)[0]) == 2


def test_a_long_curve_is_drawn_through_means() -> None:
    svg = drawn(Series(name="a", points=tuple((float(at), float(at % 2)) for at in range(4000))))

    (line,) = points(svg)
    assert 300 <= len(line) <= 400
    assert len({y for _, y in line}) == 1


def test_nothing_measured_is_axes_alone() -> None:
    assert points(drawn(Series(name="a", points=()))) == [[]]
