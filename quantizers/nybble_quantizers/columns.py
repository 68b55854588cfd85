"""GPTQ's inner loops, over columns of matrices that hold the inputs first [K, N]: a column is a linear's row.

In PyTorch each is hundreds of small steps; on a processor `loops` does the same arithmetic in compiled code.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from nybble_quantizers.grids import Grid, grid, narrowed

log = logging.getLogger("nybble.quantize")

CACHED = 1 << 15  # weights handled at a time, where one core passes over the same ones again and again


class Columns(Protocol):
    """What the loops do; see `PlainColumns`."""

    def search(self, weights: Tensor, costs: Tensor, bits: int, symmetric: bool) -> tuple[Grid, Tensor]: ...

    def compensate(
        self, work: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, top: int
    ) -> Tensor: ...

    def descend(self, codes: Tensor, pulls: Tensor, scales: Tensor, hessian: Tensor, top: int) -> Tensor: ...


class PlainColumns:
    """On any device."""

    def search(self, weights: Tensor, costs: Tensor, bits: int, symmetric: bool) -> tuple[Grid, Tensor]:
        """The range of one group of every column that minimises Σ costs · (w - ŵ)², and which are narrowed.

        weights: [g, N] · costs: [g] · the levels are [N].
        """
        parts = [
            _search(part.contiguous(), costs, bits, symmetric)
            for part in torch.split(weights, max(1, CACHED // len(weights)), 1)
        ]
        levels = Grid(torch.cat([g.scales for g, _ in parts]), torch.cat([g.zeros for g, _ in parts]), bits)
        return levels, torch.cat([moved for _, moved in parts])

    def compensate(
        self, work: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, top: int
    ) -> Tensor:
        """Round inputs [B, N], each after the errors of those before it were spread; fills `codes`.

        scales, zeros: [B, N] or [1, N] · upper: U [B, B] of these inputs. Returns their errors over their
        pivots [B, N].
        """
        scales, zeros = scales.expand_as(work), zeros.expand_as(work)
        spread, errors = upper.T.contiguous(), torch.empty_like(work)
        rows = (t.unbind(0) for t in (work, codes, scales, zeros, errors))
        for i, (weight, code, scale, zero, error) in enumerate(zip(*rows, strict=True)):
            if i:
                weight.addmv_(errors[:i].T, spread[i, :i], alpha=-1)
            torch.div(weight, scale, out=code).round_().add_(zero).clamp_(0, top)
            torch.sub(code, zero, out=error).mul_(scale)
            torch.sub(weight, error, out=error).div_(spread[i, i])
        return errors

    def descend(self, codes: Tensor, pulls: Tensor, scales: Tensor, hessian: Tensor, top: int) -> Tensor:
        """Move each input's code to the level where the parabola in its weight is least, given all others.

        codes, pulls: [B, N], a pull is half the sum's derivative · scales: [N] · hessian: [B, B] of these
        inputs. Returns by how much the weights changed [B, N].
        """
        changes, best = torch.empty_like(pulls), torch.empty_like(scales)
        for i, (code, pull, change) in enumerate(zip(codes, pulls, changes, strict=True)):
            if i:
                torch.addmv(pull, changes[:i].T, hessian[i, :i], out=best)
            else:
                best.copy_(pull)
            torch.sub(code, best.div_(scales).div_(hessian[i, i]), out=best).round_().clamp_(0, top)
            torch.sub(best, code, out=change).mul_(scales)
            code.copy_(best)
        return changes


def _search(weights: Tensor, costs: Tensor, bits: int, symmetric: bool) -> tuple[Grid, Tensor]:
    low, high = weights.aminmax(dim=0)
    missed = torch.empty_like(weights)

    def cost(tried: Grid) -> Tensor:
        torch.div(weights, tried.scales, out=missed)
        missed.round_().clamp_(-tried.zeros, 2**bits - 1 - tried.zeros).mul_(tried.scales).sub_(weights)
        return costs @ missed.square_()

    return narrowed(low, high, bits, symmetric, cost)


def full_range(weights: Tensor, bits: int, symmetric: bool) -> tuple[Grid, Tensor]:
    """The levels from the least to the largest of a group [g, N] of every column; none is narrowed."""
    low, high = weights.aminmax(dim=0)
    return grid(low, high, bits, symmetric), torch.zeros_like(low, dtype=torch.bool)


def columns_on(device: torch.device) -> Columns:
    """The fastest there."""
    return _compiled() if device.type == "cpu" else PlainColumns()


@lru_cache(maxsize=1)
def _compiled() -> Columns:
    try:
        from nybble_quantizers.loops import CompiledColumns
    except ImportError as error:
        log.warning("without Numba GPTQ rounds more slowly: %s", error)
        return PlainColumns()
    return CompiledColumns()
