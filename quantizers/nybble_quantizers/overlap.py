"""Whether two texts share runs of ten words: a model that was calibrated on a text is not judged by it."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise

RUN = 10
KEPT = 1024
WORD = re.compile(r"\w+")


def runs(text: str) -> Iterator[tuple[str, str]]:
    """Each run of ten words, lower case and without punctuation, and its fingerprint."""
    words = WORD.findall(text.lower())
    for first in range(len(words) - RUN + 1):
        run = " ".join(words[first : first + RUN])
        yield run, hashlib.blake2b(run.encode(), digest_size=6).hexdigest()


def sketch(documents: Iterable[str]) -> list[str]:
    """The smallest fingerprints of all runs: of a short text all, of a long one a fair sample.

    A text that shares a part p of its runs with another has none of them here with probability
    (1 - p)^1024.
    """
    return heapq.nsmallest(KEPT, {print for document in documents for _, print in runs(document)})


def shared(text: str, fingerprints: Collection[str]) -> list[str]:
    """The runs of `text` that have one of these fingerprints, neighbours counted once."""
    held = frozenset(fingerprints)
    hits = [(place, run) for place, (run, print) in enumerate(runs(text)) if print in held]
    return [run for _, run in hits[:1]] + [b[1] for a, b in pairwise(hits) if b[0] > a[0] + 1]
