"""What the engine asks of a device: fill the cache with prompt positions, and make one step of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NewType, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nybble.engine.request import SamplingParams

Table = Sequence[int]
"""Blocks of one sequence in order: position p lies in `table[p // block_size]`. Not kept beyond the call."""


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


Ticket = NewType("Ticket", int)
"""A step that was launched and not collected yet."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: put a token at `position`, and draw the one that follows."""

    slot: int  # whose sampling state; no two rows of a step share one
    position: int
    table: Table
    token: int | None  # None: the one that `slot` drew last, which the host has not read yet
    sample: bool = True  # False: a known token is replayed, and the slot's state stays as it is
    logits: bool = False  # bring the logits back too


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew, in the order of its rows. `tokens[b]` means nothing for a replay or a bad row.

    A row is bad when it samples and its largest logit is not finite. `logits`, as the model made them, are
    there for the rows that asked: row -> float32 [V].
    """

    tokens: Sequence[int]
    bad: Sequence[bool]
    logits: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)


@runtime_checkable
class SamplingRunner(Runner, Protocol):
    """A runner that samples on the device, so that a step starts before the host has read the one before.

    Order: `prefill`, `score`, `open` and `launch` take effect on the device in the order of the calls, and
    only `score` waits for it. So the engine hands on a block or a slot as soon as its holder ends: what is
    still in flight for the old holder comes before anything done for the new one, and a sequence reads only
    positions that were written for it before, or that the prefix cache had published before.

    Steps: they are collected in the order of their launches, at most two being uncollected at any time. So
    results need two places, which neither `open` nor the next launch touches.

    Slots: numbered `[0, max_sequences)`. A slot holds the parameters, the number of tokens generated, what
    the penalties count, and the token drawn last. Draws have the distribution of `sampler.Sampler`, and are a
    function of the logits, the parameters, the seed and the number of tokens generated: neither slot nor step
    nor company matters, so a draw that was dropped comes out the same when it is made again.

    Failures: one of `open` or `launch` leaves the device as it was and concerns the rows of that call; one of
    `collect` means that the device is lost, and ends the engine.
    """

    def idle(self) -> bool:
        """Nobody asks for anything: do a piece of work ahead, if there is one; whether there may be more."""
        ...

    def open(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int],
        generated: Sequence[int],
        seed: int,
        stops: frozenset[int],
    ) -> None:
        """Give the slot to a sequence that has `generated` so far (after a preemption: not nothing).

        `seed` has 64 bits. `stops` end the answer: muted while fewer than `min_tokens` are generated.
        """
        ...

    def launch(self, rows: Sequence[Row]) -> Ticket:
        """Enqueue one step. A row that samples changes its slot: last token, counts, number generated."""
        ...

    def collect(self, ticket: Ticket) -> Drawn:
        """Wait for the oldest uncollected step; the logits are valid until the next `collect`."""
        ...
