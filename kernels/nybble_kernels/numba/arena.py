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
    """Weights in the order in which a step reads them, in four streams. Reserved memory costs nothing."""

    def __init__(self, reserve: int) -> None:
        self.stride = aligned(-(-reserve // STREAMS)) + AHEAD  # bytes from stream to stream
        size = STREAMS * self.stride + HUGE
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, size, **private)  # shared memory gets no huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._start = -self._bytes.data_ptr() % HUGE
        self._used = 0  # of each stream

    def hold(self, blocks: Tensor) -> Tensor:
        """Copy uint8 [blocks, bytes] in: a view [blocks / 4, 4, bytes], filled up with blocks of zeros."""
        count, size = -(-blocks.shape[0] // STREAMS), blocks.shape[1]
        start, self._used = self._start + self._used, self._used + count * size
        if size % ALIGN or self._used > self.stride - AHEAD:
            raise MemoryError(f"{list(blocks.shape)} do not fit into what was reserved for the weights")
        held = torch.as_strided(self._bytes, (count, STREAMS, size), (size, self.stride, 1), start)
        for stream in range(STREAMS):
            rows = blocks[stream::STREAMS]
            held[: len(rows), stream] = rows
        return held


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
