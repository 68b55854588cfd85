"""The 2- to 8-bit product: every group size, zero point, output and norm, and the same bits in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.quantized import QuantizedTensor
from nybble_kernels.triton.epilogue import Activate, Operand, Output, Residual, Store, make_operand
from nybble_kernels.triton.linear_w4a16 import linear_w4a16
from nybble_kernels.triton.packing import UnsupportedLayout, pack, unpack
from nybble_kernels.triton.tiles import Tile, Workspace
from support_quantized import quantized
from support_triton import assert_close, poisoned

DTYPES = [torch.float16, torch.bfloat16]
KINDS = [
    pytest.param(4, 128, "zeros", 256, id="int4-g128"),
    pytest.param(4, 128, "", 384, id="int4-g128-symmetric-odd-units"),
    pytest.param(4, 64, "zeros", 576, id="int4-g64-576"),
    pytest.param(4, 32, "zeros", 160, id="int4-g32-half-unit"),
    pytest.param(4, 96, "zeros", 192, id="int4-g96"),
    pytest.param(4, 4096, "zeros", 160, id="int4-row"),
    pytest.param(4, 32, "minimums", 96, id="int4-g32-minimums"),
    pytest.param(4, 128, "minimums", 256, id="int4-g128-minimums"),
    pytest.param(3, 128, "zeros", 256, id="int3-g128"),
    pytest.param(2, 64, "", 128, id="int2-g64-symmetric"),
    pytest.param(8, 128, "zeros", 256, id="int8-g128"),
    pytest.param(8, 32, "", 96, id="int8-g32-symmetric"),
]


def scaled(bits: int, group: int, kind: str, n: int, k: int, seed: int = 1) -> QuantizedTensor:
    """Weights about as large as a model's, so that sums of products are about one."""
    weight = quantized(n, k, bits, group, kind, seed)
    return replace(
        weight,
        scales=(weight.scales / 2**bits).half().float(),
        minimums=None if weight.minimums is None else weight.minimums / 2,
    )


def operand_of(x: Tensor, rows: int, device: torch.device) -> Operand:
    made = make_operand(rows, x.shape[1], 64, x.dtype, device)
    made.values.fill_(float("nan"))  # rows beyond the batch must not matter
    made.values[: len(x)] = x.to(device)
    return made


def run(
    weight: QuantizedTensor,
    operand: Operand,
    rows: int,
    output: Output,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    colsum: Tensor | None = None,
) -> None:
    device = operand.values.device
    workspace = Workspace.allocate([(tile, weight.out_features, rows)], device)
    workspace.partial.fill_(float("nan"))
    packed = pack(weight.to(device))
    linear_w4a16(operand, rows, packed, output, tile, workspace, bias=bias, colsum=colsum)
    assert not workspace.counters.any(), "counters are left at zero for the next launch"


@pytest.mark.parametrize(("bits", "group", "kind", "k"), KINDS)
def test_unpack_is_the_inverse_of_pack(bits: int, group: int, kind: str, k: int) -> None:
    weight = scaled(bits, group, kind, 100, k)
    assert torch.equal(unpack(pack(weight)), weight.codes)


def test_word_holds_what_a_lane_multiplies() -> None:
    """Lane 5 of the first piece: rows 1 and 9, columns 2, 3, 10, 11, spelled out by hand."""
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    codes[1, 2], codes[1, 3], codes[9, 2], codes[9, 3] = 1, 2, 3, 4
    codes[1, 10], codes[1, 11], codes[9, 10], codes[9, 11] = 5, 6, 7, 8
    packed = pack(QuantizedTensor(codes, torch.ones(64, 1), 4, 64))
    assert packed.words.shape == (4, 1, 128)
    assert int(packed.words[0, 0, 5 * 4]) & 0xFFFFFFFF == 0x86427531
    assert int(packed.words[0, 0].count_nonzero()) == 1


def test_groups_that_no_kernel_reads_are_named() -> None:
    with pytest.raises(UnsupportedLayout, match="groups of 48"):
        pack(quantized(64, 96, 4, 48, "zeros"))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(("bits", "group", "kind", "k"), KINDS)
