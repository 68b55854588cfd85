"""Tuning the rounding of one block so that it makes of the text what the float model makes of it.

SignRound (Cheng et al. 2023) with three changes: it starts from what any method chose (GPTQ, say), not from
the nearest levels; scales are numbers of their own, not ranges; and the target is the float model's own
state, so that a block also makes up for what the blocks before it lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble_models.decoder import Decoder
from nybble_models.weights import Block
from nybble_quantizers.levels import Pace, TunedBlock
from nybble_quantizers.slope import Slope, batches, spaced
from nybble_quantizers.workers import Map, in_turn

JUDGES = 16  # windows on which the end is compared with the start
TINY = 1e-30

BLOCKWISE = Pace(steps=200, batch=8)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuned block, and its objective over the target's energy before and after."""

    block: Block
    before: float
    after: float


@torch.inference_mode(False)
@torch.no_grad()
def tune_block(
    decoder: Decoder,
    layer: int,
    whole: Block,
    rounded: Block,
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    pace: Pace = BLOCKWISE,
    seed: int = 0,
    run: Map = in_turn,
) -> Tuned:
    """Minimises Σ over windows ‖block(x; Ŵ) - target‖² over levels, scales, norms and biases.

    whole, rounded: the block before and after any quantizer · states: what the quantized model feeds the
    block, [T, D] for each window · targets: the float model's states after the block. Where the end is no
    better than the start, the start is returned. The same arguments make the same bits, whatever `run` is.
    """
    slope, tuned = Slope(decoder, run), TunedBlock(whole, rounded)
    judges = spaced(len(states), JUDGES)
    energy = sum(float(targets[i].square().sum(dtype=torch.float64)) for i in judges)

    def error() -> float:
        outputs = slope.forward(layer, tuned.block(tuned.values()), [states[i] for i in judges])
        missed = (y - targets[i] for y, i in zip(outputs, judges, strict=True))
        return sum(float(m.square().sum(dtype=torch.float64)) for m in missed) / max(energy, TINY)

    before = error()
    for step, chosen in enumerate(batches(len(states), pace, seed + layer)):
        values = tuned.values()
        windows = [(states[i], targets[i].neg().add) for i in chosen]  # y - target: half the gradient
        _, gradients = slope.backward(layer, tuned.block(values), values, windows)
        tuned.move(gradients, pace, step)
    after = error()
    return Tuned(tuned.made(), before, after) if after < before else Tuned(rounded, before, before)
