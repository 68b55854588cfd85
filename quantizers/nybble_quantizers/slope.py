"""A block as a function to be minimised: its outputs, and the gradients of what it computes with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nybble_models.decoder import Decoder
from nybble_models.weights import Block
from nybble_models.window import Window
from nybble_quantizers.levels import Pace, Values
from nybble_quantizers.workers import Map, in_turn

Pull = Callable[[Tensor], Tensor]
"""A window's output [T, D] -> the gradient of the objective there."""


class Slope:
    """Windows pass side by side and are summed in their order, so the number of workers changes nothing."""

    @torch.inference_mode(False)
    def __init__(self, decoder: Decoder, run: Map = in_turn) -> None:
        self.decoder = copy.copy(decoder)
        self.run = run
        if decoder.cos is not None and decoder.sin is not None:
            # what was made in inference mode takes no part in gradients
            self.decoder.cos, self.decoder.sin = decoder.cos.clone(), decoder.sin.clone()

    def forward(self, layer: int, block: Block, states: Sequence[Tensor]) -> list[Tensor]:
        return self.run(lambda x: self._through(layer, block, x), states)

    def backward(
        self, layer: int, block: Block, values: Values, windows: Sequence[tuple[Tensor, Pull]]
    ) -> tuple[list[Tensor], Values]:
        """Gradients at each window's input [T, D], and of the values that `block` holds, over all windows."""
        for value in values.values():
            value.requires_grad_()
        parts = self.run(partial(self._pulled, layer, block, list(values.values())), windows)
        total = [gradient.clone() for gradient in parts[0][1]]
        for _, gradients in parts[1:]:
            for whole, gradient in zip(total, gradients, strict=True):
                whole.add_(gradient)
        return [x for x, _ in parts], dict(zip(values, total, strict=True))

    def _pulled(
        self, layer: int, block: Block, leaves: list[Tensor], window: tuple[Tensor, Pull]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        state, pull = window
        with torch.inference_mode(False), torch.enable_grad():
            x = state.clone().requires_grad_()
            y = self._through(layer, block, x)
            first, *others = torch.autograd.grad(y, [x, *leaves], pull(y.detach()))
        return first, tuple(others)

    def _through(self, layer: int, block: Block, x: Tensor) -> Tensor:
        decoder = self.decoder
        normed = decoder.norm(block.norms["attention_norm"], x)
        x = x + decoder.attention(block, layer, normed, Window(decoder.spec))
        return x + decoder.mlp(block, decoder.norm(block.norms["mlp_norm"], x))


def batches(windows: int, pace: Pace, seed: int) -> Iterator[list[int]]:
    """Which windows each step sees: all of them before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    ahead: list[int] = []
    for _ in range(pace.steps):
        while len(ahead) < min(pace.batch, windows):
            ahead += torch.randperm(windows, generator=generator).tolist()
        yield ahead[: pace.batch]
        ahead = ahead[pace.batch :]


def spaced(windows: int, wanted: int) -> list[int]:
    """Evenly spaced windows, all where there are no more than wanted."""
    return [i * windows // wanted for i in range(wanted)] if windows > wanted else list(range(windows))
