"""Logits to the next token of every row, on the device, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import launch_dependents, wait
from nybble_kernels.triton.sample_state import PROMPT, SLOT, STOP, USES_BIAS, USES_COUNTS, SampleState

WARPS = 16


def _word(name: str) -> tl.constexpr:
    assert SLOT.fields is not None
    return tl.constexpr(SLOT.fields[name][1] // 4)


_TEMPERATURE, _TOP_P, _MIN_P, _TOP_K = (_word(n) for n in ("temperature", "top_p", "min_p", "top_k"))
_REPETITION, _FREQUENCY, _PRESENCE = (_word(n) for n in ("repetition", "frequency", "presence"))
_MIN_TOKENS, _FLAGS, _GENERATED = (_word(n) for n in ("min_tokens", "flags", "generated"))
_SEED_LOW, _SEED_HIGH = _word("seed_low"), _word("seed_high")
_USES_BIAS, _USES_COUNTS = tl.constexpr(USES_BIAS), tl.constexpr(USES_COUNTS)
_STOP, _PROMPT, _TIMES = tl.constexpr(STOP), tl.constexpr(PROMPT), tl.constexpr(STOP - 1)
_INF = tl.constexpr(float("inf"))
_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4e38)
_TURNS = tl.constexpr(
    1000
)  # rounds get by with a few dozen at worst; a device must not hang whatever it is given
_FLOOR = tl.constexpr(144.0)  # a weight of 2^-144 is no mass at all in float32


def sample(
    logits: Tensor, slots: Tensor, state: SampleState, out: Tensor, place: Tensor, *, pdl: bool = False
) -> None:
    """Draw row b's next token with the settings of slot `slots[b]`, and move that slot on by a token.

    logits: float32 [B, V], rows any stride apart, not changed. slots: int32 [B], no slot twice; a negative
    one leaves its row alone. place: int32 [1]. Written: out int32 [places, >= B], where `out[place, b]` is
    the token, or -1 for a row with NaN or without a finite maximum; `state.tokens[slot]`, the token (0 then);
    the slot's number of generated tokens and, where penalties need them, its counts.

    Order of operations, l being the logits and c the times a token was generated so far:
        l += bias
        l = (l / r if l > 0 else l r) - frequency c - presence [c > 0], for tokens in the prompt or since
        l = -inf, for stop tokens while fewer than min_tokens are generated
        temperature 0: the largest l, lowest id among equals. Else w = exp((l - max l) / temperature), and
        top-k keeps the k likeliest, top-p of those (order: l downwards, lowest id first among equals) the
        shortest beginning that holds top_p of their mass, min-p of those the tokens with w >= min_p.
    Then a draw in proportion to w: a function of the row's l, its settings, the seed and the number of tokens
    generated, and of nothing else.

    Nothing is sorted. Every kept set is a beginning of that order, so a token is drawn by inverse transform
    from all that come before a limit (at first: from all), and kept if the number and the mass of the tokens
    before it allow that; else it is the limit of the next round. This is exact rejection sampling: a round
    keeps its draw with probability mass(kept) / mass(before the limit), and else halves the latter on average
    (the idea is FlashInfer's, Ye et al. 2025, arXiv 2501.01005). Uniforms: Philox(seed; generated, round).
    """
    rows = logits.shape[0]
    sample_kernel[(state.tiles, rows)](
        logits,
        slots,
        state.settings,
        state.counts,
        state.bias,
        state.tokens,
        out,
        place,
        state.partials,
        state.best,
        state.counters,
        state.vocabulary,
        logits.stride(0),
        out.stride(0),
        TILES=state.tiles,
        PAD=max(triton.next_power_of_2(state.tiles), 2),
        BLOCK=state.block,
        PDL=pdl,
        num_warps=WARPS,
        launch_pdl=pdl,
    )


@triton.jit
def sample_kernel(
    logits,
    slots,
    settings,
    counts,
    bias,
    tokens,
    out,
    place,
    partials,
    best,
    counters,
    vocabulary,
    logits_stride,
    out_stride,
    TILES: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles, rows): every program sums up its tile, the last one of a row draws."""
    tile = tl.program_id(0)
    row = tl.program_id(1)
    wait(PDL)
    launch_dependents(PDL)
    slot = tl.load(slots + row)
    if slot >= 0:
        logits += row.to(tl.int64) * logits_stride
        counts += slot.to(tl.int64) * vocabulary
        bias += slot.to(tl.int64) * vocabulary
        settings += slot * 16
        partials += row * (3 * TILES)
        best += row * TILES
        _summarise(logits, counts, bias, settings, partials, best, tile, vocabulary, TILES, BLOCK)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + row, 1, sem="acq_rel")
        if arrived == TILES - 1:
            token = _choose(logits, counts, bias, settings, partials, best, vocabulary, TILES, PAD, BLOCK)
            tl.store(counters + row, 0)
            tl.store(out + tl.load(place).to(tl.int64) * out_stride + row, token)
            drawn = tl.maximum(token, 0)
            tl.store(tokens + slot, drawn)
            tl.store(settings + _GENERATED, tl.load(settings + _GENERATED) + 1)
            if tl.load(settings + _FLAGS) & _USES_COUNTS:
                tl.store(counts + drawn, tl.load(counts + drawn) + 1)


