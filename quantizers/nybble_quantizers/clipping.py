"""Narrowing the range of a group where the finer steps gain more than the cut weights lose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble_quantizers.grids import Grid, grid, grouped, narrowed

CHUNK = 1 << 21  # weights handled at a time


@dataclass(frozen=True, slots=True)
class Clipped:
    """Levels per row and group, and the share of groups that were narrowed."""

    levels: Grid
    share: float


def search(weight: Tensor, gram: Tensor, bits: int, group_size: int, symmetric: bool, clip: bool) -> Clipped:
    """The range of every row and group that minimises the error of its part of the output.

        sum over tokens of (x_g · (w_g - ŵ_g))² = (w_g - ŵ_g) H_g (w_g - ŵ_g)ᵀ,   H_g = X_gᵀ X_g

    weight: [N, K] · gram: XᵀX [K, K], of which only the blocks on the diagonal matter. The low and the high
    end move together first, then each alone.
    """
    size = weight.shape[1] + -weight.shape[1] % group_size
    blocks = _diagonal(gram, size, group_size)
    rows = max(1, CHUNK // weight.shape[1])
    parts = [
        _search(grouped(weight[i : i + rows], group_size), blocks, bits, symmetric, clip)
        for i in range(0, len(weight), rows)
    ]

    levels = Grid(
        torch.cat([p.levels.scales for p in parts]), torch.cat([p.levels.zeros for p in parts]), bits
    )
    return Clipped(levels, sum(p.share * len(p.levels.scales) for p in parts) / len(weight))


def _diagonal(gram: Tensor, size: int, group_size: int) -> Tensor:
    """[G, g, g]; inputs that only fill up the last group count for nothing."""
    padded = gram.new_zeros(size, size)
    padded[: len(gram), : len(gram)] = gram
    groups = size // group_size
    tiles = padded.view(groups, group_size, groups, group_size)
    return torch.stack([tiles[i, :, i] for i in range(groups)])


def _search(groups: Tensor, blocks: Tensor, bits: int, symmetric: bool, clip: bool) -> Clipped:
    low, high = groups.aminmax(dim=-1)
    if not clip:
        return Clipped(grid(low, high, bits, symmetric), 0.0)
    levels, moved = narrowed(low, high, bits, symmetric, lambda tried: _error(groups, blocks, tried))
    return Clipped(levels, float(moved.float().mean()))


def _error(groups: Tensor, blocks: Tensor, levels: Grid) -> Tensor:
    """[N, G, g] on some levels -> what each group costs, [N, G]."""
    missed = levels.round(groups).sub_(groups).transpose(0, 1)  # [G, N, g]
    return torch.bmm(missed, blocks).mul_(missed).sum(-1).T
