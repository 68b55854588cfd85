"""GPTQ (Frantar et al. 2023): round one input at a time, and let the weights still to come make up for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_quantizers import clipping
from nybble_quantizers.rtn import Grid

Order = Literal["groups", "columns", "none"]
"""In which order the inputs of a linear are rounded; none of them leaves a permutation to the kernels.

groups: whole groups, the one with the loudest input first, and within a group the loudest first (group-aware
reordering); a group's grid is made when its turn comes, of the weights as they then are. columns: the loudest
first whatever its group (act-order with static groups); the grids are made of the original weights. none: as
stored, the grids as for "groups". On BabyLlama-105 at 3 and 4 bits "groups" was best or within 0.003 of it.
"""

BLOCK = 128  # inputs between two updates of all the weights still to come
DAMP = 0.01  # of the mean of the diagonal, as in the paper's code
STEP = 10.0  # by which the damping rises where the factorisation fails
FAINT = 1e-6  # a pivot below this share of the mean is float32 noise


@dataclass(frozen=True, slots=True)
class Factor:
    """What a Hessian asks for: the same for all linears that read the same input.

    order: which input is rounded when, int64 [K] · upper: U [K, K] with inv(H + λI) = Uᵀ U, in that order ·
    damp: λ as a share of the mean of H's diagonal, as much as it took · static: all grids are made first.
    """

    order: Tensor
    upper: Tensor
    damp: float
    group_size: int
    static: bool


@dataclass(frozen=True, slots=True)
class Rounded:
    """The codes, the share of groups whose range was narrowed, the damping used, the objective reached."""

    weight: QuantizedTensor
    share: float
    damp: float
    loss: float


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    *,
    clip: bool = True,
    order: Order = "groups",
    damp: float = DAMP,
) -> Rounded:
    """Minimises ‖(W - Ŵ) X‖² = Σ over rows of (w - ŵ) H (w - ŵ)ᵀ, greedily, one input after another.

    weight: [N, K] · hessian: H = X Xᵀ [K, K]; a factor (the paper's 2) changes nothing. Once input i is
    rounded, the error (w_i - ŵ_i) / U_ii is spread over the inputs still to come by row i of U; the sum of
    the squares of these errors is the objective, damping included. `clip` searches the range of every group
    for the least sum of ((w_i - ŵ_i) / U_ii)², where False spans minimum to maximum.
    """
    return round_to(weight, factorise(hessian, group_size, order, damp), bits, symmetric, clip)


def factorise(hessian: Tensor, group_size: int, order: Order = "groups", damp: float = DAMP) -> Factor:
    """Raises `ValueError` for a Hessian that is not finite.

    An input that was never active has a zero row: damping alone gives it a pivot, so its weights are rounded
    to nearest and disturb nobody.
    """
    if not bool(hessian.isfinite().all()):
        raise ValueError("the Hessian holds NaN or infinity")
    diagonal = hessian.diagonal().double()
    chosen = _order(diagonal, group_size, order)
    mean = float(diagonal.mean()) or 1.0
    turned = hessian.double()[chosen.flip(0)][:, chosen.flip(0)]
    while True:
        damped = turned.clone()
        damped.diagonal().add_(damp * mean)
        # the factor of the reversed matrix is, reversed again, H = R Rᵀ with R upper, and U = inv(R)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and float(lower.diagonal().square().min()) > FAINT * mean:
            break
        damp = damp * STEP or DAMP
    unit = torch.eye(len(chosen), dtype=torch.float64, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1).float()
    return Factor(chosen, upper.contiguous(), damp, group_size, order == "columns")


def round_to(weight: Tensor, factor: Factor, bits: int, symmetric: bool, clip: bool) -> Rounded:
    """`gptq` with the Hessian factorised already. Rows do not depend on each other."""
    order, size = factor.order, factor.group_size
    original = weight.float()
    work = original.T[order]  # [K, N], changed from here on
    grids = _Grids(factor, bits, symmetric, clip, -(-len(order) // size))
    if factor.static:
        for group in range(grids.count):
            grids.make(group, original.T[group * size : (group + 1) * size], _places(order, group, size))
    codes = torch.empty_like(work, dtype=torch.uint8)
    group_of, loss = torch.div(order, size, rounding_mode="floor").tolist(), 0.0
    for first, last in _spans(group_of, 1 if factor.static else size):
        errors = torch.empty_like(work[first:last])
        for i in range(first, last):
            group = group_of[i]
            if group not in grids.made:
                stop = i + group_of[i:].count(group)
                grids.make(group, work[i:stop], torch.arange(i, stop))
            level = grids.made[group]
            chosen = level.codes(work[i, :, None])
            codes[i] = chosen[:, 0]
            made = chosen.sub_(level.zeros[:, None]).mul_(level.scales[:, None])[:, 0]
            errors[i - first] = (work[i] - made) / factor.upper[i, i]
            work[i + 1 : last].addr_(factor.upper[i, i + 1 : last], errors[i - first], alpha=-1)
        work[last:].addmm_(factor.upper[first:last, last:].T, errors, alpha=-1)
        loss += float(errors.square().sum(dtype=torch.float64))
    back = torch.argsort(order)
    return Rounded(grids.tensor(codes[back].T.contiguous()), grids.share, factor.damp, loss)


class _Grids:
    """The levels of each group, made one group at a time."""

    def __init__(self, factor: Factor, bits: int, symmetric: bool, clip: bool, count: int) -> None:
        self.bits = bits
        self.symmetric = symmetric
        self.clip = clip
        self.size = factor.group_size
        self.count = count
        self.made: dict[int, Grid] = {}
        self._costs = (
            factor.upper.diagonal().square().reciprocal()
        )  # of an input's error, the rest made up for
        self._shares = 0.0

    def make(self, group: int, weights: Tensor, places: Tensor) -> None:
        """weights: [g, N] of the inputs at `places` of the order."""
        cost = torch.diag(self._costs[places])
        found = clipping.search(weights.T, cost, self.bits, len(places), self.symmetric, self.clip)
        self.made[group] = Grid(found.levels.scales[:, 0], found.levels.zeros[:, 0], self.bits)
        self._shares += found.share

    @property
    def share(self) -> float:
        return self._shares / self.count

    def tensor(self, codes: Tensor) -> QuantizedTensor:
        scales = torch.stack([self.made[g].scales for g in range(self.count)], 1)
        zeros = torch.stack([self.made[g].zeros for g in range(self.count)], 1)
        if not bool(scales.isfinite().all()):
            raise ValueError("a weight is too large for a float16 scale, or not a number")
        return QuantizedTensor(
            codes, scales, self.bits, self.size, None if self.symmetric else zeros.to(torch.uint8)
        )


def _order(diagonal: Tensor, group_size: int, order: Order) -> Tensor:
    if order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    loudest = torch.argsort(diagonal, descending=True, stable=True)
    if order == "columns":
        return loudest
    groups = torch.div(loudest, group_size, rounding_mode="floor")
    rank = {group: place for place, group in enumerate(dict.fromkeys(groups.tolist()))}
    ranks = torch.tensor([rank[group] for group in groups.tolist()], device=diagonal.device)
    return loudest[torch.argsort(ranks, stable=True)]


def _places(order: Tensor, group: int, size: int) -> Tensor:
    """Where in the order the inputs of a group stand, in the order of the inputs."""
    back = torch.argsort(order)
    return back[group * size : (group + 1) * size]


def _spans(group_of: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """[first, last) of blocks of at most `BLOCK` inputs; a small group is never cut, a large one is alone."""
    first = 0
    while first < len(group_of):
        last = min(first + BLOCK, len(group_of))
        if 1 < size <= BLOCK and last < len(group_of):
            while group_of[last] == group_of[last - 1]:
                last -= 1
        elif size > BLOCK:
            last = first + group_of[first:last].count(group_of[first])
        yield first, last
        first = last
