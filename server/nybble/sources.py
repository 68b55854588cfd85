"""Where settings come from: flags, then environment, then a file, then defaults. Unknown names are errors."""

from __future__ import annotations

import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from nybble.config import ServeConfig
from nybble.errors import UsageError

PREFIX = "NYBBLE_"
NOT_SETTINGS = frozenset({"NYBBLE_CONFIG", "NYBBLE_DEBUG"})
KINDS = get_type_hints(ServeConfig)
NAMES = tuple(each.name for each in fields(ServeConfig))

# Kubernetes puts these into every pod beside a Service that is called "nybble".
SERVICE_LINK = re.compile(r"NYBBLE_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)")
YES, NO = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


def load(flags: Mapping[str, object], environ: Mapping[str, str], file: str | None = None) -> ServeConfig:
    """The merged configuration. `flags` holds only what was given; `NYBBLE_CONFIG` names a file too."""
    file = file or environ.get("NYBBLE_CONFIG")
    merged = {**(from_file(Path(file)) if file else {}), **from_environment(environ), **from_flags(flags)}
    return ServeConfig(**merged)


def from_flags(flags: Mapping[str, object]) -> dict[str, Any]:
    return {name: coerce(name, value, "--" + name.replace("_", "-")) for name, value in flags.items()}


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable in NOT_SETTINGS or _is_service_link(variable, text):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in NAMES:
            known = [PREFIX + each.upper() for each in NAMES]
            raise UsageError(f"environment: unknown setting {variable}", hint=_nearest(variable, known))
        found[name] = coerce(name, text, variable)
    return found


def from_file(path: Path) -> dict[str, Any]:
    """Settings of a flat YAML or TOML file; dashes and underscores are the same in names."""
    found = {}
    for key, value in _read(path.expanduser()).items():
        name = str(key).replace("-", "_")
        if name not in NAMES:
            raise UsageError(f"{path}: unknown setting {key!r}", hint=_nearest(name, NAMES))
        found[name] = coerce(name, value, f"{path}: {key}")
    return found


def coerce(name: str, value: object, origin: str) -> Any:
    """`value` as the field's type. Text is parsed; anything else must already fit."""
    kind = KINDS[name]
    optional = get_origin(kind) in (Union, types.UnionType)
    if optional:
        if value is None:
            return None
        kind = next(each for each in get_args(kind) if each is not type(None))
    try:
        return _PARSERS[get_origin(kind) or kind](value)
    except (TypeError, ValueError):
        expected = _EXPECTED[get_origin(kind) or kind]
        got = "something else" if name == "api_key" else repr(value)
        raise UsageError(f"{origin}: expected {expected}, got {got}", hint=_help(name)) from None


def _is_service_link(variable: str, text: str) -> bool:
    return SERVICE_LINK.fullmatch(variable) is not None or (
        variable == "NYBBLE_PORT" and text.startswith("tcp://")
    )


def _read(path: Path) -> dict[object, object]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            data: object = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            data = _yaml(text)
        else:
            raise UsageError(f"{path}: unknown kind of file", hint="name it .yaml, .yml or .toml")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="--config takes a YAML or TOML file") from None
    except ValueError as error:
        hint = "one `name: value` (YAML) or `name = value` (TOML) a line"
        raise UsageError(f"{path}: {str(error).splitlines()[0]}", hint=hint) from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: holds no settings", hint="one `name: value` a line")
    return data


def _yaml(text: str) -> object:
    import yaml

    try:
        data: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return {} if data is None else data


def _nearest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "`nybble serve --help` lists the settings"


def _help(name: str) -> str:
    each = next(each for each in fields(ServeConfig) if each.name == name)
    return str(each.metadata["setting"].help)


def _integer(value: object) -> int:
    if isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = _text(value).strip().lower()
    if word not in YES | NO:
        raise ValueError
    return word in YES


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: object) -> tuple[str, ...]:
    """A comma-separated text, one text, or a list of texts."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return tuple(_text(part) for part in value)


_PARSERS: dict[Any, Any] = {int: _integer, float: _number, bool: _truth, str: _text, tuple: _texts}
_EXPECTED: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a text or a list of texts",
}
