"""`nybble convert`: the quantizers' conversion with a progress bar around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nybble import log
from nybble.config import ServeConfig
from nybble.errors import UsageError
from nybble.progress import display
from nybble.terminal import size

if TYPE_CHECKING:
    from nybble_quantizers.convert import Conversion

PHASES = {"convert": "converting", "compare": "comparing"}


def convert(
    source: Annotated[str, Parameter(help="quantized model folder, .gguf file or hub id")],
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="folder to write; it must not exist")],
    format: Annotated[
        Literal["awq", "gptq", "gptq_v2", "compressed-tensors"], Parameter(help="what to write")
    ],
    cache_dir: Annotated[str, Parameter(help="where fetched models are kept (default ~/.cache/nybble)")] = "",
) -> None:
    """Write a quantized model in another format, without changing a weight's value."""
    if output.exists():
        raise UsageError(f"{output}: exists already", hint="name another folder with -o, or remove it")
    log.configure("warning")
    from nybble_models.hub import fetch
    from nybble_quantizers.convert import convert as write

    with display() as shown:
        cache = ServeConfig(cache_dir=cache_dir).cache_path
        local = fetch(source, cache, lambda text: shown.update(text, 0.0))
        done = write(local, output, format, lambda phase, part: shown.update(PHASES[phase], part))
        shown.close()
    print(summary(output, format, done))


def summary(output: Path, format: str, done: Conversion) -> str:
    """One line about what was written."""
    loose = f", {len(done.loose)} as floats" if done.loose else ""
    folded = f", {done.folded} act-orders made static" if done.folded else ""
    written = size(sum(done.bytes.values()))
    return f"{output}: {format}, {done.packed} linears packed{loose}{folded}, {written}; no value changed"
