"""Checkpoint in, quantized checkpoint out: read, fold, round and write, one block in memory at a time."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble_models.checkpoint import Checkpoint
from nybble_models.documents import read_documents
from nybble_models.errors import ModelError
from nybble_models.hub import open_source
from nybble_models.loader import CPU, Loader
from nybble_models.weights import Block
from nybble_quantizers import papers, teaching
from nybble_quantizers.assembly import assemble, config_of
from nybble_quantizers.block import Finding
from nybble_quantizers.calibrate import Calibration, refuse_overlap
from nybble_quantizers.canary import Canary, canary_of
from nybble_quantizers.choosing import choose, foreseen, said
from nybble_quantizers.corpus import locate
from nybble_quantizers.device import Name, device_named, facts, moved, too_small, working_on
from nybble_quantizers.estimate import Estimate, estimate, measured_rate
from nybble_quantizers.folding import float_weight
from nybble_quantizers.journal import Journal
from nybble_quantizers.origin import origin
from nybble_quantizers.output import JOURNAL, appearing
from nybble_quantizers.report import (
    LayerReport,
    Listener,
    QuantizeProgress,
    QuantReport,
    block_reports,
    versions,
)
from nybble_quantizers.rounding import naming, nearest_block
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.selection import Selection, select, unfit
from nybble_quantizers.stream import Stream, calibration_for, read_block
from nybble_quantizers.task import Task
from nybble_quantizers.units import by_name
from nybble_quantizers.windows import held_on, spilled_to
from nybble_quantizers.workers import Map
from nybble_quantizers.writer import ModelWriter

log = logging.getLogger("nybble.quantize")


@dataclass(frozen=True, slots=True)
class Finished:
    """A block: what was rounded, how that went, and what is to be stored of it, by name with its kind."""

    whole: Block
    reports: list[LayerReport]
    stored: dict[str, tuple[str, Tensor]]


@torch.inference_mode()
def quantize(
    source: Path | str,
    out: Path,
    scheme: Scheme,
    *,
    calibration: str | None = None,
    evaluation: Path | None = None,
    seed: int = 0,
    progress: Listener | None = None,
    command: str = "",
    memory: int | None = None,
    device: Name = "cpu",
    base_model: str | None = None,
) -> QuantReport:
    """Write `source` (a folder or a .gguf file), quantized by `scheme`, as the new folder `out`.

    Without a calibration file the model writes its own text; one that shares runs of words with the file
    `evaluation` is refused. The same arguments make the same bytes, also where a run was killed and the same
    arguments are given again: finished blocks are kept beside `out`. `memory` bytes are kept to, by what is
    estimated: the text's states go to files where they do not fit, which changes no byte. Another `device`
    makes other last bits, and `memory` is the GPU's there. `base_model`: the source's id on the hub, for the
    card, where it does not lie in the hub's cache. Raises `ModelError` in one line, and then nothing
    is left behind, but for what is finished where the disk is full.
    """
    task = Task(
        source=Path(source),
        scheme=scheme,
        calibration=calibration,
        evaluation=evaluation,
        seed=seed,
        memory=memory,
        device=device_named(device),
        base_model=base_model,
    )
    run = _Run(task, progress or (lambda event: None))
    run.check()
    with too_small(task.device), appearing(out, run.estimate.disk, task.key) as folder:
        report = run.write(folder, command)
        papers.write(folder, report)
    return report


def foresee(
    source: Path | str,
    scheme: Scheme,
    *,
    calibration: str | None = None,
    memory: int | None = None,
    device: Name = "cpu",
) -> Estimate:
    """What `quantize` with these arguments will need. Reads settings and heads of files, writes nothing.

    A GPU's times are left out: nobody has measured any.
    """
    place = device_named(device)
    task = Task(source=Path(source), scheme=scheme, calibration=calibration, memory=memory, device=place)
    return _Run(task, lambda event: None).foreseen(measured_rate() if place == CPU else 0.0)


class _Run:
    """One quantization from start to end."""

    def __init__(self, task: Task, tell: Listener) -> None:
        self.task = task
        self.scheme = task.scheme
        self.tell = tell
        self.loader = Loader(open_source(task.source), floats=True)  # what is written as it is
        self.placed = Loader(self.loader.source, floats=True, device=task.device)  # what is computed with
        if self.loader.codec is not None:
            raise ModelError(f"{task.source} is quantized already", hint="quantize the original model")
        spec, family, container = self.loader.spec, self.loader.family, self.scheme.container
        wanted = by_name(family, said(self.scheme, spec, family))
        usual = select(spec, family, self.scheme, container, wanted)
        self.selection: Selection = foreseen(usual, self.scheme, spec)
        self.writer = ModelWriter(family, container)
        self.estimate = self.foreseen()
        skipped = self.selection.skipped
        if skipped and self.scheme.method != "none":
            why = unfit(spec, self.scheme)
            log.warning("%d linears stay at 16 bits, the first is %s%s", len(skipped), skipped[0], why)

    def foreseen(self, rate: float = 0.0) -> Estimate:
        task = self.task
        return estimate(
            self.loader.spec,
            self.scheme,
            self.selection,
            given=task.calibration is not None,
            budget=task.memory,
            rate=rate,
            device=task.device,
        )

    def check(self) -> None:
        """What can be refused before anything is written. Raises `ModelError`."""
        if self.task.memory is not None:
            self.estimate.check(self.task.memory)
        if self.task.evaluation is None:
            return
        if self.task.calibration is not None and self.scheme.reads:
            refuse_overlap(locate(self.task.calibration), self.task.evaluation)
        else:
            read_documents(self.task.evaluation)

    def write(self, folder: Path, command: str) -> QuantReport:
        journal = Journal(folder / JOURNAL)
        with working_on(self.task.device) as run:
            calibration = self._calibration(journal, run)
            if self.scheme.mixes and calibration is not None:
                self.selection = self._chosen(journal, calibration, run)
            canary = canary_of(self.placed, self.task.source)
            self._blocks(journal, calibration, canary, run)
            if self.scheme.best and calibration is not None:
                self._teach(journal, calibration, run)
        self.tell(QuantizeProgress("write", 0, 1))
        if canary is not None:
            canary.write(folder)
        source, loader, config = self.task.source, self.loader, self._config()
        sizes, layers = assemble(folder, source, loader, journal, self.writer, self.selection, config)
        self.tell(QuantizeProgress("write", 1, 1))
        return QuantReport(
            source=source.name,
            scheme=asdict(self.scheme),
            seed=self.task.seed,
            calibration=calibration.describe() if calibration else None,
            versions=versions() | facts(self.task.device),
            command=command,
            bytes=sizes,
            bits_per_weight=8 * sum(sizes.values()) / loader.spec.parameters,
            skipped=self.selection.skipped,
            layers=tuple(layers),
            origin=origin(source, self.task.base_model),
        )

    def _calibration(self, journal: Journal, run: Map) -> Calibration | None:
        if not self.scheme.reads:
            return None
        found = journal.calibration()
        if found is None:
            task = self.task
            found = calibration_for(
                task.source, self.placed, self.scheme, task.calibration, task.seed, self.tell, run
            )
            journal.keep_calibration(found)
        return found

    def _chosen(self, journal: Journal, calibration: Calibration, run: Map) -> Selection:
        """The forms that meet the target."""
        forms = journal.forms()
        if forms is None:
            started = time.monotonic()

            def heard(done: int, total: int) -> None:
                left = (time.monotonic() - started) / done * (total - done)
                self.tell(QuantizeProgress("choose", done, total, left))

            forms = choose(self.placed, self.scheme, calibration.tokens, self.task.seed, run, heard)
            journal.keep_forms(forms)
        return select(self.loader.spec, self.loader.family, self.scheme, self.scheme.container, forms)

    def _blocks(
        self, journal: Journal, calibration: Calibration | None, canary: Canary | None, run: Map
    ) -> None:
        """Quantize every block that is not done yet."""
        watched = calibration if self.scheme.watches else None
        device = self.task.device
        place = spilled_to(journal.folder, device) if self.estimate.spilled else held_on(device)
        stream = None if watched is None else Stream(self.placed, watched, self.scheme, run, place)
        passing: list[Stream | Canary] = [each for each in (stream, canary) if each is not None]
        total, first = self.loader.spec.num_layers, journal.done(stateful=bool(passing))
        if first:
            log.warning("going on after block %d of %d, where an earlier run ended", first, total)
            for each in passing:
                each.restore(journal.states(first - 1))
        started = time.monotonic()
        for layer in range(first, total):
            made = self._passed(layer, read_block(self.placed, layer), stream, canary, run)
            states = {name: state for each in passing for name, state in each.kept().items()}
            if self.scheme.best:
                linears = {p: made.whole.linears[p] for p in self.selection.forms[layer]}
                journal.keep_whole(layer, {p: float_weight(linear).cpu() for p, linear in linears.items()})
            journal.keep(layer, made.stored, made.reports, states)
            if isinstance(self.loader.source, Checkpoint):
                self.loader.source.release()
            left = (time.monotonic() - started) / (layer + 1 - first) * (total - layer - 1)
            self.tell(QuantizeProgress("quantize", layer + 1, total, left, tuple(made.reports)))

    def _passed(
        self, layer: int, block: Block, stream: Stream | None, canary: Canary | None, run: Map
    ) -> Finished:
        """A block finished and the canary past it, at the same time where rounding keeps one core busy."""
        finishing = partial(self._finished, layer, block, stream)
        if canary is None:
            return finishing()
        if stream is not None:
            canary.advance(layer, block, run)
            return finishing()
        pieces: tuple[Callable[[], Any], ...] = finishing, partial(canary.advance, layer, block)
        found: Finished = run(operator.call, pieces)[0]
        return found

    def _finished(self, layer: int, block: Block, stream: Stream | None) -> Finished:
        forms = self.selection.forms[layer]
        whole, quantized, findings = self._rounded(layer, block, stream)
        reports = block_reports(self._names(layer), forms, whole, quantized, findings)
        return Finished(whole, reports, self.writer.block(layer, moved(quantized, CPU), forms))

    def _rounded(
        self, layer: int, block: Block, stream: Stream | None
    ) -> tuple[Block, Block, dict[str, Finding]]:
        """(what was rounded, what it became, what was found) of a block."""
        forms = self.selection.forms[layer]
        with naming(f"layer {layer}"):
            if stream is not None:
                return stream.advance(layer, block, forms)
            return block, nearest_block(block, forms, self._names(layer), self.scheme.mse), {}

    def _names(self, layer: int) -> dict[str, str]:
        """Of the linears of a block, by projection."""
        family = self.loader.family
        return {p: family.projections[p].format(i=layer) for p in self.loader.spec.projections}

    def _teach(self, journal: Journal, calibration: Calibration, run: Map) -> None:
        """Tune what was rounded, all blocks together."""
        if journal.taught(self.loader.spec.num_layers):
            return
        steps, seed, config = self.scheme.steps, self.task.seed, self._config()
        made, noises = teaching.teach(self.placed, journal, config, calibration, steps, seed, run, self.tell)
        teaching.keep(self.loader, journal, self.writer, self.selection.forms, made, noises)

    def _config(self) -> dict[str, object]:
        return config_of(self.loader, self.scheme, self.selection)
