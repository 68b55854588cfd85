"""`nybble quantize --dry-run`: what the run would need beside what there is, as a short table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.errors import NybbleError
from nybble.terminal import size

if TYPE_CHECKING:
    from nybble_quantizers.estimate import Estimate


def table(found: Estimate, budget: int, free: int) -> str:
    """budget: bytes of memory that may be used · free: bytes of disk."""
    width = max(map(len, found.memory)) + 2
    parts = [f"  {name:<{width}}{size(count):>10}" for name, count in found.memory.items() if count]
    times = [f"  {stage:<{width}}{seconds:>8.0f} s" for stage, seconds in found.seconds.items()]
    total = [f"time: about {sum(found.seconds.values()):.0f} s"] if times else []
    where = "; the text's states go to files" if found.spilled else ""
    return "\n".join(
        [
            f"{found.parameters:,} parameters, {found.linears} linears to round, "
            f"{found.bits:.2f} bits per weight, {size(found.written)}",
            f"disk: {size(found.disk)} of {size(free)} free ({size(found.journal)} of it until the run ends)",
            f"memory: {size(found.needed)} of {size(budget)}, most in stage {found.stage!r}{where}",
            *parts,
            *total,
            *times,
        ]
    )


def check(found: Estimate, budget: int, output: Path) -> str:
    """The table. Raises one line, exit status 1, where memory or disk do not suffice; writes nothing."""
    from nybble_models.errors import ModelError

    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    try:
        found.check(budget)
    except ModelError as error:
        raise NybbleError(str(error), hint=error.hint) from None
    if found.disk > free:
        raise NybbleError(
            f"{parent} has {size(free)} free, about {size(found.disk)} are needed",
            hint="free some space or choose another folder",
        )
    return table(found, budget, free)
