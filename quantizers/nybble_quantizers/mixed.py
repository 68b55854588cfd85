"""Mixed precision: which form each unit gets, so that the model changes least for the bytes it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble_models.errors import ModelError
from nybble_models.formats.form import Form
from nybble_models.spec import ModelSpec
from nybble_quantizers.units import Unit

Costs = Mapping[Unit, Mapping[Form | None, float]]
"""What each form of a unit does to the model, in nats a token (see `sensitivity`)."""

Sizes = Mapping[Unit, Mapping[Form | None, int]]
"""Bytes of each form of a unit."""

SLACK = 1e-9  # by which two sums of the same costs may differ, as a share of the largest


def byte_budget(bits: float, spec: ModelSpec, units: Sequence[Unit]) -> int:
    """Bytes that `bits` a weight come to, scales and zeros included. Raises `ModelError` above 16 bits."""
    if not 0 < bits <= 16:
        raise ModelError(f"{bits:g} bits a weight is no target", hint="give at most 16, which is no rounding")
    return int(bits * sum(unit.nbytes(spec, None) for unit in units) / 16)


def bits_of(spec: ModelSpec, forms: Mapping[Unit, Form | None]) -> float:
    """Average stored bits a weight, scales and zeros included."""
    stored = sum(unit.nbytes(spec, form) for unit, form in forms.items())
    return 16 * stored / sum(unit.nbytes(spec, None) for unit in forms)


def sizes(spec: ModelSpec, candidates: Mapping[Unit, Sequence[Form | None]]) -> Sizes:
    return {unit: {form: unit.nbytes(spec, form) for form in forms} for unit, forms in candidates.items()}


def check_budget(nbytes: Sizes, budget: int) -> None:
    """Raises `ModelError` when the smallest forms are too large."""
    least = sum(min(of.values()) for of in nbytes.values())
    if budget < least:
        raise ModelError(
            f"{budget:,} bytes for the weights are too few: the smallest forms take {least:,}",
            hint="raise the target, or allow forms of fewer bits",
        )


def allocate(costs: Costs, nbytes: Sizes, budget: int) -> dict[Unit, Form | None]:
    """Minimises Σ costs[u][f(u)] over f with Σ nbytes[u][f(u)] <= budget, exactly.

    A multiple-choice knapsack, solved unit after unit: of the partial choices, one that takes no fewer bytes
    and costs no less than another is dropped (Nemhauser & Ullmann 1969), and so is one that could not beat a
    greedy choice even if the units to come might mix two forms (the relaxation of Sinha & Zoltners 1979). Of
    equal costs the fewest bytes win. Raises `ModelError` when the smallest forms are too large.
    """
    menus = [_menu(costs[unit], nbytes[unit]) for unit in costs]
    least = np.cumsum([0, *(menu.nbytes[0] for menu in reversed(menus))])[::-1]
    check_budget(nbytes, budget)
    bounds = [_Bound(menus[first:]) for first in range(len(menus) + 1)]
    limit = _greedy(menus, budget) + SLACK * sum(abs(menu.costs[0]) for menu in menus)
    taken, cost = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for number, menu in enumerate(menus, start=1):
        taken = (taken[:, None] + menu.nbytes).ravel()
        cost = (cost[:, None] + menu.costs).ravel()
        hopeful = taken + least[number] <= budget
        hopeful &= cost + bounds[number].at(budget - taken) <= limit
        kept = _undominated(taken, cost, np.flatnonzero(hopeful))
        history.append((kept // len(menu.forms), kept % len(menu.forms)))
        taken, cost = taken[kept], cost[kept]
    return _traced(list(costs), menus, history, len(taken) - 1)


_Step = tuple[float, int, float]  # cost for a byte, bytes, cost


@dataclass(frozen=True, eq=False)
class _Menu:
    """The forms of a unit that are worth having: bytes rise, costs fall. See `_steps`."""

    forms: list[Form | None]
    nbytes: NDArray[np.int64]
    costs: NDArray[np.float64]
    steps: list[_Step]


def _menu(costs: Mapping[Form | None, float], nbytes: Mapping[Form | None, int]) -> _Menu:
    forms = list(costs)
    sizes, values = np.array([nbytes[f] for f in forms]), np.array([costs[f] for f in forms])
    kept = _undominated(sizes, values, np.arange(len(forms)))
    sizes, values = sizes[kept], values[kept]
    return _Menu([forms[i] for i in kept], sizes, values, _steps(sizes.tolist(), values.tolist()))


def _undominated(nbytes: NDArray[Any], costs: NDArray[Any], among: NDArray[np.intp]) -> NDArray[np.intp]:
    """Those that no other beats in both, by rising bytes; the first of equals."""
    order: NDArray[np.intp] = among[np.lexsort((costs[among], nbytes[among]))]
    ordered = costs[order]
    cheaper = ordered[1:] < np.minimum.accumulate(ordered)[:-1]
    kept: NDArray[np.intp] = order[np.concatenate((np.ones(len(order[:1]), bool), cheaper))]
    return kept


def _steps(nbytes: list[int], costs: list[float]) -> list[_Step]:
    """From corner to corner of the lower convex hull, the steepest fall first."""
    hull: list[_Step] = []
    for i in range(1, len(nbytes)):
        step = _step(nbytes[i] - nbytes[i - 1], costs[i] - costs[i - 1])
        while hull and step[0] <= hull[-1][0]:
            _, more, change = hull.pop()
            step = _step(step[1] + more, step[2] + change)
        hull.append(step)
    return hull


def _step(nbytes: int, change: float) -> _Step:
    return change / nbytes, nbytes, change


class _Bound:
    """The least that some units can cost if a unit may mix two forms: convex in the bytes they get."""

    def __init__(self, menus: Sequence[_Menu]) -> None:
        steps = sorted(step for menu in menus for step in menu.steps)
        self.nbytes = np.cumsum([sum(int(m.nbytes[0]) for m in menus), *(step[1] for step in steps)])
        self.costs = np.cumsum([sum(float(m.costs[0]) for m in menus), *(step[2] for step in steps)])

    def at(self, nbytes: NDArray[np.int64]) -> NDArray[np.float64]:
        bound: NDArray[np.float64] = np.interp(nbytes, self.nbytes, self.costs)
        return bound


def _greedy(menus: Sequence[_Menu], budget: int) -> float:
    """What it costs to go down the steepest steps as long as they fit."""
    left = budget - sum(int(menu.nbytes[0]) for menu in menus)
    cost = sum(float(menu.costs[0]) for menu in menus)
    closed: set[int] = set()
    steps = [(*step, number) for number, menu in enumerate(menus) for step in menu.steps]
    for _, nbytes, change, number in sorted(steps):
        if number not in closed and nbytes <= left:
            left, cost = left - nbytes, cost + change
        else:
            closed.add(number)
    return cost


def _traced(
    units: Sequence[Unit], menus: Sequence[_Menu], history: Sequence[tuple[Any, Any]], end: int
) -> dict[Unit, Form | None]:
    """Back from the cheapest end, which has the most bytes."""
    chosen: list[Form | None] = []
    for menu, (parents, choices) in zip(reversed(menus), reversed(history), strict=True):
        chosen.append(menu.forms[choices[end]])
        end = parents[end]
    return dict(zip(units, reversed(chosen), strict=True))
