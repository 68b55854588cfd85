"""Round-to-nearest: a grid per group from its extremes, or the best within them; then the nearest level."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_quantizers.grids import Grid, grid, grouped, narrowed

POWER = 2.4  # of a weight's error in the search, as in GPTQ's code


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    *,
    per_tensor: bool = False,
    mse: bool = False,
    power: float = POWER,
) -> QuantizedTensor:
    """Minimises |w - ŵ| of each weight on a grid that spans its group's minimum and maximum.

    weight: [N, K]; `group_size` K gives one scale a row; with `per_tensor` all groups share one grid. With
    `mse` the grid spans the part of that range for which Σ |w - ŵ|^power over those who share it is least.
    """
    groups = grouped(weight.float(), group_size)  # [N, G, g]
    low, high = groups.amin(-1), groups.amax(-1)
    if per_tensor:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    levels = grid(low, high, bits, symmetric)
    if mse:

        def cost(tried: Grid) -> Tensor:
            missed = tried.round(groups).sub_(groups).abs_().pow_(power).sum(-1)
            return missed.sum().expand_as(missed) if per_tensor else missed

        levels, _ = narrowed(low, high, bits, symmetric, cost)
    return on_grid(weight.float(), levels, group_size, symmetric)


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
