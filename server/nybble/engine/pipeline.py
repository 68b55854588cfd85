"""Decode steps on a device that samples: the next one is launched before the last one is read."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from nybble.engine.answers import Answers
from nybble.engine.decoder import Meter
from nybble.engine.runner import Drawn, Row, SamplingRunner, Ticket
from nybble.engine.sampler import NanLogits
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence


@dataclass(slots=True)
class Flight:
    """A launched step, until its result is read."""

    ticket: Ticket
    sequences: list[Sequence]
    rows: list[Row]
    bytes: int
    launched: float
    alone: bool  # no prompt's chunk before it or beside it


class PipelinedDecoder:
    """The host is one step behind: it learns step n's tokens while the device computes step n + 1.

    A sequence that step n ended has a row in step n + 1 already: that row's token is dropped. Its blocks and
    its slot are free at once all the same, because the device works in the order of the launches: the row
    comes before whatever a later holder has written, read or opened there.

    A sequence that is preempted with a token in flight keeps that token when it arrives (`_take`), and is not
    admitted again before; its slot is opened again then, with all it has generated.
    """

    def __init__(
        self, runner: SamplingRunner, scheduler: Scheduler, answers: Answers, lock: threading.Condition
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._answers = answers
        self._lock = lock
        self._flight: Flight | None = None
        self._behind_chunk = False
        self._read_at = 0.0
        self.meter = Meter()

    @property
    def busy(self) -> bool:
        return self._flight is not None

    def step(self, batch: list[Sequence]) -> None:
        batch = [sequence for sequence in batch if self._ready(sequence)]
        launched = self._launch(batch) if batch else None
        self._collect()
        self._flight = launched

    def interrupted(self) -> None:
        self._behind_chunk = True
        if self._flight is not None:
            self._flight.alone = False

    def idle(self) -> bool:
        return self._runner.idle()

    def close(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            with suppress(Exception):
                self._runner.collect(flight.ticket)

    def _ready(self, sequence: Sequence) -> bool:
        """Give it its slot's state when it draws for the first time since it was admitted."""
        params = sequence.request.params
        if params.max_tokens == 0:
            self._answers.finish(sequence, "length")
            return False
        if sequence.opened or not sequence.at_last_token:
            return True
        assert not sequence.in_flight
        generated = sequence.tokens[sequence.prompt_length :]
        sampler = self._answers.samplers[sequence.id]
        try:
            self._runner.open(
                sequence.slot, params, sequence.request.prompt, generated, sampler.seed, sampler.stops
            )
        except Exception as error:
            self._answers.fail(sequence, error)
            return False
        sequence.opened = True
        return True

    def _launch(self, batch: list[Sequence]) -> Flight | None:
        rows = [self._row(sequence) for sequence in batch]
        started = time.perf_counter()
        try:
            ticket = self._runner.launch(rows)
        except Exception as error:
            self._collect()  # what was drawn before still counts
            if len(batch) > 1:
                self._launch_each(batch)
            elif self._answers.alive(batch[0]):
                self._answers.fail(batch[0], error)
            return None
        size = self._runner.decode_bytes([row.position for row in rows])
        with self._lock:
            for sequence, row in zip(batch, rows, strict=True):
                self._scheduler.commit(sequence, row.position + 1)
                sequence.in_flight += row.sample
        alone, self._behind_chunk = not self._behind_chunk, False
        return Flight(ticket, batch, rows, size, started, alone)

    def _launch_each(self, batch: list[Sequence]) -> None:
        """Find out whose fault it is: the others go on."""
        for sequence in batch:
            if self._answers.alive(sequence):
                self._flight = self._launch([sequence])
                self._collect()

    def _row(self, sequence: Sequence) -> Row:
        known = sequence.computed < len(sequence.tokens)
        new = sequence.at_last_token
        return Row(
            sequence.slot,
            sequence.computed,
            sequence.blocks,
            sequence.tokens[sequence.computed] if known else None,
            new,
            new and sequence.request.params.logprobs is not None,
        )

    def _collect(self) -> None:
        flight, self._flight = self._flight, None
        if flight is None:
            return
        drawn = self._runner.collect(flight.ticket)
        now = time.perf_counter()
        if flight.alone:
            self.meter.add(now - max(flight.launched, self._read_at), flight.bytes)
        self._read_at = now
        for index, (sequence, row) in enumerate(zip(flight.sequences, flight.rows, strict=True)):
            if row.sample and self._answers.alive(sequence):
                self._take(sequence, drawn, index)

    def _take(self, sequence: Sequence, drawn: Drawn, index: int) -> None:
        sequence.in_flight -= 1
        try:
            if drawn.bad[index]:
                raise NanLogits
            self._answers.emit(sequence, drawn.tokens[index], drawn.logits.get(index))
        except Exception as error:
            self._answers.fail(sequence, error)
