"""Intervals against tables and against the formula."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from nybble.evaluation.intervals import Estimate, grow, mean, share, student

TABLE = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    5: 2.5706,
    10: 2.2281,
    11: 2.2010,
    30: 2.0423,
    120: 1.9799,
}


@pytest.mark.parametrize(("freedom", "t"), TABLE.items())
def test_students_quantile_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student(freedom) == pytest.approx(t, abs=6e-5)


def test_students_quantile_tends_to_the_normal_one() -> None:
    assert student(100_000) == pytest.approx(1.95996, abs=5e-5)


def test_mean_of_four() -> None:
    """2, 4, 4, 6: s = sqrt(8 / 3), t(3) = 3.1824."""
    found = mean([2.0, 4.0, 4.0, 6.0])
    half = 3.1824463 * math.sqrt(8 / 3) / 2
    assert found.value == 4.0
    assert found.ends == pytest.approx((4 - half, 4 + half), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    assert mean([3.0]) == Estimate(3.0, None, None)
    assert mean([3.0]).map(math.exp).within(0.0).ends is None


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    chance = random.Random(0)
    samples = [[chance.gauss(1.0, 2.0) for _ in range(5)] for _ in range(2000)]
    ends = [mean(sample).ends for sample in samples]
    covered = [low <= 1.0 <= high for low, high in filter(None, ends)]
    assert 0.935 < statistics.fmean(covered) < 0.965


def test_a_rising_function_moves_value_and_ends() -> None:
    moved = Estimate(1.0, 0.5, 2.0).map(lambda value: 2 * value)
    assert moved == Estimate(2.0, 1.0, 4.0)
    assert Estimate(0.1, -0.1, 1.2).within(0.0, 1.0) == Estimate(0.1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        pytest.param(0, 10, 0.0, 0.2775, id="none"),
        pytest.param(5, 10, 0.2366, 0.7634, id="half"),
        pytest.param(10, 10, 0.7225, 1.0, id="all"),
        pytest.param(410, 500, 0.7839, 0.8512, id="many"),
    ],
)
def test_wilsons_interval(right: int, total: int, low: float, high: float) -> None:
    found = share(right, total)
    assert found.value == right / total
    assert found.ends == pytest.approx((low, high), abs=6e-5)


def test_a_hopeless_loss_is_still_a_number() -> None:
    assert math.isfinite(grow(1e6))
    assert grow(1.0) == math.e
