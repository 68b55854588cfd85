"""Memory of matrices that come and go, in a process of its own: the allocator's limits are the process's."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import contextlib, sys
import torch
from nybble.engine.heap import tight_heap

def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

torch.ones(20 << 20, dtype=torch.uint8)  # gone at once: from now on the heap takes such matrices
with tight_heap() if sys.argv[1] == "tight" else contextlib.nullcontext():
    before = held()
    pairs = [[torch.ones(size, dtype=torch.uint8) for size in (2 << 20, 100_000)] for _ in range(50)]
    kept = [small for _, small in pairs]
    del pairs
    print(held() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator"
)
def test_what_stays_between_matrices_does_not_hold_their_memory() -> None:
    found = {
        how: int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, check=True).stdout)
        for how in ("tight", "loose")
    }
    assert found["tight"] < 20, found  # MiB, of which 5 stay
    assert found["loose"] > 60, found  # what the limit is for
