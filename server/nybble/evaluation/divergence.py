"""How far one model's next-token distribution lies from another's: a function of log probabilities alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Comparison(NamedTuple):
    """Per row: KL divergence in nats, and whether both put the same token first. float32 and bool [T]."""

    divergence: Tensor
    same_top: Tensor


def compare(reference: Tensor, other: Tensor) -> Comparison:
    """KL(reference || other) = Σ p · (log p - log q), and argmax p = argmax q, row by row.

    reference, other: log probabilities [T, V] over the same tokens, none of them -inf. Changes neither.
    """
    terms = (reference - other).mul_(reference.exp())
    divergence = terms.sum(-1).clamp_(min=0.0)  # below zero by rounding only
    return Comparison(divergence, reference.argmax(-1) == other.argmax(-1))
