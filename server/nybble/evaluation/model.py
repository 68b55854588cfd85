"""What is measured: anything that gives logits for tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

CHUNK = 256  # rows of logits in memory at a time

Tokens = tuple[int, ...]

Rows = Callable[[int, int], Iterator[Tensor]]
"""`rows(first, stop)`: the logits after positions [first, stop), float32, in pieces [CHUNK or fewer, V]."""

Tell = Callable[[str, float], None]
"""`tell(phase, fraction)`."""


class Model(Protocol):
    vocab_size: int

    def run(self, texts: Sequence[Tokens]) -> Iterator[Rows]:
        """One text after another; the rows of a text are good until the next one is asked for."""
        ...

    def describe(self) -> Mapping[str, object]:
        """For the record: where it lies, and what computes it."""
        ...
