"""`PATTERN=FORM`: what a user says of some linears by hand.

    *.down_proj=8            8 bits, the group and the symmetry of the scheme
    *.o_proj=4g32            4 bits in groups of 32
    model.layers.0.*=16      not rounded
    *.mlp.*=8channel-sym     8 bits, a scale a row, symmetric

Patterns are shell patterns of full names. The last that matches counts, so that exceptions follow rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from nybble_models.errors import ModelError
from nybble_models.families import Family
from nybble_models.formats.form import CHANNEL, Form
from nybble_quantizers.units import Unit

GRAMMAR = re.compile(r"(?P<bits>\d+)(?:g(?P<group>\d+)|(?P<channel>channel))?(?P<kind>-sym|-asym)?")


@dataclass(frozen=True, slots=True)
class Override:
    """`bits` 16: not rounded. What is None is the scheme's."""

    pattern: str
    bits: int
    group_size: int | None = None
    symmetric: bool | None = None

    def form(self, base: Form) -> Form | None:
        if self.bits == 16:
            return None
        changed = replace(base, bits=self.bits)
        if self.group_size is not None:
            changed = replace(changed, group_size=self.group_size)
        return changed if self.symmetric is None else replace(changed, symmetric=self.symmetric)


def parse_override(text: str) -> Override:
    """ "*.down_proj=8g64" -> `Override`. Raises `ModelError` for anything else."""
    pattern, _, form = text.rpartition("=")
    found = GRAMMAR.fullmatch(form)
    bits = int(found["bits"]) if found else 0
    group = int(found["group"]) if found and found["group"] else None
    whole = bits == 16 and form == "16"
    if not pattern or found is None or not (whole or 2 <= bits <= 8) or group == 0:
        raise ModelError(
            f"override {text!r} is not PATTERN=FORM",
            hint="forms: 2 to 8 bits, with a group or without, or 16; '*.down_proj=8', '*.o_proj=4g32-sym'",
        )
    symmetric = None if found["kind"] is None else found["kind"] == "-sym"
    return Override(pattern, bits, CHANNEL if found["channel"] else group, symmetric)


def apply(
    overrides: Iterable[Override], units: Sequence[Unit], family: Family, base: Form
) -> dict[Unit, Form | None]:
    """The forms of the units that overrides name. The others are left out.

    Raises `ModelError` for a pattern that matches nothing, and where linears that run as one would differ:
    widening the pattern would round what the user did not mention.
    """
    last: dict[str, Override] = {}
    names = {unit: unit.names(family) for unit in units}
    for override in overrides:
        matched = [n for of_unit in names.values() for n in of_unit if fnmatch(n, override.pattern)]
        if not matched:
            example = next(iter(names.values()))[0]
            raise ModelError(f"{override.pattern!r} matches no linear", hint=f"a name is {example}")
        last |= dict.fromkeys(matched, override)
    chosen = {
        unit: [_form(last.get(name), _base(unit, base)) for name in of_unit]
        for unit, of_unit in names.items()
    }
    for unit, forms in chosen.items():
        if len(set(forms)) > 1:
            raise ModelError(
                f"{', '.join(names[unit])} run as one, so they are stored alike",
                hint="give overrides that match all of them",
            )
    return {unit: forms[0] for unit, forms in chosen.items() if any(name in last for name in names[unit])}


def _base(unit: Unit, base: Form) -> Form:
    """What an embedding and a head read is never rounded."""
    return base if unit.layer is not None else replace(base, inputs=None)


def _form(override: Override | None, base: Form) -> Form | None:
    return base if override is None else override.form(base)
