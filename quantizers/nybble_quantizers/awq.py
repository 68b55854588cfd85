"""Activation-aware weight quantization (Lin et al. 2024): protect the input channels that carry the signal.

Scaling a weight column up and its input down by the same s changes nothing until the column is rounded: then
its error is divided by s. s is searched per input channel, folded into whatever produces the input, and the
range of every group is narrowed where that helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble_quantizers import rtn
from nybble_quantizers.scheme import Scheme

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


def search(loss: Loss, activation: Tensor, weight: Tensor, grid: int) -> Choice:
    """Minimise `loss(s)` over s = activation^r and s = activation^r / weight^(1 - r), r on a grid, and s = 1.

    activation: mean |x| of each channel [K] · weight: how large the channel's weights are within their
    groups [K], see `magnitude`. The second kind is AutoAWQ's "duo scaling".
    """
    ones = torch.ones_like(activation)
    plain = loss(ones)
    best = Choice(ones, None, False, plain, plain)
    for ratio, duo, scale in candidates(activation, weight, grid):
        error = loss(scale)
        if error < best.error:
            best = Choice(scale, ratio, duo, error, plain)
    return best


def candidates(activation: Tensor, weight: Tensor, grid: int) -> Iterator[tuple[float, bool, Tensor]]:
    for step in range(grid):
        ratio = step / grid
        if step:
            yield ratio, False, balanced(activation**ratio)
        yield ratio, True, balanced(activation**ratio / (weight ** (1 - ratio) + 1e-4))


def balanced(scale: Tensor) -> Tensor:
    """Centred on 1 by its extremes; channels that are never active are left alone."""
    scale = scale.clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


def magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean over all rows of |w| relative to the largest of its group: [K]."""
    total = torch.zeros(weights[0].shape[1])
    for weight in weights:
        groups = rtn.grouped(weight.abs(), group_size)
        relative = groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)
        total += relative.flatten(1)[:, : weight.shape[1]].sum(0)
    return total / sum(len(w) for w in weights)


def scaled_rounding(weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Q(W · s) / s: what the layer would compute with, in terms of the unscaled input."""
    group = scheme.group(weight.shape[1])
    return rtn.fake(weight * scale, scheme.bits, group, scheme.symmetric).div_(scale)


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Σ |X (W - Ŵ)ᵀ|² over Σ |X Wᵀ|², from XᵀX [K, K]."""
    missed = rounded - weight
    noise, signal = ((m @ gram).mul_(m).sum(dtype=torch.float64) for m in (missed, weight))
    return float(noise / signal.clamp(min=1e-30))
