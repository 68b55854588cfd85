"""Which instructions the dot products may use. Chosen once at start, or forced by `NYBBLE_ISA`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llvmlite import binding


@dataclass(frozen=True)
class Isa:
    """One way to compile the dot products.

    lanes: float32 lanes of a vector · needs: processor features without which it cannot run.
    """

    name: str
    lanes: int
    needs: tuple[str, ...] = ()


PLAIN = Isa("plain", 8)
AVX2 = Isa("avx2", 8, ("avx2", "fma", "f16c"))
AVX_VNNI = Isa("avxvnni", 8, ("avx2", "fma", "f16c", "avxvnni"))
AVX512_VNNI = Isa("avx512vnni", 16, ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni"))
NEON = Isa("neon", 4, ("neon", "dotprod"))

BEST_FIRST = (AVX512_VNNI, AVX_VNNI, AVX2, NEON, PLAIN)


def host_features() -> dict[str, bool]:
    """What this processor has, by LLVM's names."""
    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:  # LLVM cannot tell on every system
        return {}


def choose(name: str | None = None) -> Isa:
    """The named instruction set, or the best of this processor. Raises `ValueError` for one it lacks."""
    name = name or os.environ.get("NYBBLE_ISA") or "auto"
    features = host_features()
    runnable = [isa for isa in BEST_FIRST if all(features.get(n, False) for n in isa.needs)]
    if name == "auto":
        return runnable[0]
    for isa in runnable:
        if isa.name == name:
            return isa
    raise ValueError(
        f"instruction set {name!r} cannot run here; these can: {', '.join(i.name for i in runnable)}"
    )
