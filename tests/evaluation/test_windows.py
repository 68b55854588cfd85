"""Losses, perplexity and divergence of windows, against the same sums written down in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nybble.errors import CheckpointError
from nybble.evaluation.windows import score, summarize
from support_scripted import ScriptedModel, random_logits

WINDOWS = [(1, 5, 2, 10, 0, 3, 7), (4, 4, 9, 8, 1, 6, 2), (0, 1, 2, 3, 4, 5, 6)]


def quiet(phase: str, fraction: float) -> None:
    pass


def losses(logits: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    logs = logits.double().log_softmax(-1)
    return torch.stack([-logs[a, b] for a, b in itertools.pairwise(tokens)])


def test_perplexity_is_exp_of_the_mean_of_window_means() -> None:
    logits = random_logits(0)
    scores = list(score(ScriptedModel(logits), None, WINDOWS, quiet))
    means = [float(losses(logits, tokens).mean()) for tokens in WINDOWS]
    assert [each.loss for each in scores] == pytest.approx(means, rel=1e-6)
    assert all(each.divergence is None and each.reference_loss is None for each in scores)
    found = summarize(scores)
    assert set(found) == {"perplexity"}
    assert found["perplexity"].value == pytest.approx(math.exp(sum(means) / 3), rel=1e-6)


def test_divergence_from_a_reference() -> None:
    own, truth = random_logits(1), random_logits(2)
    scores = list(score(ScriptedModel(own), ScriptedModel(truth), WINDOWS, quiet))
    p, q = truth.double().log_softmax(-1), own.double().log_softmax(-1)
    rows = (p.exp() * (p - q)).sum(-1)
    tops = p.argmax(-1) == q.argmax(-1)
    for tokens, each in zip(WINDOWS, scores, strict=True):
        seen = torch.tensor(tokens[:-1])
        assert each.divergence == pytest.approx(float(rows[seen].mean()), rel=1e-5)
        assert each.agreement == pytest.approx(float(tops[seen].double().mean()))
        assert each.reference_loss == pytest.approx(float(losses(truth, tokens).mean()), rel=1e-6)
    found = summarize(scores)
    differences = [each.loss - (each.reference_loss or 0) for each in scores]
    assert found["perplexity_ratio"].value == pytest.approx(math.exp(sum(differences) / 3), rel=1e-9)
    ratio = found["perplexity"].value / found["reference_perplexity"].value
    assert found["perplexity_ratio"].value == pytest.approx(ratio, rel=1e-9)


def test_a_model_beside_itself() -> None:
    logits = random_logits(3)
    found = summarize(list(score(ScriptedModel(logits), ScriptedModel(logits.clone()), WINDOWS, quiet)))
    assert found["kl_divergence"].value == 0
    assert found["kl_divergence"].ends == (0, 0)
    assert found["top1_agreement"].value == 1
    assert found["perplexity_ratio"].value == 1


def test_the_ratio_is_paired() -> None:
    """Windows differ much, the models little: the ratio's interval is that of the difference."""
    logits = random_logits(4)
    near = logits + 0.01 * random_logits(5)
    found = summarize(list(score(ScriptedModel(near), ScriptedModel(logits), WINDOWS, quiet)))
    low, high = found["perplexity_ratio"].ends or (0, 9)
    wide_low, wide_high = found["perplexity"].ends or (0, 0)
    assert high - low < 0.1 < (wide_high - wide_low) / found["perplexity"].value


def test_progress_ends_at_one() -> None:
    heard: list[float] = []
    list(score(ScriptedModel(random_logits(0)), None, WINDOWS, lambda phase, part: heard.append(part)))
    assert heard == [1 / 3, 2 / 3, 1.0]


def test_logits_that_are_no_numbers_are_one_line() -> None:
    logits = random_logits(0)
    logits[4] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        list(score(ScriptedModel(logits), None, WINDOWS, quiet))
