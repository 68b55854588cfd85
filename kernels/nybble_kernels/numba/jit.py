"""Numba with types: the one place that imports its decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

f32 = cast(Callable[[float], float], np.float32)
"""A float32 constant or conversion: in compiled code, arithmetic with it stays in float32."""

_REASSOCIATE = {"reassoc", "contract", "nsz", "arcp"}  # NaN and infinity keep their meaning


def inline(function: F) -> F:
    """Compile as a part of whoever calls it."""
    return cast(F, njit(nogil=True, boundscheck=False, error_model="numpy")(function))


def fast(function: F) -> F:
    """The same, and sums may be reordered into vector lanes (always in the same way)."""
    return cast(F, njit(nogil=True, boundscheck=False, error_model="numpy", fastmath=_REASSOCIATE)(function))


def fastest(function: F) -> F:
    """The same, where a NaN may give any result (another part of the op passes it on)."""
    flags = _REASSOCIATE | {"nnan"}
    return cast(F, njit(nogil=True, boundscheck=False, error_model="numpy", fastmath=flags)(function))


def entry(signature: str) -> Callable[[F], F]:
    """Compile for one signature now, or load it from the cache on disk."""

    def decorate(function: F) -> F:
        return cast(
            F, njit(signature, nogil=True, boundscheck=False, error_model="numpy", cache=True)(function)
        )

    return decorate
