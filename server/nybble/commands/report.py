"""`nybble report`: one page about several quantized checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nybble.commands.place import check_place
from nybble.errors import UsageError


def report(
    checkpoints: Annotated[list[Path], Parameter(help="folders that `nybble quantize` has written")],
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="HTML file to write")] = Path(
        "report.html"
    ),
) -> None:
    """Write one HTML page: quality against size, a table, and the error of every layer."""
    from nybble_quantizers.quality_report.page import page
    from nybble_quantizers.quality_report.record import read

    check_place(output)
    for folder in checkpoints:
        if not folder.is_dir():
            raise UsageError(
                f"{folder}: not a folder", hint="name folders that `nybble quantize` has written"
            )
    text = page([read(folder) for folder in checkpoints])
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(text, encoding="utf8")
    partial.replace(output)
    print(output)
