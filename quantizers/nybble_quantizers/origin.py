"""Where a model comes from and under which licence, as far as its own files say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nybble_models.formats.gguf_header import read_header

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
FACTS = ("license", "license_name", "license_link", "language")
GGUF_NAMES = dict(zip(FACTS, ("license", "license.name", "license.link", "languages"), strict=True))

_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")  # a folder of the hub's cache
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)

Origin = dict[str, str | list[str]]


def origin(source: Path, base_model: str | None = None) -> Origin:
    """`base_model` as given, or where the source lies in the hub's cache; `FACTS` of its card or GGUF head.

    What is not said is left out. `license_name` and `license_link` go with the licence "other".
    """
    said = _of_gguf(source) if source.is_file() else _of_card(source / "README.md")
    found = {key: said[key] for key in FACTS if _is_text(said.get(key))}
    matches = [match for part in source.absolute().parts if (match := _CACHED.fullmatch(part))]
    if base_model is None and matches:
        base_model = f"{matches[-1]['owner']}/{matches[-1]['name']}"
    return found if base_model is None else {"base_model": base_model, **found}


def copy_licence(source: Path, folder: Path) -> None:
    """The source's licence texts, which whoever passes the weights on has to pass on too."""
    if source.is_dir():
        for path in sorted(p for pattern in LICENCES for p in source.glob(pattern) if p.is_file()):
            shutil.copyfile(path, folder / path.name)


def _of_gguf(path: Path) -> Mapping[str, Any]:
    head = read_header(path).metadata
    return {key: head.get(f"general.{name}") for key, name in GGUF_NAMES.items()}


def _of_card(path: Path) -> Mapping[str, Any]:
    try:
        match = _FRONT_MATTER.match(path.read_text(encoding="utf8"))
        said = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return said if isinstance(said, dict) else {}


def _is_text(value: object) -> bool:
    many = value if isinstance(value, list) and value else [value]
    return all(isinstance(each, str) and each.isprintable() and each.strip() for each in many)
