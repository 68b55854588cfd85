"""After GPTQ: each level and each scale once more, now that all the others are known."""

from __future__ import annotations

import torch
from torch import Tensor

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
    gradient = hessian @ levels.values().sub_(weight)
    for _ in range(sweeps):
        for group, (first, last) in enumerate(levels.spans()):
            if refit:
                _refit(levels, group, slice(first, last), hessian, gradient)
            for start in range(first, last, BLOCK):
                _descend(levels, group, start, min(start + BLOCK, last), hessian, gradient)
    missed = levels.values().sub_(weight)
    return (hessian @ missed).mul_(missed).sum(0)


def _refit(levels: Levels, group: int, span: slice, hessian: Tensor, gradient: Tensor) -> None:
    """The sum changes by 2 Δ (gradient · c) + Δ² (c H c) when a scale changes by Δ, c = codes - zeros."""
    scales = levels.scales[group]
    signed = levels.codes[span] - levels.zeros[group]
    slope = (gradient[span] * signed).sum(0)
    bend = (hessian[span, span] @ signed).mul_(signed).sum(0)
    change = stored(scales - slope / bend).sub_(scales)
    lower = change * bend + 2 * slope
    change = torch.where((change * lower < 0) & change.isfinite(), change, 0.0)
    scales.add_(change)
    gradient.addmm_(hessian[:, span], signed.mul_(change))


def _descend(levels: Levels, group: int, first: int, last: int, hessian: Tensor, gradient: Tensor) -> None:
    scales, top = levels.scales[group], 2**levels.bits - 1
    inverse = scales.reciprocal()
    block = hessian[first:last, first:last]
    pivots = block.diagonal().tolist()
    changes = torch.empty_like(gradient[first:last])
    chosen = torch.empty_like(scales)
    codes = levels.codes[first:last].unbind(0)
    for i, pull in enumerate(gradient[first:last].unbind(0)):
        torch.addmv(pull, changes[:i].T, block[i, :i], out=chosen) if i else chosen.copy_(pull)
        chosen.mul_(inverse)
        torch.sub(codes[i], chosen, alpha=1 / pivots[i], out=chosen)
        chosen.round_().clamp_(0, top)
        torch.sub(chosen, codes[i], out=changes[i]).mul_(scales)
        codes[i].copy_(chosen)
    gradient.addmm_(hessian[:, first:last], changes)
