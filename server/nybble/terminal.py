"""One console for everything that is said to the person at the terminal; results go to standard output."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """Standard error: bars, banner and log lines share it, so that none tears another."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def size(count: float) -> str:
    """`1.5 GB`: bytes for people, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
