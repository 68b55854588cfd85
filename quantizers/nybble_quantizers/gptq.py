"""GPTQ (Frantar et al. 2023): round one input at a time, and let the weights still to come make up for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_quantizers.columns import columns_on, full_range
from nybble_quantizers.refining import Levels, refine
from nybble_quantizers.workers import Map, in_turn

Order = Literal["groups", "columns", "desc_act", "none"]
"""In which order the inputs of a linear are rounded; only "desc_act" leaves a permutation to the kernels.

groups: whole groups, the one with the loudest input first, and within a group the loudest first (group-aware
reordering); a group's grid is made when its turn comes, of the weights as they then are. columns: the
loudest first whatever its group (act-order with static groups); the grids are made of the original weights.
desc_act: the loudest first, and groups of inputs that follow each other in that order. none: as stored, the
grids as for "groups". On BabyLlama-105 at 3 and 4 bits "groups" was best or within 0.003 of it.
"""

BLOCK = 64  # inputs between two updates of all the weights still to come
ROWS = 288  # rounded together on a processor: few enough that every core has some of the smallest linear
DAMP = 0.01  # of the mean of the diagonal, as in the paper's code
STEP = 10.0  # by which the damping rises where the factorisation fails
FAINT = 1e-6  # a pivot below this share of the mean is float32 noise
SWEEPS = 2  # of `refine`


@dataclass(frozen=True, slots=True)
class Factor:
    """What a Hessian asks for: the same for all linears that read the same input.

    order: which input is rounded when, int64 [K] · upper: U [K, K] with inv(H + λI) = Uᵀ U, in that order ·
    hessian: H + λI [K, K], as the inputs are grouped · damp: λ as a share of the mean of H's diagonal, as
    much as it took · kind: what the order is called.
    """

    order: Tensor
    upper: Tensor
    hessian: Tensor
    damp: float
    group_size: int
    kind: Order

    @property
    def permutation(self) -> Tensor | None:
        """Which input stands where before groups are made."""
        return self.order if self.kind == "desc_act" else None

    @property
    def turns(self) -> Tensor:
        """`order` in terms of the inputs as they are grouped."""
        return (
            torch.arange(len(self.order), device=self.order.device) if self.kind == "desc_act" else self.order
        )

    def solve(self, sums: Tensor) -> Tensor:
        """sums · inv(H + λI): the change of weights [N, K] that makes outputs with these Σ y xᵀ [N, K]."""
        made = torch.empty_like(sums)
        made[:, self.order] = sums[:, self.order] @ self.upper.T @ self.upper
        return made


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
    sweeps: int = SWEEPS,
) -> Rounded:
    """Minimises ‖(W - Ŵ) X‖² = Σ over rows of (w - ŵ) H (w - ŵ)ᵀ, one input after another.

    weight: [N, K] · hessian: H = X Xᵀ [K, K]; a factor (the paper's 2) changes nothing. Once input i is
    rounded, the error (w_i - ŵ_i) / U_ii is spread over the inputs still to come by row i of U; the sum of
    the squares of these errors is the objective, damping included. `clip` searches the range of every group
    for the least sum of ((w_i - ŵ_i) / U_ii)², where False spans minimum to maximum. Afterwards `sweeps`
    times every code, and with `clip` every scale, is chosen again given all the others, see `refine`.
    """
    return round_to(weight, factorise(hessian, group_size, order, damp), bits, symmetric, clip, sweeps=sweeps)


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
    turned.diagonal().add_(damp * mean)
    while True:
        # the factor of the reversed matrix is, reversed again, H = R Rᵀ with R upper, and U = inv(R)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not int(failed) and float(lower.diagonal().square().min()) > FAINT * mean:
            break
        raised = damp * STEP or DAMP
        turned.diagonal().add_((raised - damp) * mean)
        damp = raised
    unit = torch.eye(len(chosen), dtype=torch.float64, device=hessian.device)
    torch.linalg.solve_triangular(lower, unit, upper=False, out=turned)
    upper = turned.float().flip(0, 1).contiguous()
    laid = hessian[chosen][:, chosen] if order == "desc_act" else hessian.clone()
    laid.diagonal().add_(damp * mean)
    return Factor(chosen, upper, laid, damp, group_size, order)


def round_to(
    weight: Tensor, factor: Factor, bits: int, symmetric: bool, clip: bool, *, sweeps: int = SWEEPS
) -> Rounded:
    """`gptq` with the Hessian factorised already."""
    return round_all([weight], factor, bits, symmetric, clip, sweeps=sweeps)[0]


def round_all(
    weights: Sequence[Tensor],
    factor: Factor,
    bits: int,
    symmetric: bool,
    clip: bool,
    *,
    sweeps: int = SWEEPS,
    run: Map = in_turn,
) -> list[Rounded]:
    """`round_to` for the linears that read one input. Rows do not depend on each other: all go together."""
    stacked = torch.cat([weight.float() for weight in weights])
    if factor.permutation is not None:
        stacked = stacked[:, factor.permutation]

    def part(rows: Tensor) -> _Part:
        return _round(rows.T.contiguous(), factor, bits, symmetric, clip, sweeps)

    parts = run(part, stacked.tensor_split(pieces(len(stacked), stacked.device)))
    codes, scales, zeros = (
        torch.cat([getattr(p.levels, name) for p in parts], 1).T for name in ("codes", "scales", "zeros")
    )
    if not bool(scales.isfinite().all()):
        raise ValueError("a weight is too large for a float16 scale, or not a number")
    made = QuantizedTensor(
        codes.to(torch.uint8).contiguous(),
        scales.contiguous(),
        bits,
        factor.group_size,
        None if symmetric else zeros.to(torch.uint8).contiguous(),
        permutation=factor.permutation,
    )
    shares, losses = torch.cat([p.shares for p in parts]), torch.cat([p.losses for p in parts])
    found, first = [], 0
    for weight in weights:
        last = first + len(weight)
        share, loss = float(shares[first:last].mean()), float(losses[first:last].sum(dtype=torch.float64))
        found.append(Rounded(made.rows(first, last), share, factor.damp, loss))
        first = last
    return found


def pieces(rows: int, device: torch.device) -> int:
    """A processor's cores work side by side; a GPU takes all rows at once."""
    return -(-rows // ROWS) if device.type == "cpu" else 1


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows [N]: their levels, the share of their groups that were narrowed, and what they cost."""

    levels: Levels
    shares: Tensor
    losses: Tensor


def _round(weight: Tensor, factor: Factor, bits: int, symmetric: bool, clip: bool, sweeps: int) -> _Part:
    """weight: [K, N]"""
    turns, size = factor.turns, factor.group_size
    inputs, rows = weight.shape
    work = weight[turns]  # changed from here on
    costs = factor.upper.diagonal().square().reciprocal()  # of an input's error, the rest made up for
    levels = Levels(
        torch.empty_like(work),
        weight.new_empty(-(-inputs // size), rows),
        weight.new_empty(-(-inputs // size), rows),
        bits,
        size,
    )
    shares, columns = weight.new_zeros(rows), columns_on(weight.device)

    def make(group: int, weights: Tensor, places: Tensor) -> None:
        if clip:
            found, moved = columns.search(weights, costs[places], bits, symmetric)
        else:
            found, moved = full_range(weights, bits, symmetric)
        levels.scales[group], levels.zeros[group] = found.scales, found.zeros
        shares.add_(moved)

    static = factor.kind == "columns"
    if static:
        back = torch.argsort(turns)
        for group, (first, last) in enumerate(levels.spans()):
            make(group, weight[first:last], back[first:last])
    group_of = torch.div(turns, size, rounding_mode="floor").tolist()
    losses, made = weight.new_zeros(rows), set[int]()
    chosen = torch.empty_like(work)
    for first, last in _spans(group_of, static):
        group = group_of[first]
        if not static and group not in made:
            made.add(group)
            stop = first + group_of[first:].count(group)
            make(group, work[first:stop], torch.arange(first, stop, device=work.device))
        places = group_of[first:last] if static else [group]
        errors = columns.compensate(
            work[first:last],
            chosen[first:last],
            levels.scales[places],
            levels.zeros[places],
            factor.upper[first:last, first:last],
            2**bits - 1,
        )
        work[last:].addmm_(factor.upper[first:last, last:].T, errors, alpha=-1)
        losses += errors.square_().sum(0)
    levels.codes[turns] = chosen
    if sweeps:
        losses = refine(levels, weight, factor.hessian, sweeps, refit=clip)
    return _Part(levels, shares / len(levels.scales), losses)


def _order(diagonal: Tensor, group_size: int, order: Order) -> Tensor:
    if order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    loudest = torch.argsort(diagonal, descending=True, stable=True)
    if order != "groups":
        return loudest
    groups = torch.div(loudest, group_size, rounding_mode="floor")
    rank = {group: place for place, group in enumerate(dict.fromkeys(groups.tolist()))}
    ranks = torch.tensor([rank[group] for group in groups.tolist()], device=diagonal.device)
    return loudest[torch.argsort(ranks, stable=True)]


def _spans(group_of: Sequence[int], static: bool) -> Iterator[tuple[int, int]]:
    """[first, last) of blocks of at most `BLOCK` inputs, of one group where its grid waits for its turn."""
    first = 0
    while first < len(group_of):
        last = min(first + BLOCK, len(group_of))
        if not static:
            last = first + group_of[first:last].count(group_of[first])
        yield first, last
        first = last
