"""Divergence and agreement of two distributions, by hand and against float64."""

from __future__ import annotations

import math

import pytest
import torch

from nybble.evaluation.divergence import compare


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_two_rows_by_hand() -> None:
    found = compare(logs([0.5, 0.5], [0.9, 0.1]), logs([0.25, 0.75], [0.8, 0.2]))
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    second = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.5)
    assert found.divergence.tolist() == pytest.approx([first, second], rel=1e-5)
    assert found.same_top.tolist() == [False, True]


def test_a_distribution_is_at_no_distance_from_itself() -> None:
    p = torch.randn(7, 50).log_softmax(-1)
    found = compare(p, p.clone())
    assert found.divergence.tolist() == [0.0] * 7
    assert found.same_top.all()


def test_large_vocabularies_agree_with_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    p = 4 * torch.randn(5, 40_000, generator=generator)
    q = p + 0.1 * torch.randn(5, 40_000, generator=generator)
    exact_p, exact_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = (exact_p.exp() * (exact_p - exact_q)).sum(-1)
    found = compare(p.log_softmax(-1), q.log_softmax(-1)).divergence
    assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-6)


def test_inputs_are_left_alone() -> None:
    p, q = torch.randn(2, 3, 9).log_softmax(-1)
    before = p.clone(), q.clone()
    compare(p, q)
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])
