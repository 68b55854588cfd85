"""`nybble quantize`: the quantizers' pipeline with a progress bar around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nybble import log
from nybble.config import ServeConfig
from nybble.errors import UsageError
from nybble.progress import Display, display
from nybble.terminal import size

if TYPE_CHECKING:
    from nybble_quantizers.report import QuantizeProgress, QuantReport

STAGES = {"calibrate": "calibrating", "quantize": "quantizing", "write": "writing"}


def quantize(
    source: Annotated[str, Parameter(help='model folder, .gguf file, hub id, or "default"')],
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="folder to write; it must not exist")],
    method: Annotated[
        Literal["awq", "gptq", "awq+gptq", "rtn"], Parameter(help="how to choose the codes")
    ] = "awq",
    bits: Annotated[int, Parameter(help="bits per weight")] = 4,
    group_size: Annotated[int, Parameter(help="weights that share a scale; -1: a whole row")] = 64,
    symmetric: Annotated[bool, Parameter(help="leave out zero points", negative="--asymmetric")] = False,
    calibration: Annotated[
        str | None, Parameter(help=".txt or .jsonl; else text of the model itself")
    ] = None,
    samples: Annotated[int, Parameter(help="windows of text to calibrate on")] = 16,
    length: Annotated[int, Parameter(help="tokens in a window")] = 256,
    skip: Annotated[
        tuple[str, ...], Parameter(help="linears to leave at 16 bits, as *.down_proj", negative=())
    ] = (),
    seed: Annotated[int, Parameter(help="same seed, same bytes")] = 0,
    cache_dir: Annotated[str, Parameter(help="where fetched models are kept (default ~/.cache/nybble)")] = "",
) -> None:
    """Write a quantized copy of a model."""
    if output.exists():
        raise UsageError(f"{output}: exists already", hint="name another folder with -o, or remove it")
    log.configure("warning")
    from nybble_models.hub import fetch
    from nybble_quantizers.pipeline import quantize as write
    from nybble_quantizers.scheme import Scheme

    scheme = Scheme(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        samples=samples,
        length=length,
        skip=skip,
    )
    with display() as shown:
        local = fetch(
            source, ServeConfig(cache_dir=cache_dir).cache_path, lambda text: shown.update(text, 0.0)
        )
        report = write(local, output, scheme, calibration=calibration, seed=seed, progress=Steps(shown))
        shown.close()
    print(summary(output, report))


class Steps:
    """Turns the pipeline's progress into phases and fractions."""

    def __init__(self, shown: Display) -> None:
        self._shown = shown

    def __call__(self, event: QuantizeProgress) -> None:
        self._shown.update(STAGES[event.stage], event.done / max(event.total, 1))


def summary(output: Path, report: QuantReport) -> str:
    """One line about what was written."""
    written = size(sum(report.bytes.values()))
    return f"{output}: {len(report.layers)} linears, {report.bits_per_weight:.2f} bits per weight, {written}"
