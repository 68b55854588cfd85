"""Attention of a decode step: norm, rotary, cache write, split-KV attention and the merge, in one launch.

What may be read before `wait`: the kernel before this one let its dependents start only after its own wait,
so when this one starts, everything up to the kernel before that has ended and its stores are seen. What the
last kernel, the projection, writes is `qkv` alone. Positions, tables, norms, angles and the cache below
`positions` were written earlier, so the first tile of keys and values is fetched before the wait; `.cg` loads
pass by the L1 cache, which may hold lines of an earlier kernel. All that is written comes after the wait.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import dot, launch_dependents, wait
from nybble_kernels.triton.rotary import code_limit, encoded, narrowed, turned, unpacked, words

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(
    -1e30
)  # a maximum over nothing: below every score, and its difference to itself is no NaN
VALUE_SHIFT = tl.constexpr(256.0)  # keeps weight · scale of a value out of float16's subnormal numbers
MIN_TILES = 2  # a split with less to read costs more in the merge than it saves in the loop
WARPS = 8
REGISTERS = 128  # two programs a multiprocessor


def default_splits(kv_heads: int, sm_count: int) -> int:
    """A power of two that gives each multiprocessor at most two programs at batch 1, 32 at most.

    A program keeps a tile of keys and one of values in flight, 32 KiB at a head of 128 in float16. Two are
    64 KiB, twice what 4.8 TB/s and 0.8 µs of latency ask of each of 132 multiprocessors (29 KB, computed).
    """
    splits = 1
    while splits < 32 and splits * 2 * kv_heads <= 2 * sm_count:
        splits *= 2
    return splits


def workspace_floats(rows: int, heads: int, head_dim: int, splits: int) -> int:
    """float32 numbers of `workspace`: per row, head and split, the mixed values, the maximum and the sum."""
    return rows * heads * splits * (head_dim + 4)


def counter_ints(rows: int, kv_heads: int) -> int:
    """int32 numbers of `counters`, zero before the first launch; each launch leaves them zero."""
    return rows * kv_heads


@triton.jit
def _live(place, first, until):
    """Which positions are to be read: in the window, older than the new token, in the split."""
    return (place >= first) & (place < until)


@triton.jit
def _blocks(table, place, first, until, BLOCK: tl.constexpr):
    """The blocks that hold positions, 0 for those that are not to be read."""
    return tl.load(table + place // BLOCK, mask=_live(place, first, until), other=0)


@triton.jit
def _vectors(blocks, place, group, G: tl.constexpr, BLOCK: tl.constexpr):
    """Index of the key vector of each position; its value is BLOCK · G vectors further."""
    return (blocks * (2 * BLOCK) + place % BLOCK) * G + group


@triton.jit
def _tile(base, vectors, live, E: tl.constexpr, EP: tl.constexpr):
    """Whole vectors in a last axis of EP, zeros where they are not live. `.cg`: nothing is read twice."""
    column = tl.arange(0, EP)
    mask = tl.expand_dims(live, -1)
    if EP != E:
        mask = mask & (column < E)
    return tl.load(
        base + tl.expand_dims(vectors, -1).to(tl.int64) * E + column,
        mask=mask,
        other=0.0,
        cache_modifier=".cg",
    )


@triton.jit
def _capped(score, softcap):
    """Scores in units of log 2, after cap · tanh(score / cap) where there is a cap."""
    if softcap is not None:
        score = softcap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E / softcap)) + 1.0))
    return score * LOG2E


@triton.jit
def _merge(
    parts,
    target,
    active,
    rescale,
    R: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    RQ: tl.constexpr,
    EC: tl.constexpr,
):
    """Σ 2^(mᵢ - m) · partᵢ / Σ 2^(mᵢ - m) · lᵢ over the active splits i, of the R heads of a group."""
    split = tl.arange(0, SP)[:, None]
    head = tl.arange(0, RQ)
    live = (split < active) & (head < R)[None, :]
    index = split * R + head[None, :]
    stats = parts + SPLITS * R * E + index
    peak = tl.load(stats, mask=live, other=FLOOR, cache_modifier=".cg")
    total = tl.load(stats + SPLITS * R, mask=live, other=0.0, cache_modifier=".cg")
    weight = tl.exp2(peak - tl.max(peak, axis=0)[None, :])
    total = tl.sum(weight * total, axis=0)
    weight = weight * (rescale / tl.where(head < R, total, 1.0))[None, :]
    for start in tl.static_range(0, EP, EC):
        column = start + tl.arange(0, EC)
        inside = live[:, :, None] & (column < E)[None, None, :]
        part = tl.load(
            parts + index[:, :, None] * E + column[None, None, :],
            mask=inside,
            other=0.0,
            cache_modifier=".cg",
        )
        mixed = tl.sum(part * weight[:, :, None], axis=0)
        inside = (head < R)[:, None] & (column < E)[None, :]
        tl.store(
            target + head[:, None] * E + column[None, :],
            narrowed(mixed, target.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def _attention_decode(
    qkv,
    kv,
    scales,
    positions,
    tables,
    table_stride,
    cos,
    sin,
    q_norm,
    k_norm,
    out,
    workspace,
    counters,
    eps,
    scale,
    softcap,
    R: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    RP: tl.constexpr,
    RQ: tl.constexpr,
    EC: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    LIMIT: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(0)
    group = tl.program_id(1)
    row = tl.program_id(2)
    stored = kv.dtype.element_ty
    EW: tl.constexpr = E * stored.primitive_bitwidth // 32  # words of a vector
    EWP: tl.constexpr = EP * stored.primitive_bitwidth // 32
    operand = tl.float16 if LIMIT > 0 else stored  # cached numbers are multiplied as they are
    column = tl.arange(0, EP)[None, :]

    # The range [first, old] in tiles, the new token's among them, dealt evenly to the active splits.
    position = tl.load(positions + row)
    old = tl.maximum(position, 0)
    first = tl.maximum(old - WINDOW + 1, 0) if WINDOW > 0 else 0
    lowest = first // TILE
    tiles = old // TILE - lowest + 1
    active = tl.minimum((tiles + MIN_TILES - 1) // MIN_TILES, SPLITS)
    begin = lowest + tiles * split // active
    end = tl.where(split < active, lowest + tiles * (split + 1) // active, begin)
    until = tl.minimum(old, end * TILE)
    owner = (split == active - 1) & (position >= 0)  # of the new token

    table = tables + row * table_stride
    values = BLOCK * G  # vectors from a key to its value
    place = begin * TILE + tl.arange(0, TILE)
    vectors = _vectors(_blocks(table, place, first, until, BLOCK), place, group, G, BLOCK)
    live = _live(place, first, until)
    read = words(kv)
    key = _tile(read, vectors, live, EW, EWP)
    value = _tile(read + values * EW, vectors, live, EW, EWP)
    if LIMIT > 0:
        key_scale = tl.load(scales + vectors, mask=live, other=0.0, cache_modifier=".cg")
        value_scale = tl.load(scales + values + vectors, mask=live, other=0.0, cache_modifier=".cg")
    place += TILE
    ahead = _blocks(table, place, first, until, BLOCK)
    if cos is not None:
        cos += old * (E // 2)
        sin += old * (E // 2)

    wait(PDL)
    launch_dependents(PDL)

    projected = qkv + row * ((R + 2) * G * E)
    head = tl.arange(0, RP)
    one = tl.arange(0, 1)[:, None]
    query = projected + (group * R + head[:, None]) * E
    query = narrowed(turned(query, head[:, None] < R, q_norm, eps, cos, sin, E, EP), operand)
    new_key = turned(projected + (R * G + group) * E + one, one == 0, k_norm, eps, cos, sin, E, EP)
    new_value = tl.load(projected + ((R + 1) * G + group) * E + column, mask=column < E, other=0.0)
    new_key, new_key_scale = encoded(new_key, LIMIT, stored)
    new_value, new_value_scale = encoded(new_value, LIMIT, stored)
    if owner:
        block = tl.load(table + old // BLOCK).to(tl.int64)
        vector = (block * (2 * BLOCK) + old % BLOCK) * G + group
        tl.store(kv + vector * E + column, new_key, mask=column < E)
        tl.store(kv + (vector + values) * E + column, new_value, mask=column < E)
        if LIMIT > 0:
            tl.store(scales + vector + tl.arange(0, 1), new_key_scale)
            tl.store(scales + vector + values + tl.arange(0, 1), new_value_scale)

    # The new token first, from the numbers that were stored; then the tiles.
    new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * new_key_scale
    new_score = _capped(new_score * scale, softcap)
    new_value = new_value.to(tl.float32) * new_value_scale[:, None]
    if LIMIT > 0:
        new_value *= VALUE_SHIFT
    if RP == 1:  # no tensor cores: every slot of a tile keeps its own softmax, and no warp waits for another
        mine = tl.arange(0, SLOTS) == tl.where(owner, 0, -1)
        peak = tl.where(mine, new_score, FLOOR)
        total = tl.where(mine, 1.0, 0.0)
        mixed = tl.where(mine[:, None], new_value, 0.0)
        wide = query.to(tl.float32)
    else:
        mine = head >= tl.where(owner, 0, RP)
        peak = tl.where(mine, new_score, FLOOR)
        total = tl.where(mine, 1.0, 0.0)
        mixed = tl.where(mine[:, None], new_value, 0.0)

    for _ in range(begin, end):
        # Each half of the next tile is asked for as soon as that half of this one is used up.
        vectors = _vectors(ahead, place, group, G, BLOCK)
        next_live = _live(place, first, until)
        place += TILE
        ahead = _blocks(table, place, first, until, BLOCK)
        if RP == 1:
            score = tl.sum(wide * unpacked(key, stored).to(tl.float32), axis=1)
        else:
            score = dot(query, tl.trans(unpacked(key, stored)), tl.zeros((RP, TILE), tl.float32))
        key = _tile(read, vectors, next_live, EW, EWP)
        if LIMIT > 0:
            score *= key_scale
            key_scale = tl.load(scales + vectors, mask=next_live, other=0.0, cache_modifier=".cg")
        score = tl.where(live, _capped(score * scale, softcap), float("-inf"))
        if RP == 1:
            slotted = tl.reshape(score, (TILE // SLOTS, SLOTS))
            higher = tl.maximum(peak, tl.max(slotted, axis=0))
            weight = tl.exp2(slotted - higher[None, :])
            added = tl.sum(weight, axis=0)
            weight = tl.reshape(weight, (TILE,))
        else:
            higher = tl.maximum(peak, tl.max(score, axis=1))
            weight = tl.exp2(score - higher[:, None])
            added = tl.sum(weight, axis=1)
        keep = tl.exp2(peak - higher)
        total = total * keep + added
        if LIMIT > 0:
            weight *= value_scale * VALUE_SHIFT
            value_scale = tl.load(scales + values + vectors, mask=next_live, other=0.0, cache_modifier=".cg")
        if RP == 1:
            terms = tl.reshape(
                weight[:, None] * unpacked(value, stored).to(tl.float32), (TILE // SLOTS, SLOTS, EP)
            )
            mixed = mixed * keep[:, None] + tl.sum(terms, axis=0)
        else:
            mixed = dot(narrowed(weight, operand), unpacked(value, stored), mixed * keep[:, None])
        value = _tile(read + values * EW, vectors, next_live, EW, EWP)
        peak = higher
        live = next_live

    if RP == 1:
        highest = tl.max(peak, axis=0, keep_dims=True)
        weight = tl.exp2(peak - highest)
        peak = highest
        total = tl.sum(total * weight, axis=0, keep_dims=True)
        mixed = tl.sum(mixed * weight[:, None], axis=0, keep_dims=True)

    inside = (head < R)[:, None] & (column < E)
    target = out + (row * G + group) * (R * E)
    rescale = 1.0 / VALUE_SHIFT if LIMIT > 0 else 1.0
    if active == 1:
        if split == 0:
            share = rescale / tl.where(total > 0.0, total, 1.0)
            tl.store(
                target + head[:, None] * E + column,
                narrowed(mixed * share[:, None], out.dtype.element_ty),
                mask=inside,
            )
    elif split < active:
        parts = workspace + (row * G + group).to(tl.int64) * (SPLITS * R * (E + 4))
        index = split * R + head
        tl.store(parts + index[:, None] * E + column, mixed, mask=inside)
        tl.store(parts + SPLITS * R * E + index, peak, mask=head < R)
        tl.store(parts + SPLITS * R * (E + 1) + index, total, mask=head < R)
        tl.debug_barrier()
        counter = counters + row * G + group
        if tl.atomic_add(counter, 1, sem="acq_rel") == active - 1:
            _merge(parts, target, active, rescale, R, E, EP, SPLITS, SP, RQ, EC)
            tl.store(counter, 0)


def attention_decode(
    qkv: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    positions: Tensor,
    tables: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    eps: float,
    scale: float,
    window: int | None,
    softcap: float | None,
    splits: int,
    out: Tensor,
    workspace: Tensor,
    counters: Tensor,
    pdl: bool = False,
) -> None:
    """o = softmax(q kᵀ · scale) v for the one new token of each of B rows, which is stored on the way.

    Scores are capped, softcap · tanh(s / softcap), where a cap is given; with `window`, a row sees itself and
    the `window - 1` positions before it. A row whose position is negative is idle: zeros, nothing is stored.
    Split-KV with a merge by the last program to arrive, after Flash-Decoding (Dao et al. 2023). How a row is
    cut depends on its own position and `splits` alone, so its bits do not depend on the rest of the batch.

    qkv: float32 [B, (H + 2G) · E]; kv: [blocks, 2, block_size, G, E] of one layer, float16, bfloat16, or int8
    or float8_e4m3fn codes with scales float32 [blocks, 2, block_size, G]; positions: int32 [B]; tables: int32
    [B, W]; cos, sin: float32 [P, E/2]; q_norm, k_norm: [E]; out: [B, H · E], float16 or bfloat16; workspace,
    counters: see `workspace_floats`, `counter_ints`.
    """
    rows = qkv.shape[0]
    block_size, kv_heads, width = kv.shape[2:]
    heads = out.shape[1] // width
    shared = heads // kv_heads
    assert kv.is_contiguous() and qkv.is_contiguous() and out.is_contiguous() and tables.stride(1) == 1
    assert qkv.shape[1] == (heads + 2 * kv_heads) * width and block_size % 16 == 0
    assert workspace.numel() >= workspace_floats(rows, heads, width, splits)
    launch: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _attention_decode[(splits, kv_heads, rows)](
        qkv, kv, scales, positions, tables, tables.stride(0), cos, sin, q_norm, k_norm, out, workspace,
        counters, eps, scale, softcap,
        **_constants(shared, kv_heads, width, block_size, window, splits, kv),
        PDL=pdl, num_warps=WARPS, num_stages=1, maxnreg=REGISTERS, **launch,
    )  # fmt: skip


def _constants(
    shared: int, kv_heads: int, width: int, block_size: int, window: int | None, splits: int, kv: Tensor
) -> dict[str, Any]:
    padded = triton.next_power_of_2(width)
    heads = triton.next_power_of_2(shared)
    # 32 numbers of a tile of keys a thread; as many slots as one 16-byte load of all threads covers.
    tile = min(128, WARPS * 32 * 32 // padded)
    padded_splits = triton.next_power_of_2(splits)
    return {
        "R": shared,
        "G": kv_heads,
        "E": width,
        "EP": padded,
        "RP": 1 if shared == 1 else max(16, heads),
        "RQ": heads,
        "EC": max(16, min(padded, 8192 // (padded_splits * heads))),
        "BLOCK": block_size,
        "TILE": tile,
        "SLOTS": min(tile, WARPS * 32 * 16 // (padded * kv.element_size())),
        "WINDOW": window or 0,
        "LIMIT": code_limit(kv),
        "SPLITS": splits,
        "SP": padded_splits,
        "MIN_TILES": MIN_TILES,
    }
