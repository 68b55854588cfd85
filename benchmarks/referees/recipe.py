"""What is to be done to a model, in a word that all environments read: "gptq-w4g32-sym", "smoothquant-w8a8".

METHOD-FORM[-sym][-order]; FORM is w{bits}g{group}, w{bits}channel, w8a8 or fp8. Nothing but the standard
library is imported here: the environments share no package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PATTERN = re.compile(
    r"(?P<method>[a-z+]+)-(?:w(?P<bits>\d)(?:g(?P<group>\d+)|channel|(?P<rounded>a8))|(?P<float>fp8))"
    r"(?P<sym>-sym)?(?P<order>-order)?"
)


@dataclass(frozen=True)
class Recipe:
    """`group` is None for a scale a row; `rounded` inputs are 8-bit, token by token; `order` is act-order."""

    word: str
    method: str
    bits: int = 8
    group: int | None = None
    symmetric: bool = True
    rounded: bool = False
    floats: bool = False
    order: bool = False


def read(word: str) -> Recipe:
    """Raises `ValueError` for a word that is none."""
    found = PATTERN.fullmatch(word)
    if found is None:
        raise ValueError(f"{word!r} is no recipe: METHOD-w4g32[-sym][-order], METHOD-w8a8 or METHOD-fp8")
    eight = bool(found["rounded"] or found["float"])
    return Recipe(
        word=word,
        method=found["method"],
        bits=int(found["bits"] or 8),
        group=int(found["group"]) if found["group"] else None,
        symmetric=eight or bool(found["sym"]),
        rounded=eight,
        floats=bool(found["float"]),
        order=bool(found["order"]),
    )
