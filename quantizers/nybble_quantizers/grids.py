"""Levels: where the values that a code can mean lie, for each group of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 2.0**-24  # of float16, in which scales are stored
FLOAT16 = -1 << 13  # the bits of a float32 that float16 has too
STEPS = tuple(1 - step / 20 for step in range(1, 11))  # 0.95 down to 0.5 of the range


@dataclass(frozen=True, slots=True)
class Grid:
    """The levels of each group: w = scales · (code - zeros). Float32; the scales hold float16 values."""

    scales: Tensor
    zeros: Tensor
    bits: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest level of each weight, still float; the last dimension of `weight` is the group."""
        levels = torch.div(weight, self.scales[..., None]).round_().add_(self.zeros[..., None])
        return levels.clamp_(0, 2**self.bits - 1)

    def round(self, weight: Tensor) -> Tensor:
        """What is left of the weights after quantizing and dequantizing."""
        return self.codes(weight).sub_(self.zeros[..., None]).mul_(self.scales[..., None])


def grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    """Levels that cover [low, high] and hold 0 exactly, with scales rounded as they will be stored.

    asymmetric: scale = (max(high, 0) - min(low, 0)) / (2^b - 1), zero = round(-min(low, 0) / scale).
    symmetric: scale = max(|low|, |high|) / ((2^b - 1) / 2), zero = 2^(b - 1).
    A scale is rounded down: a symmetric group's least weight lies half-way between its two lowest levels, and
    takes the lowest, which no other weight needs.
    """
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scales = stored((span / top).view(torch.int32).bitwise_and_(FLOAT16).view(torch.float32))
    scales = torch.where(span == 0, 1.0, scales)
    zeros = (
        torch.full_like(scales, 2.0 ** (bits - 1)) if symmetric else (-low / scales).round_().clamp_(0, top)
    )
    return Grid(scales, zeros, bits)


def stored(scales: Tensor) -> Tensor:
    """The nearest scales that float16 can hold, none of them zero."""
    return scales.to(torch.float16).float().clamp(min=SMALLEST)


def narrowed(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, cost: Callable[[Grid], Tensor]
) -> tuple[Grid, Tensor]:
    """The levels within [low, high] of least `cost` (of the shape of `low`), and which groups were narrowed.

    The low and the high end move together first, then each alone; the symmetric range has one end only.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    best_low, best_high = low, high
    least = cost(grid(low, high, bits, symmetric))
    moved = torch.zeros_like(least, dtype=torch.bool)
    for move_low, move_high in ((True, True),) if symmetric else ((True, True), (True, False), (False, True)):
        start_low, start_high = best_low, best_high
        for step in STEPS:
            try_low = start_low * step if move_low else start_low
            try_high = start_high * step if move_high else start_high
            found = cost(grid(try_low, try_high, bits, symmetric))
            better = found < least
            least = torch.where(better, found, least)
            best_low = torch.where(better, try_low, best_low)
            best_high = torch.where(better, try_high, best_high)
            moved |= better
    return grid(best_low, best_high, bits, symmetric), moved


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, G, g]; a short last group is filled up with zeros, which every grid holds."""
    missing = -weight.shape[1] % group_size
    padded = F.pad(weight, (0, missing)) if missing else weight
    return padded.reshape(len(weight), -1, group_size)
