"""The product of bytes: both ways of int8, float8, every scale, output and norm, same bits in any cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor
from nybble_kernels.triton.epilogue import Activate, Operand, Output, Residual, Store
from nybble_kernels.triton.linear_w8a8 import linear_w8a8
from nybble_kernels.triton.packing import UnsupportedLayout
from nybble_kernels.triton.packing8 import Packed8, pack8, pack_float8
from nybble_kernels.triton.quantize import QuantizedOperand, quantize_operand
from nybble_kernels.triton.tiles import Tile, default_cut
from support_operand import empty_operand, operand_of, workspace_of
from support_quantized import quantized
from support_triton import assert_close, poisoned

DTYPES = [torch.float16, torch.bfloat16]
ONE, SOME = Tile(columns=1, unroll=1), Tile(columns=16, stages=3)
WAYS = [pytest.param(ONE, id="dp4a"), pytest.param(SOME, id="tensor-cores")]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def int8(n: int, k: int, seed: int = 1, scale: float | None = None) -> Packed8:
    """Levels of about a model's size, so that sums of products are about one."""
    weight = quantized(n, k, 8, 2**20, "", seed)
    return pack8(replace(weight, scales=weight.scales / 73 / k**0.5), scale)


def float8(n: int, k: int, *, multiplies: bool = True, scale: float | None = None) -> Packed8:
    generator = torch.Generator().manual_seed(1)
    values = (60 * torch.randn(n, k, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = (torch.rand(n, generator=generator) + 0.5) / 60 / k**0.5
    return pack_float8(Float8Tensor(values, scales[:, None], k), scale, multiplies=multiplies)


def plain(packed: Packed8) -> tuple[Tensor, Tensor]:
    """Values [N, K] and scales [N] without their padding."""
    values = packed.values if packed.values.dtype == torch.int8 else packed.values.view(torch.float8_e4m3fn)
    return values[: packed.outputs, : packed.inputs].float(), packed.scales[: packed.outputs]


def dense(packed: Packed8) -> Tensor:
    values, scales = plain(packed)
    return values.double() * scales.double()[:, None]


def expected(x: Tensor, packed: Packed8) -> Tensor:
    """x as its codes mean it, times the weight, in float64."""
    dtype = torch.int8 if packed.values.dtype == torch.int8 else torch.float8_e4m3fn
    codes, steps = reference.quantize(x, dtype, packed.input_scale)
    return codes.double() * steps.double()[:, None] @ dense(packed).t()


def rows_of(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(2)).to(dtype)


def moved(packed: Packed8, device: torch.device) -> Packed8:
    return replace(packed, values=packed.values.to(device), scales=packed.scales.to(device))


def run(
    packed: Packed8,
    operand: Operand | QuantizedOperand,
    rows: int,
    output: Output,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    colsum: Tensor | None = None,
) -> None:
    device = operand.values.device
    workspace = workspace_of(tile, packed.outputs, rows, device)
    linear_w8a8(operand, rows, moved(packed, device), output, tile, workspace, bias=bias, colsum=colsum)
    assert not workspace.counters.any(), "counters are left at zero for the next launch"


def test_packed_bytes_are_signed_and_padded_with_zeros() -> None:
    weight = quantized(100, 96, 8, 96, "", 1)
    packed = pack8(weight)
    assert packed.values.shape == (128, 128) and packed.nbytes == 128 * 128 + 4 * 128
    assert torch.equal(packed.values[:100, :96].int(), weight.codes.int() - 128)
    assert not packed.values[100:].any() and not packed.values[:, 96:].any()


def test_permuted_inputs_come_back_in_order() -> None:
    weight = replace(quantized(64, 96, 8, 96, "", 1), permutation=torch.randperm(96))
    assert_close(dense(pack8(weight)).float(), weight.dequantize())


@pytest.mark.parametrize(
    "weight",
    [quantized(64, 96, 8, 32, ""), quantized(64, 96, 8, 96, "zeros"), quantized(64, 96, 4, 96, "")],
    ids=QuantizedTensor.describe,
)
def test_other_levels_are_named(weight: QuantizedTensor) -> None:
    with pytest.raises(UnsupportedLayout, match="symmetric rows"):
        pack8(weight)


@pytest.mark.parametrize("static", [None, 0.02], ids=["dynamic", "static"])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(("n", "k"), [(100, 96), (64, 576)])
@pytest.mark.parametrize("tile", WAYS)
def test_int8(
    tile: Tile, n: int, k: int, dtype: torch.dtype, split: int, static: float | None, device: torch.device
) -> None:
    """Outputs and inputs that fill no whole tile, parts of K that are short or empty."""
    packed, x = int8(n, k, scale=static), rows_of(3, k, dtype)
    y = poisoned(5, n, device=device)
    run(packed, operand_of(x, 16, device), 3, Store(y), replace(tile, split=split))
    assert_close(y[:3], expected(x, packed), torch.float16)
    assert y[3:].isnan().all(), "rows beyond the batch stay as they were"


@pytest.mark.parametrize("static", [None, 0.01], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(("n", "k", "split"), [(100, 96, 1), (64, 576, 2)])
def test_float8(
    n: int, k: int, split: int, dtype: torch.dtype, static: float | None, device: torch.device
) -> None:
    packed, x = float8(n, k, scale=static), rows_of(3, k, dtype)
    y = poisoned(5, n, device=device)
    run(packed, operand_of(x, 16, device), 3, Store(y), replace(SOME, split=split))
    assert_close(y[:3], expected(x, packed), torch.float16)
    assert y[3:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_float8_where_it_is_no_factor(dtype: torch.dtype, device: torch.device) -> None:
    """Every finite value of E4M3 comes through as 16 bits, and x is not quantized."""
    packed = float8(64, 256, multiplies=False)
    levels = torch.arange(256, dtype=torch.uint8)
    levels[levels & 0x7F == 0x7F] = 0  # not a number
    packed.values[0] = levels
    x, y = rows_of(3, 256, dtype), poisoned(3, 64, device=device)
    run(packed, operand_of(x, 16, device), 3, Store(y), SOME)
    assert_close(y, x.double() @ dense(packed).t())


@pytest.mark.parametrize("tile", WAYS)
def test_input_that_comes_quantized(tile: Tile, device: torch.device) -> None:
    packed, x = int8(100, 320), rows_of(3, 320)
    source = operand_of(x, 16, device)
    codes = torch.zeros(16, 320, dtype=torch.int8, device=device)
    operand = QuantizedOperand(codes, poisoned(16, device=device), source)
    quantize_operand(source, 3, operand)
    first, second = poisoned(2, 3, 100, device=device)
    run(packed, operand, 3, Store(first), replace(tile, split=2))
    run(packed, source, 3, Store(second), replace(tile, split=2))
    assert torch.equal(first, second)


def test_float8_input_that_comes_quantized(device: torch.device) -> None:
    packed, x = float8(72, 320), rows_of(20, 320)
    source = operand_of(x, 32, device)
    codes = torch.zeros(32, 320, dtype=torch.float8_e4m3fn, device=device)
    operand = QuantizedOperand(codes, poisoned(32, device=device), source)
    quantize_operand(source, 20, operand)
    y = poisoned(20, 72, device=device)
    run(packed, operand, 20, Store(y), Tile(columns=32, unroll=1, stages=3))
    assert_close(y, expected(x, packed), torch.float16)


@pytest.mark.parametrize(("norm", "static"), [("rms", None), ("rms", 0.03), ("layer", None)])
@pytest.mark.parametrize("tile", WAYS)
def test_norm_between_two_products(tile: Tile, norm: str, static: float | None, device: torch.device) -> None:
    """The first writes x ∘ w with its statistics; the second quantizes that and makes it norm(x) Wᵀ + b."""
    first, second = int8(192, 128, 3), int8(80, 192, 4, static)
    inner, x = rows_of(3, 128), 5 * torch.randn(3, 192) + 2
    gain, shift = torch.rand(192) + 0.5, torch.randn(192)
    stream = x.clone().to(device)
    operand = empty_operand(16, 192, 64, torch.float16, device)
    run(first, operand_of(inner, 16, device), 3, Residual(stream, operand, gain.to(device)), tile)
    summed = x.double() + expected(inner, first)
    assert_close(stream, summed, torch.float16)
    u = operand.values[:3].cpu()

    weight, colsum, bias = dense(second), None, None
    if norm == "rms":
        rms = summed.square().mean(1, keepdim=True).add(1e-5).sqrt()
        codes, steps = reference.quantize(u / (1.0 if static is None else rms), torch.int8, static)
        wanted = codes.double() * steps.double()[:, None] @ weight.t() / (rms if static is None else 1.0)
    else:
        codes, steps = reference.quantize(u, torch.int8)
        centred = codes.double() * steps.double()[:, None] - summed.mean(1, keepdim=True) * gain
        std = summed.var(1, correction=0, keepdim=True).add(1e-5).sqrt()
        wanted = (centred / std + shift) @ weight.t()
        colsum, bias = (
            (weight @ gain.double()).float().to(device),
            (weight @ shift.double()).float().to(device),
        )
    y, normed = poisoned(3, 80, device=device), replace(operand, norm=norm, eps=1e-5)
    run(second, normed, 3, Store(y), replace(tile, split=2), bias=bias, colsum=colsum)
    assert_close(y, wanted, torch.float16)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("tile", WAYS)
def test_activation_after_the_product(tile: Tile, gated: bool, device: torch.device) -> None:
    packed, x = int8(144, 128), rows_of(3, 128)
    operand = empty_operand(16, 72 if gated else 144, 32 if gated else 64, torch.float16, device)
    run(packed, operand_of(x, 16, device), 3, Activate(operand, "silu", gated), tile)
    v = expected(x, packed)
    wanted = (
        reference.activation(v[:, ::2], "silu") * v[:, 1::2] if gated else reference.activation(v, "silu")
    )
    assert_close(operand.values[:3], wanted)
    assert operand.values[3:].isnan().all()


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_every_cut_gives_the_same_bits(rows: int, device: torch.device) -> None:
    """Sums of int8 are exact: alone or in a batch, on either way, with the same parts of K."""
    packed, x = int8(64, 320), rows_of(rows, 320)
    source = operand_of(x, 80, device)
    cuts = [
        Tile(columns=16, split=2),
        Tile(columns=64, split=2, unroll=1, stages=3),
        Tile(columns=1, split=2),
    ]
    results = []
    for tile in cuts:
        y = poisoned(rows, 64, device=device)
        run(packed, source, rows, Store(y), tile)
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)
    alone = poisoned(1, 64, device=device)
    run(packed, operand_of(x[-1:], 80, device), 1, Store(alone), Tile(columns=1, split=2))
    assert torch.equal(alone[0], results[0][-1])


def test_largest_products_do_not_overflow(device: torch.device) -> None:
    """All codes at their ends, over as many inputs as fit a test."""
    weight = QuantizedTensor(torch.zeros(64, 2048, dtype=torch.uint8), torch.ones(64, 1), 8, 2048)
    x = -torch.ones(1, 2048).half()
    for tile in (ONE, SOME):
        y = poisoned(1, 64, device=device)
        run(pack8(weight), operand_of(x, 16, device), 1, Store(y), tile)
        assert_close(y, torch.full((1, 64), 128.0 * 2048))


def test_wide_tile_of_a_prompt(device: torch.device) -> None:
    packed, x = int8(144, 256), rows_of(130, 256)
    y = poisoned(130, 144, device=device)
    run(packed, operand_of(x, 130, device), 130, Store(y), Tile(warps=8, columns=128, unroll=1, stages=3))
    assert_close(y, expected(x, packed), torch.float16)


def test_static_scale_before_a_layer_norm_is_refused() -> None:
    operand = replace(operand_of(rows_of(1, 64), 16, torch.device("cpu")), norm="layer")
    with pytest.raises(ValueError, match="norm_quantize"):
        run(int8(64, 64, scale=0.1), operand, 1, Store(poisoned(1, 64)), SOME)


def test_one_column_takes_int8_in_fours() -> None:
    device = torch.device("cpu")
    for packed in (float8(64, 64), int8(64, 66)):
        x, y = rows_of(1, packed.inputs), poisoned(1, 64)
        with pytest.raises(ValueError, match="in fours"):
            run(packed, operand_of(x, 16, device), 1, Store(y), ONE)


@pytest.mark.parametrize(("outputs", "inputs", "split"), [(12288, 4096, 2), (4096, 11008, 4), (576, 576, 1)])
def test_default_parts_run_at_once(outputs: int, inputs: int, split: int) -> None:
    assert default_cut("w8a8", outputs, inputs, "decode").split == split
