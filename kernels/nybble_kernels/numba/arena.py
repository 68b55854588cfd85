"""Memory for weights, in huge pages where the system has them, and for everything else a step touches."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGN = 64
HUGE = 2 * 1024 * 1024
AHEAD = 64 * 1024  # kernels prefetch past the end


class Arena:
    """Weights one behind the other in the order in which a step reads them. Reserved memory costs nothing."""

    def __init__(self, reserve: int) -> None:
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, reserve + HUGE + AHEAD, **private)  # shared memory gets no huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._next = -self._bytes.data_ptr() % HUGE
        self._end = self._next + reserve
        self.used = 0

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor inside the arena."""
        size = tensor.numel() * tensor.element_size()
        start, self._next = self._next, self._next + -(-size // ALIGN) * ALIGN
        if self._next > self._end:
            raise MemoryError("the weights need more than was reserved for them")
        self.used += size
        place = self._bytes[start : start + size].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)


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
