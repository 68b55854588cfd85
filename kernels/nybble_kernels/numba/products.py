"""Linears over the many rows of a prompt, by the kernels of a step: a row gives the same numbers as there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nybble_kernels.numba.arena import words
from nybble_kernels.numba.builder import quantize_record
from nybble_kernels.numba.frame import RECORD
from nybble_kernels.numba.layout import activation_bytes, aligned
from nybble_kernels.numba.machine import Kernels
from nybble_kernels.numba.weight import HeldWeight
from nybble_kernels.numba.workers import Workers

ROWS = 64
"""At a time, so that rounded activations stay in a cache of the second level."""

CHUNKS = 16  # of so many rows, in one call
PARTS = 4  # weights that one linear may be stacked from


class Products:
    """A program of its own among the workers', written anew for every call."""

    def __init__(self, kernels: Kernels, workers: Workers, number: int) -> None:
        """number: which program of the workers this is, in the order of registration."""
        self._kernels = kernels
        self._workers = workers
        self._number = number
        self._ops = workers.add([[0] * RECORD] * (2 * PARTS * CHUNKS))
        self._rounded = words(0)

    def multiply(self, parts: Sequence[HeldWeight], x: Tensor, out: Tensor) -> None:
        """out[:, columns of each part] = x Wᵀ. x: float32 [T, K], out: float32 [T, N], rows contiguous."""
        whole = len(x) - len(x) % ROWS
        for start in range(0, whole, ROWS * CHUNKS):
            self._run(parts, x[start : start + ROWS * CHUNKS][: whole - start], out[start:], ROWS)
        if whole < len(x):
            self._run(parts, x[whole:], out[whole:], len(x) - whole)

    def _run(self, parts: Sequence[HeldWeight], x: Tensor, out: Tensor, rows: int) -> None:
        """So many rows at a time, in one call."""
        ops: list[list[int]] = []
        for start in range(0, len(x), rows):
            ops += self._records(parts, x[start : start + rows], out[start : start + rows])
        self._ops[: len(ops)] = ops
        self._workers.set_length(self._number, len(ops))
        self._workers.run(self._number, rows)

    def _records(self, parts: Sequence[HeldWeight], x: Tensor, out: Tensor) -> list[list[int]]:
        ops: list[list[int]] = []
        before: HeldWeight | None = None
        column, plain = 0, (x.data_ptr(), 4 * x.stride(0))
        room = self._room(max(part.width for part in parts))
        for part in parts:
            if part.integer:
                source = room, aligned(activation_bytes(part.width))
                if before is None or before.width != part.width or before.columns is not part.columns:
                    ops.append(quantize_record(self._kernels, part, (*plain, *source)))
                before = part
            target = out.data_ptr() + 4 * column, 4 * out.stride(0)
            ops.append(part.gemv_record(self._kernels, (*(source if part.integer else plain), *target, 0, 0)))
            column += part.outputs
        return ops

    def _room(self, width: int) -> int:
        """Address of memory for rounded rows of this width; what was given before is not kept."""
        size = ROWS * aligned(activation_bytes(width)) // 8
        if len(self._rounded) < size:
            self._rounded = words(size)
        return int(self._rounded.ctypes.data)
