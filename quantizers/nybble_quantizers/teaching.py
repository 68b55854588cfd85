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
from nybble_models.window import Window
from nybble_quantizers import awq
from nybble_quantizers.block import TINY, Finding, read_by
from nybble_quantizers.calibrate import Calibration, Inputs, Observation
from nybble_quantizers.device import moved
from nybble_quantizers.distill import END_TO_END, JUDGES, Distilled, distill
from nybble_quantizers.folding import float_weight
from nybble_quantizers.journal import Journal
from nybble_quantizers.levels import TunedBlock
from nybble_quantizers.report import LayerReport, Listener, QuantizeProgress, layer_report
from nybble_quantizers.selection import Forms
from nybble_quantizers.slope import spaced
from nybble_quantizers.workers import Map
from nybble_quantizers.writer import ModelWriter

log = logging.getLogger("nybble.quantize")

Noise = dict[str, float]
"""Of a block's linears: the noise of the output over its signal."""


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
) -> tuple[Distilled, list[Noise]]:
    """The blocks of the journal, tuned to predict what the float model predicts of the calibration text.

    Also how well each of their linears does then. Holds every linear as a float a weight, and one block's
    gradients. The journal has the blocks before they were rounded and the float model's last states.
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

    made = distill(decoder, tuned, states, targets, pace, seed, run, heard)
    passing, noises = [states[i] for i in spaced(len(states), JUDGES)], list[Noise]()
    for layer, block in enumerate(made.blocks):
        passing, noise = _listened(decoder, layer, _whole(journal, layer, block), block, passing, run)
        noises.append(noise)
    return made, noises


def _listened(
    decoder: Decoder, layer: int, whole: Block, made: Block, states: Sequence[Tensor], run: Map
) -> tuple[list[Tensor], Noise]:
    """These windows past a tuned block, and what its linears' outputs have of noise."""
    linears = {p: replace(linear, weight=dense(linear.weight)) for p, linear in made.linears.items()}
    blocks, spec, inputs = decoder.weights.blocks, decoder.spec, Inputs(kept=0)
    blocks[layer] = Block(linears, made.norms)

    def through(x: Tensor) -> tuple[Tensor, Observation]:
        seen = Observation()
        return decoder.block(layer, x, Window(spec), seen.observe), seen

    passed = run(through, states)
    inputs.add(*(seen for _, seen in passed), run=run)
    blocks[layer] = Block()
    noise = Noise()
    for name, linear in linears.items():
        aim, gram = float_weight(whole.linears[name]), inputs.gram[read_by(name, spec)]
        noise[name] = awq.energy(float_weight(linear) - aim, gram) / max(awq.energy(aim, gram), TINY)
    return [state for state, _ in passed], noise


def keep(
    loader: Loader,
    journal: Journal,
    writer: ModelWriter,
    forms: Sequence[Forms],
    made: Distilled,
    noises: Sequence[Noise],
) -> None:
    """What was tuned, in the journal beside what it was made of. It is final once it is whole."""
    log.info("tuned: KL %.5f -> %.5f nats a token on the calibration text", made.before, made.after)
    for layer, block in enumerate(made.blocks):
        whole, rows = _whole(journal, layer, block), journal.reports(layer)
        names = {loader.family.projections[p].format(i=layer): p for p in block.linears}
        reports = list[LayerReport]()
        for row in rows:
            name = names[row.name]
            linears = whole.linears[name], block.linears[name]
            reports.append(_again(row, *linears, noises[layer][name]))
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


def _again(row: LayerReport, whole: Linear, tuned: Linear, noise: float) -> LayerReport:
    """The row of a linear whose levels have moved."""
    found = Finding(row.ratio, row.duo, row.clip_share, noise, row.damp)
    return layer_report(row.name, whole, tuned, found)
