"""quantize: x as int8 or float8, a scale a row: codes = round(x / scale), scale = max|x| / largest code.

The scale of a row is its own (dynamic, per token) or one number for all (static, per tensor); a static one
saturates what lies beyond it. A product of one row or a few quantizes on the way; with many rows every tile
of outputs would do that again, so they are quantized once, in a launch of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import INTERPRETED, launch_dependents, wait
from nybble_kernels.triton.epilogue import LARGEST, NORMS, RMS_NORM, Operand, load_norm
from nybble_kernels.triton.norm import normed_row, warps_of

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it leaves a number rounded to even in the low bits
SMALLEST = tl.constexpr(1e-30)  # stands for the largest of a row of zeros
BLOCK = 1024  # inputs a program quantizes


@dataclass(frozen=True, eq=False)
class QuantizedOperand:
    """`source` once quantized: values [rows, K], int8 or float8_e4m3fn · scales: float32 [rows].

    x[m, k] ≈ scales[m] · values[m, k]; the norm that `source` still needs follows the product.
    """

    values: Tensor
    scales: Tensor
    source: Operand


@triton.jit
def limit_of(T: tl.constexpr):
    """The largest code."""
    if tl.int8 == T:
        return 127.0
    else:
        return 448.0


@triton.jit
def to_even(v):
    """v rounded to four significant bits, and to 2⁻⁹: what the interpreter's cast to E4M3 would cut off."""
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(v) < 0.015625, (v + 24576.0) - 24576.0, normal)


@triton.jit
def encoded(x, inverse, CLIP: tl.constexpr, T: tl.constexpr):
    """round(x · inverse) as T, in float32; saturated where the scale was not made for this x."""
    if tl.int8 == T:
        v = x.to(tl.float32) * inverse
        if CLIP:
            v = tl.clamp(v, -128.0, 127.0)
        return (v + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        v = tl.clamp(x.to(tl.float32) * inverse, -448.0, 448.0)
        if INTERPRETED:
            v = to_even(v)
        return v.to(T)


@triton.jit
def scales_of(
    stats, static, mm, M, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(scale, 1 / scale) of rows mm of an operand.

    A static scale is meant for what follows the norm: u / (static · rms) are the codes of (u / rms) / static.
    """
    if static is None:
        TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
        t = tl.arange(0, triton.next_power_of_2(TILES))
        at = stats + LARGEST * TILES * STRIDE + t[:, None] * STRIDE + mm[None, :]
        held = tl.load(at, mask=(t[:, None] < TILES) & (mm[None, :] < M), other=0.0)
        largest = tl.maximum(tl.max(held, 0), SMALLEST)
        return largest / limit_of(T), limit_of(T) / largest
    elif NORM == RMS_NORM:
        _, _, raw = load_norm(stats, mm, M, STRIDE, WIDTH, TILE, EPS)
        return static / raw, raw / static
    else:
        ones = tl.full(mm.shape, 1.0, tl.float32)
        return ones * static, ones / static


@triton.jit(do_not_specialize=["M"])
def operand_kernel(
    x, stats, static, values, scales, M,
    K: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STRIDE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, row): the largest of the row is in the statistics."""
    wait(PDL)
    launch_dependents(PDL)
    row = tl.program_id(1)
    T: tl.constexpr = values.dtype.element_ty
    mm = row + tl.arange(0, 1)
    scale, inverse = scales_of(stats, static, mm, M, STRIDE, K, TILE, NORM, EPS, T)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(x + row * K + k, mask=k < K, other=0.0)
    tl.store(values + row * K + k, encoded(u, inverse, static is not None, T), mask=k < K)
    tl.store(scales + mm, scale, mask=(tl.program_id(0) == 0) & (mm < M))


@triton.jit
def row_kernel(
    x, static, values, scales,
    K: tl.constexpr, WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row)."""
    wait(PDL)
    launch_dependents(PDL)
    row = tl.program_id(0)
    k = tl.arange(0, WIDTH)
    store_row(tl.load(x + row * X_STRIDE + k, mask=k < K, other=0.0), row, k, static, values, scales, K)


@triton.jit
def norm_kernel(
    x, residual, weight, bias, static, values, scales,
    K: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row)."""
    wait(PDL)
    launch_dependents(PDL)
    row = tl.program_id(0)
    k = tl.arange(0, WIDTH)
    y = normed_row(x, residual, weight, bias, row, k, K, NORM, EPS)
    store_row(y, row, k, static, values, scales, K)


@triton.jit
def store_row(y, row, k, static, values, scales, K: tl.constexpr):
    """Codes and scale of one whole row."""
    T: tl.constexpr = values.dtype.element_ty
    if static is None:
        largest = tl.maximum(tl.max(tl.abs(y.to(tl.float32)), 0), SMALLEST)
        scale = largest / limit_of(T)
        inverse = limit_of(T) / largest
    else:
        scale = static
        inverse = 1.0 / static
    tl.store(values + row * K + k, encoded(y, inverse, static is not None, T), mask=k < K)
    tl.store(scales + row, scale)


def quantize_operand(
    operand: Operand, rows: int, out: QuantizedOperand, *, static: float | None = None, pdl: bool = False
) -> None:
    """The first `rows` rows of an operand, by its statistics. `static`: the scale of what its norm makes."""
    if static is not None and operand.norm == "layer":
        raise ValueError("a static scale belongs to the output of a LayerNorm: use norm_quantize")
    operand_kernel[(-(-operand.width // BLOCK), rows)](
        operand.values,
        operand.stats,
        static,
        out.values,
        out.scales,
        rows,
        K=operand.width,
        BLOCK=BLOCK,
        TILE=operand.tile,
        STRIDE=operand.stats.stride(1),
        NORM=NORMS[operand.norm],
        EPS=operand.eps,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def quantize(
    x: Tensor, values: Tensor, scales: Tensor, *, static: float | None = None, pdl: bool = False
) -> None:
    """x: float [T, K], rows contiguous -> values: int8 or float8_e4m3fn [T, K], scales: float32 [T]."""
    rows, width = x.shape
    row_kernel[(rows,)](
        x,
        static,
        values,
        scales,
        K=width,
        WIDTH=triton.next_power_of_2(width),
        X_STRIDE=x.stride(0),
        PDL=pdl,
        num_warps=warps_of(width),
        launch_pdl=pdl,
    )


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    scales: Tensor,
    *,
    norm: str,
    eps: float,
    residual: Tensor | None = None,
    static: float | None = None,
    pdl: bool = False,
) -> None:
    """values, scales = quantize(norm(x)), "rms" or "layer"; x: float32 [T, K], += residual first."""
    rows, width = x.shape
    norm_kernel[(rows,)](
        x,
        residual,
        weight,
        bias,
        static,
        values,
        scales,
        K=width,
        WIDTH=triton.next_power_of_2(width),
        NORM=NORMS[norm],
        EPS=eps,
        PDL=pdl,
        num_warps=warps_of(width),
        launch_pdl=pdl,
    )
