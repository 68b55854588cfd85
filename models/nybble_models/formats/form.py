"""`Form`: how the weights of one linear are stored, and to what its inputs are rounded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

CHANNEL = -1
"""Group size that means one scale for a whole row."""

TENSOR = 0
"""Group size that means one scale for the whole matrix."""

Kind = Literal["int", "float"]
Inputs = Literal["token", "tensor", "group"]


@dataclass(frozen=True, slots=True)
class Form:
    """`bits` per level with a scale (and, unless symmetric, a zero) per `group_size` inputs of a row.

    kind: "int", or "float" for FP8 E4M3 (8 bits, symmetric), of which `group_size` inputs of as many rows
    share a scale · inputs: None leaves activations as they are, "token" rounds them to 8 bits of the same
    kind with a scale a token, "group" with one per `group_size` of a token, "tensor" with one stored scale.
    A linear that stays at 16 bits has no form.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    kind: Kind = "int"
    inputs: Inputs | None = None

    def group(self, inputs: int) -> int:
        """Inputs that share a scale in a row of this many."""
        return self.group_size if self.group_size > 0 else inputs

    @property
    def blocks(self) -> bool:
        """Whether several rows share a scale."""
        return self.kind == "float" and self.group_size > 0

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of codes, 16-bit scales and zeros of a matrix [N, K]."""
        outputs, inputs = shape
        rows = math.ceil(outputs / self.group_size) if self.blocks else outputs
        scales = 1 if self.group_size == TENSOR else rows * math.ceil(inputs / self.group(inputs))
        zero_bits = 0 if self.symmetric else self.bits
        return (outputs * inputs * self.bits + scales * (16 + zero_bits)) // 8

    @property
    def label(self) -> str:
        """ "w4g64", "w4g128-sym", "w8a8", "fp8": what goes into the name of a folder."""
        if self.kind == "float":
            return "fp8" + ("-block" if self.blocks else "-static" if self.inputs == "tensor" else "")
        if self.inputs is not None:
            return f"w{self.bits}a8" + ("-static" if self.inputs == "tensor" else "")
        group = {CHANNEL: "channel", TENSOR: "tensor"}.get(self.group_size, f"g{self.group_size}")
        return f"w{self.bits}{group}" + ("-sym" if self.symmetric else "")


def rule(forms: Iterable[Form | None]) -> Form:
    """The form that most linears have (the first of them where several do). At least one has a form."""
    return Counter(form for form in forms if form is not None).most_common(1)[0][0]
