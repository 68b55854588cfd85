"""In which form each linear of a model is stored, and how many bytes that will make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nybble_models.errors import ModelError
from nybble_models.families import Family
from nybble_models.formats.container import CONTAINERS, Container
from nybble_models.formats.form import CHANNEL, Form
from nybble_models.spec import ModelSpec
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.units import partners

EIGHT = Form(8, CHANNEL, symmetric=True)  # groups gain nothing where levels are this fine
SPARE = 16 << 20  # tokenizer, report, and the heads of files

Forms = Mapping[str, Form]
"""By projection; a linear that stays at 16 bits is left out."""


@dataclass(frozen=True, slots=True)
class Selection:
    """`forms[layer]` are the forms that the scheme wants and the container can hold."""

    forms: tuple[Forms, ...]
    names: Mapping[str, Form | None]  # of every linear in order, and of an embedding or head that is rounded
    nbytes: int  # about what the folder will take

    @property
    def skipped(self) -> tuple[str, ...]:
        """Full names of the linears that stay at 16 bits."""
        return tuple(name for name, form in self.names.items() if form is None)


def select(
    spec: ModelSpec,
    family: Family,
    scheme: Scheme,
    container: Container,
    wanted: Mapping[str, Form | None] = MappingProxyType({}),
) -> Selection:
    """`wanted` are forms by full name; what it does not name gets the scheme's.

    Partners must be alike: where one cannot be stored as wanted, all stay at 16 bits; an embedding or a head
    gets 8 bits and a scale a row, which every container that takes them can hold. Raises `ModelError`
    when a quantizing scheme would round nothing.
    """
    names = {
        name: None if scheme.skips(name) else wanted.get(name, scheme.form)
        for name in linear_names(spec, family)
    }
    chosen = tuple(_fitting(spec, family, container, names, layer) for layer in range(spec.num_layers))
    if scheme.method != "none" and not any(chosen):
        form = scheme.form
        reason = container.fits(spec.shape("q"), form) if form else None
        raise ModelError(
            f"no linear can be quantized: {reason or 'all of them are skipped'}", hint="change the scheme"
        )
    ends = {
        name: form if container.fits((spec.vocab_size, spec.hidden_size), form) is None else EIGHT
        for name, form in wanted.items()
        if name not in names and form is not None and not scheme.skips(name)
    }
    held = ends | {
        family.projections[p].format(i=layer): chosen[layer].get(p)
        for layer in range(spec.num_layers)
        for p in spec.projections
    }
    return Selection(chosen, held, _bytes(spec, chosen, ends))


def unfit(spec: ModelSpec, scheme: Scheme) -> str:
    """What to say of linears that the format cannot hold in the scheme's form, and which format could."""
    form = scheme.form
    if form is None:
        return ""
    shapes = [spec.shape(p) for p in spec.projections]
    reason = next(filter(None, (scheme.container.fits(shape, form) for shape in shapes)), None)
    if reason is None:
        return ""
    others = [each.name for each in CONTAINERS.values() if not any(each.fits(s, form) for s in shapes)]
    able = [name for name in others if form.symmetric or name != "gptq"]
    return f": {reason}" + (f" (--format {able[-1]} holds it)" if able else "")


def linear_names(spec: ModelSpec, family: Family) -> list[str]:
    return [family.projections[p].format(i=i) for i in range(spec.num_layers) for p in spec.projections]


def _fitting(
    spec: ModelSpec, family: Family, container: Container, names: Mapping[str, Form | None], layer: int
) -> Forms:
    chosen: dict[str, Form] = {}
    for unit in partners(spec):
        forms = [names[family.projections[p].format(i=layer)] for p in unit]
        shapes = [spec.shape(p) for p in unit]
        if all(f is not None and container.fits(s, f) is None for f, s in zip(forms, shapes, strict=True)):
            chosen |= {p: form for p, form in zip(unit, forms, strict=True) if form is not None}
    return chosen


def _bytes(spec: ModelSpec, forms: tuple[Forms, ...], ends: Mapping[str, Form]) -> int:
    """As stored; 16 bits for every other weight."""
    table = spec.vocab_size, spec.hidden_size
    total = 2 * spec.parameters + SPARE + sum(f.nbytes(table) - 2 * math.prod(table) for f in ends.values())
    for layer in forms:
        for projection, form in layer.items():
            shape = spec.shape(projection)
            total += form.nbytes(shape) - 2 * math.prod(shape)
    return total
