"""Memory for weights, in huge pages where the system has them, and for everything else a step touches."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble_kernels.numba.layout import ALIGN, STREAMS, aligned

HUGE = 2 * 1024 * 1024
AHEAD = 64 * 1024  # kernels prefetch past the end


@dataclass(frozen=True, eq=False)
class Room:
    """Where the blocks of a weight lie: `share` after `share` of them, one for each thread that reads them.

    data: uint8 [threads, fours, 4, bytes of a block]; of a share, block b is number b // 4 in stream b % 4.
    A share is an even number of blocks, so that two threads differ by two blocks at most.
    """

    data: Tensor
    blocks: int
    share: int

    @property
    def nbytes(self) -> int:
        """That a step reads: two blocks at least are read side by side."""
        return -(-self.blocks // 2) * 2 * int(self.data.shape[3])

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Address, bytes from four to four, bytes from stream to stream, blocks of a share. Share follows
        share after four streams.
        """
        return self.data.data_ptr(), self.data.stride(1), self.data.stride(2), self.share

    def fill(self, first: int, blocks: Tensor) -> None:
        """Blocks from number `first` on."""
        for held, rows in self._streams(first, blocks):
            held.copy_(rows)

    def stored(self) -> Tensor:
        """uint8 [blocks, bytes of a block]: a copy, in order."""
        blocks = torch.empty(self.blocks, self.data.shape[3], dtype=torch.uint8)
        for held, rows in self._streams(0, blocks):
            rows.copy_(held)
        return blocks

    def _streams(self, first: int, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each stream's part of some blocks, here and there."""
        for thread, data in enumerate(self.data):
            skipped = max(0, first - thread * self.share)
            start = thread * self.share + skipped - first
            own = blocks[start : max(start, start + self.share - skipped)]
            for stream in range(STREAMS):
                ahead = (stream - skipped) % STREAMS
                rows, four = own[ahead::STREAMS], (skipped + ahead) // STREAMS
                yield data[four : four + len(rows), stream], rows


class Arena:
    """Weights in the order in which a step reads them: of every thread what it reads, in four streams.

    A thread reads its streams from end to end, from one weight into the next (past a hole where its share of
    a weight leaves two of the four streams empty), so what it fetches ahead is what it needs next. Only the
    head, which is packed first and read last, takes a jump. Reserved memory costs nothing. Where more than
    was reserved is wanted, it goes on in another stretch of memory.
    """

    def __init__(self, reserve: int, threads: int = 1) -> None:
        self.threads = threads
        self.reserve = reserve
        self._stretches = [_Stretch(reserve, threads)]

    def room(self, blocks: int, size: int) -> Room:
        """Zeros for so many blocks of `size` bytes."""
        if size % ALIGN:
            raise ValueError(f"blocks of {size} bytes do not end at a cache line")
        share = 2 * -(-blocks // (2 * self.threads))
        count = -(-share // STREAMS)
        if not self._stretches[-1].fits(count * size):
            needed = self.threads * STREAMS * count * size
            self._stretches.append(_Stretch(max(self.reserve // 8, needed), self.threads))
        return Room(self._stretches[-1].take(count, size), blocks, share)

    def pieces(self) -> Iterator[memoryview]:
        """What is used of it, in an order that depends on the rooms that were taken, and on nothing else."""
        for stretch in self._stretches:
            yield from stretch.pieces()


class _Stretch:
    """One piece of memory. What `take` gives keeps it alive."""

    def __init__(self, reserve: int, threads: int) -> None:
        self._threads = threads
        streams = threads * STREAMS
        self._stride = aligned(-(-reserve // streams)) + AHEAD  # bytes from stream to stream
        size = streams * self._stride + HUGE
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size, **private)  # shared memory gets no huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._start = -self._bytes.data_ptr() % HUGE
        self._used = 0  # of each stream

    def fits(self, size: int) -> bool:
        return self._used + size <= self._stride - AHEAD

    def pieces(self) -> Iterator[memoryview]:
        """What is used of each stream."""
        for stream in range(self._threads * STREAMS):
            start = self._start + stream * self._stride
            yield self._bytes[start : start + self._used].numpy().data

    def take(self, count: int, size: int) -> Tensor:
        start, self._used = self._start + self._used, self._used + count * size
        shape = (self._threads, count, STREAMS, size)
        return torch.as_strided(self._bytes, shape, (STREAMS * self._stride, size, self._stride, 1), start)


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
