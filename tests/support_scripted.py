"""A model of given logits: what an evaluation makes of them can be computed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nybble.evaluation.model import Rows, Tokens


class ScriptedModel:
    """`logits` [V, V]: those after token t are `logits[t]`, wherever it stands; `chunk` rows at a time."""

    def __init__(self, logits: Tensor, chunk: int = 3) -> None:
        self.logits = logits
        self.chunk = chunk
        self.vocab_size = logits.shape[1]

    def run(self, texts: Sequence[Tokens]) -> Iterator[Rows]:
        for tokens in texts:

            def rows(first: int, stop: int, tokens: Tokens = tokens) -> Iterator[Tensor]:
                yield from self.logits[torch.tensor(tokens[first:stop])].split(self.chunk)

            yield rows

    def describe(self) -> Mapping[str, object]:
        return {"path": "scripted"}


def random_logits(seed: int, vocabulary: int = 11) -> Tensor:
    return 2 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
