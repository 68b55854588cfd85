"""Sums over the text that passes: H = XᵀX of the inputs of a linear, and what its outputs lack."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nybble_quantizers.workers import Map, in_turn

BAND = 256  # columns made at a time


def hessian(inputs: Sequence[Tensor], run: Map = in_turn) -> Tensor:
    """XᵀX over all tokens [K, K]: windows [T, K], summed in their order.

    Half of it is computed, in bands of rows that start at the diagonal, and mirrored. Each band is one piece
    of work, so the sums do not depend on how many are made side by side.
    """
    width = inputs[0].shape[1]
    total = inputs[0].new_zeros(width, width)

    def band(first: int) -> None:
        part = total[first : first + BAND, first:]
        for x in inputs:
            part.addmm_(x[:, first : first + BAND].T, x[:, first:])

    run(band, range(0, width, BAND))
    return total.triu_().add_(total.triu(1).T)


def lack(
    wanted: Sequence[Tensor], found: Sequence[Tensor], inputs: Sequence[Tensor], run: Map = in_turn
) -> Tensor:
    """Σ (wanted - found)ᵀ x over all tokens [N, K], of windows [T, N], [T, N] and [T, K] in their order."""
    total = inputs[0].new_zeros(wanted[0].shape[1], inputs[0].shape[1])

    def band(first: int) -> None:
        columns = slice(first, first + BAND)
        for w, f, x in zip(wanted, found, inputs, strict=True):
            total[columns].addmm_((w[:, columns] - f[:, columns]).T, x)

    run(band, range(0, len(total), BAND))
    return total
