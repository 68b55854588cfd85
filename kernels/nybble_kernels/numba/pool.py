"""Sharing one step among threads without waiting for a thread that the system has not scheduled.

Every op of a step is cut into units. Of a product each thread has a share that lies in memory for it to read
from end to end, and it helps with the others' shares once its own is taken; all else is one share. A thread
that is late (its core busy with the event loop) finds the work done and catches up; nobody waits for it
unless it holds a unit. Spins are short, then yield, and between steps a worker sleeps on a semaphore.

Each op has words of the kind `step << 32 | count`: how many units are DONE, and of each share how many are
TAKEN, or CLOSED. A word of an older step counts as zero, so nothing is reset between steps.
"""

from __future__ import annotations

from nybble_kernels.numba.jit import inline
from nybble_kernels.numba.memory import atomic_get, atomic_set, call_libc0, call_libc1, relax, swap_if

LINE = 8  # int64 of a cache line. An op has one for DONE, then one for each share's TAKEN
CLOSED = 0xFFFFFFFF
SPINS = 200  # of about 40 ns, then the core is offered to others
IDLE_SPINS = 500  # before a worker without a step goes to sleep

# The words of a pool, as int64 numbers. STEP is `step << 24 | program << 16 | rows`; no rows: no step runs.
STEP, STOP, YIELD, WAIT, POST, PROGRAMS, WORKERS = 0, 8, 16, 17, 18, 24, 48
OPS, COUNT, WORDS, STRIDE, PROGRAM = 0, 1, 2, 3, 4  # of a program: ops, how many, their words, bytes an op
PARKED, SEMAPHORE, WORKER = 0, 8, 16  # of a worker, in a cache line each


@inline
def take(word: int, step: int, total: int, chunk: int) -> int:
    """The first unit of a chunk that now belongs to the caller, or -1 when none are left."""
    while True:
        seen = atomic_get(word)
        if seen >> 32 > step:
            return -1
        start = seen & CLOSED if seen >> 32 == step else 0
        if start == CLOSED:
            return -1
        stop = start + chunk if start + chunk < total else CLOSED
        if swap_if(word, seen, step << 32 | stop):
            return start


@inline
def finish_units(word: int, step: int, count: int) -> None:
    while True:
        seen = atomic_get(word)
        if seen >> 32 > step:
            return
        done = seen & CLOSED if seen >> 32 == step else 0
        if swap_if(word, seen, step << 32 | (done + count)):
            return


@inline
def await_units(word: int, step: int, total: int, pool: int) -> None:
    """Return when the op is complete, or its step is over: a late thread may see the `total` of a later."""
    target = step << 32 | total
    spins = 0
    while atomic_get(word) < target and atomic_get(pool + 8 * STEP) >> 24 == step:
        spins += 1
        if spins < SPINS:
            relax()
        else:
            call_libc0(atomic_get(pool + 8 * YIELD))


@inline
def wake(pool: int, workers: int) -> None:
    """Post to the workers that sleep."""
    for i in range(workers):
        worker = pool + 8 * (WORKERS + WORKER * i)
        if swap_if(worker + 8 * PARKED, 1, 0):
            call_libc1(atomic_get(pool + 8 * POST), worker + 8 * SEMAPHORE)


@inline
def next_step(pool: int, worker: int, seen: int) -> int:
    """The word of a step other than `seen`; sleeps when none comes soon."""
    for _ in range(IDLE_SPINS):
        word = atomic_get(pool + 8 * STEP)
        if word != seen:
            return word
        relax()
    atomic_set(worker + 8 * PARKED, 1)
    if atomic_get(pool + 8 * STEP) != seen and swap_if(worker + 8 * PARKED, 1, 0):
        return atomic_get(pool + 8 * STEP)
    call_libc1(atomic_get(pool + 8 * WAIT), worker + 8 * SEMAPHORE)
    return atomic_get(pool + 8 * STEP)
