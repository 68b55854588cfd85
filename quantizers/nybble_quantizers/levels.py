"""What may be tuned of a block that is quantized already, each moved by the gradient of whatever reads it.

The levels of a linear, by the sign of the gradient as SignRound does (Cheng et al. 2023); the scales of its
groups, as numbers of their own (the idea of EfficientQAT, Chen et al. 2024); norms and biases, which a
checkpoint holds unquantized anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, dense
from nybble_models.weights import Block, Linear, Norm
from nybble_quantizers.folding import float_weight
from nybble_quantizers.grids import SMALLEST, grouped

EDGE = 0.499  # how far from its level a place may lie
HOLD = 0.5  # of that: what GPTQ chose against the nearest level is not undone by the first steps
DECAY, SQUARE_DECAY = 0.9, 0.99
TINY = 1e-12
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class Pace:
    """How far everything moves. The steps fall linearly to zero.

    batch: windows a step · reach: how far a weight can travel in all, in levels (below a half, a weight that
    lies on its level stays) · scales, vectors: the first step of a scale, and of an entry of a norm or a
    bias, as a share of its size.
    """

    steps: int
    batch: int
    reach: float = 0.49
    scales: float = 1e-3
    vectors: float = 1e-3

    def left(self, step: int) -> float:
        return 1 - step / self.steps

    @property
    def levels(self) -> float:
        """The first step of a weight: as long as adds up to `reach`."""
        return 2 * self.reach / (self.steps + 1)


class Adam:
    """Kingma & Ba 2015: a step of about 1 where the gradient keeps its sign, less where it does not."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.steps = 0

    def step(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        self.mean.mul_(DECAY).add_(gradient, alpha=1 - DECAY)
        self.square.mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
        size = (self.square / (1 - SQUARE_DECAY**self.steps)).sqrt_().add_(TINY)
        return self.mean / (1 - DECAY**self.steps) / size


class Levels:
    """One linear: w = scale · (round(place) - zero), a place for each weight [N, K], a scale for each group.

    A place starts between the level that was chosen and where the weight itself lies. Rounding passes the
    gradient straight through, so a place follows that of its weight.
    """

    def __init__(self, whole: Tensor, rounded: QuantizedTensor) -> None:
        self.start = rounded
        self.scales = rounded.scales.clone()
        zeros = 2.0 ** (rounded.bits - 1) if rounded.zeros is None else rounded.zeros.float()
        self.zeros = torch.zeros_like(self.scales) + zeros
        codes = rounded.codes.float()
        beside = whole / self._wide(self.scales) + self._wide(self.zeros) - codes
        self.places = beside.clamp_(-EDGE, EDGE).mul_(HOLD).add_(codes)
        self.adam = Adam(self.scales)

    def _wide(self, groups: Tensor) -> Tensor:
        return groups.repeat_interleave(self.start.group_size, 1)[:, : self.start.in_features]

    def _stored(self) -> Tensor:
        return self.scales.to(torch.float16).float()

    def _lifted(self) -> Tensor:
        return self.places.round().sub_(self._wide(self.zeros))

    def value(self) -> Tensor:
        """The weight as it would be stored, float32 [N, K]."""
        return self._lifted().mul_(self._wide(self._stored()))

    def move(self, gradient: Tensor, pace: Pace, left: float) -> None:
        """One step against the gradient of the weight."""
        of_scales = grouped(self._lifted().mul_(gradient), self.start.group_size).sum(-1)
        self.places.sub_(gradient.sign(), alpha=pace.levels * left)
        self.places.clamp_(-EDGE, 2**self.start.bits - 1 + EDGE)
        self.scales.addcmul_(self.start.scales, self.adam.step(of_scales), value=-pace.scales * left)
        self.scales.clamp_(SMALLEST, LARGEST)

    def tensor(self) -> QuantizedTensor:
        return replace(self.start, codes=self.places.round().to(torch.uint8), scales=self._stored())


class Vector:
    """A norm's weight or a bias [D]; its steps are measured by the mean of its entries' sizes."""

    def __init__(self, start: Tensor) -> None:
        self.entries = start.float().clone()
        self.size = float(start.abs().mean())
        self.adam = Adam(self.entries)

    def value(self) -> Tensor:
        return self.entries.clone()

    def move(self, gradient: Tensor, pace: Pace, left: float) -> None:
        self.entries.sub_(self.adam.step(gradient), alpha=self.size * pace.vectors * left)


Values = dict[str, Tensor]
"""What a block computes with, or the gradients of that: "q", "q.bias", "attention_norm" ..."""


class TunedBlock:
    """A quantized block in motion: whole is the same block before it was rounded (after any folds).

    Linears that are not quantized, FP8 and whatever has real minimums stay as they are.
    """

    @torch.inference_mode(False)  # what is made under it takes no part in gradients
    def __init__(self, whole: Block, rounded: Block) -> None:
        self.start = rounded
        self.parts: dict[str, Levels | Vector] = {}
        self.fixed: Values = {}
        for name, linear in rounded.linears.items():
            weight = linear.weight
            if isinstance(weight, QuantizedTensor) and weight.minimums is None and weight.permutation is None:
                self.parts[name] = Levels(float_weight(whole.linears[name]), weight)
            else:
                self.fixed[name] = dense(weight).clone()
            self._add(f"{name}.bias", linear.bias)
        for role, norm in rounded.norms.items():
            self._add(role, norm.weight)
            self._add(f"{role}.bias", norm.bias)

    def _add(self, name: str, vector: Tensor | None) -> None:
        if vector is not None:
            self.parts[name] = Vector(vector)

    def values(self) -> Values:
        return {name: part.value() for name, part in self.parts.items()}

    def move(self, gradients: Values, pace: Pace, step: int) -> None:
        for name, gradient in gradients.items():
            self.parts[name].move(gradient, pace, pace.left(step))

    def block(self, values: Values) -> Block:
        """What computes with these values. It reads inputs unrounded: that would pass no gradient."""
        held = self.fixed | values
        linears = {p: Linear(held[p], held.get(f"{p}.bias")) for p in self.start.linears}
        return Block(linears, {n: Norm(held[n], held.get(f"{n}.bias")) for n in self.start.norms})

    def made(self) -> Block:
        """As it is now, for the checkpoint."""
        made = self.block(self.values())
        for name, linear in self.start.linears.items():
            part = self.parts.get(name)
            weight = part.tensor() if isinstance(part, Levels) else linear.weight
            made.linears[name] = replace(linear, weight=weight, bias=made.linears[name].bias)
        return made
