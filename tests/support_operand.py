"""Operands of the products under test: what a kernel before them would have left, and NaN around it."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble_kernels.triton.epilogue import Operand, make_operand
from nybble_kernels.triton.tiles import Tile, Workspace


def empty_operand(rows: int, width: int, tile: int, dtype: torch.dtype, device: torch.device) -> Operand:
    """Room for a kernel to write to; NaN shows what it left out."""
    made = make_operand(rows, width, tile, dtype, device)
    made.values.fill_(float("nan"))
    made.stats.fill_(float("nan"))
    return made


def operand_of(x: Tensor, rows: int, device: torch.device, tile: int = 64) -> Operand:
    """x [M, K] as an operand for `rows` rows, with its statistics; rows beyond the batch must not matter."""
    made = empty_operand(rows, x.shape[1], tile, x.dtype, device)
    made.values[: len(x)] = x.to(device)
    for number, part in enumerate(x.double().split(tile, dim=1)):
        total = part.sum(1)
        apart = (part - total[:, None] / part.shape[1]).square().sum(1)
        for index, values in enumerate((total, apart, part.abs().amax(1))):
            made.stats[index, number, : len(x)] = values.float().to(device)
    return made


def workspace_of(tile: Tile, outputs: int, rows: int, device: torch.device) -> Workspace:
    made = Workspace.allocate([(tile, outputs, rows)], device)
    made.partial.fill_(float("nan"))
    return made
