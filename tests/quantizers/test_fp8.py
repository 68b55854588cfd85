"""8-bit floats: every code, every midpoint, what overflows; scales; and rounding that is made up for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble_kernels.float8 import Float8Tensor
from nybble_models.formats.form import CHANNEL, TENSOR, Form
from nybble_quantizers import fp8
from nybble_quantizers.gptq import factorise
from nybble_quantizers.rounding import fake, nearest


def meaning(code: int) -> float:
    """E4M3FN by its definition: sign, four bits of exponent with a bias of 7, three of mantissa."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


POSITIVE = [meaning(code) for code in range(0x7F)]  # 0x7F is not a number


def codes_of(*values: float) -> list[int]:
    made: list[int] = fp8.rounded(torch.tensor(values, dtype=torch.float32)).view(torch.uint8).tolist()
    return made


def test_the_table_is_that_of_the_type() -> None:
    held = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for code in range(256):
        assert bool(held[code].isnan()) if code & 0x7F == 0x7F else float(held[code]) == meaning(code)


def test_every_number_of_the_type_stays_what_it_is() -> None:
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    assert codes_of(*(meaning(code) for code in codes)) == codes


@pytest.mark.parametrize("sign", [0, 0x80], ids=["positive", "negative"])
def test_between_two_numbers_the_nearer_wins_and_halfway_the_even_mantissa(sign: int) -> None:
    """All 125 midpoints, subnormal ones too, and the nearest float32 on either side of each."""
    flip = -1.0 if sign else 1.0
    for low in range(0x7E):
        middle = torch.tensor((POSITIVE[low] + POSITIVE[low + 1]) / 2)
        below, above = (torch.nextafter(middle, torch.tensor(end)) for end in (0.0, 1e9))
        found = codes_of(*(flip * float(v) for v in (below, middle, above)))
        assert found == [sign | low, sign | (low + low % 2), sign | (low + 1)]


@pytest.mark.parametrize("value", [448.0, 449.0, 464.0, 480.0, 1e9, 3e38, float("inf")])
def test_overflow_saturates(value: float) -> None:
    assert codes_of(value, -value) == [0x7E, 0xFE]


def test_the_smallest_numbers_go_to_zero_and_keep_their_sign() -> None:
    half = 2.0**-10
    assert codes_of(half, -half, 1e-30, half * 1.0001, -half * 1.0001) == [0x00, 0x80, 0x00, 0x01, 0x81]


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        fp8.rounded(torch.tensor([1.0, float("nan")]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [CHANNEL, TENSOR], ids=["channel", "tensor"])
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e6])
def test_scales_are_float16_numbers_that_keep_the_largest_in_range(group: int, size: float) -> None:
    weight = random(16, 40) * size * torch.logspace(-1, 1, 16)[:, None]
    made = fp8.quantize(weight, group)
    assert torch.equal(made.scales.half().float(), made.scales)
    assert bool((weight.abs().amax(1, keepdim=True) <= 448 * made.scales).all())
    assert len(made.scales.unique()) == 1 or group == CHANNEL


def test_the_error_of_a_weight_is_at_most_a_sixteenth_of_it() -> None:
    weight = random(32, 64)
    made = fp8.quantize(weight, CHANNEL)
    normal = weight.abs() > made.scales * 2.0**-6
    missed = (made.dequantize() - weight).abs()
    assert bool((missed <= weight.abs() / 16 * (1 + 1e-6))[normal].all())
    assert bool((missed <= made.scales * 2.0**-10 * (1 + 1e-6)).masked_select(~normal).all())


def test_rows_of_zeros_stay_zero() -> None:
    made = fp8.quantize(torch.zeros(3, 8), CHANNEL)
    assert not made.dequantize().any()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e9])
def test_weights_past_the_scales_are_refused(value: float) -> None:
    weight = random(4, 8)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="too large"):
        fp8.quantize(weight, CHANNEL)


def correlated(tokens: int, channels: int) -> Tensor:
    return random(tokens, channels, seed=1) @ (random(channels, channels, seed=2) / 4 + torch.eye(channels))


def test_rounding_that_is_made_up_for_leaves_less_error() -> None:
    weight, x = random(48, 96), correlated(512, 96)
    factor = factorise(x.T @ x, 96)

    def error(made: Float8Tensor) -> float:
        return float(((made.dequantize() - weight) @ x.T).square().sum())

    assert error(fp8.compensated(weight, factor, CHANNEL)) < 0.6 * error(fp8.quantize(weight, CHANNEL))


@pytest.mark.parametrize("group", [CHANNEL, TENSOR], ids=["channel", "tensor"])
def test_with_inputs_that_have_nothing_to_do_with_each_other_it_is_the_nearest(group: int) -> None:
    weight = random(8, 200)
    made = fp8.compensated(weight, factorise(torch.eye(200), 200, damp=0.0), group)
    assert torch.equal(made.dequantize(), fp8.quantize(weight, group).dequantize())


@pytest.mark.parametrize(
    "form",
    [
        Form(8, CHANNEL, True, "float"),
        Form(8, TENSOR, True, "float"),
        Form(8, TENSOR, True),
        Form(8, CHANNEL, True),
        Form(4, 32),
    ],
    ids=["fp8", "fp8-tensor", "int8-tensor", "int8", "int4"],
)
def test_what_is_tried_is_what_is_made(form: Form) -> None:
    weight = random(16, 64)
    assert torch.equal(fake(weight, form), nearest(weight, form).dequantize())
