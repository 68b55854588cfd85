"""`Activations`: to what the inputs of a linear are rounded before they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nybble_kernels import reference

Kind = Literal["int", "float"]
TYPES = {"int": torch.int8, "float": torch.float8_e4m3fn}
LIMITS = {kind: reference.KV_CODES[dtype] for kind, dtype in TYPES.items()}
"""The code of the largest magnitude."""


@dataclass(frozen=True, slots=True)
class Activations:
    """8-bit codes of `kind` ("float" is E4M3), symmetric: x ≈ codes · scale.

    scale: one for all inputs, found in calibration, beyond which they saturate; None: max|x| / largest code
    of each token.
    """

    kind: Kind = "int"
    scale: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return TYPES[self.kind]

    def round(self, x: Tensor) -> Tensor:
        """What is left of float [T, K] after quantizing and dequantizing, in float32."""
        codes, steps = reference.quantize(x, self.dtype, self.scale)
        return codes.float().mul_(steps[:, None])
