"""SmoothQuant (Xiao et al. 2023): move what is hard to round from the inputs of a linear into its weights.

A few input channels are many times the rest, and with one scale a token they leave the rest no levels.
Dividing channel j of the input by s_j and multiplying the weights' column j by it changes nothing until both
are rounded. s is folded into what produces the input: the norm, v (before o), up (before down).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nybble_models.formats.form import Form
from nybble_models.weights import Block
from nybble_quantizers import awq
from nybble_quantizers.block import TINY, Finding, Scene, rescale
from nybble_quantizers.folding import float_weight, fold, foldable, pool, spread
from nybble_quantizers.rounding import fake, inputs_of
from nybble_quantizers.workers import Map, in_turn

GRID = 20  # steps of alpha from 0 to 1
FAINT = 1e-5  # of the largest: below, a channel counts as this loud


def scale_of(peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^a / max|w_j|^(1 - a) with a = `alpha`, centred on 1: [K] and [K] -> [K].

    peak: the largest magnitude of each input channel · weight: that of its column, over all linears that
    read it. A channel that is never active, or never read, is left alone.
    """
    loud, wide = (v.clamp(min=float(v.max()) * FAINT) for v in (peak, weight))
    scale = awq.balanced(loud**alpha / wide ** (1 - alpha))
    return torch.where((peak > 0) & (weight > 0), scale, 1.0)


def search(loss: Callable[[Tensor], float], peak: Tensor, weight: Tensor, run: Map = in_turn) -> awq.Choice:
    """Minimise `loss(s)` over alpha = 0, 1/20 .. 1 and s = 1. The ratio of the choice is alpha."""
    ones = torch.ones_like(peak)
    plain = loss(ones)

    def attempt(step: int) -> awq.Choice:
        scale = scale_of(peak, weight, step / GRID)
        return awq.Choice(scale, step / GRID, False, loss(scale), plain)

    tried = run(attempt, list(range(GRID + 1)))
    return min(awq.Choice(ones, None, False, plain, plain), *tried, key=lambda choice: choice.error)


@torch.inference_mode()
def smooth_block(
    block: Block, scene: Scene, forms: Mapping[str, Form], alpha: float | None = None, run: Map = in_turn
) -> tuple[Block, dict[str, Finding]]:
    """The same function with smooth inputs where inputs are rounded. Rescales the scene's inputs.

    Without `alpha` every fold has the one that leaves least error in what its half of the block makes, with
    weights and inputs rounded; none is a candidate too.
    """
    findings: dict[str, Finding] = {}
    for producer, consumers in scene.family.folds:
        rounds = all(c in forms and forms[c].inputs is not None for c in consumers)
        if rounds and foldable(scene.spec, producer, consumers):
            ratio, scale = _chosen(block, scene, forms, producer, consumers, alpha, run)
            block = fold(block, scene.spec, producer, consumers, scale)
            rescale(scene.inputs, consumers[0], spread(scene.spec, producer, scale))
            findings |= dict.fromkeys(consumers, Finding(ratio))
    return block, findings


def _chosen(
    block: Block,
    scene: Scene,
    forms: Mapping[str, Form],
    producer: str,
    consumers: tuple[str, ...],
    alpha: float | None,
    run: Map,
) -> tuple[float | None, Tensor]:
    """(alpha, scale [channels of the producer]) of one fold."""
    widest = torch.stack([float_weight(block.linears[c]).abs().amax(0) for c in consumers]).amax(0)
    peak = scene.inputs.peak[consumers[0]]
    peak, widest = (pool(scene.spec, producer, v, torch.amax) for v in (peak, widest))
    if alpha is not None:
        return alpha, scale_of(peak, widest, alpha)
    choice = search(_loss(block, scene, forms, producer, consumers), peak, widest, run)
    return choice.ratio, choice.scale


def _loss(
    block: Block, scene: Scene, forms: Mapping[str, Form], producer: str, consumers: tuple[str, ...]
) -> Callable[[Tensor], float]:
    """Error over signal of what the half makes (of the linear's output where a linear produces)."""
    read, seen = consumers[0], scene.inputs
    weights = {c: float_weight(block.linears[c]) for c in consumers}

    def output(changed: Block, rows: list[Tensor]) -> Tensor:
        if producer in block.norms:
            return scene.half(changed, producer, rows)
        return torch.cat([scene.decoder.project(changed, (read,), x)[0] for x in rows])

    target = output(block, seen.rows[read])
    signal = max(float(target.square().sum()), TINY)

    def loss(scale: Tensor) -> float:
        columns = spread(scene.spec, producer, scale)
        largest = float((seen.peak[read] / columns).max())
        linears = {
            c: replace(
                block.linears[c], weight=fake(w * columns, forms[c]), inputs=inputs_of(forms[c], largest)
            )
            for c, w in weights.items()
        }
        made = output(Block(block.linears | linears, block.norms), [x / columns for x in seen.rows[read]])
        return float(made.sub_(target).square_().sum()) / signal

    return loss
