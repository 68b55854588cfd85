"""linear_w4a16: y = x Wᵀ for weights of 2 to 8 bits in groups and 16-bit activations, on tensor cores.

The weight is the left factor, so its 16-byte words go from memory to the registers that multiply (`packing`),
and up to 16 rows of x cost what one costs. A level becomes a 16-bit float by its bits: under 0x6400, a 4-bit
level q is the float16 1024 + q (under 0x4300 the bfloat16 128 + q), and subtracting 1024 + z leaves q - z
exactly (the trick is FasterTransformer's). Scales multiply the float32 sum of their group.

K is cut into `split` parts, summed in order by the part that arrives last: a row's bits depend on the shape
of the weight and on the row, not on the rows beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import INTERPRETED, dot, launch_dependents, tile_and_block, wait
from nybble_kernels.triton.epilogue import Operand, Output, arguments, gather_parts
from nybble_kernels.triton.packing import PackedWeight
from nybble_kernels.triton.tiles import Tile, Workspace

EIGHT_FLOAT16 = tl.constexpr((tl.float16,) * 8)
EIGHT_BFLOAT16 = tl.constexpr((tl.bfloat16,) * 8)
FLOAT16 = tl.constexpr(
    """{
    .reg .b32 a, b, c, d, t;
    lop3.b32 a, $8, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 b, $8, 0x00F000F0, 0x54005400, 0xEA;
    shr.u32 t, $8, 8;
    lop3.b32 c, t, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 d, t, 0x00F000F0, 0x54005400, 0xEA;
    sub.f16x2 a, a, $9;
    sub.f16x2 b, b, $10;
    sub.f16x2 c, c, $9;
    sub.f16x2 d, d, $10;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d;
    }"""
)
BFLOAT16 = tl.constexpr(
    """{
    .reg .b32 a, b, c, d, t, one;
    mov.b32 one, 0x3F803F80;
    lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 t, $8, 4;
    lop3.b32 b, t, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 t, $8, 8;
    lop3.b32 c, t, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 t, $8, 12;
    lop3.b32 d, t, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 a, a, one, $9;
    fma.rn.bf16x2 b, b, one, $10;
    fma.rn.bf16x2 c, c, one, $9;
    fma.rn.bf16x2 d, d, one, $10;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d;
    }"""
)
BYTES = tl.constexpr(
    """{
    .reg .b32 a, b, t;
    lop3.b32 a, $4, 0x00FF00FF, 0x64006400, 0xEA;
    shr.u32 t, $4, 8;
    lop3.b32 b, t, 0x00FF00FF, 0x64006400, 0xEA;
    sub.f16x2 a, a, $5;
    sub.f16x2 b, b, $6;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    }"""
)


@triton.jit
def nibbles(w, low, high, T: tl.constexpr):
    """Elements (j, h, c) of words of 4-bit levels: minus `low` where h = 0, minus `high` where h = 1."""
    if T == tl.float16:  # noqa: SIM300
        a = low * 0x00010001 + 0x64006400
        b = high * 0x00100010 + 0x54005400
        return tl.inline_asm_elementwise(
            FLOAT16,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r",
            [w, a, b],
            dtype=EIGHT_FLOAT16,
            is_pure=True,
            pack=1,
        )
    else:  # the sign bit is set: -(128 + zero)
        a = (low * 0x00010001) | -0x3CFF3D00
        b = (high * 0x00010001) | -0x3CFF3D00
        return tl.inline_asm_elementwise(
            BFLOAT16,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r",
            [w, a, b],
            dtype=EIGHT_BFLOAT16,
            is_pure=True,
            pack=1,
        )


@triton.jit
def bytes_of(w, low, high, T: tl.constexpr):
    """Four elements (j, h) of a word of 8-bit levels, minus their zeros."""
    a = low * 0x00010001 + 0x64006400
    b = high * 0x00010001 + 0x64006400
    p, q, r, s = tl.inline_asm_elementwise(
        BYTES,
        "=h,=h,=h,=h,r,r,r",
        [w, a, b],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=1,
    )
    return p.to(T), q.to(T), r.to(T), s.to(T)  # up to 255: exact in bfloat16 too


@triton.jit
def elements(w, v, low, high, BITS: tl.constexpr, T: tl.constexpr):
    """The plain meaning of the assembly, for the interpreter: [RT, 32, PIECES, 8], the last as (j, h, c)."""
    e = tl.arange(0, 8)
    j, h, c = e // 4, e // 2 % 2, e % 2
    word = w[:, :, :, None]
    if BITS == 4:
        shift = 4 * (2 * c + h) + 16 * j
    else:
        shift = 8 * h + 16 * j
        word = tl.where(c == 0, word, v[:, :, :, None])
    zero = tl.where(h == 0, low[:, :, :, None], high[:, :, :, None])
    return (((word >> shift) & (2**BITS - 1)) - zero).to(tl.float32).to(T)


@triton.jit
def fragment(w, v, low, high, RT: tl.constexpr, PIECES: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """Words [RT, 32, PIECES] of a unit -> levels minus zeros, T [RT · 16, PIECES · 16]; lanes keep theirs."""
    if INTERPRETED:
        each = elements(w, v, low, high, BITS, T)
    else:
        if BITS == 4:
            a, b, c, d, e, f, g, h = nibbles(w, low, high, T)
        else:
            a, b, c, d = bytes_of(w, low, high, T)
            e, f, g, h = bytes_of(v, low, high, T)
        each = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    each = each.reshape(RT, 8, 4, PIECES, 2, 2, 2).permute(0, 5, 1, 3, 6, 2, 4)
    return each.reshape(RT * 16, PIECES * 16)


@triton.jit
def load_words(words, step, PAIR: tl.constexpr, RT: tl.constexpr, BITS: tl.constexpr):
    """Units of a step, [RT, 32, 4] each: (first, its plane 1, second, its plane 1); only 8 bits have planes.

    Read flat, one 16-byte load a lane, and only then seen as lanes: a four-dimensional pointer would be split
    among lanes in another order.
    """
    WORDS: tl.constexpr = 32 * BITS
    at = words + step * (2 * WORDS if PAIR else WORDS)
    w = tl.load(at, eviction_policy="evict_first").reshape(RT, 32, 4)
    v, w2, v2 = w, w, w
    if BITS == 8:
        v = tl.load(at + 128, eviction_policy="evict_first").reshape(RT, 32, 4)
        v2 = v
    if PAIR:
        w2 = tl.load(at + WORDS, eviction_policy="evict_first").reshape(RT, 32, 4)
        v2 = w2
        if BITS == 8:
            v2 = tl.load(at + WORDS + 128, eviction_policy="evict_first").reshape(RT, 32, 4)
    return w, v, w2, v2


@triton.jit
def load_group(
    scales, zeros, group, rows, lanes, N_PADDED: tl.constexpr, CENTER: tl.constexpr, RT: tl.constexpr
):
    """(scales of the rows [RT · 16], zero points of a lane's two rows [RT, 32] twice) of one group."""
    at = group * N_PADDED
    scale = tl.load(scales + at + rows)
    if zeros is None:
        low = tl.full((RT, 32), CENTER, tl.int32)
        high = low
    else:
        low = tl.load(zeros + at + lanes)
        high = tl.load(zeros + at + lanes + 8)
    return scale, low, high


@triton.jit
def load_groups(
    scales, zeros, step, rows, lanes,
    N_PADDED: tl.constexpr, GROUP: tl.constexpr, CENTER: tl.constexpr, RT: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """What `load_group` says of a step's group, and of its second one where groups have 32 inputs."""
    if GROUP == 32:
        s, low, high = load_group(scales, zeros, step * 2, rows, lanes, N_PADDED, CENTER, RT)
        s2, low2, high2 = load_group(scales, zeros, step * 2 + 1, rows, lanes, N_PADDED, CENTER, RT)
    else:
        group = step * (128 if PAIR else 64) // GROUP if GROUP > 0 else 0
        s, low, high = load_group(scales, zeros, group, rows, lanes, N_PADDED, CENTER, RT)
        s2, low2, high2 = s, low, high
    return s, low, high, s2, low2, high2


@triton.jit
def load_rows(x, order, k, mm, M, K: tl.constexpr):
    """Inputs k of rows mm, [len(k), BM]; zero beyond K and M."""
    mask = mm[None, :] < M
    if K % 64 != 0:
        mask = mask & (k[:, None] < K)
    at = k
    if order is not None:
        at = tl.load(order + k, mask=k < K, other=0).to(tl.int32)
    return tl.load(x + at[:, None] + mm[None, :] * K, mask=mask, other=0.0)


@triton.jit
def load_inputs(x, order, step, mm, M, K: tl.constexpr, GROUP: tl.constexpr, PAIR: tl.constexpr):
    """The inputs of a step: of its two units, its two groups of 32, or twice of its one unit."""
    WIDTH: tl.constexpr = 32 if GROUP == 32 else 64
    k = step * (128 if PAIR else 64) + tl.arange(0, WIDTH)
    first = load_rows(x, order, k, mm, M, K)
    second = first
    if PAIR or GROUP == 32:
        second = load_rows(x, order, k + WIDTH, mm, M, K)
    return first, second


@triton.jit
def add_group(acc, p, inputs, scale, minimums, at):
    """acc += scale · p (+ minimum · Σ x)."""
    acc += scale.to(tl.float32)[:, None] * p
    if minimums is not None:
        sums = tl.sum(inputs.to(tl.float32), 0)
        acc += tl.load(minimums + at).to(tl.float32)[:, None] * sums[None, :]
    return acc


@triton.jit
def multiply(
    acc, w, v, w2, v2, x, x2, s, low, high, s2, low2, high2, minimums, step, rows,
    N_PADDED: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    RT: tl.constexpr, BM: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """acc += the product of one step, every group under its scale."""
    T: tl.constexpr = x.dtype
    zero = tl.zeros((RT * 16, BM), tl.float32)
    low, high = low.to(tl.int32)[:, :, None], high.to(tl.int32)[:, :, None]
    if GROUP == 32:
        low2, high2 = low2.to(tl.int32)[:, :, None], high2.to(tl.int32)[:, :, None]
        w, w2 = tl.split(w.reshape(RT, 32, 2, 2).permute(0, 1, 3, 2))
        v, v2 = tl.split(v.reshape(RT, 32, 2, 2).permute(0, 1, 3, 2))
        at = step * 2 * N_PADDED + rows
        acc = add_group(acc, dot(fragment(w, v, low, high, RT, 2, BITS, T), x, zero), x, s, minimums, at)
        p = dot(fragment(w2, v2, low2, high2, RT, 2, BITS, T), x2, zero)
        return add_group(acc, p, x2, s2, minimums, at + N_PADDED)
    else:
        at = (step * (128 if PAIR else 64) // GROUP if GROUP > 0 else 0) * N_PADDED + rows
        p = dot(fragment(w, v, low, high, RT, 4, BITS, T), x, zero)
        if PAIR:
            p = dot(fragment(w2, v2, low, high, RT, 4, BITS, T), x2, p)
            if minimums is not None:
                x = x.to(tl.float32) + x2.to(tl.float32)
        return add_group(acc, p, x, s, minimums, at)


@triton.jit(do_not_specialize=["M"])
def _linear_w4a16(
    x, words, scales, zeros, minimums, order, partial, counters,
    in_stats, colsum, bias, y, residual, weight, out_stats, M,
    K: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr, N_PADDED: tl.constexpr,
    GROUP: tl.constexpr, CENTER: tl.constexpr, BITS: tl.constexpr,
    RT: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
    NORM: tl.constexpr, IN_TILE: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr,
    ACTIVATION: tl.constexpr, STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile of RT · 16 outputs, part of K, block of BM rows). RT equals the number of warps.

    Everything a step needs is loaded while the step before it multiplies: weights, scales and zeros come from
    memory, inputs from the L2, and no multiplication waits for either.
    """
    tile, block = tile_and_block(SPLIT)
    part = tl.program_id(1)
    PAIR: tl.constexpr = UNITS % 2 == 0 and (GROUP == 0 or GROUP % 128 == 0)
    STEPS: tl.constexpr = UNITS // 2 if PAIR else UNITS
    EACH: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    first = part * EACH
    last = tl.minimum(first + EACH, STEPS)
    rt = tl.minimum(tile * RT + tl.arange(0, RT), N_PADDED // 16 - 1)
    rows = tl.minimum(tile * (RT * 16) + tl.arange(0, RT * 16), N_PADDED - 1)
    # One element a thread, so the hint cannot widen a load; it keeps lanes in the order of the words.
    lanes = tl.max_contiguous(rt[:, None] * 16 + (tl.arange(0, 32) // 4)[None, :], [1, 32])
    mm = block * BM + tl.arange(0, BM)
    at = words + rt[:, None] * (UNITS * 32 * BITS) + tl.arange(0, 128)[None, :]
    acc = tl.zeros((RT * 16, BM), tl.float32)
    start = tl.minimum(first, STEPS - 1)  # a part may be empty
    w, v, w2, v2 = load_words(at, start, PAIR, RT, BITS)
    s, low, high, s2, low2, high2 = load_groups(
        scales, zeros, start, rows, lanes, N_PADDED, GROUP, CENTER, RT, PAIR
    )
    wait(PDL)
    launch_dependents(PDL)
    inputs, inputs2 = load_inputs(x, order, start, mm, M, K, GROUP, PAIR)
    for step in tl.range(first, last, loop_unroll_factor=UNROLL):
        ahead = tl.minimum(step + 1, last - 1)
        nw, nv, nw2, nv2 = load_words(at, ahead, PAIR, RT, BITS)
        ns, nlow, nhigh, ns2, nlow2, nhigh2 = load_groups(
            scales, zeros, ahead, rows, lanes, N_PADDED, GROUP, CENTER, RT, PAIR
        )
        ninputs, ninputs2 = load_inputs(x, order, ahead, mm, M, K, GROUP, PAIR)
        acc = multiply(
            acc, w, v, w2, v2, inputs, inputs2, s, low, high, s2, low2, high2, minimums, step, rows,
            N_PADDED, GROUP, BITS, RT, BM, PAIR,
        )  # fmt: skip
        w, v, w2, v2 = nw, nv, nw2, nv2
        s, low, high, s2, low2, high2 = ns, nlow, nhigh, ns2, nlow2, nhigh2
        inputs, inputs2 = ninputs, ninputs2
    gather_parts(
        acc, partial, counters, tile, block, part, M,
        in_stats, colsum, bias, y, residual, weight, out_stats,
        N, RT * 16, BM, SPLIT, NORM, K, IN_TILE, EPS, KIND, ACTIVATION, STRIDE, Y_STRIDE,
    )  # fmt: skip


def linear_w4a16(
    operand: Operand,
    rows: int,
    packed: PackedWeight,
    output: Output,
    tile: Tile,
    workspace: Workspace,
    *,
    bias: Tensor | None = None,
    colsum: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """output(norm(x) Wᵀ + bias) for the first `rows` rows of `operand`. No allocation: it can be captured.

    bias: [N] · colsum: float32 [N], Σₖ W[n, k] · norm weight[k], for a LayerNorm's mean.
    """
    tiles = -(-packed.outputs // (16 * tile.warps))
    _linear_w4a16[(tiles, tile.split, -(-rows // tile.columns))](
        operand.values,
        packed.words,
        packed.scales,
        packed.zeros,
        packed.minimums,
        packed.order,
        K=packed.inputs,
        N=packed.outputs,
        UNITS=packed.words.shape[1],
        N_PADDED=packed.scales.shape[1],
        GROUP=packed.group_size,
        CENTER=packed.center,
        BITS=packed.bits,
        RT=tile.warps,
        BM=tile.columns,
        UNROLL=tile.unroll,
        **arguments(operand, rows, output, tile, workspace, bias, colsum, pdl),
        num_stages=tile.stages,
    )
