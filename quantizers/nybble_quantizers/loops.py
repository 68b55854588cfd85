"""GPTQ's inner loops, compiled for the processor: what PyTorch does in hundreds of small steps.

Each does the arithmetic of the method of `columns.PlainColumns` that has its name, in float32 and in the same
order, for some columns at a time: what they need stays in the nearest cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble_kernels.numba.compiled import cached
from nybble_kernels.numba.jit import f32, inline
from nybble_kernels.numba.memory import bits_of_f32, f32_of_bits, rint_f32
from nybble_quantizers.grids import STEPS, Grid

Floats = Any  # a numpy array of float32, as Numba sees it

LANES = 64  # columns

_ZERO, _ONE, _TWO, _HALF = f32(0), f32(1), f32(2), f32(0.5)
_SMALLEST, _NORMAL, _LARGEST = f32(2.0**-24), f32(2.0**-14), f32(65504.0)  # of float16
_INFINITE, _KEPT = f32(float("inf")), -1 << 13  # the bits of a float32 that float16 has too

_MATRIX, _VECTOR = "float32[:,::1]", "float32[::1]"
SEARCH = f"void({_MATRIX}, {_VECTOR}, float32, boolean, {_VECTOR}, {_MATRIX})"
COMPENSATE = f"void({_MATRIX}, {_MATRIX}, {_MATRIX}, {_MATRIX}, {_MATRIX}, float32, {_MATRIX})"
DESCEND = f"void({_MATRIX}, {_MATRIX}, {_VECTOR}, {_MATRIX}, float32, {_MATRIX})"


class CompiledColumns:
    """`PlainColumns` on a processor. Matrices are contiguous."""

    def __init__(self) -> None:
        self._search = cached(search, SEARCH)
        self._compensate = cached(compensate, COMPENSATE)
        self._descend = cached(descend, DESCEND)
        self.steps = np.array(STEPS, np.float32)

    def search(self, weights: Tensor, costs: Tensor, bits: int, symmetric: bool) -> tuple[Grid, Tensor]:
        made = weights.new_empty(3, weights.shape[1])
        top = f32(2**bits - 1)
        self._search(weights.numpy(), costs.numpy(), top, symmetric, self.steps, made.numpy())
        return Grid(made[0], made[1], bits), made[2] > 0

    def compensate(
        self, work: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, top: int
    ) -> Tensor:
        errors = torch.empty_like(work)
        self._compensate(
            work.numpy(),
            codes.numpy(),
            scales.numpy(),
            zeros.numpy(),
            upper.contiguous().numpy(),
            f32(top),
            errors.numpy(),
        )
        return errors

    def descend(self, codes: Tensor, pulls: Tensor, scales: Tensor, hessian: Tensor, top: int) -> Tensor:
        changes = torch.empty_like(pulls)
        self._descend(
            codes.numpy(),
            pulls.numpy(),
            scales.numpy(),
            hessian.contiguous().numpy(),
            f32(top),
            changes.numpy(),
        )
        return changes


def search(weights: Floats, costs: Floats, top: float, symmetric: bool, steps: Floats, made: Floats) -> None:
    """made [3, N]: scales, zeros, and 1 where the range was narrowed."""
    held = np.empty((9, LANES), np.float32)
    low, high, try_low, try_high = held[0], held[1], held[2], held[3]
    from_low, from_high, least, cost, lost = held[4], held[5], held[6], held[7], held[8]
    for first in range(0, weights.shape[1], LANES):
        last = min(first + LANES, weights.shape[1])
        scales, zeros, moved = made[0, first:last], made[1, first:last], made[2, first:last]
        count = last - first
        low[:], high[:], lost[:], moved[:] = _ZERO, _ZERO, _ZERO, _ZERO
        for k in range(len(costs)):
            row = weights[k, first:last]
            for n in range(count):
                low[n] = min(low[n], row[n])
                high[n] = max(high[n], row[n])
                lost[n] += row[n] - row[n]  # NaN where a weight is no finite number
        for n in range(count):
            low[n] += lost[n]
        _cost(weights, first, last, costs, top, symmetric, low, high, scales, zeros, least)
        for phase in range(1 if symmetric else 3):  # both ends, the low one, the high one
            from_low[:], from_high[:] = low, high
            for step in steps:
                for n in range(count):
                    try_low[n] = from_low[n] * step if phase < 2 else from_low[n]
                    try_high[n] = from_high[n] * step if phase != 1 else from_high[n]
                _cost(weights, first, last, costs, top, symmetric, try_low, try_high, scales, zeros, cost)
                for n in range(count):
                    if cost[n] < least[n]:
                        least[n], moved[n] = cost[n], _ONE
                        low[n], high[n] = try_low[n], try_high[n]
        _grids(low, high, count, top, symmetric, scales, zeros)


@inline
def _cost(
    weights: Floats,
    first: int,
    last: int,
    costs: Floats,
    top: float,
    symmetric: bool,
    low: Floats,
    high: Floats,
    scales: Floats,
    zeros: Floats,
    total: Floats,
) -> None:
    """total = Σ costs · (w - ŵ)² of columns [first, last) on the levels between their ends."""
    _grids(low, high, last - first, top, symmetric, scales, zeros)
    total[:] = _ZERO
    for k in range(len(costs)):
        row, cost = weights[k, first:last], costs[k]
        for n in range(last - first):
            code = min(max(rint_f32(row[n] / scales[n]), -zeros[n]), top - zeros[n])
            missed = code * scales[n] - row[n]
            total[n] += missed * missed * cost


@inline
def _grids(
    low: Floats, high: Floats, count: int, top: float, symmetric: bool, scales: Floats, zeros: Floats
) -> None:
    """`grids.grid` of ends on either side of zero."""
    for n in range(count):
        span = _TWO * max(-low[n], high[n]) if symmetric else high[n] - low[n]
        scale = _half(f32_of_bits(bits_of_f32(span / top) & _KEPT))
        scale = _ONE if span == _ZERO else scale
        scales[n] = scale
        zeros[n] = (top + _ONE) * _HALF if symmetric else min(max(rint_f32(-low[n] / scale), _ZERO), top)


@inline
def _half(scale: float) -> float:
    """A scale as float16 holds it, at least its smallest number."""
    if scale < _NORMAL:
        return max(rint_f32(scale / _SMALLEST), _ONE) * _SMALLEST
    return scale if scale <= _LARGEST else _INFINITE


def compensate(
    work: Floats, codes: Floats, scales: Floats, zeros: Floats, upper: Floats, top: float, errors: Floats
) -> None:
    for first in range(0, work.shape[1], LANES):
        last = min(first + LANES, work.shape[1])
        for i in range(len(work)):
            weights, code, error = work[i, first:last], codes[i, first:last], errors[i, first:last]
            group = i if len(scales) > 1 else 0
            scale, zero = scales[group, first:last], zeros[group, first:last]
            for j in range(i):
                missed, pull = errors[j, first:last], upper[j, i]
                for n in range(last - first):
                    weights[n] -= missed[n] * pull
            for n in range(last - first):
                code[n] = min(max(rint_f32(weights[n] / scale[n]) + zero[n], _ZERO), top)
                error[n] = (weights[n] - (code[n] - zero[n]) * scale[n]) / upper[i, i]


def descend(
    codes: Floats, pulls: Floats, scales: Floats, hessian: Floats, top: float, changes: Floats
) -> None:
    pulled = np.empty(LANES, np.float32)
    for first in range(0, codes.shape[1], LANES):
        last = min(first + LANES, codes.shape[1])
        scale = scales[first:last]
        for i in range(len(codes)):
            code, pull, change = codes[i, first:last], pulls[i, first:last], changes[i, first:last]
            for n in range(last - first):
                pulled[n] = pull[n]
            for j in range(i):
                moved, bend = changes[j, first:last], hessian[j, i]
                for n in range(last - first):
                    pulled[n] += moved[n] * bend
            for n in range(last - first):
                best = min(max(rint_f32(code[n] - pulled[n] / scale[n] / hessian[i, i]), _ZERO), top)
                change[n] = (best - code[n]) * scale[n]
                code[n] = best
