"""After GPTQ: each level and each scale once more, now that all the others are known."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble_quantizers.columns import Columns, columns_on
from nybble_quantizers.grids import stored

BLOCK = 64  # inputs between two updates of the whole gradient


class Levels:
    """What was chosen for a matrix, inputs first: w[k, n] = scales[g, n] · (codes[k, n] - zeros[g, n]).

    codes: [K, N] · scales, zeros: [G, N], all float32 · size: inputs in a group; the last may be short.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, size: int) -> None:
        self.codes = codes
        self.scales = scales
        self.zeros = zeros
        self.bits = bits
        self.size = size

    def spans(self) -> list[tuple[int, int]]:
        """[first, last) of each group."""
        count = len(self.codes)
        return [(first, min(first + self.size, count)) for first in range(0, count, self.size)]

    def values(self) -> Tensor:
        """[K, N]"""
        made = torch.empty_like(self.codes)
        for group, (first, last) in enumerate(self.spans()):
            torch.sub(self.codes[first:last], self.zeros[group], out=made[first:last])
            made[first:last].mul_(self.scales[group])
        return made


def refine(levels: Levels, weight: Tensor, hessian: Tensor, sweeps: int, refit: bool) -> Tensor:
    """Lower (w - ŵ) H (w - ŵ)ᵀ of every row by coordinate descent, in place; returns it, [N].

    weight: [K, N] · hessian: [K, K]. One sweep passes over the groups: with `refit` the scale is set to where
    the parabola in it is least (and rounded as stored, and only if that is lower still); then each code in
    turn to the level nearest to where the parabola in its weight is least. No step raises the sum. `gradient`
    = H (ŵ - w) is half the sum's derivative.
    """
    gradient, columns = hessian @ levels.values().sub_(weight), columns_on(weight.device)
    for _ in range(sweeps):
        for group, (first, last) in enumerate(levels.spans()):
            changes = _group(columns, levels, group, first, last, hessian, gradient, refit)
            gradient[:first].addmm_(hessian[:first, first:last], changes)
            gradient[last:].addmm_(hessian[last:, first:last], changes)
    return gradient.mul_(levels.values().sub_(weight)).sum(0)


def _group(
    columns: Columns,
    levels: Levels,
    group: int,
    first: int,
    last: int,
    hessian: Tensor,
    gradient: Tensor,
    refit: bool,
) -> Tensor:
    """One group's scale and codes; the gradient of its own inputs follows. Returns its weights' changes."""
    bends, pulls, codes = hessian[first:last, first:last], gradient[first:last], levels.codes[first:last]
    changes = torch.zeros_like(pulls)
    if refit:
        changes = _refit(levels, group, codes, bends, pulls)
        pulls.addmm_(bends, changes)
    for start in range(0, last - first, BLOCK):
        part = slice(start, start + BLOCK)
        moved = columns.descend(
            codes[part], pulls[part], levels.scales[group], bends[part, part], 2**levels.bits - 1
        )
        pulls.addmm_(bends[:, part], moved)
        changes[part] += moved
    return changes


def _refit(levels: Levels, group: int, codes: Tensor, bends: Tensor, pulls: Tensor) -> Tensor:
    """The sum changes by 2 Δ (gradient · c) + Δ² (c H c) when a scale changes by Δ, c = codes - zeros."""
    scales = levels.scales[group]
    signed = codes - levels.zeros[group]
    slope = (pulls * signed).sum(0)
    bend = (bends @ signed).mul_(signed).sum(0)
    change = stored(scales - slope / bend).sub_(scales)
    lower = change * bend + 2 * slope
    change = torch.where((change * lower < 0) & change.isfinite(), change, 0.0)
    scales.add_(change)
    return signed.mul_(change)
