"""What is timed: one way to multiply by one matrix, ours or a peer's, behind one small interface."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from part import missing
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor

Run = Callable[..., object]


@dataclass(frozen=True, eq=False)
class Matrix:
    """One random weight, as the codes of a 4-bit form and as what they mean."""

    codes: QuantizedTensor  # 4 bits, groups of 128, integer zero points
    dense: Tensor  # float32 [N, K], `codes.dequantize()`

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight as a subject keeps it. `run(x, *tensors)` multiplies; tensors are all that differs by copy."""

    tensors: tuple[Tensor, ...]
    run: Run
    means: Tensor  # float [N, K]: what the kept form stands for, the oracle of the check

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def copy(self) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in self.tensors)


class Subject:
    """An adapter. `tolerance` bounds the relative error against float64: past it, nothing is timed."""

    name: str
    kind: str  # "W4A16", "W8A8", "fp8" or "16-bit": what is compared with what
    ours = False
    dtype = torch.bfloat16  # of the activations
    modules: tuple[str, ...] = ()
    on_cpu = False
    compiles = False  # whether its first call at a shape compiles something
    rows = (1, 1 << 30)  # batches it takes
    tolerance = 1e-2

    def available(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if absent := missing(*self.modules):
            return f"{', '.join(absent)} not installed"
        if not self.on_cpu and not torch.cuda.is_available():
            return f"needs a CUDA device{self.imported()}"
        return None

    def imported(self) -> str:
        """Whether its packages can at least be imported on this machine."""
        for name in self.modules:
            try:
                import_module(name)
            except Exception as error:  # whatever a package does on a machine it is not made for
                return f"; {name} does not import without one: {error}"
        return f"; {', '.join(self.modules)} can be imported" if self.modules else ""

    def takes(self, m: int) -> bool:
        return self.rows[0] <= m <= self.rows[1]

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        raise NotImplementedError


def random_codes(outputs: int, inputs: int, device: str, bits: int = 4, group: int = 128) -> QuantizedTensor:
    """Codes of every value, zero points around the middle; the product has about the size of its input."""
    groups, top = math.ceil(inputs / group), 2**bits
    scales = (torch.rand(outputs, groups, device=device) + 0.5) * 4 / (top * inputs**0.5)
    middle = top // 2
    zeros = torch.randint(middle - 1, middle + 2, (outputs, groups), device=device, dtype=torch.uint8)
    codes = torch.randint(0, top, (outputs, inputs), device=device, dtype=torch.uint8)
    return QuantizedTensor(codes, scales.half().float(), bits, group, zeros=zeros)


def random_matrix(outputs: int, inputs: int, device: str) -> Matrix:
    codes = random_codes(outputs, inputs, device)
    return Matrix(codes, codes.dequantize())


def rows8(dense: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and float32 [N, 1]: symmetric, one scale a row."""
    scales = dense.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    return (dense / scales).round().clamp(-127, 127).to(torch.int8), scales


def error(found: Tensor, x: Tensor, means: Tensor, most: int = 16) -> float:
    """‖y - x Wᵀ‖ / ‖x Wᵀ‖ in float64 over some rows, first and last among them; NaN passes nowhere."""
    chosen = torch.linspace(0, x.shape[0] - 1, min(most, x.shape[0]), device=x.device).long().unique()
    expected = torch.cat([x[chosen].double() @ block.double().T for block in means.split(8192)], dim=1)
    return float((found[chosen].double() - expected).norm() / expected.norm())
