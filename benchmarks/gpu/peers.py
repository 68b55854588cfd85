"""Peers inside PyTorch itself, and the list of all peers. Each is checked before it is timed.

`_weight_int4pack_mm` is the tinygemm kernel; `_int_mm` takes more than 16 rows only, so fewer are padded to
32; `_scaled_mm` is cuBLASLt's fp8 product with a scale a row.
"""

from __future__ import annotations

import torch
from peers_packages import (
    BitsAndBytes8,
    BitsAndBytesNf4,
    Gemlite4,
    Gemlite8,
    Humming4,
    Humming8,
    TorchAo4,
    TorchAo8,
)
from subject import Matrix, Prepared, Subject, rows8
from tinygemm import pack_tinygemm
from torch import Tensor
from torch.nn import functional as F

PADDED = 32  # rows that `_int_mm` is given at least


class Cublas(Subject):
    """F.linear in 16 bits: what quantization is measured against."""

    kind = "16-bit"
    on_cpu = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = f"cuBLAS {str(dtype).removeprefix('torch.')}"

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        weight = matrix.dense.to(self.dtype)
        return Prepared((weight,), F.linear, weight)


class TinyGemm(Subject):
    name = "torch _weight_int4pack_mm"
    kind = "W4A16"
    tolerance = 2e-2  # it keeps scales and zeros in bfloat16

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        words, scales_and_zeros, means = pack_tinygemm(matrix.codes)
        group = matrix.codes.group_size

        def run(x: Tensor, words: Tensor, scales_and_zeros: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, words, group, scales_and_zeros)

        return Prepared((words, scales_and_zeros), run, means)


class IntMm(Subject):
    """Per-token scales of x, the product in int32, both scales applied: three more small kernels."""

    name = "torch _int_mm"
    kind = "W8A8"
    on_cpu = True
    tolerance = 2e-2

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        codes, scales = rows8(matrix.dense)
        padding = max(0, PADDED - m)

        def run(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
            step = x.abs().amax(1, keepdim=True).float().clamp_min(1e-8) / 127
            rounded = F.pad((x / step).round().to(torch.int8), (0, 0, 0, padding))
            product = torch._int_mm(rounded, codes.T)[: x.shape[0]]
            return (product * step * scales.T).to(x.dtype)

        return Prepared((codes, scales), run, codes * scales)


class IntMmAlone(Subject):
    """The integer product alone: no scales are found or applied, so a bound for the library, not an op."""

    name = "torch _int_mm, product alone"
    kind = "int8 product"
    dtype = torch.int8
    on_cpu = True
    tolerance = 1e-6

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        codes, _ = rows8(matrix.dense)
        padding = max(0, PADDED - m)

        def run(x: Tensor, codes: Tensor) -> Tensor:
            return torch._int_mm(F.pad(x, (0, 0, 0, padding)) if padding else x, codes.T)

        return Prepared((codes,), run, codes)


class ScaledMm(Subject):
    name = "torch _scaled_mm"
    kind = "fp8"
    tolerance = 5e-2
    top = 448.0  # the largest float8_e4m3fn

    def available(self) -> str | None:
        if reason := super().available():
            return reason
        return None if torch.cuda.get_device_capability() >= (8, 9) else "needs compute capability 8.9"

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        scales = matrix.dense.abs().amax(1, keepdim=True).clamp_min(1e-8) / self.top
        weight = (matrix.dense / scales).to(torch.float8_e4m3fn)

        def run(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
            step = x.abs().amax(1, keepdim=True).float().clamp_min(1e-8) / self.top
            rounded = (x / step).to(torch.float8_e4m3fn)
            return torch._scaled_mm(
                rounded, weight.T, scale_a=step, scale_b=scales.T, out_dtype=torch.bfloat16
            )

        return Prepared((weight, scales), run, weight.float() * scales)


def peers() -> list[Subject]:
    """All of them, the most telling first: where time runs out, the last are left out."""
    return [
        Cublas(torch.bfloat16),
        TinyGemm(),
        Humming4(),
        Gemlite4(),
        IntMm(),
        ScaledMm(),
        Cublas(torch.float16),
        TorchAo4(),
        BitsAndBytesNf4(),
        Humming8(),
        Gemlite8(),
        BitsAndBytes8(),
        TorchAo8(),
        IntMmAlone(),
    ]
