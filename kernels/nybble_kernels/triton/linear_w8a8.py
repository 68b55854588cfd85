"""linear_w8a8: y = x Wᵀ with factors of one byte, int8 with int32 sums or float8 (E4M3) with float32 sums.

x is quantized on the way in, by the largest |u| of its row, which the kernel before left in the statistics,
or in steps of a static scale; or it comes quantized (`quantize`), as it should above 16 rows, where each tile
of outputs would do that again at the cost of the product itself. Two ways to multiply:

    columns = 1    one row, int8: words go from memory to registers and through `dp4a`, four products each
    otherwise      tensor cores, the weight as the left factor, `stages` tiles on their way to shared memory

Sums of int8 are exact within a part of K, and parts are added in order: both ways give the same bits. A row's
scales commute with the matrix as a norm's do (see `epilogue`). A GPU that does not multiply float8 (sm_80)
gets 16-bit floats of the same values, and x as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import INTERPRETED, dot, launch_dependents, tile_and_block, wait
from nybble_kernels.triton.epilogue import Operand, Output, arguments, gather_parts
from nybble_kernels.triton.linear_f16 import prefetch_rows
from nybble_kernels.triton.packing8 import Packed8
from nybble_kernels.triton.quantize import ROUND, QuantizedOperand, encoded, scales_of
from nybble_kernels.triton.tiles import Tile, Workspace

UNIT = tl.constexpr(256)  # inputs; parts of K are whole units
STEP = 128  # inputs of a tile, times `unroll`
FLOATS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}


@triton.jit
def byte(w, shift: tl.constexpr):
    """The signed byte at `shift`."""
    return (w << (24 - shift)) >> 24


@triton.jit
def dp4a(w, x, acc):
    """acc + Σ of the products of four signed bytes."""
    if INTERPRETED:
        for shift in tl.static_range(0, 32, 8):
            acc += byte(w, shift) * byte(x, shift)
        return acc
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def fours(v, BN: tl.constexpr, BW: tl.constexpr):
    """The four words of a lane's 16 bytes, [BN, BW / 4] each: registers renamed, nothing moved."""
    low, high = tl.split(v.reshape(BN, BW // 4, 2, 2))
    a, b = tl.split(low)
    c, d = tl.split(high)
    return a, b, c, d


@triton.jit
def add_words(acc, w, x, BN: tl.constexpr, BW: tl.constexpr):
    """acc [BN, BW / 4] + the products of a tile of words with codes [BW]: four words of a lane, one sum."""
    a, b, c, d = fours(w, BN, BW)
    e, f, g, h = fours(tl.broadcast_to(x[None, :], (BN, BW)), BN, BW)
    return dp4a(d, h, dp4a(c, g, dp4a(b, f, dp4a(a, e, acc))))


@triton.jit
def element(pack, index: tl.constexpr, T: tl.constexpr):
    """One of the four 16-bit floats of an int64, as float32."""
    bits = (pack >> (16 * index)).to(tl.int16)
    if tl.bfloat16 == T:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def code(pack, index: tl.constexpr, inverse, CLIP: tl.constexpr, T: tl.constexpr):
    """round(element · inverse) in the low byte of an int32; the other bytes hold what rounding left."""
    v = element(pack, index, T) * inverse
    if CLIP:
        v = tl.clamp(v, -128.0, 127.0)
    return (v + ROUND).to(tl.int32, bitcast=True)


@triton.jit
def load_codes(x, word, row, inverse, K: tl.constexpr, CLIP: tl.constexpr, T: tl.constexpr):
    """Four codes a word of one row of x: as they are, or made of four 16-bit floats in an int64.

    So few elements that the compiler lets every thread load its own, where it needs them.
    """
    pack = tl.load(x + row * (K // 4) + word, mask=word < K // 4, other=0)
    if tl.int8 == T:
        return pack
    else:
        low = (code(pack, 0, inverse, CLIP, T) & 0xFF) | ((code(pack, 1, inverse, CLIP, T) & 0xFF) << 8)
        high = (code(pack, 2, inverse, CLIP, T) & 0xFF) | (code(pack, 3, inverse, CLIP, T) << 8)
        return low | (high << 16)


@triton.jit
def load_words(rows, word, WORDS: tl.constexpr, BW: tl.constexpr):
    """A tile of four weights a word, 16 bytes a lane, past shared memory."""
    at = rows[:, None] + word[None, :]
    if WORDS % BW == 0:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=word[None, :] < WORDS, other=0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["M", "each"])
def row_kernel(
    x, x_scales, static, words, scales, partial, counters,
    in_stats, colsum, bias, y, residual, weight, out_stats, M, each,
    K: tl.constexpr, N: tl.constexpr, WORDS: tl.constexpr, T: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
    NORM: tl.constexpr, IN_TILE: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr,
    ACTIVATION: tl.constexpr, STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN outputs, part of K of `each` units, row).

    Were `each` a constant, the compiler would unroll the whole loop and its registers would spill.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.program_id(2)
    STEPS: tl.constexpr = (WORDS + BW - 1) // BW
    first = part * each
    last = tl.minimum(first + each, STEPS)
    rows = words + (tile * BN + tl.arange(0, BN)).to(tl.int64) * WORDS
    lane = tl.arange(0, BW)
    w = load_words(rows, tl.minimum(first, STEPS - 1) * BW + lane, WORDS, BW)  # a part may be empty
    wait(PDL)
    launch_dependents(PDL)
    mm = row + tl.arange(0, 1)
    if x_scales is not None:
        scale = tl.load(x_scales + mm)
        inverse = scale
    else:
        scale, inverse = scales_of(in_stats, static, mm, M, STRIDE, K, IN_TILE, NORM, EPS, tl.int8)
    inverse = tl.sum(inverse, 0)  # a number: a tensor would bring its layout into the loop
    acc = tl.zeros((BN, BW // 4), tl.int32)
    for step in tl.range(first, last, loop_unroll_factor=UNROLL):
        ahead = load_words(rows, tl.minimum(step + 1, last - 1) * BW + lane, WORDS, BW)
        codes = load_codes(x, step * BW + lane, row, inverse, K, static is not None, T)
        acc = add_words(acc, w, codes, BN, BW)
        w = ahead
    each_scale = tl.load(scales + tile * BN + tl.arange(0, BN))
    sums = tl.sum(acc, 1).to(tl.float32) * each_scale
    gather_parts(
        sums[:, None] * scale[None, :], partial, counters, tile, row, part, M,
        in_stats, colsum, bias, y, residual, weight, out_stats,
        N, BN, 1, SPLIT, NORM, K, IN_TILE, EPS, KIND, ACTIVATION, STRIDE, Y_STRIDE,
    )  # fmt: skip


@triton.jit
def widened(w, T: tl.constexpr):
    """The bits of E4M3 as 16-bit floats: in float16 they mean 2⁻⁸ of themselves, subnormal numbers too."""
    bits = w.to(tl.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return (bits.to(tl.float16, bitcast=True) * 256.0).to(T)


@triton.jit
def add_tile(acc, w, u, inverse, CLIP: tl.constexpr):
    """acc + w · codes of u, in the way of w's type."""
    T: tl.constexpr = w.dtype
    if tl.uint8 == T:
        return dot(widened(w, u.dtype), u, acc)
    else:
        if u.dtype != T:
            u = encoded(u, inverse[None, :], CLIP, T)
        if tl.int8 == T:
            return tl.dot(w, u, acc, out_dtype=tl.int32)
        elif INTERPRETED:
            return dot(w.to(tl.float32), u.to(tl.float32), acc)
        else:  # tensor cores of sm_90 keep 14 bits of a float8 sum: take it from them in time
            return tl.dot(w, u, acc, max_num_imprecise_acc=128)


@triton.jit(do_not_specialize=["M"])
def kernel(
    x, x_scales, static, matrix, scales, partial, counters,
    in_stats, colsum, bias, y, residual, weight, out_stats, M,
    K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    NORM: tl.constexpr, IN_TILE: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr,
    ACTIVATION: tl.constexpr, STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN outputs, part of K, block of BM rows)."""
    T: tl.constexpr = matrix.dtype.element_ty
    PART: tl.constexpr = (WIDTH + UNIT * SPLIT - 1) // (UNIT * SPLIT) * UNIT
    tile, block = tile_and_block(SPLIT)
    part = tl.program_id(1)
    first = part * PART
    last = tl.minimum(first + PART, WIDTH)
    mm = block * BM + tl.arange(0, BM)
    n = tl.minimum(tile * BN + tl.arange(0, BN), (N + 63) // 64 * 64 - 1)
    rows = matrix + n.to(tl.int64) * WIDTH
    prefetch_rows(rows, first, last, BK, STAGES - 1 if STAGES > 1 else 1, PDL)
    wait(PDL)
    launch_dependents(PDL)
    if tl.uint8 == T:
        scale = tl.full((BM,), 1.0, tl.float32)
        inverse = scale
    elif x_scales is not None:
        scale = tl.load(x_scales + mm, mask=mm < M, other=0.0)
        inverse = scale
    else:
        scale, inverse = scales_of(in_stats, static, mm, M, STRIDE, K, IN_TILE, NORM, EPS, T)
    k = tl.arange(0, BK)
    acc = tl.zeros((BN, BM), tl.int32 if tl.int8 == T else tl.float32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        at = rows[:, None] + (start + k)[None, :]
        if WIDTH % BK == 0:
            w = tl.load(at, eviction_policy="evict_first")
        else:
            w = tl.load(at, mask=(start + k)[None, :] < WIDTH, other=0.0, eviction_policy="evict_first")
        inside = mm[None, :] < M
        if K % BK != 0:
            inside = inside & ((start + k)[:, None] < K)
        u = tl.load(x + (start + k)[:, None] + mm[None, :] * K, mask=inside, other=0.0)
        acc = add_tile(acc, w, u, inverse, static is not None)
    acc = acc.to(tl.float32) * tl.load(scales + n)[:, None] * scale[None, :]
    gather_parts(
        acc, partial, counters, tile, block, part, M,
        in_stats, colsum, bias, y, residual, weight, out_stats,
        N, BN, BM, SPLIT, NORM, K, IN_TILE, EPS, KIND, ACTIVATION, STRIDE, Y_STRIDE,
    )  # fmt: skip


def linear_w8a8(
    operand: Operand | QuantizedOperand,
    rows: int,
    packed: Packed8,
    output: Output,
    tile: Tile,
    workspace: Workspace,
    *,
    bias: Tensor | None = None,
    colsum: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """output(norm(x) Wᵀ + bias) for the first `rows` rows of `operand`. No allocation: it can be captured.

    bias: [N] · colsum: float32 [N], Σₖ W[n, k] · norm weight[k], for a LayerNorm's mean. `tile.unroll` is 1
    or 2: tiles of 128 or 256 inputs; with `columns` of 1, turns of the loop.
    """
    source = operand.source if isinstance(operand, QuantizedOperand) else operand
    static = None if isinstance(operand, QuantizedOperand) else packed.input_scale
    if static is not None and source.norm == "layer":
        raise ValueError("a static scale belongs to the output of a LayerNorm: use norm_quantize")
    if tile.columns == 1:
        _rows(operand, source, static, rows, packed, output, tile, workspace, bias, colsum, pdl)
    else:
        _tiles(operand, source, static, rows, packed, output, tile, workspace, bias, colsum, pdl)


def _rows(
    operand: Operand | QuantizedOperand,
    source: Operand,
    static: float | None,
    rows: int,
    packed: Packed8,
    output: Output,
    tile: Tile,
    workspace: Workspace,
    bias: Tensor | None,
    colsum: Tensor | None,
    pdl: bool,
) -> None:
    """Row by row, with `dp4a`."""
    if packed.values.dtype != torch.int8 or packed.inputs % 4:
        raise ValueError("a tile of one column takes int8 weights and inputs in fours")
    quantized = isinstance(operand, QuantizedOperand)
    words = packed.values.view(torch.int32)
    row_kernel[(-(-packed.outputs // tile.outputs), tile.split, rows)](
        operand.values.view(torch.int32 if quantized else torch.int64),
        operand.scales if isinstance(operand, QuantizedOperand) else None,
        static,
        words,
        packed.scales,
        each=-(-words.shape[1] // (tile.split * UNIT.value // 4)),
        K=packed.inputs,
        N=packed.outputs,
        WORDS=words.shape[1],
        T=FLOATS[operand.values.dtype],
        BN=tile.outputs,
        BW=UNIT.value // 4,
        UNROLL=1 if static is not None else tile.unroll,  # two turns with saturation can spill
        **arguments(source, rows, output, tile, workspace, bias, colsum, pdl),
    )


def _tiles(
    operand: Operand | QuantizedOperand,
    source: Operand,
    static: float | None,
    rows: int,
    packed: Packed8,
    output: Output,
    tile: Tile,
    workspace: Workspace,
    bias: Tensor | None,
    colsum: Tensor | None,
    pdl: bool,
) -> None:
    """Tiles of rows, on tensor cores."""
    kernel[(-(-packed.outputs // tile.outputs), tile.split, -(-rows // tile.columns))](
        operand.values,
        operand.scales if isinstance(operand, QuantizedOperand) else None,
        static,
        packed.values,
        packed.scales,
        K=packed.inputs,
        N=packed.outputs,
        WIDTH=packed.values.shape[1],
        BN=tile.outputs,
        BM=tile.columns,
        BK=STEP * min(tile.unroll, 2),
        STAGES=tile.stages,
        **arguments(source, rows, output, tile, workspace, bias, colsum, pdl),
    )
