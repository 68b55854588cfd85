"""`nybble quantize`: the quantizers' pipeline with a progress bar around it."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nybble import log
from nybble.commands.dry_run import check as dry_run_of
from nybble.config import ServeConfig
from nybble.errors import UsageError
from nybble.progress import Display, display
from nybble.terminal import size

if TYPE_CHECKING:
    from nybble_quantizers.report import QuantizeProgress, QuantReport
    from nybble_quantizers.scheme import Scheme

STAGES = {
    "calibrate": "calibrating",
    "choose": "choosing bits",
    "quantize": "quantizing",
    "tune": "tuning",
    "write": "writing",
}
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def quantize(
    source: Annotated[str, Parameter(help='model folder, .gguf file, hub id, or "default"')],
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="folder to write; it must not exist")],
    scheme: Annotated[
        str | None,
        Parameter(help="W4A16 (default), W8A8, W8A8-static, FP8, FP8-static ...; flags change it"),
    ] = None,
    method: Annotated[
        Literal["awq", "gptq", "awq+gptq", "rtn", "smoothquant", "smoothquant+gptq"] | None,
        Parameter(help="how to choose the codes (default awq; smoothquant: W8A8)"),
    ] = None,
    bits: Annotated[int | None, Parameter(help="bits per weight (default 4)")] = None,
    group_size: Annotated[
        int | None,
        Parameter(help="weights that share a scale (default 64); -1: a whole row, 0 (rtn): the whole matrix"),
    ] = None,
    symmetric: Annotated[
        bool | None, Parameter(help="leave out zero points", negative="--asymmetric")
    ] = None,
    quality: Annotated[
        Literal["fast", "best"],
        Parameter(help="best: then tune levels, scales and norms by gradient, many times as long"),
    ] = "fast",
    steps: Annotated[int, Parameter(help="of --quality best")] = 100,
    alpha: Annotated[
        float | None, Parameter(help="how much of their range inputs pass to weights; else it is searched")
    ] = None,
    act_order: Annotated[
        bool, Parameter(help="classic desc_act of GPTQ, which kernels must undo at run time", negative=())
    ] = False,
    damp: Annotated[float, Parameter(help="first damping of GPTQ; it rises by itself")] = 0.01,
    format: Annotated[
        Literal["auto", "awq", "gptq", "gptq_v2", "compressed-tensors"],
        Parameter(help="of the output; auto: awq if it can hold the result, else compressed-tensors"),
    ] = "auto",
    override: Annotated[
        tuple[str, ...],
        Parameter(
            help="other bits for some linears, as *.down_proj=8 or *.o_proj=4g32 or *=16",
            negative=(),
            consume_multiple=True,
        ),
    ] = (),
    target_bits: Annotated[
        float | None, Parameter(help="choose 3, 4, 8 or 16 bits for each linear, so many on average")
    ] = None,
    target_size: Annotated[
        str | None, Parameter(help="the same for a size of the weights, as 80MB or 1.2GB")
    ] = None,
    embeddings: Annotated[
        bool, Parameter(help="round the embedding and the head too, to 8 bits or as the target says")
    ] = False,
    calibration: Annotated[
        str | None,
        Parameter(help=".txt, .jsonl or hf:owner/data-set/file.jsonl; else text of the model itself"),
    ] = None,
    evaluation: Annotated[
        Path | None, Parameter(help="text that will judge the result: no calibration text may quote it")
    ] = None,
    samples: Annotated[int, Parameter(help="windows of text to calibrate on")] = 16,
    length: Annotated[int, Parameter(help="tokens in a window")] = 256,
    skip: Annotated[
        tuple[str, ...],
        Parameter(
            help="linears to leave at 16 bits, as *.down_proj; wins over --override",
            negative=(),
            consume_multiple=True,
        ),
    ] = (),
    seed: Annotated[int, Parameter(help="same seed, same bytes")] = 0,
    memory: Annotated[
        str | None, Parameter(help="to keep to, as 8GiB; the text's states go to files where they do not fit")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(help="print memory, disk and time that it will take, and write nothing", negative=())
    ] = False,
    cache_dir: Annotated[str, Parameter(help="where fetched models are kept (default ~/.cache/nybble)")] = "",
) -> None:
    """Write a quantized copy of a model. The same command after a crash goes on where it stood."""
    if output.exists():
        raise UsageError(f"{output}: exists already", hint="name another folder with -o, or remove it")
    log.configure("warning")
    from nybble.engine.bandwidth import available_memory
    from nybble_models.hub import fetch
    from nybble_quantizers.estimate import resident
    from nybble_quantizers.pipeline import foresee
    from nybble_quantizers.pipeline import quantize as write

    given = {"method": method, "bits": bits, "group_size": group_size, "symmetric": symmetric, "alpha": alpha}
    wanted = scheme_of(
        scheme,
        given,
        samples=samples,
        length=length,
        skip=skip,
        format=format,
        overrides=override,
        target_bits=target_bits,
        target_bytes=None if target_size is None else in_bytes(target_size),
        ends=embeddings,
        best=quality == "best",
        steps=steps,
        act_order=act_order,
        damp=damp,
    )
    budget = available_memory() + resident() if memory is None else in_bytes(memory)
    with display() as shown:
        local = fetch(
            source, ServeConfig(cache_dir=cache_dir).cache_path, lambda text: shown.update(text, 0.0)
        )
        if dry_run:
            found = dry_run_of(foresee(local, wanted, calibration=calibration, memory=budget), budget, output)
            shown.close()
            print(found)
            return
        report = write(
            local,
            output,
            wanted,
            calibration=calibration,
            evaluation=evaluation,
            seed=seed,
            progress=Steps(shown),
            command=shlex.join(["nybble", *sys.argv[1:]]),
            memory=budget,
        )
        shown.close()
    print(summary(output, report))


def scheme_of(name: str | None, given: Mapping[str, Any], **rest: Any) -> Scheme:
    """A preset with what was given over it. SmoothQuant without a preset means W8A8."""
    from nybble_quantizers.scheme import preset

    smooths = str(given["method"]).startswith("smoothquant")
    changes = {flag: value for flag, value in given.items() if value is not None}
    return preset(name or ("W8A8" if smooths else "W4A16"), **changes, **rest)


def in_bytes(text: str) -> int:
    """ "80MB", "1.2 GiB", "5e6" -> bytes."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*(|[kmg]i?)b?\s*", text.lower())
    try:
        return int(float(found[1]) * UNITS[found[2]]) if found else _no_size(text)
    except ValueError:
        return _no_size(text)


