from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble_quantizers.hessian import hessian, lack


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_hessian_is_the_sum_over_windows() -> None:
    windows = [random(7 + i, 12, seed=i) for i in range(19)]
    joined = torch.cat(windows)
    assert torch.allclose(hessian(windows), joined.T @ joined, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [12, 300, 520])
def test_half_of_the_hessian_is_all_of_it(width: int) -> None:
    windows = [random(40, width, seed=i) for i in range(3)]
    found, joined = hessian(windows), torch.cat(windows).double()
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), joined.T @ joined, rtol=1e-4, atol=1e-3)


def test_what_outputs_lack_is_summed_over_windows() -> None:
    wanted, made = ([random(7 + i, 300, seed=seed + i) for i in range(5)] for seed in (0, 20))
    inputs = [random(7 + i, 12, seed=40 + i) for i in range(5)]
    expected = (torch.cat(wanted) - torch.cat(made)).T @ torch.cat(inputs)
    assert torch.allclose(lack(wanted, made, inputs), expected, rtol=1e-4, atol=1e-4)
