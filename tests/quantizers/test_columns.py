"""GPTQ's inner loops: compiled and in PyTorch the same numbers, and each what it says."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from nybble_quantizers import columns
from nybble_quantizers.columns import PlainColumns, columns_on
from nybble_quantizers.loops import LANES, CompiledColumns

PLAIN, COMPILED = PlainColumns(), CompiledColumns()
COUNTS = (1, LANES - 1, LANES, 2 * LANES + 3)
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_processor_runs_compiled_loops() -> None:
    assert isinstance(columns_on(torch.device("cpu")), CompiledColumns)
    assert isinstance(columns_on(torch.device("cuda")), PlainColumns)


def test_without_numba_pytorch_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nybble_quantizers.loops", None)
    columns._compiled.cache_clear()
    assert isinstance(columns_on(torch.device("cpu")), PlainColumns)
    assert "without Numba" in caplog.text
    columns._compiled.cache_clear()


@SYMMETRIC
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_same_range_is_found(bits: int, size: int, count: int, symmetric: bool) -> None:
    weights, costs = random(size, count) * 0.02, random(size, seed=1).abs()
    wanted, moved = PLAIN.search(weights, costs, bits, symmetric)
    found, also_moved = COMPILED.search(weights, costs, bits, symmetric)
    assert torch.equal(found.scales, wanted.scales)
    assert torch.equal(found.zeros, wanted.zeros)
    assert torch.equal(also_moved, moved)
    assert size < 64 or count < LANES or bits > 4 or bool(moved.any())


@SYMMETRIC
@pytest.mark.parametrize(
    "weights",
    [torch.zeros(8, 3), random(8, 3) * 1e-7, random(8, 3) * 1e-5, random(8, 3).abs(), -random(8, 3).abs()],
    ids=["zeros", "below float16", "the smallest of float16", "positive", "negative"],
)
def test_the_same_range_at_the_ends_of_float16(weights: Tensor, symmetric: bool) -> None:
    wanted, moved = PLAIN.search(weights, torch.ones(8), 4, symmetric)
    found, also_moved = COMPILED.search(weights, torch.ones(8), 4, symmetric)
    assert torch.equal(found.scales, wanted.scales)
    assert torch.equal(found.zeros, wanted.zeros)
    assert torch.equal(also_moved, moved)


@SYMMETRIC
@pytest.mark.parametrize("value", [1e9, float("inf"), float("nan")])
def test_a_scale_past_float16_is_not_finite(value: float, symmetric: bool) -> None:
    weights = random(8, 3)
    weights[2, 1] = value
    found, _ = COMPILED.search(weights, torch.ones(8), 4, symmetric)
    assert found.scales.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("static", [False, True], ids=["a group", "a grid an input"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("inputs", [1, 5, 64])
def test_errors_are_spread_alike(inputs: int, count: int, static: bool) -> None:
    rows = inputs if static else 1
    scales, zeros = random(rows, count, seed=2).abs() + 0.1, torch.full((rows, count), 8.0)
    upper = random(inputs, inputs, seed=3).triu(1) * 0.2 + torch.eye(inputs) * 0.7
    done = []
    for each in (PLAIN, COMPILED):
        work, codes = random(inputs, count), torch.full((inputs, count), float("nan"))
        errors = each.compensate(work, codes, scales, zeros, upper, 15)
        assert torch.allclose(errors, (work - (codes - 8) * scales) / upper.diagonal()[:, None], atol=1e-5)
        done.append((work, codes, errors))
    (work, codes, errors), (also_work, also_codes, also_errors) = done
    assert torch.equal(codes, also_codes)
    assert torch.allclose(work, also_work, atol=1e-5)
    assert torch.allclose(errors, also_errors, atol=1e-5)
    assert not torch.equal(work, random(inputs, count)) or inputs == 1


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("inputs", [1, 5, 64])
def test_codes_descend_alike(inputs: int, count: int) -> None:
    scales, x = random(count, seed=2).abs() + 0.1, random(300, inputs, seed=3)
    hessian, pulls, start = x.T @ x, random(inputs, count, seed=4) * 200, torch.full((inputs, count), 7.0)
    codes, also_codes = start.clone(), start.clone()
    changes = PLAIN.descend(codes, pulls, scales, hessian, 15)
    also_changes = COMPILED.descend(also_codes, pulls, scales, hessian, 15)
    assert torch.equal(codes, also_codes)
    assert torch.allclose(changes, also_changes)
    assert torch.allclose(changes, (codes - start) * scales)
    # 2 Σ pull · change + change H change is by how much the sum grew
    assert bool((2 * (pulls * changes) + (hessian @ changes) * changes).sum(0).le(0).all())
    assert not torch.equal(codes, start)
