"""FP8: weights as 8-bit floats (E4M3) with a scale a row or one for the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble_kernels.float8 import LARGEST, Float8Tensor
from nybble_models.formats.form import TENSOR
from nybble_quantizers.gptq import Factor
from nybble_quantizers.grids import SMALLEST

BLOCK = 64  # inputs between two updates of all the weights still to come


def rounded(x: Tensor) -> Tensor:
    """float [..] -> float8_e4m3fn: to the nearest, ties to the even mantissa, ±448 for what lies beyond.

    Casts differ in what they make of an overflow, so this one meets none. Raises `ValueError` for NaN.
    """
    if bool(x.isnan().any()):
        raise ValueError("a value is not a number")
    return x.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def scales_of(weight: Tensor, group_size: int) -> Tensor:
    """float32 [N, 1]: max|w| / 448 of a row, or of the matrix, as a float16 number no smaller.

    Rounded up, the largest weight stays in range; a float grid has no step that this could coarsen.
    """
    largest = weight.abs().amax(1, keepdim=True)
    if group_size == TENSOR:
        largest = largest.amax().expand_as(largest)
    exact = (largest / LARGEST).clamp(min=SMALLEST)
    half = exact.to(torch.float16)
    above = (half.view(torch.int16) + 1).view(torch.float16)  # the next one up: they are positive
    return torch.where(half.float() < exact, above, half).float()


def quantize(weight: Tensor, group_size: int) -> Float8Tensor:
    """Minimises |w - ŵ| of each weight [N, K] under scales that put the largest of a row at 448.

    group_size: `CHANNEL`, or `TENSOR` for one scale in all. Raises `ValueError` for a weight that is not a
    number, or too large for a float16 scale.
    """
    weight = weight.float()
    scales = scales_of(weight, group_size)
    if not bool(scales.isfinite().all()):
        raise ValueError("a weight is too large for a float16 scale, or not a number")
    return Float8Tensor(rounded(weight / scales), scales, weight.shape[1])


def compensated(weight: Tensor, factor: Factor, group_size: int) -> Float8Tensor:
    """GPTQ's rounding to 8-bit floats: minimises what `gptq` does, under the scales of `quantize`."""
    scales, order, upper = scales_of(weight.float(), group_size), factor.order, factor.upper
    steps, work = scales[:, 0], weight.float().T[order]  # [K, N], changed from here on
    values = torch.empty_like(work, dtype=torch.uint8)
    for first in range(0, len(order), BLOCK):
        last = min(first + BLOCK, len(order))
        errors = torch.empty_like(work[first:last])
        for i in range(first, last):
            chosen = rounded(work[i] / steps)
            values[i] = chosen.view(torch.uint8)
            errors[i - first] = (work[i] - chosen.float() * steps) / upper[i, i]
            work[i + 1 : last].addr_(upper[i, i + 1 : last], errors[i - first], alpha=-1)
        work[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    back = values[torch.argsort(order)].T.contiguous()
    return Float8Tensor(back.view(torch.float8_e4m3fn), scales, weight.shape[1])
