"""One decode step after another: the runner makes logits, the host draws from them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nybble.engine.answers import Answers
from nybble.engine.runner import Runner
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence


@dataclass(slots=True)
class Meter:
    """What the decode steps took, where nothing but them ran."""

    steps: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, seconds: float, size: int) -> None:
        self.steps += 1
        self.seconds += seconds
        self.bytes += size


class Decoder(Protocol):
    meter: Meter

    @property
    def busy(self) -> bool:
        """Whether a step runs whose result nobody has taken: `step([])` takes it."""
        ...

    def step(self, batch: list[Sequence]) -> None:
        """Move every sequence of the plan by a token, or start to."""
        ...

    def interrupted(self) -> None:
        """A prompt's chunk was computed in between."""
        ...

    def idle(self) -> bool:
        """Use the time while there are no requests; whether there is more to do."""
        ...

    def close(self) -> None:
        """Leave nothing running."""
        ...


class HostDecoder:
    """A step is over when `step` returns."""

    busy = False

    def __init__(
        self, runner: Runner, scheduler: Scheduler, answers: Answers, lock: threading.Condition
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._answers = answers
        self._lock = lock
        self.meter = Meter()

    def step(self, batch: list[Sequence]) -> None:
        if not batch:
            return
        started = time.perf_counter()
        try:
            logits = self._run(batch)
        except Exception as error:
            if len(batch) == 1:
                self._answers.fail(batch[0], error)
            else:
                for sequence in batch:  # find out whose fault it is: the others go on
                    self.step([sequence])
            return
        seconds = time.perf_counter() - started
        self.meter.add(seconds, self._runner.decode_bytes([s.computed for s in batch]))
        for sequence, row in zip(batch, logits, strict=True):
            self._advance(sequence, row)

    def interrupted(self) -> None:
        pass

    def idle(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def _run(self, batch: Seq[Sequence]) -> NDArray[np.float32]:
        return self._runner.decode(
            [s.tokens[s.computed] for s in batch], [s.computed for s in batch], [s.blocks for s in batch]
        )

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        """Take the step's result for one sequence: a replayed position, or a new token."""
        new = sequence.at_last_token
        with self._lock:
            self._scheduler.commit(sequence, sequence.computed + 1)
        if not new:
            return
        try:
            if sequence.request.params.max_tokens == 0:
                self._answers.finish(sequence, "length")
            else:
                sampler = self._answers.samplers[sequence.id]
                token = sampler.sample(logits, sequence.generated)
                sampler.record(token)
                self._answers.emit(sequence, token, logits)
        except Exception as error:
            self._answers.fail(sequence, error)
