"""What the engine asks of a device: fill the cache with prompt positions, and make one step of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Table = Sequence[int]
"""Blocks of one sequence in order: position p lies in `table[p // block_size]`."""


class Runner(Protocol):
    """One thread calls it. A row's numbers depend on its own sequence only, bit for bit."""

    def prefill(self, tokens: Sequence[int], start: int, table: Table) -> None:
        """Compute keys and values of positions `[start, start + len(tokens))`; those before are held."""
        ...

    def score(self, tokens: Sequence[int], start: int, table: Table) -> NDArray[np.float32]:
        """`prefill`, and the logits [T, V] of those positions."""
        ...

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Table]
    ) -> NDArray[np.float32]:
        """Row b puts `tokens[b]` at `positions[b]`; float32 logits [B, V], valid until the next call."""
        ...

    def decode_bytes(self, positions: Sequence[int]) -> int:
        """Exact bytes that a decode step at these positions has to read: weights, scales, keys and values."""
        ...

    def used_bytes(self) -> Mapping[str, int]:
        """Bytes held now, by kind."""
        ...