@triton.jit
def _real(settings, WORD: tl.constexpr):
    return tl.load(settings + WORD).to(tl.float32, bitcast=True)


@triton.jit
def _scale(settings):
    """exp2(scale (l - max)) is the weight of l."""
    return _LOG2E / tl.maximum(_real(settings, _TEMPERATURE), 1e-5)


@triton.jit
def _adjust(x, counts, bias, settings, columns, vocabulary):
    """Logits of these columns after bias, penalties and muting; -inf past the end."""
    flags = tl.load(settings + _FLAGS)
    inside = columns < vocabulary
    if flags & _USES_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0)
    if flags & _USES_COUNTS:
        marks = tl.load(counts + columns, mask=inside, other=0)
        times = (marks & _TIMES).to(tl.float32)
        repetition = _real(settings, _REPETITION)
        lowered = tl.where(x > 0, x / repetition, x * repetition) - _real(settings, _FREQUENCY) * times
        lowered -= _real(settings, _PRESENCE) * tl.where(times > 0, 1.0, 0.0)
        x = tl.where((marks & (_TIMES | _PROMPT)) != 0, lowered, x)
        early = tl.load(settings + _GENERATED) < tl.load(settings + _MIN_TOKENS)
        x = tl.where(early & ((marks & _STOP) != 0), -_INF, x)
    return x


@triton.jit
def _adjusted(logits, counts, bias, settings, columns, vocabulary):
    x = tl.load(logits + columns, mask=columns < vocabulary, other=-_INF)
    return _adjust(x, counts, bias, settings, columns, vocabulary)


