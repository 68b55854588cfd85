"""Activation-aware weight quantization (Lin et al. 2024): protect the input channels that carry the signal.

Scaling a weight column up and its input down by the same s changes nothing until the column is rounded: then
its error is divided by s. s is searched per input channel, folded into whatever produces the input, and the
range of every group is narrowed where that helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble_models.formats.form import Form
from nybble_quantizers import rounding
from nybble_quantizers.grids import grouped
from nybble_quantizers.workers import Map, in_turn

STRIDE = 4

Loss = Callable[[Tensor], float]
"""The error of a layer's or a half block's output when its weights are Q(W · s) / s."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The scale [K] that was best, how it was made, and its error next to that of plain rounding."""

    scale: Tensor
    ratio: float | None
    duo: bool
    error: float
    plain_error: float


def search(loss: Loss, activation: Tensor, weight: Tensor, grid: int, run: Map = in_turn) -> Choice:
    """Minimise `loss(s)` over s = activation^r and s = activation^r / weight^(1 - r), r on a grid, and s = 1.

    activation: mean |x| of each channel [K] · weight: how large the channel's weights are within their
    groups [K], see `magnitude`. The second kind is AutoAWQ's "duo scaling". The loss has one valley in r, so
    every fourth point of the grid is tried first, then the neighbours of the best.
    """
    ones = torch.ones_like(activation)
    plain = loss(ones)
    best = Choice(ones, None, False, plain, plain)

    def attempt(point: tuple[int, bool]) -> Choice:
        step, duo = point
        ratio = step / grid
        scale = scale_of(activation, weight, ratio, duo)
        return Choice(scale, ratio, duo, loss(scale), plain)

    coarse = [(step, duo) for step in range(0, grid, STRIDE) for duo in (False, True)]
    best = min(best, *run(attempt, coarse[1:]), key=_error)  # the first, activation^0, is s = 1
    if best.ratio is None:
        return best
    centre, duo = round(best.ratio * grid), best.duo
    near = range(max(centre - STRIDE + 1, 0 if duo else 1), min(centre + STRIDE, grid))
    return min(best, *run(attempt, [(step, duo) for step in near if step != centre]), key=_error)


def _error(choice: Choice) -> float:
    return choice.error


def scale_of(activation: Tensor, weight: Tensor, ratio: float, duo: bool) -> Tensor:
    """A candidate [K], centred on 1."""
    if duo:
        return balanced(activation**ratio / (weight ** (1 - ratio) + 1e-4))
    return balanced(activation**ratio)


def balanced(scale: Tensor) -> Tensor:
    """Centred on 1 by its extremes; channels that are never active are left alone."""
    scale = scale.clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


def magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean over all rows of |w| relative to the largest of its group: [K]."""
    total = weights[0].new_zeros(weights[0].shape[1])
    for weight in weights:
        groups = grouped(weight.abs(), group_size)
        relative = groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)
        total += relative.flatten(1)[:, : weight.shape[1]].sum(0)
    return total / sum(len(w) for w in weights)


def scaled_rounding(weight: Tensor, scale: Tensor, form: Form) -> Tensor:
    """Q(W · s) / s: what the layer would compute with, in terms of the unscaled input."""
    return rounding.fake(weight * scale, form).div_(scale)


def energy(weight: Tensor, gram: Tensor) -> float:
    """Σ |X Wᵀ|² over the tokens that made XᵀX [K, K]: the squared norm of a linear's output."""
    return float((weight @ gram).mul_(weight).sum(dtype=torch.float64))
