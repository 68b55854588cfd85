"""What the kernel tests share: how far results may lie from float64, and buffers that show a missed write."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Largest relative RMSE against float64, by the type that the result is rounded to."""

GUARD = 7


def error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; NaN where anything was not written."""
    wanted = expected.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """NaN everywhere: a lane that is not written fails."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    limit = TOLERANCE[dtype or found.dtype]
    measured = error(found, expected)
    assert measured <= limit, f"relative RMSE {measured:.2e} > {limit:.0e}"
