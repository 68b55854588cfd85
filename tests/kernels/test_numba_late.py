"""A worker that comes late, when the caller has gone on to write the next call's records."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from nybble_kernels.numba import frame as at
from nybble_kernels.numba import pool, workers
from nybble_kernels.numba.arena import Arena, floats, words
from nybble_kernels.numba.compiled import compiled_step, kernels
from nybble_kernels.numba.isa import choose
from nybble_kernels.numba.products import Products
from nybble_kernels.numba.weight import hold
from nybble_kernels.numba.workers import Workers
from support_quantized import quantized


class Late:
    """A pool of two whose worker has not been scheduled yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arena = Arena(1 << 22, 2)
        self.frame, self.scratch = words(at.FRAME), floats(2 * 4096)
        self.frame[at.SCRATCH], self.frame[at.SCRATCH_STRIDE] = self.scratch.ctypes.data, 4 * 4096
        with monkeypatch.context() as without:
            without.setattr(workers, "_semaphores", lambda: False)
            self.pool = Workers(compiled_step(), self.frame, 2)
        self.pool.count = 1
        memory, libc = self.pool._words, ctypes.CDLL(None)
        for word, name in ((pool.YIELD, "sched_yield"), (pool.WAIT, "sem_wait"), (pool.POST, "sem_post")):
            memory[word] = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value or 0
        self.semaphore = ctypes.c_void_p(memory.ctypes.data + 8 * (pool.WORKERS + pool.SEMAPHORE))
        libc.sem_init(self.semaphore, 0, 0)
        self.products = Products(kernels(choose()), self.pool, 0)
        self.libc, self.memory = libc, memory

    def come(self) -> None:
        """The worker finds what is there, and goes to sleep."""
        arguments = self.memory.ctypes.data, self.frame.ctypes.data, 0, 0, 0, 1
        thread = threading.Thread(target=self.pool._run, args=arguments, daemon=True)
        thread.start()
        thread.join(0.2)
        self.memory[pool.STOP] = 1
        self.memory[pool.STEP] += 1 << 24
        self.libc.sem_post(self.semaphore)
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("case", ["another kind of op", "more ops"])
def test_records_of_a_later_call_are_not_taken_for_those_of_a_step(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(monkeypatch)
    weight, plain = (
        hold(quantized(256, 64, 4, 32, "zeros"), late.arena),
        hold(torch.randn(256, 64), late.arena),
    )
    x = torch.randn(128, 64)
    first, second = torch.empty(64, 256), torch.full((128, 256), float("nan"))
    late.products.multiply([weight], x[:64], first)  # the caller alone: two ops, all of them done
    assert first.isfinite().all()
    if case == "more ops":
        ops = late.products._records([weight], x[:64], second[:64])
        ops += late.products._records([weight], x[64:], second[64:])
    else:
        ops = late.products._records([plain], x[:64], second[:64])
    late.products._ops[: len(ops)] = ops
    late.pool.set_length(0, len(ops))
    late.come()
    assert second.isnan().all()
