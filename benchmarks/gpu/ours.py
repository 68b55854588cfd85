"""Our linears as subjects: packed and launched as a decode step does, with a plain store at the end.

"overlap" is programmatic dependent launch: the next launch of the chain loads weights while this one ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from subject import Matrix, Prepared, Subject, rows8
from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_kernels.quantized import QuantizedTensor, Weight

TOLERANCE = {"W4A16": 1e-2, "W8A8": 2e-2, "16-bit": 1e-2}
DECODE_ROWS = 64  # a step runs at most so many; more is a prompt


class OurLinear(Subject):
    """`kind` "W4A16" takes the codes as they are, "W8A8" one int8 scale a row, "16-bit" the values."""

    ours = True
    compiles = True
    on_cpu = True  # in the interpreter
    modules = ("triton",)

    def __init__(self, kind: str, dtype: torch.dtype, pdl: bool = False) -> None:
        self.kind, self.dtype, self.pdl = kind, dtype, pdl
        self.name = f"nybble {kind} {str(dtype).removeprefix('torch.')}{', overlap' if pdl else ''}"
        self.tolerance = TOLERANCE[kind]

    def available(self) -> str | None:
        if reason := super().available():
            return reason
        if self.pdl and not torch.cuda.is_available():
            return "launches overlap on a device only"
        try:
            import nybble_kernels.triton.linear  # noqa: F401
        except ImportError as error:
            return str(error)
        return None

    def weight(self, matrix: Matrix) -> tuple[Weight, Tensor]:
        """What is packed, and what it means."""
        if self.kind == "W4A16":
            return matrix.codes, matrix.dense
        if self.kind == "16-bit":
            return matrix.dense, matrix.dense.to(self.dtype)
        codes, scales = rows8(matrix.dense)
        levels = (codes.short() + 128).to(torch.uint8)
        return QuantizedTensor(levels, scales, 8, matrix.shape[1]), codes * scales

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        from nybble_kernels.triton.linear import make_linear
        from nybble_kernels.triton.tiles import Tuning

        weight, means = self.weight(matrix)
        rounded = Activations() if self.kind == "W8A8" else None
        tuning = Tuning.of_device(matrix.dense.device)
        linear = make_linear(weight, None, dtype=self.dtype, tuning=tuning, inputs=rounded)
        launch = self.launcher(linear, matrix.dense.device, m)

        def run(x: Tensor, *tensors: Tensor) -> Tensor:
            return launch(x, rebuilt(linear, tensors))

        return Prepared(tuple(tensors_of(linear)), run, means)

    def launcher(self, linear: Any, device: torch.device, m: int) -> Callable[[Tensor, Any], Tensor]:
        """Buffers are made once, as in a step, and the operand's statistics when x is first seen."""
        from nybble_kernels.triton.epilogue import Operand, Store
        from nybble_kernels.triton.tiles import Workspace

        phase = "decode" if m <= DECODE_ROWS else "prefill"
        workspace = Workspace.allocate([(linear.tile(m, phase), linear.outputs, m)], device)
        y = torch.full((m, linear.outputs), float("nan"), dtype=self.dtype, device=device)
        operands: dict[int, Operand] = {}

        def launch(x: Tensor, weight: Any) -> Tensor:
            if id(x) not in operands:
                operands[id(x)] = Operand(x, statistics(x), x.shape[1])
            weight(operands[id(x)], m, Store(y), phase, workspace, pdl=self.pdl)
            return y

        return launch


def statistics(x: Tensor) -> Tensor:
    """float32 [3, 1, rows]: sum, squared deviation and largest magnitude of each row, as one tile."""
    wide = x.float()
    deviation = (wide - wide.mean(1, keepdim=True)).square().sum(1)
    return torch.stack((wide.sum(1), deviation, wide.abs().amax(1)))[:, None].contiguous()


def tensors_of(linear: Any) -> list[Tensor]:
    """What a launch reads of the weight: its one tensor, or the tensors of its packed form."""
    if isinstance(linear.weight, Tensor):
        return [linear.weight]
    held = (getattr(linear.weight, each.name) for each in dataclasses.fields(linear.weight))
    return [each for each in held if isinstance(each, Tensor)]


def rebuilt(linear: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The linear over copies of its tensors."""
    if isinstance(linear.weight, Tensor):
        return dataclasses.replace(linear, weight=tensors[0])
    fields = dataclasses.fields(linear.weight)
    names = [each.name for each in fields if isinstance(getattr(linear.weight, each.name), Tensor)]
    packed = dataclasses.replace(linear.weight, **dict(zip(names, tensors, strict=True)))
    return dataclasses.replace(linear, weight=packed)


def ours() -> list[Subject]:
    """Overlapping first, as a step runs them."""
    return [
        OurLinear("W4A16", torch.bfloat16, pdl=True),
        OurLinear("W4A16", torch.bfloat16),
        OurLinear("W8A8", torch.bfloat16, pdl=True),
        OurLinear("W4A16", torch.float16, pdl=True),
        OurLinear("W8A8", torch.bfloat16),
        OurLinear("16-bit", torch.bfloat16, pdl=True),
        OurLinear("16-bit", torch.bfloat16),
    ]
