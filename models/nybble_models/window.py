"""Attention over text that is seen once: nothing is kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_models.spec import ModelSpec


class Window:
    """Attention within one window of tokens: the decoder's cache for text that is seen once."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.start = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        mask = None if window is None else _band(len(query), window, query.device)
        scale = self.spec.attention_scale
        mixed = F.scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None, scale=scale, enable_gqa=True)
        return mixed[0].transpose(0, 1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """A token sees itself and the `window - 1` before it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)
