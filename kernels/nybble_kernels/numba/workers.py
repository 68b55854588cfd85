"""The threads beside the one that calls `step`, asleep unless a step runs."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nybble_kernels.numba import pool
from nybble_kernels.numba.arena import words
from nybble_kernels.numba.compiled import Run
from nybble_kernels.numba.frame import RECORD


class Workers:
    """The pool's memory, its programs and its threads. All calls must come from one thread."""

    def __init__(self, run: Run, frame: NDArray[np.int64], threads: int) -> None:
        self.count = threads - 1 if _semaphores() else 0
        self._lines = 1 + threads
        self._run = run
        self._frame = frame
        self._words = words(pool.WORKERS + pool.WORKER * max(1, self.count))
        self._programs: list[NDArray[np.int64]] = []
        self._address = int(self._words.ctypes.data)
        if self.count:
            self._start()

    def _start(self) -> None:
        libc = ctypes.CDLL(None)
        for word, name in ((pool.YIELD, "sched_yield"), (pool.WAIT, "sem_wait"), (pool.POST, "sem_post")):
            self._words[word] = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value or 0
        threads = []
        for number in range(1, self.count + 1):
            semaphore = 8 * (pool.WORKERS + pool.WORKER * (number - 1) + pool.SEMAPHORE)
            libc.sem_init(ctypes.c_void_p(self._address + semaphore), 0, 0)
            arguments = (self._address, int(self._frame.ctypes.data), 0, 0, 0, number)
            held = (self._words, self._frame)
            threads.append(threading.Thread(target=_follow, args=(self._run, arguments, held), daemon=True))
            threads[-1].start()
        stop = weakref.finalize(self, _stop, self._words, self.count, threads)
        stop.atexit = False  # the process takes sleeping threads with it

    def add(self, ops: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Register a program, numbered in order of registration. Its records may change between runs."""
        table = words(RECORD * len(ops)).reshape(-1, RECORD)
        table[:] = np.asarray(ops, np.int64).reshape(-1, RECORD)
        counters = words(pool.LINE * self._lines * len(ops))
        place = pool.PROGRAMS + pool.PROGRAM * (len(self._programs) // 2)
        stride = 8 * pool.LINE * self._lines
        self._words[place : place + 4] = table.ctypes.data, len(ops), counters.ctypes.data, stride
        self._programs += [table, counters]
        return table

    def set_length(self, program: int, ops: int) -> None:
        """Run only the first `ops` of a program from now on."""
        self._words[pool.PROGRAMS + pool.PROGRAM * program + pool.COUNT] = ops

    def run(self, program: int, rows: int) -> None:
        self._run(self._address, int(self._frame.ctypes.data), program, rows, self.count, 0)


def _semaphores() -> bool:
    """Unnamed POSIX semaphores, as glibc and musl have them."""
    try:
        return hasattr(ctypes.CDLL(None), "sem_init") and not hasattr(ctypes.CDLL(None), "mach_absolute_time")
    except OSError:
        return False


def _follow(run: Run, arguments: Sequence[int], held: object) -> None:
    """A worker thread; `held` keeps the memory it reads alive."""
    run(*arguments)


def _stop(held: NDArray[np.int64], count: int, threads: Sequence[threading.Thread]) -> None:
    """Wake every worker for the last time."""
    libc = ctypes.CDLL(None)
    held[pool.STOP] = 1
    held[pool.STEP] += 1 << 24
    for number in range(count):
        worker = pool.WORKERS + pool.WORKER * number
        held[worker + pool.PARKED] = 0
        libc.sem_post(ctypes.c_void_p(int(held.ctypes.data) + 8 * (worker + pool.SEMAPHORE)))
    for thread in threads:
        thread.join(timeout=1.0)
