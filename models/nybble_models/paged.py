"""The paged key/value cache of the CPU paths, and attention over it.

kv: bfloat16 [layers, blocks, 2, block_size, kv_heads, head_dim]; keys at index 0 of the third axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_models.spec import ModelSpec

ROWS = 16  # a prompt's rows are padded to whole tiles of this, for the sake of BLAS
TILE = 64  # positions whose queries attend in one call: see `PagedCache.attend`


def allocate(spec: ModelSpec, blocks: int, block_size: int) -> Tensor:
    """Zeros, so that a stale position is never NaN. From NumPy, whose zeros take no memory until written."""
    shape = (spec.num_layers, blocks, 2, block_size, spec.num_kv_heads, spec.head_dim)
    return torch.from_numpy(np.zeros(shape, np.uint16)).view(torch.bfloat16)


def bytes_per_token(spec: ModelSpec, bits: int = 16) -> int:
    """Keys and values of one position; 8-bit ones have a float32 scale per head."""
    per_head = spec.head_dim * bits // 8 + (4 if bits < 16 else 0)
    return spec.num_layers * 2 * spec.num_kv_heads * per_head


def kv_reader(spec: ModelSpec) -> Callable[[int], int]:
    """Bytes of keys and values that a step reads at a position, sliding windows considered."""
    windows = Counter(spec.window(layer) for layer in range(spec.num_layers))
    size = bytes_per_token(spec) // spec.num_layers

    def read(position: int) -> int:
        seen = position + 1
        return size * sum(count * min(seen, window or seen) for window, count in windows.items())

    return read


class PagedCache:
    """A sequence's view of the cache while a chunk of its prompt runs, positions `[start, start + count)`."""

    def __init__(
        self, spec: ModelSpec, kv: Tensor, table: Sequence[int], start: int, count: int, tile: int = TILE
    ) -> None:
        block_size = kv.shape[3]
        used = -(-(start + count) // block_size)
        self.scale = spec.attention_scale
        self.kv = kv
        self.start = start
        self.count = count
        self.tile = tile
        self.blocks = torch.tensor(table[:used], dtype=torch.int64)
        positions = torch.arange(start, start + count)
        self.rows = self.blocks[positions // block_size], positions % block_size
        self.masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """Store the chunk, then attend over everything stored. Rows past `count` are padding.

        Keys are read back from the cache, and queries attend in tiles of positions, counted from the
        first of all and filled up with zeros: a row sees the same bfloat16 numbers in the same order, in a
        call of the same shape, however its prompt is cut into chunks.
        """
        held, (blocks, slots) = self.kv[layer], self.rows
        held[blocks, 0, slots] = key[: self.count].bfloat16()
        held[blocks, 1, slots] = value[: self.count].bfloat16()
        stop = self.start + self.count
        tiles = range(self.start // self.tile, -(-stop // self.tile))
        stored = held[self.blocks].transpose(1, 2).flatten(0, 1)[:stop].float()  # [L, 2, G, E]
        both = F.pad(stored, (0, 0) * 3 + (0, tiles.stop * self.tile - stop)).permute(1, 2, 0, 3)
        mixed = torch.zeros_like(query)
        for tile in tiles:
            first, end = tile * self.tile, (tile + 1) * self.tile
            low, high = max(first, self.start), min(end, stop)
            queries = query.new_zeros(self.tile, *query.shape[1:])
            queries[low - first : high - first] = query[low - self.start : high - self.start]
            made = self._attend(queries, both[:, :, :end], self._mask(tile, window))
            mixed[low - self.start : high - self.start] = made[low - first : high - first]
        return mixed

    def _attend(self, queries: Tensor, both: Tensor, mask: Tensor) -> Tensor:
        """[rows, H, E], [2, G, L, E], [rows, L] -> [rows, H, E]."""
        made = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            both[None, 0],
            both[None, 1],
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=queries.shape[1] != both.shape[1],
        )
        return made[0].transpose(0, 1)

    def _mask(self, tile: int, window: int | None) -> Tensor:
        """Additive mask [rows of a tile, L]: a row sees itself and what came before, within the window."""
        size = self.tile
        if (tile, window) not in self.masks:
            row = torch.arange(tile * size, (tile + 1) * size)[:, None]
            column = torch.arange((tile + 1) * size)[None]
            hidden = column > row
            if window is not None:
                hidden |= column <= row - window
            self.masks[tile, window] = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return self.masks[tile, window]
