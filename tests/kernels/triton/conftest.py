"""Where the kernels of a test run: in the interpreter on the CPU, or on the GPU when Triton compiles."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("Triton compiles, and there is no GPU")
    return torch.device("cuda")
