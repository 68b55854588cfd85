"""norm: y = x / sqrt(mean(x²) + eps) ∘ w, or (x - mean) / sqrt(var + eps) ∘ w + b, a row at a time.

What the folded norm of `epilogue` comes to, for a row that no product follows (Zhang & Sennrich 2019; Ba et
al. 2016). With `residual`, x += residual first, in place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import launch_dependents, wait
from nybble_kernels.triton.epilogue import LAYER_NORM, NORMS

PER_WARP = 1024  # columns: 32 values a thread
WARPS = (1, 2, 4, 8, 16)


def warps_of(width: int) -> int:
    """A row stays in registers from its only read to its only write."""
    return next((w for w in WARPS if width <= w * PER_WARP), WARPS[-1])


@triton.jit
def normed_row(x, residual, weight, bias, row, k, K: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """Row of x, after its residual, normed: float32, zero beyond K."""
    at = x + row * K + k
    held = k < K
    v = tl.load(at, mask=held, other=0.0)
    if residual is not None:
        v += tl.load(residual + row * K + k, mask=held, other=0.0).to(tl.float32)
        tl.store(at, v, mask=held)
    if NORM == LAYER_NORM:
        v = tl.where(held, v - tl.sum(v, 0) / K, 0.0)
    y = v * tl.rsqrt(tl.sum(v * v, 0) / K + EPS)
    if weight is not None:
        y *= tl.load(weight + k, mask=held, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + k, mask=held, other=0.0).to(tl.float32)
    return y


@triton.jit
def kernel(
    x, residual, weight, bias, out,
    K: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row)."""
    wait(PDL)
    launch_dependents(PDL)
    row = tl.program_id(0)
    k = tl.arange(0, WIDTH)
    y = normed_row(x, residual, weight, bias, row, k, K, NORM, EPS)
    tl.store(out + row * K + k, y.to(out.dtype.element_ty), mask=k < K)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: str,
    eps: float,
    residual: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """out = norm(x) in the type of out; x: float32 [T, D], `norm`: "rms" or "layer", residual: [T, D]."""
    rows, width = x.shape
    kernel[(rows,)](
        x,
        residual,
        weight,
        bias,
        out,
        K=width,
        WIDTH=triton.next_power_of_2(width),
        NORM=NORMS[norm],
        EPS=eps,
        PDL=pdl,
        num_warps=warps_of(width),
        launch_pdl=pdl,
    )
