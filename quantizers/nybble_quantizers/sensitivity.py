"""How much the model's output changes when one unit is rounded: measured in a single backward pass.

Rounding the weights θ to θ + δ changes what the model predicts by, to second order,

    KL(p ‖ q) = ½ δᵀ F δ,   F = E[∇L ∇Lᵀ],   L = log p(y | text), y drawn from the model itself

(the true Fisher information; the text's own tokens for y would make the empirical one, which is no second
derivative of anything). A window of T tokens is one backward pass of Σ_t L_t, its T labels drawn
independently: as E[∇L_t] = 0, the products of different t vanish in expectation, and the gradient of the sum
serves for the sum over tokens. With the gradient dW [N, K] of a linear in one window, the rounding error δ_n
of a row adds

    ½ (dW_n · δ_n)²   nats over the window,   dW_n · δ_n = Σ_t g_tn (δ_n · x_t)

Rows are rounded independently, so their cross terms average out, and so many rows need few windows; the
square of the sum over all rows would be one draw a window.

Against the divergence itself, one unit rounded at a time (BabyLlama-105, 16 x 256 tokens; 3, 4 and 8 bits):
correlation of the logarithms 0.97 to 1.00, mean ratio 0.96 to 1.00. The square of the sum: 0.81 to 0.85. Nine
units of SmolLM2-135M at 4 bits: ratios 0.94 to 1.36; a sum over all units was 1.18 of what the whole model at
4 bits showed, and 1.05 where the most sensitive had 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.quantized import dense
from nybble_models.decoder import Decoder
from nybble_models.formats.form import Form
from nybble_models.loader import Loader
from nybble_models.weights import Block, Linear, Weights
from nybble_models.window import Window
from nybble_quantizers.folding import float_weight
from nybble_quantizers.rounding import fake
from nybble_quantizers.stream import read_block
from nybble_quantizers.units import EMBED, Unit
from nybble_quantizers.workers import Map, in_turn

T = TypeVar("T")
R = TypeVar("R")

Candidates = Mapping[Unit, Sequence[Form | None]]

Heard = Callable[[int, int], None]
"""`heard(done, total)`, in blocks passed."""

ROWS = 256  # positions whose logits are held at a time
BACK = 4  # times as long as forward takes a block backward, with its candidates (SmolLM2-135M)


def measure(
    loader: Loader,
    tokens: Tensor,
    candidates: Candidates,
    seed: int = 0,
    run: Map = in_turn,
    heard: Heard = lambda done, total: None,
) -> dict[Unit, dict[Form | None, float]]:
    """Nats a token by which each form of each unit moves the model away from the unquantized one.

    tokens: int64 [windows, T]; two windows of 256 chose as well as eight (SmolLM2-135M, 5 bits of 4 and 8).
    Rounds to nearest: AWQ lessens the errors of all units by about the same factor, and chose as well there.
    One block in memory, each read twice, and the states before all of them: layers · windows · T · D floats.
    16 bits cost nothing, and rounded inputs are not counted.
    """
    with torch.inference_mode(False):
        return _Measurement(loader, tokens.clone(), candidates, run, heard).costs(seed)


class _Measurement:
    def __init__(
        self, loader: Loader, tokens: Tensor, candidates: Candidates, run: Map, heard: Heard
    ) -> None:
        self.heard = heard
        self.loader = loader
        self.tokens = tokens
        self.candidates = candidates
        self.run = run
        head, positions = loader.head(), loader.positions()
        weights = Weights(
            dense(loader.embed()),
            None if positions is None else positions.float(),
            [Block()] * loader.spec.num_layers,
            loader.final_norm(),
            None if head is None else replace(head, weight=dense(head.weight)),
        )
        self.decoder = Decoder(loader.spec, weights)

    def costs(self, seed: int) -> dict[Unit, dict[Form | None, float]]:
        states = self._states()
        last = states.pop()
        found = {unit: dict.fromkeys(forms, 0.0) for unit, forms in self.candidates.items()}
        slopes = self._map(self._slope, [(seed << 20 | i, state) for i, state in enumerate(last)])
        count = len(states)
        for layer in reversed(range(count)):
            slopes = self._back(layer, states.pop(), slopes, found)
            self.heard(BACK * (count - layer) + count, (BACK + 1) * count)
        for unit in (unit for unit in found if unit.layer is None):
            for form in (form for form in found[unit] if form is not None):
                found[unit][form] = self._end(unit, form, last, slopes)
        return found

    def _map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Workers run in inference mode, in which nothing can be differentiated."""

        def call(item: T) -> R:
            with torch.inference_mode(False):
                return function(item)

        return self.run(call, items)

    def _states(self) -> list[list[Tensor]]:
        """[T, D] of every window before each block, and after the last."""
        states = [self._map(self.decoder.embed, list(self.tokens))]
        for layer in range(self.decoder.spec.num_layers):
            self.decoder.weights.blocks[layer] = read_block(self.loader, layer)
            states.append(self._map(torch.no_grad()(lambda x, i=layer: self._block(i, x)), states[-1]))
            self.decoder.weights.blocks[layer] = Block()
            self.heard(layer + 1, (BACK + 1) * self.decoder.spec.num_layers)
        return states

    def _block(self, layer: int, x: Tensor) -> Tensor:
        return self.decoder.block(layer, x, Window(self.decoder.spec))

    def _slope(self, window: tuple[int, Tensor]) -> Tensor:
        """The gradient of Σ_t log p(y_t) at the end of the stream [T, D], up to its sign."""
        seed, state = window
        generator = torch.Generator().manual_seed(seed)
        slopes: list[Tensor] = []
        for rows in torch.split(state, ROWS):
            x = rows.detach().requires_grad_()
            logits = self.decoder.logits(x)
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            slopes += torch.autograd.grad(loss, x)
        return torch.cat(slopes)

    def _back(
        self,
        layer: int,
        states: list[Tensor],
        slopes: list[Tensor],
        found: dict[Unit, dict[Form | None, float]],
    ) -> list[Tensor]:
        """Gradients before a block [T, D] from those after it; adds up what its units cost."""
        block = read_block(self.loader, layer)
        weights = {p: float_weight(linear).detach().requires_grad_() for p, linear in block.linears.items()}
        linears = {p: replace(linear, weight=weights[p]) for p, linear in block.linears.items()}
        self.decoder.weights.blocks[layer] = Block(linears, block.norms)
        deltas = [
            (unit, form, part, fake(weights[part].detach(), form) - weights[part].detach())
            for unit in found
            for form in found[unit]
            for part in unit.parts
            if unit.layer == layer and form is not None
        ]

        def one(window: tuple[Tensor, Tensor]) -> tuple[Tensor, list[float]]:
            x = window[0].detach().requires_grad_()
            after = self._block(layer, x)
            before, *gradients = torch.autograd.grad(after, [x, *weights.values()], window[1])
            by_part = dict(zip(weights, gradients, strict=True))
            return before, [_rows(by_part[part], delta) for _, _, part, delta in deltas]

        done = self._map(one, list(zip(states, slopes, strict=True)))
        self.decoder.weights.blocks[layer] = Block()
        for _, terms in done:
            for (unit, form, _, _), term in zip(deltas, terms, strict=True):
                found[unit][form] += term / (2 * self.tokens.numel())
        return [before for before, _ in done]

    def _end(self, unit: Unit, form: Form, states: list[Tensor], slopes: list[Tensor]) -> float:
        """The embedding through the gradient of the rows it gave, the head by the divergence itself."""
        weights, total = self.decoder.weights, 0.0
        table = dense(weights.embed) if EMBED in unit.parts else dense(self._head().weight)
        rounded = fake(table, form)
        if EMBED in unit.parts:
            for window, slope in zip(self.tokens, slopes, strict=True):
                moved = (slope * (rounded[window] - table[window])).sum(1).cpu()
                by_token = torch.zeros(len(table)).index_add_(0, window, moved)
                total += float(by_token.square().sum()) / 2
        if EMBED not in unit.parts or weights.head is None:
            other = Decoder(self.decoder.spec, replace(weights, head=replace(self._head(), weight=rounded)))
            total += sum(self._map(torch.no_grad()(lambda x: self._divergence(other, x)), states))
        return total / self.tokens.numel()

    def _head(self) -> Linear:
        weights = self.decoder.weights
        return Linear(weights.embed) if weights.head is None else weights.head

    def _divergence(self, other: Decoder, state: Tensor) -> float:
        """Σ_t KL(p ‖ q) of this model's predictions and another's."""
        total = 0.0
        for x in torch.split(state, ROWS):
            p, q = self.decoder.logits(x).log_softmax(-1), other.logits(x).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return total


def _rows(gradient: Tensor, delta: Tensor) -> float:
    """Σ_n (dW_n · δ_n)²."""
    return float(torch.einsum("nk,nk->n", gradient, delta).square().sum(dtype=torch.float64))