def test_product_matches_reference(
    bits: int, group: int, kind: str, k: int, dtype: torch.dtype, split: int, device: torch.device
) -> None:
    weight = scaled(bits, group, kind, 100, k)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = poisoned(5, 100, device=device)
    run(weight, operand_of(x, 16, device), 3, Store(y), Tile(split=split, unroll=1))
    assert_close(y[:3], x.double() @ weight.dequantize().double().t())
    assert y[3:].isnan().all(), "rows beyond the batch stay as they were"


def test_permuted_inputs(device: torch.device) -> None:
    weight = replace(scaled(4, 64, "zeros", 64, 192), permutation=torch.randperm(192))
    x = torch.randn(2, 192).half()
    y = poisoned(2, 64, device=device)
    run(weight, operand_of(x, 16, device), 2, Store(y), Tile())
    assert_close(y, x.double() @ weight.dequantize().double().t())


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_before_the_product(norm: str, split: int, device: torch.device) -> None:
    """A residual kernel writes x ∘ w with its statistics; the next product makes it norm(x) Wᵀ + b."""
    first, second = scaled(4, 64, "zeros", 192, 128, 3), scaled(4, 64, "zeros", 80, 192, 4)
    inner = torch.randn(3, 128).half()
    x, gain, shift = 5 * torch.randn(3, 192) + 2, torch.rand(192) + 0.5, torch.randn(192)
    stream = x.clone().to(device)
    operand = make_operand(16, 192, 64, torch.float16, device)
    operand.values.fill_(float("nan"))
    operand.stats.fill_(float("nan"))
    residual = Residual(stream, operand, gain.to(device))
    run(first, operand_of(inner, 16, device), 3, residual, Tile(split=split))
    summed = x.double() + inner.double() @ first.dequantize().double().t()
    assert_close(stream, summed)
    assert_close(operand.values[:3], summed * gain)
    assert_close(operand.stats[2, :, :3].amax(0), operand.values[:3].abs().amax(1))

    bias, colsum = torch.randn(80), None
    if norm == "rms":
        expected = reference.rms_norm(summed, gain, 1e-5)
    else:
        expected = reference.layer_norm(summed, gain, shift, 1e-5)
        colsum = (second.dequantize() @ gain).to(device)
        bias = bias + second.dequantize() @ shift
    y = poisoned(3, 80, device=device)
    normed = replace(operand, norm=norm, eps=1e-5)
    run(second, normed, 3, Store(y), Tile(split=split), bias=bias.to(device), colsum=colsum)
    wanted = expected.double() @ second.dequantize().double().t()
    wanted += (bias - second.dequantize() @ shift).double() if norm == "layer" else bias.double()
    assert_close(y, wanted, torch.float16)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_activation_after_the_product(gated: bool, kind: str, device: torch.device) -> None:
    weight = scaled(4, 64, "zeros", 144, 128)
    x = torch.randn(3, 128).half()
    width = 72 if gated else 144
    operand = make_operand(16, width, 32 if gated else 64, torch.float16, device)
    operand.values.fill_(float("nan"))
    run(weight, operand_of(x, 16, device), 3, Activate(operand, kind, gated), Tile(split=2))
    v = x.double() @ weight.dequantize().double().t()
    wanted = reference.activation(v[:, ::2], kind) * v[:, 1::2] if gated else reference.activation(v, kind)
    assert_close(operand.values[:3], wanted)
    assert operand.values[3:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 70])
def test_row_alone_equals_row_in_a_batch(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit, whatever the batch and its tile: the parts of K and their order are those of the shape."""
    weight = scaled(4, 64, "zeros", 64, 192)
    x = torch.randn(rows, 192).to(dtype)
    columns = next(c for c in (16, 32, 64) if rows <= c or c == 64)
    together, alone = poisoned(rows, 64, device=device), poisoned(1, 64, device=device)
    run(weight, operand_of(x, 80, device), rows, Store(together), Tile(columns=columns, split=2, unroll=1))
    for row in {0, rows // 2, rows - 1}:
        run(weight, operand_of(x[row : row + 1], 16, device), 1, Store(alone), Tile(split=2))
        assert torch.equal(together[row], alone[0])


def test_wide_tile_of_a_prompt(device: torch.device) -> None:
    weight = scaled(4, 128, "zeros", 144, 256)
    x = torch.randn(130, 256).half()
    y = poisoned(130, 144, device=device)
    run(weight, operand_of(x, 130, device), 130, Store(y), Tile(warps=8, columns=128, unroll=1))
    assert_close(y, x.double() @ weight.dequantize().double().t())
