"""One HTML file about several checkpoints: no script, no network, every string from a file escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nybble_quantizers.quality_report.heat import Heat, heat
from nybble_quantizers.quality_report.record import Record
from nybble_quantizers.quality_report.scatter import MARKS, scatter
from nybble_quantizers.quality_report.wording import (
    figure,
    form,
    interval,
    method,
    share,
    size,
    storage,
)

TEMPLATES = Path(__file__).with_name("templates")
NARROW = (360, 340)  # pixels: the plot on a phone


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    of: Callable[[Record], str]
    interval: Callable[[Record], str] = lambda record: ""


@dataclass(frozen=True, slots=True)
class Part:
    """A checkpoint's own section."""

    record: Record
    heat: Heat | None
    facts: tuple[tuple[str, str], ...]


ALWAYS = (
    Column("bits a weight", lambda record: figure(record.bits_per_weight)),
    Column("size", lambda record: size(record.nbytes)),
)
MEASURED = (
    Column(
        "KL divergence",
        lambda record: figure(record.evaluation.kl_divergence, "{:.4f}"),
        lambda record: interval(record.evaluation.kl_interval, "{:.4f}"),
    ),
    Column(
        "top-1 agreement",
        lambda record: share(record.evaluation.top1_agreement),
        lambda record: interval(record.evaluation.top1_interval, "{:.2f}", 100),
    ),
    Column("perplexity", lambda record: figure(record.evaluation.perplexity, "{:.3f}")),
    Column("its rise", lambda record: share(record.evaluation.rise, signed=True)),
    Column("output noise", lambda record: share(record.output_noise)),
    Column("weight noise", lambda record: share(record.weight_noise)),
)


def columns(records: Sequence[Record]) -> list[Column]:
    """Those that say something of at least one checkpoint."""
    nothing = figure(None)
    return [*ALWAYS, *(c for c in MEASURED if any(c.of(record) != nothing for record in records))]


def page(records: Sequence[Record]) -> str:
    """The HTML document. At least one record."""
    ordered = sorted(records, key=lambda record: (record.nbytes, record.name))
    parts = [Part(record, heat(record), facts(record)) for record in ordered]
    return (
        _environment()
        .get_template("page.html")
        .render(
            parts=parts,
            sources=list(dict.fromkeys(record.source or "an unnamed source" for record in ordered)),
            columns=columns(ordered),
            wide=scatter(ordered),
            narrow=scatter(ordered, *NARROW),
            marks=MARKS,
            style=Markup((TEMPLATES / "page.css").read_text(encoding="utf8")),
        )
    )


def strip(record: Record) -> str | None:
    """The heat strip as an SVG file of its own; None where no error was measured."""
    plot = heat(record)
    if plot is None:
        return None
    module = _environment().get_template("heat.svg").make_module({})
    return str(module.heat(plot, "heat", True)) + "\n"  # type: ignore[attr-defined]  # the template's macro


def facts(record: Record) -> tuple[tuple[str, str], ...]:
    """How the checkpoint was made, by term."""
    found = record.evaluation
    windows = f", {found.windows} windows of {found.length} tokens" if found.windows and found.length else ""
    said = (
        ("calibration", ", ".join(f"{key} {value}" for key, value in record.calibration) or "none"),
        ("seed", figure(record.seed, "{}")),
        ("evaluated on", f"{found.text}{windows}" if found.text else ""),
        ("left at 16 bits", ", ".join(record.skipped)),
        ("versions", ", ".join(f"{name} {number}" for name, number in record.versions)),
    )
    return tuple((term, value) for term, value in said if value)


@cache
def _environment() -> Environment:
    """Escapes everything but the style sheets."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    made.filters |= {
        "form": form,
        "method": method,
        "number": figure,
        "px": lambda value: f"{value:.4g}",
        "size": size,
        "storage": storage,
    }
    made.globals["colors"] = Markup((TEMPLATES / "colors.css").read_text(encoding="utf8"))
    return made
