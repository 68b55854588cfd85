"""What building an engine makes on any device, and the clock that runs while it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from nybble.engine.protocol import Progress
from nybble.engine.runner import Runner
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.loader import Loader
from nybble_models.weights import Block

T = TypeVar("T")


@dataclass
class Timer:
    """Seconds by phase, and the same phases told to `progress`."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, phase: str, work: Callable[[], T]) -> T:
        self.progress(phase, 0.0)
        started = time.perf_counter()
        result = work()
        self.seconds[phase] = time.perf_counter() - started
        self.progress(phase, 1.0)
        return result

    def inside(self, phase: str) -> Callable[[float], None]:
        """Tells how far a phase is."""
        return lambda part: self.progress(phase, part)


@dataclass(frozen=True)
class Built:
    """A runner, and what there is to say about it. Bytes by kind are those one decode step reads."""

    runner: Runner
    device: str
    kernels: Mapping[str, str]
    dtype: str
    scheme: str
    weight_bytes: Mapping[str, int]
    kv_bytes_per_token: int
    bandwidth: float  # bytes per second that a read of memory reaches


def scheme_name(blocks: Iterable[Block], loader: Loader) -> str:
    """ "awq int4 g64 asymmetric", from the first quantized linear; "none" where there is none.

    A row with one scale is one group, also of 8-bit floats: "compressed-tensors fp8 g576". Levels that no
    codec read are a GGUF file's own.
    """
    for block in blocks:
        for linear in block.linears.values():
            w, method = linear.weight, loader.settings.get("quant_method", "gguf")
            if isinstance(w, Float8Tensor):
                return f"{method} fp8 g{w.group_size}"
            if isinstance(w, QuantizedTensor):
                kind = "symmetric" if w.symmetric else "asymmetric"
                order = "" if w.permutation is None else " act-order"
                return f"{method} int{w.bits} g{w.group_size} {kind}{order}"
    return "none"
