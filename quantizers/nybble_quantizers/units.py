"""What gets one form: the linears of a layer that engines fuse, the embedding, the head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nybble_models.families import Family
from nybble_models.formats.form import Form
from nybble_models.spec import ModelSpec

EMBED, HEAD = "embed", "head"
FUSED = (("q", "k", "v"), ("gate", "up"))  # by engines, so they are all alike


@dataclass(frozen=True, slots=True)
class Unit:
    """`parts` are projections of a layer, or "embed" or "head" of no layer. A tied head is its embedding."""

    layer: int | None
    parts: tuple[str, ...]

    def names(self, family: Family) -> list[str]:
        """As on disk, in the order of the parts."""
        if self.layer is None:
            return [family.embed if part == EMBED else family.head for part in self.parts]
        return [family.projections[part].format(i=self.layer) for part in self.parts]

    def shapes(self, spec: ModelSpec) -> list[tuple[int, int]]:
        """(outputs, inputs) of each part."""
        if self.layer is None:
            return [(spec.vocab_size, spec.hidden_size) for _ in self.parts]
        return [spec.shape(part) for part in self.parts]

    def nbytes(self, spec: ModelSpec, form: Form | None) -> int:
        """Bytes stored, scales and zeros included; None stands for 16 bits a weight."""
        shapes = self.shapes(spec)
        return sum(2 * math.prod(shape) if form is None else form.nbytes(shape) for shape in shapes)


def partners(spec: ModelSpec) -> tuple[tuple[str, ...], ...]:
    """The projections of a block, those that engines fuse together."""
    joined = {p: fused for fused in FUSED for p in fused}
    found = (joined.get(p, (p,)) for p in spec.projections)
    return tuple(dict.fromkeys(tuple(p for p in unit if p in spec.projections) for unit in found))


def block_units(spec: ModelSpec) -> tuple[Unit, ...]:
    """The linears of all blocks: (q, k, v), (o), (gate, up), (down) of every layer."""
    return tuple(Unit(layer, parts) for layer in range(spec.num_layers) for parts in partners(spec))


def end_units(spec: ModelSpec) -> tuple[Unit, ...]:
    """The embedding, and the head where it has weights of its own."""
    return tuple(Unit(None, (part,)) for part in ((EMBED,) if spec.tied_head else (EMBED, HEAD)))


def by_name(family: Family, forms: Mapping[Unit, Form | None]) -> dict[str, Form | None]:
    """The form of each linear under its name on disk."""
    return {name: form for unit, form in forms.items() for name in unit.names(family)}
