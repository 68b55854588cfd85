"""A `TokenRunner` that samples: a device in miniature, which does what it is given in order, but late."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.engine.request import SamplingParams
from nybble.engine.runner import Drawn, Row, Table, Ticket
from nybble.engine.sampler import NanLogits, Sampler
from support_runner import TokenRunner


@dataclass
class Slot:
    """`last` is None until the slot has drawn for its present holder."""

    sampler: Sampler
    generated: int
    last: int | None = None


@dataclass
class Step:
    rows: list[Row]
    drawn: Drawn | None = None


class SamplingTokenRunner(TokenRunner):
    """Keeps the contract of `SamplingRunner`, and complains when the engine does not keep its part.

    Work is executed at a random time between the call and the latest moment at which its result is needed, so
    an engine that relies on more than the order of its calls gives wrong answers. Every position also keeps a
    hash of all tokens up to it, written when the position was: a row that reads a position which somebody
    else has overwritten is found out at once. `complaints` holds what was found, `overlapped` the steps that
    were followed by another before they were read.
    """

    def __init__(self, blocks: int, block_size: int, **options: Any) -> None:
        super().__init__(blocks, block_size, **options)
        self.history = np.zeros(self.kv.shape, dtype=np.int64)
        self.slots: dict[int, Slot] = {}
        self.complaints: list[str] = []
        self.launched = self.collected = self.overlapped = self.idled = 0
        self._steps: dict[int, Step] = {}
        self._work: deque[Callable[[], None]] = deque()
        self._chance = random.Random(0)

    def prefill(self, tokens: Sequence[int], start: int, table: Table) -> None:
        tokens, table = list(tokens), list(table)
        self._enqueue(lambda: TokenRunner.prefill(self, tokens, start, table))

    def score(self, tokens: Sequence[int], start: int, table: Table) -> NDArray[np.float32]:
        self.prefill(tokens, start, table)
        self._execute(len(self._work))
        return np.stack([self._logits(start + i, table) for i in range(len(tokens))])

    def decode(self, *_: object) -> NDArray[np.float32]:
        raise AssertionError("a runner that samples is not asked for logits")

    def idle(self) -> bool:
        self.idled += 1
        return self.idled < 3

    def open(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int],
        generated: Sequence[int],
        seed: int,
        stops: frozenset[int],
    ) -> None:
        sampler = Sampler(params, tuple(prompt), ())
        sampler.seed, sampler._muted = seed, np.array(sorted(stops), dtype=np.int64)
        for token in generated:
            sampler.record(token)
        count = len(generated)

        def work() -> None:
            self.slots[slot] = Slot(sampler, count)

        self._enqueue(work)

    def launch(self, rows: Sequence[Row]) -> Ticket:
        if self.fail_on is not None and self.fail_on in [row.token for row in rows]:
            raise RuntimeError("planted failure")
        self._check(self.launched - self.collected < 2, "three steps are uncollected")
        self._check(len({row.slot for row in rows}) == len(rows), "two rows share a slot")
        self._check(all(row.sample or row.token is not None for row in rows), "a replay of an unknown token")
        self.launched += 1
        copied = [Row(r.slot, r.position, list(r.table), r.token, r.sample, r.logits) for r in rows]
        step = self._steps[self.launched] = Step(copied)
        self.batches.append(len(rows))

        def work() -> None:
            step.drawn = self._run(step.rows)

        self._enqueue(work)
        return Ticket(self.launched)

    def collect(self, ticket: Ticket) -> Drawn:
        time.sleep(self.delay)
        self.collected += 1
        self._check(ticket == self.collected, "steps are collected out of order")
        self.overlapped += self.launched > self.collected
        step = self._steps.pop(ticket)
        while step.drawn is None and self._work:
            self._execute(1)
        assert step.drawn is not None, self.complaints
        return step.drawn

    def _check(self, fine: bool, complaint: str) -> None:
        if not fine:
            self.complaints.append(complaint)

    def _enqueue(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        self._execute(self._chance.choice((0, 0, 1, len(self._work))))

    def _execute(self, count: int) -> None:
        """What goes wrong on a device shows when its results are read, not where the work was enqueued."""
        for _ in range(min(count, len(self._work))):
            try:
                self._work.popleft()()
            except Exception as error:
                self.complaints.append(repr(error))

    def _run(self, rows: list[Row]) -> Drawn:
        tokens, bad, logits = [], [], {}
        for index, row in enumerate(rows):
            token, broken = self._run_row(row, index, logits)
            tokens.append(token)
            bad.append(broken)
        return Drawn(tokens, bad, logits)

    def _run_row(self, row: Row, index: int, logits: dict[int, NDArray[np.float32]]) -> tuple[int, bool]:
        slot = self.slots.get(row.slot)
        token = row.token
        if token is None:
            self._check(slot is not None and slot.last is not None, "a slot that drew nothing is read")
            token = (slot.last if slot else None) or 0
        self._write(row.position, token, row.table)
        made = self._logits(row.position, row.table)
        if token == self.nan_on:
            made[:] = np.nan
        if row.logits:
            logits[index] = made
        if not row.sample:
            return -1, False
        assert slot is not None, "a slot was used that nobody opened"
        try:
            slot.last = slot.sampler.sample(made, slot.generated)
        except NanLogits:
            slot.last = 0
            return -1, True
        slot.sampler.record(slot.last)
        slot.generated += 1
        return slot.last, False

    def _cell(self, position: int, table: Table) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size

    def _write(self, position: int, token: int, table: Table) -> None:
        super()._write(position, token, table)
        before = int(self.history[self._cell(position - 1, table)]) if position else 0
        self.history[self._cell(position, table)] = hash((before, token))

    def _logits(self, position: int, table: Table) -> NDArray[np.float32]:
        before = 0
        for p in range(position + 1):
            before = hash((before, int(self.kv[self._cell(p, table)])))
            self._check(before == self.history[self._cell(p, table)], f"position {p} is another sequence's")
        return super()._logits(position, table)
