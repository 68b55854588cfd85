"""Tuning a whole quantized model so that it predicts what the float model predicts.

Knowledge distillation of a model into its own rounded self: the levels of all blocks, their scales, norms and
biases, moved together (EfficientQAT, Chen et al. 2024, trains scales alone in its last phase). One block's
float weights are in memory at a time: a block's inputs are kept on the way forward, and on the way back it is
run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.quantized import dense
from nybble_models.decoder import Decoder
from nybble_models.weights import Block, Linear, Norm, Weights
from nybble_quantizers.levels import Pace, TunedBlock
from nybble_quantizers.slope import Slope, batches, spaced
from nybble_quantizers.workers import Map, in_turn

JUDGES = 8  # windows on which the end is compared with the start

END_TO_END = Pace(steps=100, batch=8)

Listener = Callable[[int, float], None]
"""`heard(step, divergence)`: steps done, and the mean divergence over the last one's windows."""


@dataclass(frozen=True, slots=True)
class Distilled:
    """The blocks, and the mean divergence of a token's prediction, in nats, before and after."""

    blocks: list[Block]
    before: float
    after: float


@torch.inference_mode(False)
@torch.no_grad()
def distill(
    decoder: Decoder,
    tuned: Sequence[TunedBlock],
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    pace: Pace = END_TO_END,
    seed: int = 0,
    run: Map = in_turn,
    heard: Listener = lambda step, divergence: None,
) -> Distilled:
    """Minimises the mean over tokens of KL(p ‖ p̂), p the float model's prediction of the next token.

    decoder: its embedding, final norm and head serve both models · tuned: every block · states: embedded
    windows, [T, D] each · targets: the float model's states after its last block. Where the end is no better
    than the start, the start is returned. The same arguments make the same bits, whatever `run` is.
    """
    model = _Model(decoder, tuned, run)
    judges = spaced(len(states), JUDGES)
    judged = [states[i] for i in judges], [targets[i] for i in judges]
    before = model.divergence(*judged)
    for step, chosen in enumerate(batches(len(states), pace, seed)):
        heard(step + 1, model.descend([states[i] for i in chosen], [targets[i] for i in chosen], pace, step))
    after = model.divergence(*judged)
    if after < before:
        return Distilled([block.made() for block in tuned], before, after)
    return Distilled([block.start for block in tuned], before, before)


class _Model:
    def __init__(self, decoder: Decoder, tuned: Sequence[TunedBlock], run: Map) -> None:
        self.slope = Slope(decoder, run)
        self.tuned = tuned
        self.run = run
        self.decoder = self.slope.decoder
        self.decoder.weights = _ends(decoder.weights)

    def divergence(self, states: list[Tensor], targets: list[Tensor]) -> float:
        for layer, block in enumerate(self.tuned):
            states = self.slope.forward(layer, block.block(block.values()), states)
        return _mean([loss for loss, _ in self.run(self._judge, zip(states, targets, strict=True))])

    def descend(self, states: list[Tensor], targets: list[Tensor], pace: Pace, step: int) -> float:
        """One step down the mean divergence of these windows; returns that."""
        kept: list[list[Tensor]] = []
        for layer, block in enumerate(self.tuned):
            kept.append(states)
            states = self.slope.forward(layer, block.block(block.values()), states)
        judged = self.run(self._judge, zip(states, targets, strict=True))
        gradients = [gradient for _, gradient in judged]
        for layer in reversed(range(len(self.tuned))):
            block, values = self.tuned[layer], self.tuned[layer].values()
            windows = [(x, partial(_given, g)) for x, g in zip(kept.pop(), gradients, strict=True)]
            gradients, of_values = self.slope.backward(layer, block.block(values), values, windows)
            block.move(of_values, pace, step)
        return _mean([loss for loss, _ in judged])

    def _judge(self, pair: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
        """The mean divergence of one window's predictions, and its gradient at the state [T, D]."""
        with torch.inference_mode(False), torch.no_grad():
            wanted = self.decoder.logits(pair[1].clone()).log_softmax(-1)
            with torch.enable_grad():
                state = pair[0].clone().requires_grad_()
                made = self.decoder.logits(state).log_softmax(-1)
                loss = F.kl_div(made, wanted, log_target=True, reduction="batchmean")
                (gradient,) = torch.autograd.grad(loss, state)
            return loss.item(), gradient


def _mean(losses: list[float]) -> float:
    return math.fsum(losses) / len(losses)


def _given(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient


def _ends(weights: Weights) -> Weights:
    """What makes predictions of states, as tensors that take part in gradients."""
    norm, head = weights.final_norm, weights.head
    bias = None if norm.bias is None else norm.bias.clone()
    table = dense(weights.embed if head is None else head.weight).clone()
    made = Linear(table, None if head is None or head.bias is None else head.bias.clone())
    return Weights(table, None, [], Norm(norm.weight.clone(), bias), made)
