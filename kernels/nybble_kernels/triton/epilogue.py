"""What follows a product in one launch: the norm before it, the bias, and what the next product reads.

A norm's two scalars commute with the matrix: with u = x ∘ w,

    W (x / rms(x) ∘ w) = (W u) / rms(x)          W ((x - mean) / std ∘ w + b) = (W u - mean · W w) / std + W b

So the kernel that makes the residual stream x also writes u, rounded once, and per tile of it the sum, the
sum of squared deviations from the tile's mean and the largest |u|. The next product multiplies u and applies
the scalars to its sums: no kernel waits for a whole row of x, and nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.tiles import Tile, Workspace

NO_NORM, RMS_NORM, LAYER_NORM = (tl.constexpr(i) for i in range(3))
STORE, RESIDUAL, ACTIVATE, GATED = (tl.constexpr(i) for i in range(4))
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
LARGEST = tl.constexpr(2)  # the row of `Operand.stats` that holds the largest |u|


@dataclass(frozen=True, eq=False)
class Operand:
    """The input u [rows, K] of products, with what its norm still needs.

    stats: float32 [3, tiles, rows]: sum of x, squared deviations of x from the tile's mean, largest |u|, over
    each `tile` columns; not `measured` where what wrote the values left none. `norm`: "rms", "layer" or None.
    """

    values: Tensor
    stats: Tensor
    tile: int
    norm: str | None = None
    eps: float = 0.0
    measured: bool = True

    @property
    def width(self) -> int:
        return self.values.shape[1]


@dataclass(frozen=True, eq=False)
class Store:
    """y = v, in the type of y; columns `[column, column + N)` of y [rows, ..]."""

    y: Tensor
    column: int = 0


@dataclass(frozen=True, eq=False)
class Residual:
    """x += v (float32 [rows, N]); then `operand` gets u = x ∘ weight and its statistics."""

    x: Tensor
    operand: Operand
    weight: Tensor | None  # of the norm that follows; None: all ones


@dataclass(frozen=True, eq=False)
class Activate:
    """u = act(v), or act(gate) · up where rows (2i, 2i + 1) of the weight are (gate i, up i)."""

    operand: Operand
    kind: str
    gated: bool


Output = Store | Residual | Activate


@triton.jit
def load_norm(stats, mm, M, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr):
    """(mean [BM], 1 / sqrt(var + eps) [BM], mean square's 1 / sqrt [BM]) of rows mm, merged tile by tile.

    var = (Σ M₂ + Σ n (mean_t - mean)²) / N (Chan et al. 1979): no difference of large squares.
    """
    TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
    COUNT: tl.constexpr = triton.next_power_of_2(TILES)
    t = tl.arange(0, COUNT)
    at = t[:, None] * STRIDE + mm[None, :]
    mask = (t[:, None] < TILES) & (mm[None, :] < M)
    sums = tl.load(stats + at, mask=mask, other=0.0)
    deviations = tl.load(stats + TILES * STRIDE + at, mask=mask, other=0.0)
    n = tl.maximum(tl.minimum(WIDTH - t * TILE, TILE), 1).to(tl.float32)[:, None]
    mean = tl.sum(sums, 0) / WIDTH
    apart = tl.where(mask, sums / n - mean[None, :], 0.0)
    variance = tl.sum(deviations + n * apart * apart, 0) / WIDTH
    return mean, tl.rsqrt(variance + EPS), tl.rsqrt(variance + mean * mean + EPS)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(tl.minimum(-z, 80.0)))


@triton.jit
def activate(v, KIND: tl.constexpr):
    """silu, gelu, gelu_tanh, relu by the numbers of ACTIVATIONS, in float32."""
    if KIND == 0:
        return v * sigmoid(v)
    elif KIND == 1:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif KIND == 2:  # 0.5 v (1 + tanh z) = v sigmoid(2 z)
        return v * sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    else:
        return tl.maximum(v, 0.0)


@triton.jit
def write_operand(
    u, x, n, mm, M, operand, stats, tile, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr
):
    """Store u [TILE, BM] and the statistics of x and u over this tile of columns."""
    TILES: tl.constexpr = (COLUMNS + TILE - 1) // TILE
    held = n[:, None] < COLUMNS
    if operand.dtype.element_ty == tl.float16:  # no norm has shrunk it yet
        u = tl.clamp(u, -65504.0, 65504.0)
    u = u.to(operand.dtype.element_ty)
    tl.store(operand + mm[None, :] * COLUMNS + n[:, None], u, mask=held & (mm[None, :] < M))
    if stats is not None:
        count = tl.minimum(COLUMNS - tile * TILE, TILE).to(tl.float32)
        total = tl.sum(tl.where(held, x, 0.0), 0)
        apart = tl.where(held, x - (total / count)[None, :], 0.0)
        largest = tl.max(tl.where(held, tl.abs(u.to(tl.float32)), 0.0), 0)
        at = stats + tile * STRIDE + mm
        tl.store(at, total, mask=mm < M)
        tl.store(at + TILES * STRIDE, tl.sum(apart * apart, 0), mask=mm < M)
        tl.store(at + 2 * TILES * STRIDE, largest, mask=mm < M)


@triton.jit
def finish(
    acc,
    tile,
    mm,
    M,
    N: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    in_stats,
    colsum,
    bias,
    y,
    residual,
    weight,
    out_stats,
    NORM: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    IN_TILE: tl.constexpr,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
):
    """acc [BN, BM] = W u of outputs [tile · BN, ..) and rows mm, to its output."""
    n = tile * BN + tl.arange(0, BN)
    if NORM != NO_NORM:
        mean, centred, raw = load_norm(in_stats, mm, M, STRIDE, IN_WIDTH, IN_TILE, EPS)
        if NORM == RMS_NORM:
            acc *= raw[None, :]
        else:
            sums = tl.load(colsum + n, mask=n < N, other=0.0)
            acc = (acc - sums[:, None] * mean[None, :]) * centred[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n[:, None] < N) & (mm[None, :] < M)
    if KIND == STORE:
        tl.store(y + mm[None, :] * Y_STRIDE + n[:, None], acc.to(y.dtype.element_ty), mask=inside)
    elif KIND == RESIDUAL:
        at = residual + mm[None, :] * N + n[:, None]
        x = acc + tl.load(at, mask=inside, other=0.0)
        tl.store(at, x, mask=inside)
        u = x
        if weight is not None:
            u = x * tl.load(weight + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        write_operand(u, x, n, mm, M, y, out_stats, tile, N, STRIDE, BN)
    elif KIND == ACTIVATE:
        u = activate(acc, ACTIVATION)
        write_operand(u, u, n, mm, M, y, out_stats, tile, N, STRIDE, BN)
    else:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 2, 2, BM)), (0, 2, 1)))
        u = activate(gate, ACTIVATION) * up
        half = tile * (BN // 2) + tl.arange(0, BN // 2)
        write_operand(u, u, half, mm, M, y, out_stats, tile, N // 2, STRIDE, BN // 2)


@triton.jit
def gather_parts(
    acc, partial, counters, tile, block, part, M,
    in_stats, colsum, bias, y, residual, weight, out_stats,
    N: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    NORM: tl.constexpr, IN_WIDTH: tl.constexpr, IN_TILE: tl.constexpr, EPS: tl.constexpr,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
):  # fmt: skip
    """`finish` when all SPLIT parts of K are there: by the last program to arrive, in the order of parts.

    The order in which lanes add a tile's statistics follows from its shape. So a decode step finishes 16 rows
    at a time, read back from memory, however many it multiplied at once: a row's bits are those it has alone.
    """
    CHUNK: tl.constexpr = 16 if BM <= 64 else BM
    WIDTH: tl.constexpr = BM if BM > CHUNK else CHUNK
    if SPLIT == 1 and BM == CHUNK and (BM > 64 or KIND != RESIDUAL):
        finish(
            acc, tile, block * BM + tl.arange(0, BM), M, N, BN, BM,
            in_stats, colsum, bias, y, residual, weight, out_stats,
            NORM, IN_WIDTH, IN_TILE, EPS, KIND, ACTIVATION, STRIDE, Y_STRIDE,
        )  # fmt: skip
    else:
        place = block * tl.num_programs(0) + tile
        n = tl.arange(0, BN)[:, None] * CHUNK
        columns = tl.arange(0, BM)[None, :]
        held = partial + place * (SPLIT * BN * WIDTH)
        tl.store(held + part * (BN * WIDTH) + columns // CHUNK * (BN * CHUNK) + n + columns % CHUNK, acc)
        tl.debug_barrier()  # every warp's stores before the release below, and before they are read
        arrived = SPLIT - 1
        if SPLIT > 1:
            arrived = tl.atomic_add(counters + place, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            c = tl.arange(0, CHUNK)
            for chunk in range((tl.minimum(M - block * BM, BM) + CHUNK - 1) // CHUNK):
                source = held + chunk * (BN * CHUNK) + n + c[None, :]
                total = tl.zeros((BN, CHUNK), tl.float32)
                for each in tl.static_range(SPLIT):
                    parts = source + each * (BN * WIDTH)
                    total += tl.load(parts, mask=c[None, :] < BM, other=0.0, cache_modifier=".cg")
                finish(
                    total, tile, block * BM + chunk * CHUNK + c, M, N, BN, CHUNK,
                    in_stats, colsum, bias, y, residual, weight, out_stats,
                    NORM, IN_WIDTH, IN_TILE, EPS, KIND, ACTIVATION, STRIDE, Y_STRIDE,
                )  # fmt: skip
            if SPLIT > 1:
                tl.store(counters + place, 0)


NORMS = {None: NO_NORM.value, "rms": RMS_NORM.value, "layer": LAYER_NORM.value}


def arguments(
    operand: Operand,
    rows: int,
    output: Output,
    tile: Tile,
    workspace: Workspace,
    bias: Tensor | None,
    colsum: Tensor | None,
    pdl: bool,
) -> dict[str, Any]:
    """What every kernel that ends in `gather_parts` is launched with, whatever its weight is."""
    held: dict[str, Any] = {
        "partial": workspace.partial,
        "counters": workspace.counters,
        "bias": bias,
        "colsum": colsum,
        "M": rows,
        "SPLIT": tile.split,
        "PDL": pdl,
        "num_warps": tile.warps,
        "launch_pdl": pdl,
        "in_stats": operand.stats,
        "NORM": NORMS[operand.norm],
        "IN_TILE": operand.tile,
        "EPS": operand.eps,
        "residual": None,
        "weight": None,
        "out_stats": None,
        "ACTIVATION": 0,
        "STRIDE": operand.stats.stride(1),
        "Y_STRIDE": 0,
    }
    if isinstance(output, Store):
        y = output.y[:, output.column :]
        return held | {"y": y, "Y_STRIDE": output.y.stride(0), "KIND": STORE.value}
    written = {"y": output.operand.values, "out_stats": output.operand.stats}
    if isinstance(output, Residual):
        return held | written | {"residual": output.x, "weight": output.weight, "KIND": RESIDUAL.value}
    kind = GATED.value if output.gated else ACTIVATE.value
    return held | written | {"KIND": kind, "ACTIVATION": ACTIVATIONS[output.kind]}


def make_operand(rows: int, width: int, tile: int, dtype: torch.dtype, device: torch.device) -> Operand:
    """Room for `rows` rows; `tile`: columns that the kernel that writes it handles at a time."""
    values = torch.zeros(rows, width, dtype=dtype, device=device)
    return Operand(values, torch.zeros(3, -(-width // tile), rows, device=device), tile)
