"""The paged key/value cache of the CPU paths, and attention over it.

kv: bfloat16 [layers, blocks, 2, block_size, kv_heads, head_dim]; keys at index 0 of the third axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_models.spec import ModelSpec

ROWS = 16  # queries and keys are padded to whole tiles of this: see `PagedCache.attend`


def allocate(spec: ModelSpec, blocks: int, block_size: int) -> Tensor:
    """Zeros, so that a stale position is never NaN."""
    shape = (spec.num_layers, blocks, 2, block_size, spec.num_kv_heads, spec.head_dim)
    return torch.zeros(shape, dtype=torch.bfloat16)


def bytes_per_token(spec: ModelSpec, bits: int = 16) -> int:
    """Keys and values of one position; 8-bit ones have a float32 scale per head."""
    per_head = spec.head_dim * bits // 8 + (4 if bits < 16 else 0)
    return spec.num_layers * 2 * spec.num_kv_heads * per_head


class PagedCache:
    """A sequence's view of the cache while a chunk of its prompt runs, positions `[start, start + count)`."""

    def __init__(self, spec: ModelSpec, kv: Tensor, table: Sequence[int], start: int, count: int) -> None:
        block_size = kv.shape[3]
        used = -(-(start + count) // block_size)
        self.scale = spec.attention_scale
        self.kv = kv
        self.start = start
        self.count = count
        self.blocks = torch.tensor(table[:used], dtype=torch.int64)
        positions = torch.arange(start, start + count)
        self.rows = self.blocks[positions // block_size], positions % block_size
        self.masks: dict[int | None, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """Store the chunk, then attend over everything stored.

        Rows past `count` are padding. Keys are read back from the cache, in whole blocks: a row sees the same
        bfloat16 numbers in the same order however its prompt is cut into chunks.
        """
        held = self.kv[layer]
        blocks, slots = self.rows
        held[blocks, 0, slots] = key[: self.count].bfloat16()
        held[blocks, 1, slots] = value[: self.count].bfloat16()
        keys, values = held[self.blocks].unbind(1)  # [B, block_size, G, E] each
        keys, values = (t.flatten(0, 1).float().transpose(0, 1) for t in (keys, values))  # [G, L, E]
        values = values.clone()
        values[:, self.start + self.count :] = 0  # whatever a former holder left there
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=self._mask(query.shape[0], keys.shape[1], window),
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return mixed[0].transpose(0, 1)

    def _mask(self, rows: int, length: int, window: int | None) -> Tensor:
        """Additive mask [rows, length]: a row sees itself and what came before, within the window."""
        if window not in self.masks:
            row = torch.arange(self.start, self.start + rows)[:, None]
            column = torch.arange(length)[None]
            hidden = column > row
            if window is not None:
                hidden |= column <= row - window
            self.masks[window] = torch.zeros(rows, length).masked_fill_(hidden, float("-inf"))
        return self.masks[window]
