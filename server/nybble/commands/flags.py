"""The flags of `nybble serve`, derived from the fields of `ServeConfig`; one that is not given is `None`."""

from __future__ import annotations

from dataclasses import Field, fields, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from nybble.config import ServeConfig, Setting


def given(flags: Any) -> dict[str, object]:
    """What the user wrote, by the name of the setting."""
    values = {each.name: getattr(flags, each.name) for each in fields(flags)}
    return {name: value for name, value in values.items() if value is not None}


def _flag(each: Field[Any]) -> tuple[str, Any, None]:
    setting: Setting = each.metadata["setting"]
    kind = bool if isinstance(each.default, bool) else tuple[str, ...] if each.default == () else str
    described = Parameter(
        group=_group(setting.group),
        help=_describe(each, setting),
        metavar=_metavar(each, setting),
        show_default=False,
        negative_iterable=(),
    )
    return each.name, Annotated[kind | None, described], None


@cache
def _group(name: str) -> Group:
    return Group.create_ordered(name)


def _describe(each: Field[Any], setting: Setting) -> str:
    if setting.choices:
        return f"{setting.help}: {', '.join(str(c) for c in setting.choices)} (default {each.default})"
    if each.default in ((), None, "") or each.default is False:
        return setting.help
    return f"{setting.help} (default {'on' if each.default is True else each.default})"


def _metavar(each: Field[Any], setting: Setting) -> str:
    if setting.choices:
        return "CHOICE"
    return {int: "N", float: "SECONDS"}.get(type(each.default), "TEXT")


_FLAGS = [_flag(each) for each in fields(ServeConfig) if each.name != "model"]

if TYPE_CHECKING:
    ServeFlags = Any
else:
    ServeFlags = make_dataclass(
        "ServeFlags", _FLAGS, kw_only=True, frozen=True, namespace={"__module__": __name__}
    )

NONE_GIVEN = ServeFlags()
