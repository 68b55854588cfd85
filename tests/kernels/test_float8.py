"""A weight of 8-bit floats behaves as other quantized weights do; inputs are rounded as they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble_kernels import torch_cpu
from nybble_kernels.activations import Activations, Kind
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import dense, look_up, shape_of, stacked
from support_quantized import quantized


def made(n: int = 6, k: int = 40, group: int = 40, seed: int = 0) -> Float8Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(n, k, generator=generator) * 60).to(torch.float8_e4m3fn)
    return Float8Tensor(values, torch.rand(n, -(-k // group), generator=generator) + 0.1, group)


def plain(weight: Float8Tensor) -> Tensor:
    """Element by element."""
    n, k = weight.shape
    values, scales, size = weight.values.float(), weight.scales, weight.group_size
    return torch.tensor([[float(values[i, j] * scales[i, j // size]) for j in range(k)] for i in range(n)])


@pytest.mark.parametrize("group", [40, 16], ids=["rows", "short last group"])
def test_values_times_scales(group: int) -> None:
    weight = made(group=group)
    expected = plain(weight)
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(dense(weight, torch.bfloat16), expected.bfloat16())
    assert shape_of(weight) == weight.shape == (6, 40)
    assert weight.by_row == (group == 40)
    assert weight.nbytes == 240 + 2 * 6 * (1 if group == 40 else 3)


def test_rows_and_selected_rows() -> None:
    weight = made()
    order = torch.tensor([5, 0, 3])
    assert torch.equal(weight.rows(2, 5).dequantize(), weight.dequantize()[2:5])
    assert torch.equal(weight.select(order).dequantize(), weight.dequantize()[order])
    assert torch.equal(look_up(weight, order), weight.dequantize()[order])
    assert weight.to("cpu").device == torch.device("cpu")


def test_partners_are_stacked_where_their_groups_agree() -> None:
    parts = [made(seed=0), made(3, seed=1)]
    whole = stacked(parts)
    assert isinstance(whole, Float8Tensor)
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert stacked([made(), made(group=16)]) is None
    assert stacked([made(), quantized(6, 40, 8, 40, "symmetric")]) is None
    assert stacked([made(), torch.zeros(6, 40)]) is None


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        (torch.zeros(4, 8), torch.ones(4, 1)),
        (torch.zeros(4, dtype=torch.float8_e4m3fn), torch.ones(4, 1)),
        (torch.zeros(4, 8, dtype=torch.float8_e4m3fn), torch.ones(4, 2)),
    ],
    ids=["type", "shape", "scales"],
)
def test_contradictions_are_refused(values: Tensor, scales: Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        Float8Tensor(values, scales, 8)


def test_torchs_products_read_it_as_bfloat16() -> None:
    weight, x = made(32, 64, 64), torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    packed = torch_cpu.pack(weight)
    assert torch.allclose(packed(x), x @ weight.dequantize(torch.bfloat16).float().T, rtol=1e-4, atol=1e-4)
    assert packed.nbytes == 2 * 32 * 64


@pytest.mark.parametrize(("kind", "worst"), [("int", 0.5 / 127), ("float", 1 / 16)])
def test_inputs_are_rounded_by_the_row(kind: Kind, worst: float) -> None:
    """The largest of each row stays what it is; scaling a row scales what is made of it."""
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    found = Activations(kind).round(x)
    at = x.abs().argmax(1, keepdim=True)
    largest = x.gather(1, at)
    assert torch.allclose(found.gather(1, at), largest, rtol=1e-6)
    assert float(((found - x).abs() / largest.abs()).max()) <= worst * (1 + 1e-5)
    assert torch.allclose(Activations(kind).round(x * 8), found * 8, rtol=1e-6)


@pytest.mark.parametrize(("kind", "least", "top"), [("int", -128, 127), ("float", -448, 448)])
def test_inputs_past_a_static_scale_saturate(kind: Kind, least: int, top: int) -> None:
    x = torch.tensor([[0.25, 1e4], [-1e4, 0.25]])
    found = Activations(kind, 0.25).round(x)
    assert found.tolist() == [[0.25, 0.25 * top], [0.25 * least, 0.25]]


def test_equal_activations_are_one() -> None:
    assert len({Activations("int"), Activations("int"), Activations("int", 0.5), Activations("float")}) == 3
