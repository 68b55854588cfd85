"""The runner of the CPU: prompts and a step over one paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nybble.engine.runner import Table
from nybble_models.prefill import Prompts, Step
from nybble_models.spec import ModelSpec


class CpuRunner:
    """Buffers are made once for `max_batch` rows; a step writes into them."""

    def __init__(
        self,
        spec: ModelSpec,
        step: Step,
        prompts: Prompts,
        kv: torch.Tensor,
        *,
        max_batch: int,
        weight_bytes: Mapping[str, int],
    ) -> None:
        self._step = step
        self._prompts = prompts
        self._kv = kv
        self._weight_bytes = dict(weight_bytes)
        self._fixed_bytes = sum(step.weight_bytes_per_step.values())
        self._tokens = np.zeros(max_batch, dtype=np.int32)
        self._positions = np.zeros(max_batch, dtype=np.int32)
        self._tables = np.zeros((max_batch, kv.shape[1]), dtype=np.int32)
        self._logits = np.empty((max_batch, spec.vocab_size), dtype=np.float32)

    def prefill(self, tokens: Sequence[int], start: int, table: Table) -> None:
        with torch.inference_mode():
            self._prompts.fill(tokens, start, table)

    def score(self, tokens: Sequence[int], start: int, table: Table) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._prompts.score(tokens, start, table).numpy()
        return logits

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Table]
    ) -> NDArray[np.float32]:
        """NumPy only: a PyTorch op would hand the interpreter to the event loop and wait for it."""
        rows, width = len(tokens), max(map(len, tables))
        self._tokens[:rows] = tokens
        self._positions[:rows] = positions
        for row, table in enumerate(tables):
            self._tables[row, : len(table)] = table
        logits = self._logits[:rows]
        self._step.step(self._tokens[:rows], self._positions[:rows], self._tables[:rows, :width], logits)
        return logits

    def decode_bytes(self, positions: Sequence[int]) -> int:
        return self._fixed_bytes + self._step.kv_bytes(positions)

    def used_bytes(self) -> Mapping[str, int]:
        return {
            "weights": sum(self._weight_bytes.values()),
            "kv": self._kv.nbytes,
            "workspace": self._prompts.workspace_bytes + self._tables.nbytes + self._logits.nbytes,
        }
