"""`nybble version`: versions without importing what they belong to."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Annotated

from cyclopts import Parameter

import nybble

PARTS = ("torch", "triton", "numba", "transformers", "tokenizers", "safetensors", "fastapi", "uvicorn")


def version(
    *, json_: Annotated[bool, Parameter(name="--json", help="print JSON", negative=())] = False
) -> None:
    """Print the versions of nybble and of what it runs on."""
    found = versions()
    print(json.dumps(found) if json_ else "\n".join(f"{name} {number}" for name, number in found.items()))


def versions() -> dict[str, str]:
    """Name to version, nybble first; what is not installed is left out."""
    found = {"nybble": nybble.__version__, "python": platform.python_version()}
    for part in PARTS:
        try:
            found[part] = metadata.version(part)
        except metadata.PackageNotFoundError:
            continue
    return found
