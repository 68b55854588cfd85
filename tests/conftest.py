"""For every test: OpenMP threads sleep instead of spinning, so that a busy machine stalls no test.

Triton kernels run in its interpreter, on the CPU; on a GPU machine, `TRITON_INTERPRET=0` compiles them.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before anything imports torch
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
