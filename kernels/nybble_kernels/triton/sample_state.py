"""What the sampling kernel knows of every sequence: one slot each, in device memory that never moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # logits a program reads: 32 programs share a row of 128k

SLOT = np.dtype(
    [
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("repetition", "<f4"),
        ("frequency", "<f4"),
        ("presence", "<f4"),
        ("top_k", "<i4"),
        ("min_tokens", "<i4"),
        ("flags", "<i4"),
        ("generated", "<i4"),  # tokens drawn so far: the kernel adds one each time
        ("seed_low", "<u4"),
        ("seed_high", "<u4"),
        ("unused", "<i4", 4),
    ]
)
"""A slot's 16 words of `SampleState.settings`, the floats bit by bit."""

USES_BIAS, USES_COUNTS = 1, 2  # flags: the slot's row of that table matters
STOP, PROMPT = 1 << 29, 1 << 30  # bits of `counts`; those below hold how often a token was generated


@dataclass(frozen=True)
class Settings:
    """One sequence's parameters as the API defines them. 0 for `temperature` is greedy, for `top_k` off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_tokens: int = 0
    seed: int = 0  # 64 bits

    @property
    def counts(self) -> bool:
        """Whether the tokens seen so far, or the stop tokens, matter."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0) or self.min_tokens > 0


class SampleState:
    """Slots of sequences, and the workspace of up to `max_batch` rows.

    settings: int32 [slots, 16], see `SLOT`. counts: int32 [slots, V]. bias: float32 [slots, V]. tokens: int32
    [slots], the token drawn last. partials: float32 [max_batch, 3, tiles]. best: int32 [max_batch, tiles].
    counters: int32 [max_batch], zero between launches.
    """

    def __init__(
        self, slots: int, vocabulary: int, max_batch: int, device: torch.device, *, block: int = BLOCK
    ) -> None:
        tiles = -(-vocabulary // block)
        self.vocabulary, self.block, self.tiles = vocabulary, block, tiles
        self.settings = torch.zeros((slots, 16), dtype=torch.int32, device=device)
        self.counts = torch.zeros((slots, vocabulary), dtype=torch.int32, device=device)
        self.bias = torch.zeros((slots, vocabulary), dtype=torch.float32, device=device)
        self.tokens = torch.zeros(slots, dtype=torch.int32, device=device)
        self.partials = torch.zeros((max_batch, 3, tiles), dtype=torch.float32, device=device)
        self.best = torch.zeros((max_batch, tiles), dtype=torch.int32, device=device)
        self.counters = torch.zeros(max_batch, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def open(
        self,
        slot: int,
        settings: Settings,
        *,
        prompt: Sequence[int] = (),
        generated: Sequence[int] = (),
        stops: Sequence[int] | frozenset[int] = (),
        bias: Mapping[int, float] | None = None,
    ) -> None:
        """Enqueue what gives `slot` to a sequence that has generated so much; no waiting for the device."""
        record = np.zeros((), dtype=SLOT)
        for name in ("temperature", "top_p", "min_p", "top_k", "min_tokens"):
            record[name] = getattr(settings, name)
        for name in ("repetition", "frequency", "presence"):
            record[name] = getattr(settings, f"{name}_penalty")
        record["flags"] = USES_BIAS * bool(bias) + USES_COUNTS * settings.counts
        record["generated"] = len(generated)
        record["seed_low"], record["seed_high"] = settings.seed & 0xFFFFFFFF, settings.seed >> 32
        self._copy(self.settings[slot], record.reshape(1).view(np.int32))
        if bias:
            ids = np.fromiter(bias, dtype=np.int64, count=len(bias))
            self._fill(self.bias[slot], ids, np.fromiter(bias.values(), dtype=np.float32, count=len(bias)))
        if settings.counts:
            self._fill(self.counts[slot], *marks(prompt, generated, sorted(stops)))

    def _fill(self, row: Tensor, ids: np.ndarray, values: np.ndarray) -> None:
        """Zero but for `values` at `ids`."""
        row.zero_()
        to = row.device
        row.index_copy_(
            0,
            torch.from_numpy(ids).to(to, non_blocking=True),
            torch.from_numpy(values).to(to, non_blocking=True),
        )

    def _copy(self, row: Tensor, values: np.ndarray) -> None:
        row.copy_(torch.from_numpy(values), non_blocking=True)


def marks(
    prompt: Sequence[int], generated: Sequence[int], stops: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct token ids int64 [n], and what `counts` holds for them int32 [n]."""
    ids, index = np.unique(np.array([*prompt, *generated, *stops], dtype=np.int64), return_inverse=True)
    values = np.zeros(len(ids), dtype=np.int32)
    p, g = len(prompt), len(prompt) + len(generated)
    values[index[:p]] |= PROMPT
    values[index[g:]] |= STOP
    np.add.at(values, index[p:g], 1)
    return ids, values
