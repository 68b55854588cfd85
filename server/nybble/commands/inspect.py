"""`nybble inspect`: what a model is, and what it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nybble.inspection import Inspection, inspect_model
from nybble.terminal import size


def inspect(
    model: Annotated[Path, Parameter(help="model folder or .gguf file")],
    /,
    *,
    json_: Annotated[bool, Parameter(name="--json", help="print JSON", negative=())] = False,
) -> None:
    """Say what a model folder or file is: method, bits, sizes, memory needed."""
    found = inspect_model(model)
    if json_:
        print(json.dumps({**asdict(found), "plan": found.plan}, indent=2))
    else:
        print_table(found)


def rows(found: Inspection) -> list[tuple[str, str]]:
    """The same for people."""
    group = f", group {found.group_size}" if found.group_size else ""
    zeros = {None: "", True: ", symmetric", False: ", asymmetric"}[found.symmetric]
    plan = found.plan
    return [
        ("model", found.path),
        (
            "format",
            f"{found.format}: {', '.join(f'{count} {dtype}' for dtype, count in found.dtypes.items())}",
        ),
        ("family", f"{found.family}, {found.layers} layers, {found.parameters / 1e6:.1f}M parameters"),
        ("quantization", f"{found.method}, {found.bits:.2f} bits a parameter{group}{zeros}"),
        *((f"  {kind}", size(count)) for kind, count in found.bytes.items()),
        ("weights", size(plan["weights"])),
        (
            "KV cache",
            f"{size(found.kv_bytes_per_token)} a token, {size(plan['kv'])} for {found.max_model_len}",
        ),
        ("to serve one request", size(sum(plan.values()))),
    ]


def print_table(found: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows(found):
        table.add_row(Text(label, style="dim"), Text(value))
    Console(highlight=False).print(table)
