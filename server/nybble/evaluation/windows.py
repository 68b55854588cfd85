"""Windows of a text through one model or two: loss, divergence and agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from nybble.errors import CheckpointError
from nybble.evaluation.divergence import compare
from nybble.evaluation.intervals import Estimate, grow, mean
from nybble.evaluation.model import Model, Rows, Tell, Tokens


@dataclass(frozen=True, slots=True)
class Score:
    """Means over a window's tokens after its first: losses and KL(reference || model) in nats."""

    loss: float
    reference_loss: float | None = None
    divergence: float | None = None
    agreement: float | None = None


def score(model: Model, reference: Model | None, windows: Sequence[Tokens], tell: Tell) -> Iterator[Score]:
    """Window by window. Tokens of a window are not independent, windows nearly are."""
    ours = model.run(windows)
    theirs: Iterator[Rows | None] = repeat(None) if reference is None else reference.run(windows)
    for index, (tokens, own, other) in enumerate(zip(windows, ours, theirs, strict=False)):
        yield _score(tokens, own, other)
        tell("windows", (index + 1) / len(windows))


@torch.inference_mode()
def _score(tokens: Tokens, own: Rows, other: Rows | None) -> Score:
    count = len(tokens) - 1
    expected: Iterator[Tensor | None] = repeat(None) if other is None else other(0, count)
    sums = torch.zeros(4, dtype=torch.float64)
    start = 0
    for logits, truth in zip(own(0, count), expected, strict=False):
        targets = torch.tensor(tokens[start + 1 : start + 1 + len(logits)])[:, None]
        start += len(logits)
        q = logits.cpu().log_softmax(-1)
        sums[0] -= q.gather(1, targets).sum(dtype=torch.float64)
        if truth is None:
            continue
        p = truth.cpu().log_softmax(-1)
        compared = compare(p, q)
        sums[1] -= p.gather(1, targets).sum(dtype=torch.float64)
        sums[2] += compared.divergence.sum(dtype=torch.float64)
        sums[3] += compared.same_top.sum()
    loss, *rest = (sums / count).tolist()
    if not all(map(math.isfinite, (loss, *rest))):
        raise CheckpointError(
            "the logits are not finite", hint="is the model whole? --engine reference tells"
        )
    return Score(loss) if other is None else Score(loss, *rest)


def summarize(scores: Sequence[Score]) -> dict[str, Estimate]:
    """Estimates by name, intervals from the spread between windows.

    perplexity: exp of the mean of the windows' mean losses, as in the papers. perplexity_ratio: exp of the
    mean difference to the reference, window by window, so that what makes a window hard cancels.
    """
    found = {"perplexity": mean([each.loss for each in scores]).map(grow)}
    known = [s for s in scores if s.reference_loss is not None]
    if known:
        pairs = [(s.loss, s.reference_loss or 0.0) for s in known]
        found |= {
            "reference_perplexity": mean([other for _, other in pairs]).map(grow),
            "perplexity_ratio": mean([own - other for own, other in pairs]).map(grow),
            "kl_divergence": mean([s.divergence or 0.0 for s in known]).within(0.0),
            "top1_agreement": mean([s.agreement or 0.0 for s in known]).within(0.0, 1.0),
        }
    return found
