"""Causal attention of a chunk of a prompt over the paged cache, which holds the chunk already."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.attention_decode import FLOOR, VALUE_SHIFT, _capped
from nybble_kernels.triton.common import dot, launch_dependents, wait
from nybble_kernels.triton.rotary import code_limit, narrowed, unpacked, words

QUERIES = 128  # rows of a program: keys are fetched half as often as with 64
CODED_QUERIES = 64  # with a cache of codes: unpacking them takes the registers that 128 rows would need
TILE = 64  # keys a step
WARPS = 8
STAGES = 3
REGISTERS = (
    248  # all there are for one program a multiprocessor: left alone, the compiler may stop at 128 and spill
)


@triton.jit(do_not_specialize=["start", "count", "tokens"])
def _attention_prefill(
    query,
    kv,
    scales,
    table,
    out,
    start,
    count,
    tokens,
    scale,
    softcap,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    LIMIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    launch_dependents(PDL)
    # The longest rows first: what is left at the end is short.
    stored = kv.dtype.element_ty
    operand = tl.float16 if LIMIT > 0 else stored  # cached numbers are multiplied as they are
    EW: tl.constexpr = E // 4 if LIMIT > 0 else E  # numbers of a vector as it is read
    EWP: tl.constexpr = EP // 4 if LIMIT > 0 else EP
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    group = head // (H // G)
    token = chunk * QUERIES + tl.arange(0, QUERIES)
    row = start + token
    column = tl.arange(0, EP)[None, :]
    place = token[:, None].to(tl.int64) * (H * E) + head * E + column
    inside = (token[:, None] < count) & (column < E)
    q = tl.load(query + place, mask=inside, other=0.0)
    q = narrowed(q.to(tl.float32), operand)

    # Tiles begin at multiples of TILE of the sequence: a row meets the same ones in the same order in any
    # chunk, and those that are hidden from it change nothing (weights 0, maximum kept).
    length = start + tl.minimum(count, chunk * QUERIES + QUERIES)
    first = tl.maximum(start + chunk * QUERIES - WINDOW + 1, 0) // TILE if WINDOW > 0 else 0
    last = tl.where(chunk * QUERIES < count, (length + TILE - 1) // TILE, first)
    peak = tl.full((QUERIES,), FLOOR, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, EP), tl.float32)
    slots = tl.arange(0, TILE)
    lane = tl.arange(0, EWP)[None, :]
    read = words(kv) if LIMIT > 0 else kv  # plain numbers go to shared memory as they are
    for tile in tl.range(first, last, num_stages=STAGES):
        position = tile * TILE + slots
        live = position < length
        block = tl.load(table + position // BLOCK, mask=live, other=0)
        vector = (block * (2 * BLOCK) + position % BLOCK) * G + group
        source = read + vector[:, None].to(tl.int64) * EW + lane
        held = live[:, None] & (lane < EW)
        key = tl.load(source, mask=held, other=0.0)
        value = tl.load(source + BLOCK * G * EW, mask=held, other=0.0)
        if LIMIT > 0:
            key, value = unpacked(key, stored), unpacked(value, stored)
        score = dot(q, tl.trans(key), tl.zeros((QUERIES, TILE), tl.float32))
        if LIMIT > 0:
            score *= tl.load(scales + vector, mask=live, other=0.0)[None, :]
        score = _capped(score * scale, softcap)
        seen = position[None, :] <= row[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] > row[:, None] - WINDOW)
        score = tl.where(seen & live[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        keep = tl.exp2(peak - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        if LIMIT > 0:
            shift = tl.load(scales + vector + BLOCK * G, mask=live, other=0.0) * VALUE_SHIFT
            weight *= shift[None, :]
        mixed = dot(narrowed(weight, operand), value, mixed * keep[:, None])
        peak = higher
    share = (1.0 / VALUE_SHIFT if LIMIT > 0 else 1.0) / tl.where(total > 0.0, total, 1.0)
    share = tl.where(token < count, share, 0.0)
    result = narrowed(mixed * share[:, None], out.dtype.element_ty)
    tl.store(out + place, result, mask=(token[:, None] < tokens) & (column < E))


def attention_prefill(
    query: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    table: Tensor,
    *,
    start: int,
    count: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
    pdl: bool = False,
) -> None:
    """o = softmax(q kᵀ · scale) v of T tokens of one sequence at positions [start, start + count).

    Scores are capped, softcap · tanh(s / softcap), where a cap is given; a row sees the positions up to its
    own, with `window` only the last `window` of them. A row's bits depend on its position and what the cache
    holds up to there, not on the chunk it comes in. Rows from `count` on are padding: zeros.
    After FlashAttention-2 (Dao 2023).

    query, out: [T, H · E], float16 or bfloat16; kv: [blocks, 2, block_size, G, E] of one layer, holding
    positions [0, start + count), float16, bfloat16, or int8 or float8_e4m3fn codes with scales float32
    [blocks, 2, block_size, G]; table: int32 [W].
    """
    tokens = query.shape[0]
    block_size, kv_heads, width = kv.shape[2:]
    heads = out.shape[1] // width
    assert kv.is_contiguous() and query.is_contiguous() and out.is_contiguous()
    limit = code_limit(kv)
    queries = CODED_QUERIES if limit else QUERIES
    launch: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _attention_prefill[(triton.cdiv(tokens, queries), heads)](
        query, kv, scales, table, out, start, count, tokens, scale, softcap,
        H=heads, G=kv_heads, E=width, EP=triton.next_power_of_2(width), BLOCK=block_size, QUERIES=queries,
        TILE=TILE, WINDOW=window or 0, LIMIT=limit, STAGES=STAGES, PDL=pdl, num_warps=WARPS,
        maxnreg=REGISTERS, **launch,
    )  # fmt: skip
