"""`Axis`: numbers to places on a line, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDE = 20.0  # values further apart than this factor are shown on a logarithmic axis
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Axis:
    """Runs from the first to the last of `ticks`."""

    ticks: tuple[float, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """0 at the first tick, 1 at the last; what lies beyond is moved to the end."""
        first, last, value = (self._place(each) for each in (self.ticks[0], self.ticks[-1], value))
        return min(max((value - first) / (last - first), 0.0), 1.0)

    def _place(self, value: float) -> float:
        return math.log10(max(value, self.ticks[0])) if self.logarithmic else value


def axis(values: Sequence[float], *, zero: bool = False, logarithmic: bool = False) -> Axis:
    """Fits all of the values; `zero` includes 0. At least one value."""
    low, high = min(values), max(values)
    if logarithmic and low > 0 and high / low > WIDE:
        return Axis(_decades(low, high), True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0) or float(low == 0)
    else:
        room = 0.05 * ((high - low) or abs(high) or 1.0)
        low, high = low - room, high + room
    step = round_step((high - low) / 5)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return Axis(tuple(step * i for i in range(first, last + 1)))


def round_step(atleast: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(atleast))
    return next(step * power for step in STEPS if step * power >= atleast * (1 - 1e-9))


def _decades(low: float, high: float) -> tuple[float, ...]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return tuple(10.0**power for power in range(first, last + 1))
