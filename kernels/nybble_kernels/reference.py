"""Every op in plain PyTorch, computed in float32: the oracle of the fast paths, and the last fallback.

Shapes: T tokens, D hidden, H query heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.quantized import Weight, dense


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
    query: Tensor, key: Tensor, value: Tensor, start: int, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of T new tokens at positions [start, start + T) over all L = start + T positions.

    o = softmax(q kᵀ · scale) v, query head h reads key/value head h // (H / G); with `window`, a token sees
    itself and the `window - 1` positions before it. query: [T, H, E]; key, value: [L, G, E] -> [T, H, E].
    """
    tokens, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    key, value = (t.float().repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
    scores = torch.einsum("the,lhe->htl", query.float(), key) * scale
    rows = torch.arange(start, start + tokens, device=query.device)[:, None]
    columns = torch.arange(length, device=query.device)[None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("htl,lhe->the", weights, value)
