"""The product with 16-bit weights as stored: odd shapes, parts of K, outputs, the same bits in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.triton.epilogue import Activate, Operand, Output, Residual, Store
from nybble_kernels.triton.linear_f16 import linear_f16
from nybble_kernels.triton.tiles import Tile, default_cut
from support_operand import empty_operand, operand_of, workspace_of
from support_triton import assert_close, poisoned

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def matrix(n: int, k: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)


def rows_of(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(2)).to(dtype)


def run(
    weight: Tensor,
    operand: Operand,
    rows: int,
    output: Output,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    colsum: Tensor | None = None,
) -> None:
    device = operand.values.device
    workspace = workspace_of(tile, len(weight), rows, device)
    linear_f16(operand, rows, weight.to(device), output, tile, workspace, bias=bias, colsum=colsum)
    assert not workspace.counters.any(), "counters are left at zero for the next launch"


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(("n", "k"), [(100, 96), (64, 576), (144, 320), (72, 40)])
def test_product_matches_reference(
    n: int, k: int, dtype: torch.dtype, split: int, device: torch.device
) -> None:
    """Outputs and inputs that fill no whole tile, parts of K that are short or empty."""
    weight, x = matrix(n, k, dtype), rows_of(3, k, dtype)
    y = poisoned(5, n, device=device)
    run(weight, operand_of(x, 16, device), 3, Store(y), Tile(split=split, stages=3))
    assert_close(y[:3], x.double() @ weight.double().t())
    assert y[3:].isnan().all(), "rows beyond the batch stay as they were"


@pytest.mark.parametrize("bias", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_bias_and_columns_of_a_wider_output(bias: torch.dtype, device: torch.device) -> None:
    weight, x, shift = matrix(96, 64), rows_of(2, 64), torch.randn(96).to(bias)
    y = poisoned(2, 200, dtype=torch.float16, device=device)
    run(weight, operand_of(x, 16, device), 2, Store(y, column=80), Tile(unroll=1), bias=shift.to(device))
    assert_close(y[:, 80:176], x.double() @ weight.double().t() + shift.double())
    assert y[:, :80].isnan().all() and y[:, 176:].isnan().all()


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_between_two_products(norm: str, split: int, device: torch.device) -> None:
    """The first writes x ∘ w with its statistics; the second makes it norm(x) Wᵀ + b."""
    first, second = matrix(192, 128, seed=3), matrix(80, 192, seed=4)
    inner, x = rows_of(3, 128), 5 * torch.randn(3, 192) + 2
    gain, shift = torch.rand(192) + 0.5, torch.randn(192)
    stream = x.clone().to(device)
    operand = empty_operand(16, 192, 64, torch.float16, device)
    run(
        first, operand_of(inner, 16, device), 3, Residual(stream, operand, gain.to(device)), Tile(split=split)
    )
    summed = x.double() + inner.double() @ first.double().t()
    assert_close(stream, summed)
    assert_close(operand.values[:3], summed * gain)
    assert_close(operand.stats[2, :, :3].amax(0), operand.values[:3].abs().amax(1))

    if norm == "rms":
        wanted, colsum, bias = (
            reference.rms_norm(summed, gain, 1e-5).double() @ second.double().t(),
            None,
            None,
        )
    else:
        wanted = reference.layer_norm(summed, gain, shift, 1e-5).double() @ second.double().t()
        colsum, bias = (second.float() @ gain).to(device), (second.float() @ shift).to(device)
    y = poisoned(3, 80, device=device)
    normed = replace(operand, norm=norm, eps=1e-5)
    run(second, normed, 3, Store(y), Tile(split=split), bias=bias, colsum=colsum)
    assert_close(y, wanted, torch.float16)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_activation_after_the_product(gated: bool, kind: str, device: torch.device) -> None:
    weight, x = matrix(144, 128), rows_of(3, 128)
    operand = empty_operand(16, 72 if gated else 144, 32 if gated else 64, torch.float16, device)
    run(weight, operand_of(x, 16, device), 3, Activate(operand, kind, gated), Tile(split=2))
    v = x.double() @ weight.double().t()
    wanted = reference.activation(v[:, ::2], kind) * v[:, 1::2] if gated else reference.activation(v, kind)
    assert_close(operand.values[:3], wanted)
    assert operand.values[3:].isnan().all()
    assert_close(operand.stats[0, :, :3].sum(0), wanted.sum(1), torch.float16)


@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_row_alone_equals_row_in_a_batch(rows: int, device: torch.device) -> None:
    """Bit for bit among rows of one tile; parts of K begin at the same inputs in every tile."""
    weight, x = matrix(64, 320), rows_of(rows, 320)
    tile = Tile(columns=16, split=2, stages=3)
    together, alone = poisoned(rows, 64, device=device), poisoned(1, 64, device=device)
    run(weight, operand_of(x, 80, device), rows, Store(together), tile)
    for row in {0, rows // 2, rows - 1}:
        run(weight, operand_of(x[row : row + 1], 16, device), 1, Store(alone), tile)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("split", [1, 2])
def test_blocks_of_rows_of_a_prompt(split: int, device: torch.device) -> None:
    """More blocks than share the cache at a time, and tiles of outputs that no eight divide."""
    weight, x = matrix(200, 72), rows_of(150, 72)
    y = poisoned(151, 200, device=device)
    run(weight, operand_of(x, 150, device), 150, Store(y), Tile(columns=16, unroll=1, split=split))
    assert_close(y[:150], x.double() @ weight.double().t())
    assert y[150].isnan().all()


def test_wide_tile_of_a_prompt(device: torch.device) -> None:
    weight, x = matrix(144, 256), rows_of(130, 256)
    y = poisoned(130, 144, device=device)
    run(weight, operand_of(x, 130, device), 130, Store(y), Tile(warps=8, columns=128, unroll=1, stages=3))
    assert_close(y, x.double() @ weight.double().t())


@pytest.mark.parametrize(
    ("outputs", "inputs", "split"),
    [(12288, 4096, 2), (4096, 4096, 4), (128256, 4096, 1), (576, 576, 1), (768, 2048, 4)],
)
def test_default_parts_run_at_once(outputs: int, inputs: int, split: int) -> None:
    assert default_cut("f16", outputs, inputs, "decode").split == split
