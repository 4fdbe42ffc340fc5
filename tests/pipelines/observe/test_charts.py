"""charts.py draws curves as SVG."""

from __future__ import annotations

import math
import re

import pytest

from cluster.events import Point
from pipelines.observe.charts import chart, stretches, ticks


def test_nan_and_infinity_leave_a_gap() -> None:
    points = [Point(step, value, 0) for step, value in enumerate((1.0, 2.0, math.nan, math.inf, 3.0))]
    assert stretches(points) == [[(0, 1.0), (1, 2.0)], [(4, 3.0)]]


def test_a_long_curve_is_thinned_and_keeps_its_lowest_and_highest_point() -> None:
    points = [Point(step, float(step % 97), 0) for step in range(100_000)] + [Point(100_000, 500.0, 0), Point(100_001, -7.0, 0)]
    [thin] = stretches(points)
    assert len(thin) <= 600
    assert {500.0, -7.0} <= {value for _, value in thin}


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [(0, 800, 7, [0, 200, 400, 600, 800]), (2.56, 8.4, 5, [2, 4, 6, 8, 10]), (0.0, 0.003, 3, [0, 0.001, 0.002, 0.003])],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, about: int, expected: list[float]) -> None:
    assert ticks(low, high, about) == pytest.approx(expected)


def test_a_single_value_still_has_an_axis() -> None:
    found = ticks(3.0, 3.0, 3)
    assert found[0] < 3.0 < found[-1]


def test_ticks_of_the_step_axis_are_whole_numbers() -> None:
    drawn = chart({"train/loss": [Point(2, 5.0, 0), Point(4, 4.0, 0)]}, 960, 320)
    assert re.findall(r'text-anchor="middle">(.*?)<', drawn) == ["2", "3", "4"]


def test_a_curve_without_a_finite_value_says_so() -> None:
    assert "no value of this curve is a finite number" in chart({"train/loss": [Point(0, math.nan, 0)]}, 960, 320)
