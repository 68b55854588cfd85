"""What the allocator keeps of matrices that come and go."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
OWN_PAGES, USUAL = 1 << 20, 32 << 20  # bytes; glibc raises its own limit up to the second by itself


@contextmanager
def tight_heap() -> Iterator[None]:
    """Inside, whatever takes a MiB or more has pages of its own, and gives them back when it goes.

    Otherwise glibc soon takes matrices of up to 32 MiB from its heap, where the little that stays between
    them keeps the holes: 360 MiB of a model of 0.9 GB. Nothing happens with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, OWN_PAGES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, USUAL)  # both as glibc's own raising would leave them
        mallopt(M_TRIM_THRESHOLD, 2 * USUAL)
