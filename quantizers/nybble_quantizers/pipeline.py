"""Checkpoint in, quantized checkpoint out: read, fold, round and write, one block in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nybble_kernels.quantized import dense
from nybble_models.checkpoint import Checkpoint, write_json
from nybble_models.errors import BrokenCheckpoint, ModelError
from nybble_models.formats.form import Form
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.weights import Block, Linear
from nybble_quantizers import papers
from nybble_quantizers.block import Finding
from nybble_quantizers.calibrate import Calibration, refuse_overlap
from nybble_quantizers.canary import Canary
from nybble_quantizers.choosing import choose, said
from nybble_quantizers.corpus import locate, read_documents
from nybble_quantizers.estimate import Estimate, estimate, measured_rate
from nybble_quantizers.folding import float_weight
from nybble_quantizers.journal import Journal, fingerprint, key_of
from nybble_quantizers.origin import copy_licence, origin
from nybble_quantizers.output import ShardWriter, appearing
from nybble_quantizers.report import (
    LayerReport,
    Listener,
    QuantizeProgress,
    QuantReport,
    layer_report,
    versions,
)
from nybble_quantizers.rounding import nearest, tokenwise
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.selection import Forms, Selection, select
from nybble_quantizers.stream import Stream, calibration_for, read_block
from nybble_quantizers.teaching import report_again, teach, whole_block
from nybble_quantizers.tokenizing import carry_over, load_tokenizer
from nybble_quantizers.units import by_name
from nybble_quantizers.windows import in_memory, spilled_to
from nybble_quantizers.workers import Map, side_by_side
from nybble_quantizers.writer import ModelWriter

log = logging.getLogger("nybble.quantize")

LAST_SEED = 2**31 - 1


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
) -> QuantReport:
    """Write `source` (a folder or a .gguf file), quantized by `scheme`, as the new folder `out`.

    Without a calibration file the model writes its own text; one that shares runs of words with the file
    `evaluation` is refused. The same arguments make the same bytes, also where a run was killed and the same
    arguments are given again: finished blocks are kept beside `out`. `memory` bytes are kept to, by what is
    estimated: the text's states go to files where they do not fit, which changes no byte. Raises `ModelError`
    in one line, and then nothing is left behind.
    """
    run = _Run(Path(source), scheme, calibration, evaluation, seed, progress or (lambda event: None), memory)
    if memory is not None:
        run.estimate.check(memory)
    run.check()
    with appearing(out, run.estimate.disk, run.key) as folder:
        report = run.write(folder, command)
        papers.write(folder, report)
    return report


def foresee(
    source: Path | str, scheme: Scheme, *, calibration: str | None = None, memory: int | None = None
) -> Estimate:
    """What `quantize` with these arguments will need. Reads settings and heads of files, writes nothing."""
    run = _Run(Path(source), scheme, calibration, None, 0, lambda event: None, memory)
    given, spec = calibration is not None, run.loader.spec
    return estimate(spec, scheme, run.selection, given=given, budget=memory, rate=measured_rate())


class _Run:
    """One quantization from start to end."""

    def __init__(
        self,
        source: Path,
        scheme: Scheme,
        calibration: str | None,
        evaluation: Path | None,
        seed: int,
        tell: Listener,
        memory: int | None,
    ) -> None:
        if not 0 <= seed <= LAST_SEED:
            raise ModelError(f"seed is {seed}", hint=f"give 0 to {LAST_SEED}")
        self.source = source
        self.scheme = scheme
        self.calibration = calibration
        self.evaluation = evaluation
        self.seed = seed
        self.tell = tell
        self.loader = Loader(open_source(source), floats=True)
        if self.loader.codec is not None:
            raise ModelError(f"{source} is quantized already", hint="quantize the original model")
        self.container = scheme.container
        spec, family = self.loader.spec, self.loader.family
        self.selection: Selection = select(
            spec, family, scheme, self.container, by_name(family, said(scheme, spec, family))
        )
        given = calibration is not None
        self.estimate = estimate(spec, scheme, self.selection, given=given, budget=memory)
        self.key = key_of(source, scheme, fingerprint(calibration), seed)
        skipped = self.selection.skipped
        if skipped and scheme.method != "none":
            log.warning("%d linears stay at 16 bits, the first is %s", len(skipped), skipped[0])

    def check(self) -> None:
        """What can be refused before anything is written. Raises `ModelError`."""
        if self.evaluation is None:
            return
        if self.calibration is not None and self.scheme.reads:
            refuse_overlap(locate(self.calibration), self.evaluation)
        else:
            read_documents(self.evaluation)

    def write(self, folder: Path, command: str) -> QuantReport:
        journal = Journal(folder / "journal")
        writer = ModelWriter(self.loader.family, self.container)
        with side_by_side() as run:
            calibration = self._calibration(journal, run)
            if self.scheme.mixes and calibration is not None:
                self.selection = self._chosen(journal, calibration, run)
            canary = self._canary()
            self._blocks(journal, writer, calibration, canary, run)
            if self.scheme.best and calibration is not None:
                self._teach(journal, writer, calibration, run)
        self.tell(QuantizeProgress("write", 0, 1))
        if canary is not None:
            canary.write(folder)
        sizes, layers = self._assemble(folder, journal, writer)
        self.tell(QuantizeProgress("write", 1, 1))
        return QuantReport(
            source=self.source.name,
            scheme=asdict(self.scheme),
            seed=self.seed,
            calibration=calibration.describe() if calibration else None,
            versions=versions(),
            command=command,
            bytes=sizes,
            bits_per_weight=8 * sum(sizes.values()) / self.loader.spec.parameters,
            skipped=self.selection.skipped,
            layers=tuple(layers),
            origin=origin(self.source),
        )

    def _assemble(
        self, folder: Path, journal: Journal, writer: ModelWriter
    ) -> tuple[dict[str, int], list[LayerReport]]:
        """The finished blocks and all the rest, as the files of a checkpoint. Takes the journal away."""
        shards, reports = ShardWriter(folder), list[LayerReport]()
        for layer in range(self.loader.spec.num_layers):
            shards.extend(journal.stored(layer))
            reports += journal.reports(layer)
        ends, found = self._ends()
        shards.extend(writer.rest(self.loader, ends))
        shards.close()
        write_json(folder / "config.json", self._config())
        carry_over(self.source, folder)
        copy_licence(self.source, folder)
        journal.remove()
        return shards.bytes, reports + found

    def _chosen(self, journal: Journal, calibration: Calibration, run: Map) -> Selection:
        """The forms that meet the target."""
        forms = journal.forms()
        if forms is None:
            self.tell(QuantizeProgress("choose", 0, 1))
            forms = choose(self.loader, self.scheme, calibration.tokens, self.seed, run)
            journal.keep_forms(forms)
        return select(self.loader.spec, self.loader.family, self.scheme, self.container, forms)

    def _teach(self, journal: Journal, writer: ModelWriter, calibration: Calibration, run: Map) -> None:
        """Tune what was rounded, all blocks together."""
        layers = self.loader.spec.num_layers
        if journal.taught(layers):
            return
        scheme, config = self.scheme, self._config()
        made = teach(self.loader, journal, config, calibration, scheme.steps, self.seed, run, self.tell)
        log.info("tuned: KL %.5f -> %.5f nats a token on the calibration text", made.before, made.after)
        for layer, block in enumerate(made.blocks):
            whole, rows = whole_block(journal, layer, block), journal.reports(layer)
            names = {self.loader.family.projections[p].format(i=layer): p for p in block.linears}
            reports = [
                report_again(row, whole.linears[names[row.name]], block.linears[names[row.name]])
                for row in rows
            ]
            journal.keep_tuned(layer, writer.block(layer, block, self.selection.forms[layer]), reports)
        journal.taught(layers)

    def _canary(self) -> Canary | None:
        """None for a model without a tokenizer: nobody could send it a prompt."""
        try:
            return Canary(self.loader, load_tokenizer(self.source))
        except ModelError as error:
            log.warning("no canary is written: %s", error)
            return None

    def _ends(self) -> tuple[dict[str, tuple[Linear, Form]], list[LayerReport]]:
        """Embedding and head where they are rounded: to nearest, as no text reaches all of a vocabulary."""
        loader, made, reports = self.loader, dict[str, tuple[Linear, Form]](), list[LayerReport]()
        for name in (loader.family.embed, loader.family.head):
            form = self.selection.names.get(name)
            if form is None:
                continue
            whole = Linear(dense(loader.embed())) if name == loader.family.embed else loader.head()
            assert whole is not None
            with _rounding(name):
                rounded = Linear(nearest(float_weight(whole), form))
            made[name] = rounded, form
            reports.append(layer_report(name, whole, rounded, Finding()))
        return made, reports

    def _blocks(
        self,
        journal: Journal,
        writer: ModelWriter,
        calibration: Calibration | None,
        canary: Canary | None,
        run: Map,
    ) -> None:
        """Quantize every block that is not done yet."""
        watched = calibration if self.scheme.watches else None
        place = spilled_to(journal.folder) if self.estimate.spilled else in_memory
        stream = None if watched is None else Stream(self.loader, watched, self.scheme, run, place)
        passing: list[Stream | Canary] = [each for each in (stream, canary) if each is not None]
        total, first = self.loader.spec.num_layers, journal.done(stateful=bool(passing))
        if first:
            log.warning("going on after block %d of %d, where an earlier run ended", first, total)
            for each in passing:
                each.restore(journal.states(first - 1))
        started = time.monotonic()
        for layer in range(first, total):
            block, forms = read_block(self.loader, layer), self.selection.forms[layer]
            findings: dict[str, Finding] = {}
            with _rounding(f"layer {layer}"):
                if stream is None:
                    folded, quantized = block, self._nearest(layer, block, forms)
                else:
                    folded, quantized, findings = stream.advance(layer, block, forms)
            if canary is not None:
                canary.advance(layer, block)
            reports = self._reports(layer, folded, quantized, findings)
            states = {name: state for each in passing for name, state in each.kept().items()}
            if self.scheme.best:
                journal.keep_whole(layer, {p: float_weight(folded.linears[p]) for p in forms})
            journal.keep(layer, writer.block(layer, quantized, forms), reports, states)
            if isinstance(self.loader.source, Checkpoint):
                self.loader.source.release()
            left = (time.monotonic() - started) / (layer + 1 - first) * (total - layer - 1)
            self.tell(QuantizeProgress("quantize", layer + 1, total, left, tuple(reports)))

    def _reports(
        self, layer: int, folded: Block, quantized: Block, findings: dict[str, Finding]
    ) -> list[LayerReport]:
        names = self.loader.family.projections
        return [
            layer_report(
                names[p].format(i=layer), folded.linears[p], quantized.linears[p], findings.get(p, Finding())
            )
            for p in self.loader.spec.projections
            if p in self.selection.forms[layer]
        ]

    def _calibration(self, journal: Journal, run: Map) -> Calibration | None:
        if not self.scheme.reads:
            return None
        kept = journal.calibration()
        if kept is not None:
            return kept
        file, seed = self.calibration, self.seed
        found = calibration_for(self.source, self.loader, self.scheme, file, seed, self.tell, run)
        journal.keep_calibration(found)
        return found

    def _nearest(self, layer: int, block: Block, forms: Forms) -> Block:
        linears = dict(block.linears)
        for p, form in forms.items():
            with _rounding(self.loader.family.projections[p].format(i=layer)):
                rounded = nearest(float_weight(linears[p]), form)
            linears[p] = Linear(rounded, linears[p].bias, tokenwise(form))
        return Block(linears, block.norms)

    def _config(self) -> dict[str, Any]:
        config = dict(self.loader.source.config) | {"torch_dtype": "float16"}
        config.pop("dtype", None)
        form = self.scheme.form
        if form is not None:
            config["quantization_config"] = self.container.codec(form).settings(self.selection.names)
        return config


@contextmanager
def _rounding(part: str) -> Iterator[None]:
    """Says which part of the model holds numbers that cannot be rounded."""
    try:
        yield
    except ValueError as error:
        raise BrokenCheckpoint(f"{part}: {error}", hint="is the checkpoint damaged? fetch it again") from None
