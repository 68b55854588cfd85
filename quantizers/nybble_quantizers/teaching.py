"""`--quality best`: when all is rounded, the model learns from the float model it was (see `distill`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, dense
from nybble_models.decoder import Decoder
from nybble_models.errors import BrokenCheckpoint
from nybble_models.loader import CPU, Loader
from nybble_models.weights import Block, Linear, Weights
from nybble_quantizers.block import Finding
from nybble_quantizers.calibrate import Calibration
from nybble_quantizers.device import moved
from nybble_quantizers.distill import END_TO_END, Distilled, distill
from nybble_quantizers.journal import Journal
from nybble_quantizers.levels import TunedBlock
from nybble_quantizers.report import LayerReport, Listener, QuantizeProgress, layer_report
from nybble_quantizers.selection import Forms
from nybble_quantizers.workers import Map
from nybble_quantizers.writer import ModelWriter

log = logging.getLogger("nybble.quantize")


class Finished:
    """The finished blocks of a journal, as a loader's source: what was written is what is tuned."""

    def __init__(self, journal: Journal, layers: int, config: Mapping[str, Any]) -> None:
        self.config = config
        self._where = {name: layer for layer in range(layers) for name in journal.names(layer)}
        self._journal = journal

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def tensor(self, name: str) -> Tensor:
        if name not in self._where:
            raise BrokenCheckpoint(f"{name} is in no finished block", hint="run the same command again")
        return self._journal.tensor(self._where[name], name)

    def levels(self, name: str) -> QuantizedTensor | None:
        return None

    def release(self) -> None:
        """Nothing is held between two reads."""

    def files(self) -> list[Path]:
        return []


def teach(
    loader: Loader,
    journal: Journal,
    config: Mapping[str, Any],
    calibration: Calibration,
    steps: int,
    seed: int,
    run: Map,
    tell: Listener,
) -> Distilled:
    """The blocks of the journal, tuned to predict what the float model predicts of the calibration text.

    Holds every linear as a float a weight, and one block's gradients. The journal has the blocks before they
    were rounded and the float model's last states.
    """
    spec = loader.spec
    finished = Loader(Finished(journal, spec.num_layers, config), device=loader.device)
    tuned = [
        TunedBlock(_whole(journal, layer, finished.block(layer)), finished.block(layer))
        for layer in range(spec.num_layers)
    ]
    last = journal.states(spec.num_layers - 1)
    weights = Weights(
        dense(loader.embed()),
        loader.positions(),
        [Block()] * spec.num_layers,
        loader.final_norm(),
        loader.head(),
    )
    decoder = Decoder(spec, weights)
    states = [decoder.embed(window) for window in calibration.tokens]
    targets = [window.to(loader.device) for window in last.get("plain", last["states"])]
    pace = replace(END_TO_END, steps=steps, batch=min(END_TO_END.batch, len(states)))

    def heard(step: int, divergence: float) -> None:
        tell(QuantizeProgress("tune", step, steps))

    return distill(decoder, tuned, states, targets, pace, seed, run, heard)


def keep(
    loader: Loader, journal: Journal, writer: ModelWriter, forms: Sequence[Forms], made: Distilled
) -> None:
    """What was tuned, in the journal beside what it was made of. It is final once it is whole."""
    log.info("tuned: KL %.5f -> %.5f nats a token on the calibration text", made.before, made.after)
    for layer, block in enumerate(made.blocks):
        whole, rows = _whole(journal, layer, block), journal.reports(layer)
        names = {loader.family.projections[p].format(i=layer): p for p in block.linears}
        reports = [
            _again(row, whole.linears[names[row.name]], block.linears[names[row.name]]) for row in rows
        ]
        journal.keep_tuned(layer, writer.block(layer, moved(block, CPU), forms[layer]), reports)
    journal.taught(loader.spec.num_layers)


def _whole(journal: Journal, layer: int, rounded: Block) -> Block:
    """The block as it was before its linears were rounded."""
    whole = journal.whole(layer)
    linears = {
        name: replace(linear, weight=whole[name].to(linear.weight.device)) if name in whole else linear
        for name, linear in rounded.linears.items()
    }
    return Block(linears, rounded.norms)


def _again(row: LayerReport, whole: Linear, tuned: Linear) -> LayerReport:
    """The row of a linear whose levels have moved: its outputs were not measured again."""
    found = Finding(ratio=row.ratio, duo=row.duo, clip_share=row.clip_share, damp=row.damp)
    return layer_report(row.name, whole, tuned, found)
