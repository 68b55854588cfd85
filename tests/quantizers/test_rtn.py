from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble_quantizers import rtn

BITS = st.integers(2, 8)
SIZES = st.sampled_from([1, 3, 16, 32, 40])


def random(rows: int, columns: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift


@given(BITS, SIZES, st.booleans(), st.integers(0, 999), st.sampled_from([-3.0, 0.0, 3.0]))
def test_no_weight_moves_by_more_than_half_a_step(
    bits: int, size: int, symmetric: bool, seed: int, shift: float
) -> None:
    weight = random(4, 40, seed, shift)
    made = rtn.quantize(weight, bits, size, symmetric)
    step = made.scales.repeat_interleave(size, dim=1)[:, :40]
    # The stored scale is rounded (a subnormal one coarsely): the last level may lie inside the extreme.
    slack = 2**bits * (step * 2.0**-10 + 2.0**-25)
    assert bool(((made.dequantize() - weight).abs() <= step * 0.5 + slack).all())


@given(BITS, SIZES, st.booleans(), st.integers(0, 999))
def test_codes_are_in_range_and_zero_is_exact(bits: int, size: int, symmetric: bool, seed: int) -> None:
    weight = random(4, 40, seed)
    weight[0] = 0
    weight[1, ::2] = 0
    made = rtn.quantize(weight, bits, size, symmetric)
    assert int(made.codes.max()) < 2**bits
    assert bool((made.dequantize()[weight == 0] == 0).all())
    assert made.symmetric == symmetric


@given(BITS, SIZES, st.booleans(), st.integers(0, 999))
def test_scales_are_what_will_be_stored(bits: int, size: int, symmetric: bool, seed: int) -> None:
    made = rtn.quantize(random(4, 40, seed), bits, size, symmetric)
    assert torch.equal(made.scales.half().float(), made.scales)


@given(BITS, st.sampled_from([8, 20, 40]), st.booleans(), st.integers(0, 999))
def test_fake_is_quantize_and_back(bits: int, size: int, symmetric: bool, seed: int) -> None:
    weight = random(4, 40, seed)
    expected = rtn.quantize(weight, bits, size, symmetric).dequantize()
    assert torch.equal(rtn.fake(weight, bits, size, symmetric), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_least_weight_of_a_symmetric_group_takes_the_lowest_level(bits: int) -> None:
    weight = random(200, 32, seed=3)
    weight[:, 5] = -weight.abs().amax(1) - 1
    assert int(rtn.quantize(weight, bits, 32, symmetric=True).codes[:, 5].max()) == 0


def test_weights_on_the_grid_stay_there() -> None:
    levels = torch.arange(16.0).repeat(3, 2) * 0.25 - 1.5
    assert torch.equal(rtn.quantize(levels, 4, 16).dequantize(), levels)


def test_an_all_positive_group_keeps_zero_in_its_range() -> None:
    made = rtn.quantize(torch.full((1, 8), 5.0), 4, 8)
    assert made.zeros is not None
    assert int(made.zeros) == 0
    assert torch.allclose(made.dequantize(), torch.full((1, 8), 5.0), rtol=1e-3)


def test_one_grid_for_the_tensor() -> None:
    made = rtn.quantize(random(6, 32, 0), 4, 8, per_tensor=True)
    assert made.scales.unique().numel() == 1
    finer = rtn.quantize(random(6, 32, 0), 4, 8)
    coarse, fine = ((m.dequantize() - random(6, 32, 0)).square().sum() for m in (made, finer))
    assert fine < coarse


@pytest.mark.parametrize("size", [8, 16, 48], ids=["groups of 8", "groups of 16", "whole rows"])
def test_smaller_groups_lose_less(size: int) -> None:
    weight = random(16, 48, 1)
    errors = [(rtn.quantize(weight, 4, s).dequantize() - weight).square().sum() for s in (4, size)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("value", [1e9, float("nan"), float("inf")], ids=str)
def test_what_no_scale_can_hold_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="too large"):
        rtn.quantize(torch.tensor([[1.0, value]]), 4, 2)


@settings(max_examples=40, deadline=None)
@given(BITS, SIZES, st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_searched_grid_is_never_worse(
    bits: int, size: int, symmetric: bool, shared: bool, seed: int
) -> None:
    weight = random(4, 40, seed)
    plain, searched = (
        rtn.quantize(weight, bits, size, symmetric, per_tensor=shared, mse=mse, power=2.0)
        for mse in (False, True)
    )
    before, after = (float((made.dequantize() - weight).square().sum()) for made in (plain, searched))
    assert after <= before * (1 + 1e-5)
    assert (searched.symmetric, searched.group_size) == (symmetric, size)
    assert not shared or len(searched.scales.unique()) == 1


def test_a_searched_grid_gives_up_one_weight_for_the_others() -> None:
    weight = random(8, 64, 0)
    weight[:, 3] = 5
    plain, searched = (rtn.quantize(weight, 3, 64, mse=mse, power=2.0).dequantize() for mse in (False, True))
    assert float((searched - weight).square().sum()) < 0.9 * float((plain - weight).square().sum())


def test_a_searched_grid_leaves_weights_on_the_grid_alone() -> None:
    weight = (torch.arange(16.0).repeat(3, 3) - 6) * 0.25
    assert torch.equal(rtn.quantize(weight, 4, 16, mse=True).dequantize(), weight)
