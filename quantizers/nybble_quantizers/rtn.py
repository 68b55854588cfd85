"""Round-to-nearest: a grid per group from its extremes, every weight to the nearest level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.quantized import QuantizedTensor

SMALLEST = 2.0**-24  # of float16, in which scales are stored


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
    """
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scales = (span / top).to(torch.float16).float()
    scales = torch.where(span == 0, 1.0, scales.clamp(min=SMALLEST))
    zeros = (
        torch.full_like(scales, 2.0 ** (bits - 1)) if symmetric else (-low / scales).round_().clamp_(0, top)
    )
    return Grid(scales, zeros, bits)


def quantize(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = False, *, per_tensor: bool = False
) -> QuantizedTensor:
    """Minimises |w - ŵ| of each weight on a grid that spans its group's minimum and maximum.

    weight: [N, K]; `group_size` K gives one scale a row; with `per_tensor` all groups share one grid.
    """
    groups = grouped(weight.float(), group_size)  # [N, G, g]
    low, high = groups.amin(-1), groups.amax(-1)
    if per_tensor:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    return on_grid(weight.float(), grid(low, high, bits, symmetric), group_size, symmetric)


def on_grid(weight: Tensor, levels: Grid, group_size: int, symmetric: bool) -> QuantizedTensor:
    """Round [N, K] to the levels of its groups [N, G]. Raises `ValueError` where a scale is past float16."""
    if not bool(levels.scales.isfinite().all()):
        raise ValueError("a weight is too large for a float16 scale, or not a number")
    codes = levels.codes(grouped(weight, group_size)).flatten(1)[:, : weight.shape[1]]
    return QuantizedTensor(
        codes=codes.to(torch.uint8),
        scales=levels.scales.clone(),
        bits=levels.bits,
        group_size=group_size,
        zeros=None if symmetric else levels.zeros.to(torch.uint8),
    )


def fake(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """`quantize(...).dequantize()` without the tensor between."""
    groups = grouped(weight, group_size)
    low, high = groups.aminmax(dim=-1)
    return grid(low, high, bits, symmetric).round(groups).flatten(1)[:, : weight.shape[1]]


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, G, g]; a short last group is filled up with zeros, which every grid holds."""
    missing = -weight.shape[1] % group_size
    padded = F.pad(weight, (0, missing)) if missing else weight
    return padded.reshape(len(weight), -1, group_size)
