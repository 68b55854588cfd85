"""A worker that comes late, when the caller has gone on to write the next call's records."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from nybble_kernels.numba import frame as at
from nybble_kernels.numba import pool, workers
from nybble_kernels.numba.arena import Arena, floats, words
from nybble_kernels.numba.builder import quantize_record
from nybble_kernels.numba.compiled import compiled_step, kernels
from nybble_kernels.numba.isa import choose
from nybble_kernels.numba.layout import activation_bytes, aligned
from nybble_kernels.numba.weight import HeldWeight, hold
from nybble_kernels.numba.workers import Workers
from support_quantized import quantized

ROWS = 64


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
        self.ops = self.pool.add([[0] * at.RECORD] * 4)
        self.kernels, self.rounded = kernels(choose()), words(ROWS * aligned(activation_bytes(64)) // 8)
        self.libc, self.memory = libc, memory

    def write(self, weight: HeldWeight, *products: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The records of x Wᵀ for each x [ROWS, 64] and out [ROWS, 256]."""
        records = []
        rounded = int(self.rounded.ctypes.data), aligned(activation_bytes(64))
        for x, out in products:
            source = x.data_ptr(), 4 * x.stride(0)
            if weight.integer:
                records.append(quantize_record(self.kernels, weight, (*source, *rounded)))
                source = rounded
            records.append(
                weight.gemv_record(self.kernels, (*source, out.data_ptr(), 4 * out.stride(0), 0, 0))
            )
        self.ops[: len(records)] = records
        self.pool.set_length(0, len(records))

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
    first, second = torch.empty(ROWS, 256), torch.full((128, 256), float("nan"))
    late.write(weight, (x[:ROWS], first))
    late.pool.run(0, ROWS)  # the caller alone: two ops, all of them done
    assert first.isfinite().all()
    if case == "more ops":
        late.write(weight, (x[:ROWS], second[:ROWS]), (x[ROWS:], second[ROWS:]))
    else:
        late.write(plain, (x[:ROWS], second[:ROWS]))
    late.come()
    assert second.isnan().all()
