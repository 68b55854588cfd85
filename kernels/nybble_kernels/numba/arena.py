"""Memory for weights, in huge pages where the system has them, and for everything else a step touches."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble_kernels.numba.layout import ALIGN, STREAMS, aligned

HUGE = 2 * 1024 * 1024
AHEAD = 64 * 1024  # kernels prefetch past the end


class Arena:
    """Weights in the order in which a step reads them, in four streams. Reserved memory costs nothing.

    Where more than was reserved is wanted, it goes on in another stretch of memory.
    """

    def __init__(self, reserve: int) -> None:
        self._reserve = reserve
        self._stretch = _Stretch(reserve)

    def room(self, blocks: int, size: int) -> Tensor:
        """Zeros, uint8 [blocks / 4, 4, size]: block b is number b // 4 of stream b % 4."""
        if size % ALIGN:
            raise ValueError(f"blocks of {size} bytes do not end at a cache line")
        count = -(-blocks // STREAMS)
        if not self._stretch.fits(count * size):
            self._stretch = _Stretch(max(self._reserve, STREAMS * count * size))
        return self._stretch.take(count, size)


def fill(held: Tensor, first: int, blocks: Tensor) -> None:
    """Blocks from number `first` on, a multiple of four."""
    for stream in range(STREAMS):
        rows = blocks[stream::STREAMS]
        held[first // STREAMS :][: len(rows), stream] = rows


class _Stretch:
    """One piece of memory. What `take` gives keeps it alive."""

    def __init__(self, reserve: int) -> None:
        self._stride = aligned(-(-reserve // STREAMS)) + AHEAD  # bytes from stream to stream
        size = STREAMS * self._stride + HUGE
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size, **private)  # shared memory gets no huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._start = -self._bytes.data_ptr() % HUGE
        self._used = 0  # of each stream

    def fits(self, size: int) -> bool:
        return self._used + size <= self._stride - AHEAD

    def take(self, count: int, size: int) -> Tensor:
        start, self._used = self._start + self._used, self._used + count * size
        return torch.as_strided(self._bytes, (count, STREAMS, size), (size, self._stride, 1), start)


def words(count: int) -> NDArray[np.int64]:
    """Zeroed int64s at the start of a cache line."""
    raw = np.zeros(count + ALIGN // 8, np.int64)
    skip = -raw.ctypes.data % ALIGN // 8
    return raw[skip : skip + count]


def floats(count: int) -> NDArray[np.float32]:
    """NaN float32s at the start of a cache line: a lane that is read before it is written shows."""
    filled = words(-(-count // 2)).view(np.float32)
    filled[:] = np.nan
    return filled[:count]
