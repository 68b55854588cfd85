"""Independent pieces of work side by side, each computed on one thread.

A block's search is thousands of small matrix products. Splitting each over the cores makes every core
wait for the slowest: with other programs running that can take several times as long as one thread.
Whole candidates side by side do not wait for each other, and what they compute does not depend on how many
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """`map` as a list: results in the order of the items."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> list[R]: ...


def in_turn(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    return [function(item) for item in items]


@contextmanager
def side_by_side() -> Iterator[Map]:
    """As many workers as PyTorch would use threads; PyTorch itself keeps to one meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:

            def spread(function: Callable[[T], R], items: Iterable[T], /) -> list[R]:
                return list(pool.map(lambda item: _work(function, item), items))

            yield spread
    finally:
        torch.set_num_threads(threads)


def _work(function: Callable[[T], R], item: T) -> R:
    torch.set_num_threads(1)  # a new thread starts with the default
    with torch.inference_mode():  # which holds for one thread
        return function(item)
