"""Means with 95 % confidence intervals."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

CONFIDENCE = 0.95
GREATEST = math.log(sys.float_info.max)
NORMAL = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the ends of its interval; `None` where one value alone says nothing of its spread."""

    value: float
    low: float | None
    high: float | None

    def map(self, change: Callable[[float], float]) -> Estimate:
        """The estimate of a rising function of the same quantity."""
        ends = (None if end is None else change(end) for end in (self.low, self.high))
        return Estimate(change(self.value), *ends)

    @property
    def ends(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    def within(self, low: float, high: float = math.inf) -> Estimate:
        """The same, its interval cut where no value can lie."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(self.low, low), high=min(self.high, high))


def mean(values: Sequence[float]) -> Estimate:
    """mean ± t · s / √n of independent values, t Student's with n - 1 degrees of freedom."""
    count, middle = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Estimate(middle, None, None)
    half = student(count - 1) * statistics.stdev(values, middle) / math.sqrt(count)
    return Estimate(middle, middle - half, middle + half)


def grow(value: float) -> float:
    """e to the value, as far as a float goes: the perplexity of a mean loss."""
    return math.exp(min(value, GREATEST))


def share(right: int, total: int) -> Estimate:
    """A proportion of independent trials with Wilson's score interval (Wilson 1927)."""
    p, z2 = right / total, NORMAL**2
    middle = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half))


def student(freedom: int) -> float:
    """The t with P(|T| <= t) = 0.95 for `freedom` >= 1 degrees of freedom, by bisection on its angle."""
    low, high = 0.0, math.pi / 2
    while True:
        angle = (low + high) / 2
        if angle in (low, high):
            return math.sqrt(freedom) * math.tan(angle)
        low, high = (angle, high) if _inside(angle, freedom) < CONFIDENCE else (low, angle)


def _inside(angle: float, freedom: int) -> float:
    """P(|T| <= √freedom · tan angle): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for step in range(2 + odd, freedom - 1, 2):
        term *= (step - 1) / step * math.cos(angle) ** 2
        total += term
    sine = math.sin(angle) * total
    return 2 / math.pi * (angle + sine) if odd else sine
