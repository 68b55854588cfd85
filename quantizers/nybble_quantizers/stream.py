"""The calibration text on its way through the model, one block in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nybble_kernels.quantized import Weight
from nybble_models.decoder import Decoder
from nybble_models.errors import BrokenCheckpoint
from nybble_models.loader import Loader
from nybble_models.weights import Block, Linear, Norm, Weights
from nybble_models.window import Window
from nybble_quantizers.block import Finding, Scene, fold_block, merged, round_block
from nybble_quantizers.calibrate import Calibration, Inputs, Observation, read_windows
from nybble_quantizers.corpus import locate
from nybble_quantizers.generate import generate
from nybble_quantizers.report import Listener, QuantizeProgress
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.selection import Forms
from nybble_quantizers.sequential import ENOUGH, Passage
from nybble_quantizers.smoothquant import smooth_block
from nybble_quantizers.tokenizing import load_tokenizer
from nybble_quantizers.windows import Place, Windows, in_memory
from nybble_quantizers.workers import Map

TOGETHER = 8  # windows whose inputs are held at the same time
KEPT = 2  # windows on which the halves of a block are run for every candidate; four chose no better


def calibration_for(
    source: Path, loader: Loader, scheme: Scheme, file: str | None, seed: int, tell: Listener, run: Map
) -> Calibration:
    """Windows of the file, or, without one, text that the model writes (which needs all of it in memory)."""
    length = min(scheme.length, loader.spec.max_positions)
    if file is not None:
        return read_windows(locate(file), load_tokenizer(source), scheme.samples, length, seed)
    started = time.monotonic()

    def advance(done: int) -> None:
        left = (time.monotonic() - started) / done * (length - done)
        tell(QuantizeProgress("calibrate", done, length, left))

    tokens = generate(loader.spec, float_weights(loader), scheme.samples, length, seed, advance, run)
    return Calibration(tokens, "written by the model")


def float_weights(loader: Loader) -> Weights:
    """The whole model in float32."""
    blocks = [read_block(loader, layer) for layer in range(loader.spec.num_layers)]
    positions, head = loader.positions(), loader.head()
    return Weights(
        _finite(loader.embed(), loader.family.embed),
        None if positions is None else positions.float(),
        blocks,
        loader.final_norm(),
        None if head is None else _finite_linear(head, loader.family.head),
    )


class Stream:
    """One state [T, D] per window, moved on by a block at a time.

    AWQ: the next block sees what the float block makes of the text. Feeding it what the quantized block makes
    instead was measured: the same perplexity within the noise, for twice the forward passes. GPTQ: it sees
    what the quantized block makes of it, and the rounding itself is that pass; the float block's states pass
    along, for the rounding to make up for what has been lost so far.
    """

    def __init__(
        self, loader: Loader, calibration: Calibration, scheme: Scheme, run: Map, place: Place = in_memory
    ) -> None:
        self.loader = loader
        self.run = run
        self.scheme = scheme
        self.place = place
        spec = loader.spec
        empty = [Block()] * spec.num_layers
        weights = Weights(loader.embed(), loader.positions(), empty, loader.final_norm(), None)
        self.decoder = Decoder(spec, weights)
        count, length = calibration.tokens.shape
        self.states = place(count, (length, spec.hidden_size))
        known = told(scheme, count, length, spec.hidden_size)
        self.plain = place(known, (length, spec.hidden_size))  # as the float model makes them
        for index, window in enumerate(calibration.tokens):
            for passing in (self.states, self.plain):
                if index < len(passing):
                    passing[index] = self.decoder.embed(window)
        weights.embed = torch.empty(0, spec.hidden_size)  # a large matrix that nobody looks at any more

    def advance(self, layer: int, block: Block, forms: Forms) -> tuple[Block, Block, dict[str, Finding]]:
        """(folded, quantized, findings) of one block, see `round_block`; moves the text past it."""
        scheme, run = self.scheme, self.run
        folded, findings = block, dict[str, Finding]()
        if scheme.folds or not scheme.compensates:
            scene = self._watch(layer, block)
            if scheme.smooths:
                folded, findings = smooth_block(block, scene, forms, scheme.alpha, run)
            elif scheme.folds:
                folded, findings = fold_block(block, scene, scheme, forms, run)
            if not scheme.compensates:
                made, rounding = round_block(folded, scene, forms, scheme.clip and scheme.folds, run)
                return folded, made, merged(findings, rounding)
        passage = Passage(self.decoder, layer, folded, scheme, forms, run, self.place)
        passage.through(self.states, self.plain)
        return folded, passage.made, merged(findings, passage.findings)

    def kept(self) -> dict[str, Windows]:
        """All that the next block needs to know of the blocks before it."""
        kept = {"states": self.states}
        return kept | {"plain": self.plain} if len(self.plain) else kept

    def restore(self, kept: Mapping[str, Windows]) -> None:
        """Go on after the block with which `kept` was made."""
        for name, windows in self.kept().items():
            for index, window in enumerate(kept[name]):
                windows[index] = window

    def _watch(self, layer: int, block: Block) -> Scene:
        """What the linears of the float block read; moves the states on unless they pass later."""
        inputs, states, moves = Inputs(KEPT), self.states, not self.scheme.compensates
        blocks, spec = self.decoder.weights.blocks, self.loader.spec
        blocks[layer] = block

        def through(index: int) -> Observation:
            seen = Observation()
            moved = self.decoder.block(layer, states[index], Window(spec), seen.observe)
            if moves:
                states[index] = moved
            return seen

        for first in range(0, len(states), TOGETHER):
            part = range(first, min(first + TOGETHER, len(states)))
            inputs.add(*self.run(through, part), run=self.run)
        blocks[layer] = Block()
        return Scene(self.decoder, self.loader.family, layer, inputs)


def told(scheme: Scheme, windows: int, length: int, hidden_size: int) -> int:
    """How many windows also pass the float blocks: all, to teach or to correct by, or none."""
    useful = scheme.best or windows * length >= ENOUGH * hidden_size
    return windows if scheme.compensates and useful else 0


def read_block(loader: Loader, layer: int) -> Block:
    """A block in float32. Raises `BrokenCheckpoint` naming the tensor that holds NaN or infinity."""
    loaded, family = loader.block(layer), loader.family
    linears = {p: _finite_linear(x, family.projections[p].format(i=layer)) for p, x in loaded.linears.items()}
    norms = {role: _finite_norm(x, family.norms[role].format(i=layer)) for role, x in loaded.norms.items()}
    return Block(linears, norms)


def _finite_linear(linear: Linear, name: str) -> Linear:
    bias = None if linear.bias is None else _finite(linear.bias, f"{name}.bias")
    return replace(linear, weight=_finite(linear.weight, f"{name}.weight"), bias=bias)


def _finite_norm(norm: Norm, name: str) -> Norm:
    bias = None if norm.bias is None else _finite(norm.bias, f"{name}.bias")
    return Norm(_finite(norm.weight, f"{name}.weight"), bias)


def _finite(tensor: Weight, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is quantized already")
    value = tensor.float()
    if not all(bool(end.isfinite()) for end in value.aminmax()):  # NaN is both ends of what holds one
        raise BrokenCheckpoint(
            f"{name} holds NaN or infinity", hint="the checkpoint is damaged; fetch it again"
        )
    return value
