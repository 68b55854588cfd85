"""Which form each linear gets: the scheme's, what overrides say, and what a target of bits leaves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch

from torch import Tensor

from nybble_models.errors import ModelError
from nybble_models.families import Family
from nybble_models.formats.container import Container
from nybble_models.formats.form import CHANNEL, Form
from nybble_models.loader import Loader
from nybble_models.spec import ModelSpec
from nybble_quantizers import mixed, sensitivity
from nybble_quantizers.override import apply, parse_override
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.selection import EIGHT, SPARE, Selection, linear_names
from nybble_quantizers.units import Unit, block_units, by_name, end_units
from nybble_quantizers.workers import Map, in_turn

log = logging.getLogger("nybble.quantize")

GROUPS = (32, 16, CHANNEL)  # where inputs are no multiple of the scheme's group
WINDOWS = 4  # more choose no better: on SmolLM2-135M the sums of eight and of four agree within 1 %
SHAPE = 16  # bytes in which compressed-tensors says the shape of a linear
END_WIDTHS = (4, 6, 8)  # of an embedding or a head: a level of 3 bits in a row of a vocabulary is noise

Chosen = Mapping[Unit, Form | None]


def said(scheme: Scheme, spec: ModelSpec, family: Family) -> dict[Unit, Form | None]:
    """What the scheme says of each unit, a target aside; of the ends only where it rounds them.

    Raises `ModelError` for a pattern that matches nothing, for an override that cannot be stored, and for a
    target that no choice meets.
    """
    _check_skips(scheme, spec, family)
    base = scheme.form
    if base is None:
        return {}
    units = (*block_units(spec), *(end_units(spec) if scheme.ends else ()))
    chosen: dict[Unit, Form | None] = {unit: _usual(unit, scheme, spec, base) for unit in units}
    named = _named(scheme, spec, family, units, base)
    if scheme.mixes:
        _check_target(scheme, spec, _menus(scheme, spec, family, chosen | named, named))
    return chosen | named


def _check_skips(scheme: Scheme, spec: ModelSpec, family: Family) -> None:
    names = [*linear_names(spec, family), family.embed, family.head]
    for pattern in scheme.skip:
        if not any(fnmatch(name, pattern) for name in names):
            raise ModelError(f"{pattern!r} matches no linear", hint=f"a name is {names[0]}")


def _usual(unit: Unit, scheme: Scheme, spec: ModelSpec, base: Form) -> Form:
    """Four bits in an embedding cost more than they save. A target is met in the groups that fit."""
    form = base if unit.layer is not None else replace(base, bits=8, inputs=None)
    if not scheme.mixes:
        return form
    forms = [form, *(replace(form, group_size=size) for size in GROUPS)]
    return next((each for each in forms if not _unfit(unit, each, scheme.container, spec)), form)


def _unfit(unit: Unit, form: Form, container: Container, spec: ModelSpec) -> str | None:
    """Why the container cannot hold the unit so."""
    return next(filter(None, (container.fits(shape, form) for shape in unit.shapes(spec))), None)


def _named(
    scheme: Scheme, spec: ModelSpec, family: Family, units: Sequence[Unit], base: Form
) -> dict[Unit, Form | None]:
    """What overrides say, checked."""
    named = apply([parse_override(text) for text in scheme.overrides], units, family, base)
    for unit, form in named.items():
        if form is None or _skipped(unit, scheme, family):
            continue
        scheme.check(form)
        reason = _unfit(unit, form, scheme.container, spec)
        if reason is not None:
            raise ModelError(
                f"{unit.names(family)[0]} cannot be {form.label}: {reason}", hint="change the override"
            )
    return named


def _skipped(unit: Unit, scheme: Scheme, family: Family) -> bool:
    """Partners of a skipped linear stay at 16 bits with it."""
    return any(scheme.skips(name) for name in unit.names(family))


def choose(
    loader: Loader,
    scheme: Scheme,
    tokens: Tensor,
    seed: int,
    run: Map = in_turn,
    heard: sensitivity.Heard = lambda done, total: None,
) -> dict[str, Form | None]:
    """The forms of the units by full name, such that their bytes meet the scheme's target.

    Minimises the sum of the divergences measured unit by unit (see `sensitivity`). Units that overrides name
    keep what they say, and count. tokens: int64 [windows, T].
    """
    spec, family = loader.spec, loader.family
    fixed = said(scheme, spec, family)
    menus = _menus(
        scheme, spec, family, fixed, _named(scheme, spec, family, tuple(fixed), scheme.form or Form())
    )
    budget = _budget(scheme, spec, tuple(menus))
    costs = sensitivity.measure(loader, tokens[:WINDOWS], menus, seed, run, heard)
    found = mixed.allocate(costs, mixed.sizes(spec, menus), budget)
    total = sum(costs[unit][form] for unit, form in found.items())
    log.info("target: %.2f bits a weight, expected KL %.4f", mixed.bits_of(spec, found), total)
    return by_name(family, found)


def _menus(
    scheme: Scheme, spec: ModelSpec, family: Family, forms: Chosen, named: Chosen
) -> dict[Unit, list[Form | None]]:
    """What a target chooses from: of a skipped unit 16 bits alone, of a named one what is said of it."""
    menus: dict[Unit, list[Form | None]] = {}
    for unit, form in forms.items():
        if _skipped(unit, scheme, family):
            menus[unit] = [None]
        else:
            menus[unit] = [form] if unit in named else _menu(unit, spec, scheme, form)
    return menus


def _check_target(scheme: Scheme, spec: ModelSpec, menus: Mapping[Unit, list[Form | None]]) -> None:
    """Before anything is measured."""
    budget = _budget(scheme, spec, tuple(menus))
    mixed.check_budget(mixed.sizes(spec, menus), budget)
    plain = sum(unit.nbytes(spec, None) for unit in menus)
    if budget >= plain and all(None in menu for menu in menus.values()):
        raise ModelError(
            f"{budget:,} bytes hold all {plain:,} at 16 bits: nothing would be rounded",
            hint="lower the target",
        )


def foreseen(selection: Selection, scheme: Scheme, spec: ModelSpec) -> Selection:
    """Before a target's forms are chosen: with the bytes that they will take."""
    if not scheme.mixes:
        return selection
    units = (*block_units(spec), *(end_units(spec) if scheme.ends else ()))
    nbytes = _rest(spec, units) + _budget(scheme, spec, units) + SPARE
    return replace(selection, nbytes=nbytes)


