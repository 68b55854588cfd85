"""`nybble tune`: measure how this GPU cuts a model's products best, and keep it for `serve`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from nybble.config import ServeConfig
from nybble.errors import UsageError

if TYPE_CHECKING:
    from nybble_kernels.triton.tiles import Tuning


def tune(
    model: Annotated[str, Parameter(help='model folder, hub id, or "default"')] = "default",
    /,
    *,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="file to write (default: where serve looks)")
    ] = None,
    rounds: Annotated[int, Parameter(help="measurements of each candidate")] = 5,
) -> None:
    """Try every cut of every distinct product of a model on the GPU; the fastest go into a file."""
    try:
        from nybble.tuning import default_file, tune_model
    except ImportError as error:
        raise UsageError(f"tune: {error}", hint="pip install 'nybble[gpu]'") from None
    config = ServeConfig(model=model)
    path = output or default_file(config)

    def save(table: Tuning) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(table.as_json(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    tune_model(config, rounds, lambda line: print(line, file=sys.stderr, flush=True), save)
    print(path)
