"""Every op in plain PyTorch, computed in float32: the oracle of the fast paths, and the last fallback.

Shapes: T tokens, D hidden, H query heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.quantized import Table, Weight, dense, look_up


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b with W as `QuantizedTensor.dequantize` defines it. x: [T, K] -> [T, N]."""
    return F.linear(x.float(), dense(weight), None if bias is None else bias.float())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016)."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), None if bias is None else bias.float(), eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + E/2]) by the angle of their position (Su et al. 2021).

    x: [T, H, E]; cos, sin: [T, E/2] -> [T, H, E].
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def activation(x: Tensor, kind: str) -> Tensor:
    """silu: x·sigmoid(x) · gelu: x·Φ(x) · gelu_tanh: its tanh approximation · relu: max(x, 0)."""
    x = x.float()
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    raise ValueError(f"unknown activation {kind!r}")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of T new tokens at positions [start, start + T) over all L = start + T positions.

    o = softmax(s) v with s = q kᵀ · scale, or softcap · tanh(q kᵀ · scale / softcap) (Gemma 2); query head h
    reads key/value head h // (H / G); with `window`, a token sees itself and `window - 1` before.
    query: [T, H, E]; key, value: [L, G, E] -> [T, H, E].
    """
    tokens, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    key, value = (t.float().repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
    scores = torch.einsum("the,lhe->htl", query.float(), key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(start, start + tokens, device=query.device)[:, None]
    columns = torch.arange(length, device=query.device)[None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("htl,lhe->the", weights, value)


KV_CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Quantized cache types, and the code of a vector's largest magnitude."""


def quantize_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes x / scale in `dtype`, scale = max|x| / largest code: [..., E] -> [..., E] and [...]."""
    scale = x.float().abs().amax(-1).clamp(min=1e-20) / KV_CODES[dtype]
    codes = x.float() / scale[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def write_kv(
    kv: Tensor, scales: Tensor | None, table: Tensor, start: int, key: Tensor, value: Tensor
) -> None:
    """Store [T, G, E] at positions [start, start + T) of one layer, kv: [blocks, 2, block_size, G, E]."""
    positions = torch.arange(start, start + len(key), device=kv.device)
    blocks, slots = table.long()[positions // kv.shape[2]], positions % kv.shape[2]
    for kind, x in enumerate((key, value)):
        if scales is None:
            kv[blocks, kind, slots] = x.to(kv.dtype)
        else:
            codes, scale = quantize_kv(x, kv.dtype)
            # Through bytes: torch does not index float8.
            kv.view(torch.uint8)[blocks, kind, slots] = codes.view(torch.uint8)
            scales[blocks, kind, slots] = scale


def read_kv(kv: Tensor, scales: Tensor | None, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values at positions [0, length) of one layer: float32 [length, G, E] each."""
    positions = torch.arange(length, device=kv.device)
    blocks, slots = table.long()[positions // kv.shape[2]], positions % kv.shape[2]
    key, value = (kv.float()[blocks, kind, slots] for kind in (0, 1))
    if scales is not None:
        key, value = key * scales[blocks, 0, slots, :, None], value * scales[blocks, 1, slots, :, None]
    return key, value


def attention_prefill(
    query: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    table: Tensor,
    start: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`attention` of [T, H, E] over a paged cache that holds positions [0, start + T) -> [T, H, E]."""
    key, value = read_kv(kv, scales, table, start + len(query))
    return attention(query, key, value, start, scale, window, softcap)


def attention_decode(
    qkv: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    position: int,
    table: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One row's new token, stored at `position` and attended with: qkv [(H + 2G) · E] -> [H, E]."""
    query, key, value = turn(qkv[None], kv.shape[3], kv.shape[4], position, cos, sin, q_norm, k_norm, eps)
    write_kv(kv, scales, table, position, key, value)
    return attention_prefill(query, kv, scales, table, position, scale, window, softcap)[0]


def turn(
    qkv: Tensor,
    kv_heads: int,
    width: int,
    start: int,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values of [T, (H + 2G) · E], heads normed (Qwen3), then rotated, where given."""
    tokens = len(qkv)
    heads = qkv.view(tokens, -1, width)
    query, key, value = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        query, key = rms_norm(query, q_norm, eps), rms_norm(key, k_norm, eps)
    if cos is not None and sin is not None:
        cos, sin = cos[start : start + tokens], sin[start : start + tokens]
        query, key = rotary(query, cos, sin), rotary(key, cos, sin)
    return query, key, value


def embed(
    tokens: Tensor,
    table: Table,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """table[tokens], plus position_table[positions + offset] where positions are learned: [T] -> [T, D]."""
    x = look_up(table, tokens.long())
    if positions is None or position_table is None:
        return x
    return x + position_table.float()[positions.long() + offset]


def quantize(x: Tensor, dtype: torch.dtype, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes of rows in int8 or float8_e4m3fn and their scales, x ≈ codes · scale: [T, K] -> [T, K], [T].

    A scale for all saturates what lies beyond it, int8 at -128 and 127; else each row has its own, max|x| /
    largest code.
    """
    if scale is None:
        return quantize_kv(x, dtype)
    limit = KV_CODES[dtype]
    codes = (x.float() / scale).clamp(-128 if dtype == torch.int8 else -limit, limit)
    steps = torch.full((len(x),), scale, device=x.device)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), steps


def linear_w8a8(x: Tensor, values: Tensor, scales: Tensor, scale: float | None = None) -> Tensor:
    """y = Q(x) Wᵀ with W[n, k] = scales[n] · values[n, k], x quantized like W: [T, K] -> [T, N]."""
    codes, steps = quantize(x, values.dtype, scale)
    return F.linear(codes.double(), values.double()).float() * steps[:, None] * scales