def _budget(scheme: Scheme, spec: ModelSpec, units: Sequence[Unit]) -> int:
    """Bytes for the units: a target of bits is theirs alone, one of bytes is that of all weights."""
    if scheme.target_bytes is None:
        return mixed.byte_budget(scheme.target_bits or 16, spec, units)
    rest = _rest(spec, units) + SHAPE * sum(len(unit.parts) for unit in units)
    if rest >= scheme.target_bytes:
        raise ModelError(
            f"{scheme.target_bytes:,} bytes are too few: what is not rounded takes {rest:,}",
            hint="raise the target" + ("" if scheme.ends else ", or --embeddings rounds those too"),
        )
    return scheme.target_bytes - rest


def _rest(spec: ModelSpec, units: Sequence[Unit]) -> int:
    """Bytes of what no unit holds: matrices at 16 bits, norms and biases at 32."""
    return 2 * spec.parameters - sum(unit.nbytes(spec, None) for unit in units) + 4 * spec.vectors


def _menu(unit: Unit, spec: ModelSpec, scheme: Scheme, form: Form | None) -> list[Form | None]:
    """Forms that the container can hold, and 16 bits: of a linear, 8 bits with a scale a row."""
    if unit.layer is None:
        forms = [replace(form or Form(), bits=bits) for bits in END_WIDTHS]
    else:
        forms = [EIGHT if bits == 8 else replace(form or Form(), bits=bits) for bits in scheme.widths]
    return [f for f in forms if _unfit(unit, f, scheme.container, spec) is None] + [None]
