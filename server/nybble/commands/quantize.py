"""`nybble quantize`: the quantizers' pipeline with a progress bar around it."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nybble import log
from nybble.commands.dry_run import check as dry_run_of
from nybble.commands.eval import check_text, judge
from nybble.commands.recipe import USUAL, Recipe, in_bytes
from nybble.config import ServeConfig
from nybble.errors import UsageError
from nybble.progress import Display, display
from nybble.terminal import size

if TYPE_CHECKING:
    from nybble_quantizers.report import QuantizeProgress, QuantReport

STAGES = {
    "calibrate": "calibrating",
    "choose": "choosing bits",
    "quantize": "quantizing",
    "tune": "tuning",
    "write": "writing",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """What computes, and where fetched models are kept."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Parameter(help="what computes: auto takes a GPU where there is one, a block at a time"),
    ] = "auto"
    memory: Annotated[
        str | None,
        Parameter(
            help="of the device, to keep to, as 8GiB; the text's states go to files where they do not fit"
        ),
    ] = None
    cache_dir: Annotated[str, Parameter(help="where fetched models are kept (default ~/.cache/nybble)")] = ""

    def budget(self) -> int:
        """Bytes: as given, or all that are free there. Raises `ModelError` for a device that is not there."""
        from nybble.engine.bandwidth import available_memory
        from nybble_models.loader import CPU
        from nybble_quantizers.device import device_named, free_memory
        from nybble_quantizers.estimate import resident

        device = device_named(self.device)
        if self.memory is not None:
            return in_bytes(self.memory)
        return available_memory() + resident() if device == CPU else free_memory(device)


HERE = Place()


def quantize(
    source: Annotated[str, Parameter(help='model folder, .gguf file, hub id, or "default"')],
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="folder to write; it must not exist")],
    recipe: Annotated[Recipe, Parameter(name="*")] = USUAL,
    calibration: Annotated[
        str | None,
        Parameter(help=".txt, .jsonl or hf:owner/data-set/file.jsonl; else text of the model itself"),
    ] = None,
    evaluation: Annotated[
        Path | None,
        Parameter(help="text that judges the result, for its report; no calibration text may quote it"),
    ] = None,
    seed: Annotated[int, Parameter(help="same seed, same bytes")] = 0,
    place: Annotated[Place, Parameter(name="*")] = HERE,
    dry_run: Annotated[
        bool, Parameter(help="print memory, disk and time that it will take, and write nothing", negative=())
    ] = False,
    base_model: Annotated[
        str | None, Parameter(help="hub id of the source, for the model card; the hub's cache tells it too")
    ] = None,
) -> None:
    """Write a quantized copy of a model. The same command after a crash goes on where it stood."""
    if output.exists():
        raise UsageError(f"{output}: exists already", hint="name another folder with -o, or remove it")
    log.configure("warning")
    from nybble_models.hub import fetch
    from nybble_quantizers.pipeline import foresee
    from nybble_quantizers.pipeline import quantize as write
    from nybble_quantizers.scheme import preset

    wanted, budget = preset(recipe.preset, **recipe.changes()), place.budget()
    cache = ServeConfig(cache_dir=place.cache_dir).cache_path
    with display() as shown:
        local = fetch(source, cache, lambda text: shown.update(text, 0.0))
        if dry_run:
            found = foresee(local, wanted, calibration=calibration, memory=budget, device=place.device)
            shown.close()
            print(dry_run_of(found, budget, output))
            return
        if evaluation is not None:
            check_text(local, evaluation)
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
            device=place.device,
            base_model=base_model,
        )
        shown.close()
    print(summary(output, report))
    if evaluation is not None:
        judge(output, local, evaluation, place.cache_dir)


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