@triton.jit
def _summarise(
    logits,
    counts,
    bias,
    settings,
    partials,
    best,
    tile,
    vocabulary,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile's largest raw logit (NaN if there is one), its largest adjusted one, that one's id, the mass."""
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(logits + columns, mask=columns < vocabulary, other=-_INF)
    broken = tl.sum((raw != raw).to(tl.int32), 0) > 0
    highest = tl.max(tl.where(raw == raw, raw, -_INF), 0)
    x = _adjust(raw, counts, bias, settings, columns, vocabulary)
    top = tl.max(tl.where(x == x, x, -_INF), 0)
    tl.store(partials + tile, tl.where(broken, float("nan"), highest))
    tl.store(partials + TILES + tile, top)
    tl.store(best + tile, tl.min(tl.where(x == top, columns, vocabulary), 0))
    if (_real(settings, _TEMPERATURE) > 0) & (top > -_INF) & (top < _INF):  # else nobody reads the mass
        weights = tl.exp2((x - top) * _scale(settings))
        tl.store(partials + 2 * TILES + tile, tl.sum(weights, 0))


@triton.jit
def _choose(
    logits,
    counts,
    bias,
    settings,
    partials,
    best,
    vocabulary,
    TILES: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row's token, or -1. Partials were written by other programs: they are read past the first cache."""
    tiles = tl.arange(0, PAD)
    mine = tiles < TILES
    raw = tl.load(partials + tiles, mask=mine, other=-_INF, cache_modifier=".cg")
    tops = tl.load(partials + TILES + tiles, mask=mine, other=-_INF, cache_modifier=".cg")
    firsts = tl.load(best + tiles, mask=mine, other=vocabulary, cache_modifier=".cg")
    highest = tl.max(tl.where(raw == raw, raw, -_INF), 0)
    bad = (tl.sum((raw != raw).to(tl.int32), 0) > 0) | (highest == _INF) | (highest == -_INF)
    top = tl.max(tops, 0)
    token = tl.min(tl.where(tops == top, firsts, vocabulary), 0)
    if (_real(settings, _TEMPERATURE) > 0) & (top > -_INF) & (bad == 0):
        masses = tl.load(partials + 2 * TILES + tiles, mask=mine, other=0.0, cache_modifier=".cg")
        masses = tl.where(tops > -_INF, masses * tl.exp2((tops - top) * _scale(settings)), 0.0)
        token = _draw(logits, counts, bias, settings, tops, masses, top, token, vocabulary, PAD, BLOCK)
    return tl.where(bad, -1, token)


@triton.jit
def _draw(
    logits,
    counts,
    bias,
    settings,
    tops,
    masses,
    top,
    token,
    vocabulary,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds of a draw and its check. masses [PAD]: of the tokens before the limit, by tile; at first of all.

    With both top-k and top-p, the mass of the k likeliest is bracketed by halving [low, high] in logits just
    until the check is decided: `least <= mass(top k) <= most`, fewer than k tokens above `high`, at least k
    above `low` (or all that have any weight).
    """
    scale = _scale(settings)
    top_p = _real(settings, _TOP_P)
    min_p = _real(settings, _MIN_P)
    top_k = tl.load(settings + _TOP_K)
    limited = (top_k > 0) & (top_k < vocabulary)
    kept = tl.where(limited, top_k, vocabulary)
    most = tl.sum(masses, 0)
    least = tl.where(limited, 0.0, most)
    low = tl.maximum(top - _FLOOR / scale, _LOWEST)
    high = top
    high_count = 0
    high_mass = 0.0
    limit = tl.full((), -_INF, tl.float32)
    limit_id = 0
    if min_p > 0:
        limit = tl.minimum(top + tl.log2(min_p) / scale, top)
        limit_id = vocabulary
        masses, _ = _before(
            logits, counts, bias, settings, tops, top, scale, limit, limit_id, vocabulary, PAD, BLOCK
        )
    turn = 0
    searching = True
    while searching:
        first, second = _uniforms(settings, turn)
        tile = _pick(masses, first, PAD)
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        x = _adjusted(logits, counts, bias, settings, columns, vocabulary)
        before = (x > limit) | ((x == limit) & (columns < limit_id))
        column = _pick(tl.where(before, tl.exp2((x - top) * scale), 0.0), second, BLOCK)
        token = tile * BLOCK + column
        searching = False
        if limited | (top_p < 1.0):
            limit = tl.sum(tl.where(columns == token, x, 0.0), 0)
            limit_id = token
            masses, ahead = _before(
                logits, counts, bias, settings, tops, top, scale, limit, limit_id, vocabulary, PAD, BLOCK
            )
            mass = tl.sum(masses, 0)
            undecided = (ahead < kept) & (top_p < 1.0) & (mass >= top_p * least) & (mass < top_p * most)
            while undecided:
                middle = 0.5 * low + 0.5 * high
                parts, count = _before(
                    logits, counts, bias, settings, tops, top, scale, middle, 0, vocabulary, PAD, BLOCK
                )
                above = tl.sum(parts, 0)
                if (middle <= low) | (middle >= high):  # the cut lies among tokens of the logit `high`
                    least = high_mass + (kept - high_count) * tl.exp2((high - top) * scale)
                    most = least
                elif count >= kept:
                    low = middle
                    most = above
                    least = tl.where(count == kept, above, least)
                else:
                    high = middle
                    high_count = count
                    high_mass = above
                    least = above
                undecided = (mass >= top_p * least) & (mass < top_p * most)
            allowed = (ahead < kept) & ((top_p >= 1.0) | (mass < top_p * least))
            searching = (ahead > 0) & (allowed == 0) & (turn < _TURNS)
        turn += 1
    return token


@triton.jit
def _before(
    logits,
    counts,
    bias,
    settings,
    tops,
    top,
    scale,
    limit,
    limit_id,
    vocabulary,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mass by tile [PAD], and number, of the tokens that come before (limit, limit_id).

    Only tiles whose largest logit reaches the limit are read: few, where the distribution is a usual one.
    """
    tiles = tl.arange(0, PAD)
    masses = tl.zeros((PAD,), dtype=tl.float32)
    count = 0
    tile = tl.min(tl.where(tops >= limit, tiles, PAD), 0)
    while tile < PAD:
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        x = _adjusted(logits, counts, bias, settings, columns, vocabulary)
        before = (x > limit) | ((x == limit) & (columns < limit_id))
        mass = tl.sum(tl.where(before, tl.exp2((x - top) * scale), 0.0), 0)
        masses = tl.where(tiles == tile, mass, masses)
        count += tl.sum(before.to(tl.int32), 0)
        tile = tl.min(tl.where((tops >= limit) & (tiles > tile), tiles, PAD), 0)
    return masses, count


@triton.jit
def _pick(weights, uniform, SIZE: tl.constexpr):
    """Index i with probability weights[i] / sum(weights), by inverse transform; never one of weight 0."""
    ids = tl.arange(0, SIZE)
    running = tl.cumsum(weights, 0)  # a tree of sums: not monotone to the last bit, hence the two guards
    beyond = (running > uniform * tl.max(running, 0)) & (weights > 0)
    chosen = tl.min(tl.where(beyond, ids, SIZE), 0)
    return tl.minimum(chosen, tl.max(tl.where(weights > 0, ids, 0), 0))


@triton.jit
def _uniforms(settings, turn):
    """Two numbers of 24 bits in [0, 1)."""
    low = tl.load(settings + _SEED_LOW).to(tl.uint32, bitcast=True)
    high = tl.load(settings + _SEED_HIGH).to(tl.uint32, bitcast=True)
    generated = tl.load(settings + _GENERATED).to(tl.uint32, bitcast=True)
    zero = generated * 0
    first, second, _, _ = tl.philox_impl(generated, zero + turn.to(tl.uint32), zero, zero, low, high)
    unit: tl.constexpr = 2.0**-24
    return (first >> 8).to(tl.float32) * unit, (second >> 8).to(tl.float32) * unit
