"""Checkpoint in, quantized checkpoint out: read, fold, round and write, one block in memory at a time."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nybble_models.checkpoint import write_json
from nybble_models.errors import ModelError
from nybble_models.formats.awq import AwqCodec
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.weights import Block, Linear
from nybble_quantizers import rtn
from nybble_quantizers.block import Finding
from nybble_quantizers.calibrate import Calibration
from nybble_quantizers.folding import float_weight
from nybble_quantizers.output import appearing
from nybble_quantizers.report import (
    LayerReport,
    Listener,
    QuantizeProgress,
    QuantReport,
    layer_report,
    versions,
)
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.selection import Selection, select
from nybble_quantizers.stream import Stream, calibration_for, read_block
from nybble_quantizers.tokenizing import carry_over
from nybble_quantizers.workers import Map, side_by_side
from nybble_quantizers.writer import ModelWriter

log = logging.getLogger("nybble.quantize")

CODEC = AwqCodec()


@torch.inference_mode()
def quantize(
    source: Path | str,
    out: Path,
    scheme: Scheme,
    *,
    calibration: str | None = None,
    seed: int = 0,
    progress: Listener | None = None,
    command: str | None = None,
) -> QuantReport:
    """Write `source` (a folder or a .gguf file), quantized by `scheme`, as the new folder `out`.

    Without a calibration file the model writes its own text. The same arguments make the same bytes. Raises
    `ModelError` in one line; then, and on Ctrl-C, nothing is left behind.
    """
    run = _Run(Path(source), scheme, calibration, seed, progress or (lambda event: None))
    with appearing(out, run.selection.nbytes) as folder:
        report = run.write(folder, " ".join(sys.argv) if command is None else command)
        report.write(folder)
    return report


class _Run:
    """One quantization from start to end."""

    def __init__(
        self, source: Path, scheme: Scheme, calibration: str | None, seed: int, tell: Listener
    ) -> None:
        self.source = source
        self.scheme = scheme
        self.calibration = calibration
        self.seed = seed
        self.tell = tell
        self.loader = Loader(open_source(source))
        if self.loader.codec is not None:
            raise ModelError(f"{source} is quantized already", hint="quantize the original model")
        self.selection: Selection = select(self.loader.spec, self.loader.family, scheme, CODEC)
        skipped = self.selection.skipped
        if skipped and scheme.method != "none":
            log.warning("%d linears stay at 16 bits, the first is %s", len(skipped), skipped[0])

    def write(self, folder: Path, command: str) -> QuantReport:
        writer = ModelWriter(folder, self.loader.family, CODEC)
        with side_by_side() as run:
            calibration = self._calibration(run)
            layers = self._blocks(writer, calibration, run)
        writer.rest(self.loader)
        self.tell(QuantizeProgress("write", 0, 1))
        writer.shards.close()
        write_json(folder / "config.json", self._config())
        carry_over(self.source, folder)
        self.tell(QuantizeProgress("write", 1, 1))
        sizes = writer.shards.bytes
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
        )

    def _blocks(self, writer: ModelWriter, calibration: Calibration | None, run: Map) -> list[LayerReport]:
        """Quantize and write every block."""
        stream = None if calibration is None else Stream(self.loader, calibration, self.scheme, run)
        started, total = time.monotonic(), self.loader.spec.num_layers
        reports: list[LayerReport] = []
        for layer, rounded in enumerate(self.selection.rounded):
            block = read_block(self.loader, layer)
            findings: dict[str, Finding] = {}
            if stream is None:
                folded, quantized = block, self._nearest(block, rounded)
            else:
                folded, quantized, findings = stream.advance(layer, block, rounded)
            writer.block(layer, quantized)
            for p in (p for p in self.loader.spec.projections if p in rounded):
                name = self.loader.family.projections[p].format(i=layer)
                found = findings.get(p, Finding())
                reports.append(layer_report(name, folded.linears[p], quantized.linears[p], found))
            left = (time.monotonic() - started) / (layer + 1) * (total - layer - 1)
            noise = max((f.noise for f in findings.values() if f.noise is not None), default=None)
            self.tell(QuantizeProgress("quantize", layer + 1, total, left, noise))
        return reports

    def _calibration(self, run: Map) -> Calibration | None:
        if not (self.scheme.folds or self.scheme.compensates):
            return None
        file, seed = self.calibration, self.seed
        return calibration_for(self.source, self.loader, self.scheme, file, seed, self.tell, run)

    def _nearest(self, block: Block, rounded: frozenset[str]) -> Block:
        linears = dict(block.linears)
        for p in rounded:
            weight = float_weight(linears[p])
            group = self.scheme.group(weight.shape[1])
            linears[p] = Linear(
                rtn.quantize(weight, self.scheme.bits, group, self.scheme.symmetric), linears[p].bias
            )
        return Block(linears, block.norms)

    def _config(self) -> dict[str, Any]:
        config = dict(self.loader.source.config) | {"torch_dtype": "float16"}
        config.pop("dtype", None)
        if self.scheme.method != "none":
            scheme = self.scheme
            config["quantization_config"] = CODEC.settings(
                scheme.bits, scheme.group_size, scheme.symmetric, self.selection.skipped
            )
        return config
