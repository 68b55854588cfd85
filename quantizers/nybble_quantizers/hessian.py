"""Sums over the text that passes: H = XᵀX of the inputs of a linear, and what its outputs lack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from nybble_quantizers.windows import Seen
from nybble_quantizers.workers import Map, in_turn

T = TypeVar("T")

BAND = 256  # columns made at a time
TOGETHER = 8  # windows in memory at the same time, where they come from a file or are made on the way


def hessian(inputs: Sequence[Tensor], run: Map = in_turn) -> Tensor:
    """XᵀX over all tokens [K, K]: windows [T, K], summed in their order.

    Half of it is computed, in bands of rows that start at the diagonal, and mirrored. Each band is one piece
    of work, so the sums do not depend on how many are made side by side.
    """
    width = inputs[0].shape[1]
    total = inputs[0].new_zeros(width, width)
    for held in _parts(inputs, run):

        def band(first: int, held: Sequence[Tensor] = held) -> None:
            part = total[first : first + BAND, first:]
            for x in held:
                part.addmm_(x[:, first : first + BAND].T, x[:, first:])

        run(band, range(0, width, BAND))
    return total.triu_().add_(total.triu(1).T)


def lack(
    wanted: Sequence[Tensor], found: Sequence[Tensor], inputs: Sequence[Tensor], run: Map = in_turn
) -> Tensor:
    """Σ (wanted - found)ᵀ x over all tokens [N, K], of windows [T, N], [T, N] and [T, K] in their order."""
    total = inputs[0].new_zeros(wanted[0].shape[1], inputs[0].shape[1])
    missing = Seen(range(len(wanted)), lambda i: (wanted[i] - found[i], inputs[i]))
    for held in _parts(missing, run):

        def band(first: int, held: Sequence[tuple[Tensor, Tensor]] = held) -> None:
            columns = slice(first, first + BAND)
            for missed, x in held:
                total[columns].addmm_(missed[:, columns].T, x)

        run(band, range(0, len(total), BAND))
    return total


def _parts(windows: Sequence[T], run: Map) -> Iterator[list[T]]:
    """A few windows at a time."""
    for first in range(0, len(windows), TOGETHER):
        yield run(windows.__getitem__, range(first, min(first + TOGETHER, len(windows))))
