"""activation: u = act(v), or act(gate) ∘ up, for products whose epilogue could not do it.

Gate and up of different kinds are two launches, so their sums meet here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import launch_dependents, wait
from nybble_kernels.triton.epilogue import ACTIVATIONS, Operand, activate, write_operand

ROWS = 16  # of one program, in every batch: statistics are summed in one order


@triton.jit(do_not_specialize=["M"])
def kernel(
    gate, up, operand, stats, M,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr, STRIDE: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of columns, block of BM rows)."""
    tile = tl.program_id(0)
    mm = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tile * TILE + tl.arange(0, TILE)
    inside = (mm[None, :] < M) & (n[:, None] < WIDTH)
    wait(PDL)
    launch_dependents(PDL)
    u = tl.load(gate + mm[None, :] * GATE_STRIDE + n[:, None], mask=inside, other=0.0).to(tl.float32)
    u = activate(u, KIND)
    if up is not None:
        u *= tl.load(up + mm[None, :] * UP_STRIDE + n[:, None], mask=inside, other=0.0).to(tl.float32)
    write_operand(u, u, n, mm, M, operand, stats, tile, WIDTH, STRIDE, TILE)


def activation(gate: Tensor, up: Tensor | None, operand: Operand, *, kind: str, pdl: bool = False) -> None:
    """`operand` gets act(gate) ∘ up, or act(gate), and its statistics.

    gate, up: float [M, I], rows contiguous: buffers of their own, or halves `y[:, :I]` and `y[:, I:]` of one.
    """
    rows, width = gate.shape
    assert width == operand.width
    kernel[(-(-width // operand.tile), -(-rows // ROWS))](
        gate,
        up,
        operand.values,
        operand.stats,
        rows,
        WIDTH=width,
        TILE=operand.tile,
        BM=ROWS,
        GATE_STRIDE=gate.stride(0),
        UP_STRIDE=0 if up is None else up.stride(0),
        STRIDE=operand.stats.stride(1),
        KIND=ACTIVATIONS[kind],
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
