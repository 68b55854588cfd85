"""The runner of the CPU: prefill through PyTorch, decode through a step program, one paged cache for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nybble.engine.runner import Table
from nybble_models.prefill import Prefill, Step


class CpuRunner:
    """Buffers are made once for `max_batch` rows; a step writes into them."""

    def __init__(
        self, step: Step, prefill: Prefill, *, max_batch: int, weight_bytes: Mapping[str, int]
    ) -> None:
        spec, kv = prefill.spec, prefill.kv
        self._step = step
        self._prefill = prefill
        self._weight_bytes = dict(weight_bytes)
        self._fixed_bytes = sum(step.weight_bytes_per_step.values())
        self._tokens = torch.zeros(max_batch, dtype=torch.int32)
        self._positions = torch.zeros(max_batch, dtype=torch.int32)
        self._tables = torch.zeros(max_batch, kv.shape[1], dtype=torch.int32)
        self._logits = torch.empty(max_batch, spec.vocab_size)

    def prefill(self, tokens: Sequence[int], start: int, table: Table) -> None:
        with torch.inference_mode():
            self._prefill.run(tokens, start, table)

    def score(self, tokens: Sequence[int], start: int, table: Table) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._prefill.logits(
                self._prefill.run(tokens, start, table)
            ).numpy()
        return logits

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Table]
    ) -> NDArray[np.float32]:
        rows = len(tokens)
        self._tokens[:rows] = torch.tensor(tokens, dtype=torch.int32)
        self._positions[:rows] = torch.tensor(positions, dtype=torch.int32)
        for row, table in enumerate(tables):
            self._tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        with torch.inference_mode():
            self._step.step(
                self._tokens[:rows], self._positions[:rows], self._tables[:rows], self._logits[:rows]
            )
        logits: NDArray[np.float32] = self._logits[:rows].numpy()
        return logits

    def decode_bytes(self, positions: Sequence[int]) -> int:
        return self._fixed_bytes + self._step.kv_bytes(positions)

    def used_bytes(self) -> Mapping[str, int]:
        kv = self._prefill.kv
        buffers = (self._prefill.workspace, self._tables, self._logits)
        return {
            "weights": sum(self._weight_bytes.values()),
            "kv": kv.nbytes,
            "workspace": sum(b.nbytes for b in buffers),
        }