def _no_size(text: str) -> int:
    raise UsageError(f"{text!r} is not a size", hint="as 80MB, 1.2GB or 8GiB")


class Steps:
    """Turns the pipeline's progress into phases and fractions, and says how each block went."""

    def __init__(self, shown: Display) -> None:
        self._shown = shown
        self._since = time.monotonic()

    def __call__(self, event: QuantizeProgress) -> None:
        now = time.monotonic()
        if event.layers:
            self._shown.note(block_line(event, now - self._since))
        self._since = now
        self._shown.update(STAGES[event.stage], event.done / max(event.total, 1))


def block_line(event: QuantizeProgress, seconds: float) -> str:
    """ "block 3/30  q 24.1  k 25.0 ... dB  2.1 s, 57 s left": the signal over noise of each output.

    Without calibration text there are no outputs: then the relative error of each weight.
    """
    heard = all(row.output_sqnr_db is not None for row in event.layers)
    errors = "  ".join(
        f"{row.name.rsplit('.', 1)[-1].removesuffix('_proj')} "
        + (f"{row.output_sqnr_db:.1f}" if heard else f"{100 * row.weight_error:.1f}")
        for row in event.layers
    )
    left = "" if event.seconds_left is None else f", about {event.seconds_left:.0f} s left"
    return f"block {event.done}/{event.total}  {errors} {'dB' if heard else '%'}  {seconds:.1f} s{left}"


def summary(output: Path, report: QuantReport) -> str:
    """One line about what was written."""
    written = size(sum(report.bytes.values()))
    return f"{output}: {len(report.layers)} linears, {report.bits_per_weight:.2f} bits per weight, {written}"
