"""Which form each linear gets: the scheme's, what overrides say, and what a target of bits leaves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from nybble_models.families import Family
from nybble_models.formats.container import Container
from nybble_models.formats.form import CHANNEL, Form
from nybble_models.loader import Loader
from nybble_models.spec import ModelSpec
from nybble_quantizers import mixed, sensitivity
from nybble_quantizers.override import apply, parse_override
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.units import Unit, block_units, by_name, end_units
from nybble_quantizers.workers import Map, in_turn

log = logging.getLogger("nybble.quantize")

WIDTHS = (3, 4)  # with the scheme's groups; and 8 bits, and 16: what a target chooses from
EIGHT = Form(8, CHANNEL, symmetric=True)  # groups gain nothing where levels are this fine
WINDOWS = 4  # more choose no better: on SmolLM2-135M the sums of eight and of four agree within 1 %
END_WIDTHS = (4, 6, 8)  # of an embedding or a head: a level of 3 bits in a row of a vocabulary is noise

Chosen = Mapping[Unit, Form | None]


def said(scheme: Scheme, spec: ModelSpec, family: Family) -> dict[Unit, Form | None]:
    """What the scheme says of each unit, a target aside; of the ends only where it rounds them."""
    base = scheme.form
    if base is None:
        return {}
    units = (*block_units(spec), *(end_units(spec) if scheme.ends else ()))
    chosen: dict[Unit, Form | None] = {unit: base if unit.layer is not None else _end(base) for unit in units}
    named = apply([parse_override(text) for text in scheme.overrides], units, family, base)
    return chosen | named


def _end(base: Form) -> Form:
    """Four bits in an embedding cost more than they save."""
    return replace(base, bits=8)


def choose(
    loader: Loader, scheme: Scheme, container: Container, tokens: Tensor, seed: int, run: Map = in_turn
) -> dict[str, Form | None]:
    """The forms of the units by full name, such that their bytes meet the scheme's target.

    Minimises the sum of the divergences measured unit by unit (see `sensitivity`). Units that overrides name
    keep what they say, and count. tokens: int64 [windows, T].
    """
    spec, family = loader.spec, loader.family
    fixed = said(scheme, spec, family)
    named = apply([parse_override(t) for t in scheme.overrides], tuple(fixed), family, scheme.form or Form())
    menus: dict[Unit, Sequence[Form | None]] = {
        unit: [form] if unit in named else _menu(unit, scheme, spec, container, form)
        for unit, form in fixed.items()
    }
    budget = _budget(scheme, spec, tuple(menus))
    costs = sensitivity.measure(loader, tokens[:WINDOWS], menus, seed, run)
    found = mixed.allocate(costs, mixed.sizes(spec, menus), budget)
    total = sum(costs[unit][form] for unit, form in found.items())
    log.info("target: %.2f bits a weight, expected KL %.4f", mixed.bits_of(spec, found), total)
    return by_name(family, found)


def _budget(scheme: Scheme, spec: ModelSpec, units: Sequence[Unit]) -> int:
    if scheme.target_bytes is not None:
        return scheme.target_bytes
    return mixed.byte_budget(scheme.target_bits or 16, spec, units)


def _menu(
    unit: Unit, scheme: Scheme, spec: ModelSpec, container: Container, form: Form | None
) -> list[Form | None]:
    """Forms that the container can hold, and 16 bits."""
    widths = WIDTHS if unit.layer is not None else END_WIDTHS
    forms = [replace(form or Form(), bits=bits) for bits in widths]
    forms += [EIGHT] if unit.layer is not None else []
    return [f for f in forms if all(container.fits(s, f) is None for s in unit.shapes(spec))] + [None]
