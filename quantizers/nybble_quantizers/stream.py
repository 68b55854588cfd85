"""The calibration text on its way through the model, one block in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nybble_kernels.quantized import Weight, dense
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
from nybble_quantizers.sequential import Passage
from nybble_quantizers.smoothquant import smooth_block
from nybble_quantizers.tokenizing import load_tokenizer
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

    def __init__(self, loader: Loader, calibration: Calibration, scheme: Scheme, run: Map) -> None:
        self.loader = loader
        self.run = run
        self.scheme = scheme
        spec = loader.spec
        empty = [Block()] * spec.num_layers
        weights = Weights(dense(loader.embed()), loader.positions(), empty, loader.final_norm(), None)
        self.decoder = Decoder(spec, weights)
        self.states: list[Tensor] = [self.decoder.embed(window) for window in calibration.tokens]
        self.plain = list(self.states) if scheme.compensates else []  # as the float model makes them

    def advance(self, layer: int, block: Block, forms: Forms) -> tuple[Block, Block, dict[str, Finding]]:
        """(folded, quantized, findings) of one block, see `round_block`; moves the text past it."""
        scheme, run = self.scheme, self.run
        folded, findings = block, dict[str, Finding]()
        if scheme.folds or not scheme.compensates:
            scene, moved = self._watch(layer, block)
            if scheme.smooths:
                folded, findings = smooth_block(block, scene, forms, scheme.alpha, run)
            elif scheme.folds:
                folded, findings = fold_block(block, scene, scheme, forms, run)
            if not scheme.compensates:
                self.states = moved
                made, rounding = round_block(folded, scene, forms, scheme.clip and scheme.folds, run)
                return folded, made, merged(findings, rounding)
        passage = Passage(self.decoder, layer, folded, scheme, forms, run)
        passage.through(self.states, self.plain)
        return folded, passage.made, merged(findings, passage.findings)

    def kept(self) -> dict[str, Tensor]:
        """All that the next block needs to know of the blocks before it."""
        kept = {"states": torch.stack(self.states)}
        return kept | {"plain": torch.stack(self.plain)} if self.plain else kept

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Go on after the block with which `kept` was made."""
        self.states = list(kept["states"])
        self.plain = list(kept.get("plain", ()))

    def _watch(self, layer: int, block: Block) -> tuple[Scene, list[Tensor]]:
        """What the linears of the float block read, and the states after it."""
        inputs, states = Inputs(KEPT), list(self.states)
        blocks, spec = self.decoder.weights.blocks, self.loader.spec
        blocks[layer] = block

        def through(state: Tensor) -> tuple[Tensor, Observation]:
            seen = Observation()
            return self.decoder.block(layer, state, Window(spec), seen.observe), seen

        for first in range(0, len(states), TOGETHER):
            part = slice(first, first + TOGETHER)
            moved = self.run(through, states[part])
            states[part] = [state for state, _ in moved]
            for _, seen in moved:
                inputs.add(seen)
        blocks[layer] = Block()
        return Scene(self.decoder, self.loader.family, layer, inputs), states


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
    if not bool(value.isfinite().all()):
        raise BrokenCheckpoint(
            f"{name} holds NaN or infinity", hint="the checkpoint is damaged; fetch it again"
        )
    return value
