"""What happens between projection and attention of a chunk of a prompt: norm, rotation, cache write."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import INTERPRETED, launch_dependents, wait

CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Cache types that hold codes, and the code that a vector's largest magnitude gets."""

# A byte c + 128 under the upper byte 0x64 is the float16 number 1152 + c.
INT8_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 biased, offset, low, high;
    xor.b32 biased, $4, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 low, biased, 0x64646464, 0x4140;
    prmt.b32 high, biased, 0x64646464, 0x4342;
    sub.f16x2 low, low, offset;
    sub.f16x2 high, high, offset;
    mov.b32 {$0, $1}, low;
    mov.b32 {$2, $3}, high;
}""")
FLOAT8_TO_FLOAT16 = tl.constexpr("""{
    .reg .b16 first, second;
    .reg .b32 low, high;
    mov.b32 {first, second}, $4;
    cvt.rn.f16x2.e4m3x2 low, first;
    cvt.rn.f16x2.e4m3x2 high, second;
    mov.b32 {$0, $1}, low;
    mov.b32 {$2, $3}, high;
}""")

TOKENS = 16  # tokens a program turns


def code_limit(kv: Tensor) -> float:
    """The largest code of a quantized cache; 0 for a cache that holds the numbers themselves."""
    return CODES.get(kv.dtype, 0.0)


@triton.jit
def narrowed(x, TYPE: tl.constexpr):
    """float32 as a shorter type, half to even.

    The interpreter's own cast to bfloat16 cuts the low bits off, and the one to float8 loses a carry: there,
    all but the bits to be kept are rounded away first.
    """
    if INTERPRETED and (TYPE.is_bf16() or TYPE.is_fp8e4nv()):
        LOST: tl.constexpr = 16 if TYPE.is_bf16() else 20
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + ((1 << (LOST - 1)) - 1) + ((bits >> LOST) & 1)) & -(1 << LOST)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def words(kv):
    """The cache in words of 32 bits: what a loop carries of it takes a register a word, not one a number."""
    return kv.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def unpacked(read, STORED: tl.constexpr):
    """The numbers in words, [N, C] -> [N, 2C] or [N, 4C]: codes as float16; float32 when interpreted."""
    if STORED.primitive_bitwidth == 16:
        if INTERPRETED:
            a, b = _part(read, 0, STORED), _part(read, 1, STORED)
        else:
            HALVES: tl.constexpr = (tl.int16, tl.int16)
            SPLIT: tl.constexpr = "mov.b32 {$0, $1}, $2;"
            a, b = tl.inline_asm_elementwise(SPLIT, "=h,=h,r", [read], HALVES, is_pure=True, pack=1)
            a, b = a.to(STORED, bitcast=True), b.to(STORED, bitcast=True)
        numbers = tl.join(a, b)
    else:
        if INTERPRETED:
            a, b = _part(read, 0, STORED), _part(read, 1, STORED)
            c, d = _part(read, 2, STORED), _part(read, 3, STORED)
        else:
            FOURS: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
            CODE: tl.constexpr = INT8_TO_FLOAT16 if STORED.is_int8() else FLOAT8_TO_FLOAT16
            a, b, c, d = tl.inline_asm_elementwise(CODE, "=h,=h,=h,=h,r", [read], FOURS, is_pure=True, pack=1)
        numbers = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(numbers, (read.shape[0], read.shape[1] * (32 // STORED.primitive_bitwidth)))


@triton.jit
def _part(read, INDEX: tl.constexpr, STORED: tl.constexpr):
    BITS: tl.constexpr = STORED.primitive_bitwidth
    part = (read >> (BITS * INDEX)).to(tl.int16 if BITS == 16 else tl.int8)
    return part.to(STORED, bitcast=True).to(tl.float32)


@triton.jit
def turned(heads, inside, norm, eps, cos, sin, E: tl.constexpr, EP: tl.constexpr):
    """x / sqrt(mean(x²) + eps) · norm, then the pairs (x[i], x[i + E/2]) rotated; each where given.

    heads: [N, 1] pointers to float32 vectors; cos, sin: [N, 1] or scalar pointers to their positions' rows;
    inside: [N, 1], vectors outside are zeros -> float32 [N, EP], zeros from column E on.
    """
    column = tl.arange(0, EP)[None, :]
    inside = inside & (column < E)
    x = tl.load(heads + column, mask=inside, other=0.0)
    if norm is not None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / E + eps)[:, None]
        x = x * inverse * tl.load(norm + column, mask=column < E, other=0.0)
    if cos is not None:
        partner = (column + E // 2) % E
        y = tl.load(heads + partner, mask=inside, other=0.0)
        if norm is not None:
            y = y * inverse * tl.load(norm + partner, mask=column < E, other=0.0)
        pair = column % (E // 2)
        c = tl.load(cos + pair, mask=inside, other=0.0)
        s = tl.load(sin + pair, mask=inside, other=0.0)
        x = x * c + tl.where(column < E // 2, -y, y) * s
    return x


@triton.jit
def encoded(x, LIMIT: tl.constexpr, STORED: tl.constexpr):
    """(codes, scale) of each row of [N, EP]: the cache stands for codes · scale. LIMIT 0: a cast, scale 1."""
    if LIMIT > 0:
        scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-20) / LIMIT
        code = x / scale[:, None]
        if STORED.is_int8():
            code = (code + 12582912.0) - 12582912.0  # 1.5 · 2²³: what is left is rounded, half to even
        return narrowed(code, STORED), scale
    else:
        return narrowed(x, STORED), tl.full((x.shape[0],), 1.0, tl.float32)


@triton.jit(do_not_specialize=["start", "count", "tokens"])
def _rotary(
    qkv,
    kv,
    scales,
    table,
    cos,
    sin,
    q_norm,
    k_norm,
    out,
    start,
    count,
    tokens,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    real = token < count
    position = tl.where(real, start + token, 0)
    block = tl.load(table + position // BLOCK, mask=real, other=0).to(tl.int64)
    if cos is not None:
        cos += position[:, None] * (E // 2)
        sin += position[:, None] * (E // 2)
    wait(PDL)
    launch_dependents(PDL)
    column = tl.arange(0, EP)[None, :]
    inside = real[:, None] & (column < E)
    source = qkv + token[:, None].to(tl.int64) * ((H + 2 * G) * E) + head * E
    if head < H:
        x = turned(source, real[:, None], q_norm, eps, cos, sin, E, EP)
        target = out + token[:, None].to(tl.int64) * (H * E) + head * E + column
        tl.store(target, narrowed(x, out.dtype.element_ty), mask=(token[:, None] < tokens) & (column < E))
    else:
        kind = (head - H) // G  # 0: a key, 1: a value
        if kind == 0:
            x = turned(source, real[:, None], k_norm, eps, cos, sin, E, EP)
        else:
            x = tl.load(source + column, mask=inside, other=0.0)
        codes, scale = encoded(x, LIMIT, kv.dtype.element_ty)
        vector = ((block * 2 + kind) * BLOCK + position % BLOCK) * G + (head - H - kind * G)
        tl.store(kv + vector[:, None] * E + column, codes, mask=inside)
        if LIMIT > 0:
            tl.store(scales + vector, scale, mask=real)


def rotary(
    qkv: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    table: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    start: int,
    count: int,
    eps: float,
    out: Tensor,
    pdl: bool = False,
) -> None:
    """Queries to `out`, keys and values to the cache: a chunk of one sequence, at [start, start + count).

    Heads are RMS-normed where norms are given, then rotated where tables are; `reference.rotary` is the same
    rotation. Rows from `count` on are padding: zeros in `out`, nothing in the cache.

    qkv: float32 [T, (H + 2G) · E]; kv: [blocks, 2, block_size, G, E] of one layer, float16, bfloat16, or int8
    or float8_e4m3fn codes with scales float32 [blocks, 2, block_size, G]; table: int32 [W]; cos, sin:
    float32 [P, E/2]; q_norm, k_norm: [E]; out: [T, H · E], float16 or bfloat16.
    """
    tokens = qkv.shape[0]
    block_size, kv_heads, width = kv.shape[2:]
    heads = out.shape[1] // width
    assert kv.is_contiguous() and qkv.is_contiguous() and out.is_contiguous()
    assert qkv.shape[1] == (heads + 2 * kv_heads) * width
    launch: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _rotary[(triton.cdiv(tokens, TOKENS), heads + 2 * kv_heads)](
        qkv, kv, scales, table, cos, sin, q_norm, k_norm, out, start, count, tokens, eps,
        H=heads, G=kv_heads, E=width, EP=triton.next_power_of_2(width), BLOCK=block_size, TOKENS=TOKENS,
        LIMIT=code_limit(kv), PDL=pdl, num_warps=4, **launch,
    )  # fmt: skip
