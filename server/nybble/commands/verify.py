"""`nybble verify`: whether a checkpoint is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nybble.errors import UsageError


def verify(folder: Annotated[Path, Parameter(help="checkpoint to check")], /) -> int:
    """Check sums, tensors and report of a checkpoint; exit 1 if anything is wrong with it."""
    from nybble_quantizers.verify import verify as check

    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder", hint="give the folder of a checkpoint")
    found = check(folder)
    for prefix, lines in (("ok", found.checked), ("unknown", found.missing), ("problem", found.problems)):
        for line in lines:
            print(f"{prefix}: {' '.join(line.split())}")
    return 1 if found.problems else 0
