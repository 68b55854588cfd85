"""What `nybble eval` prints: what was measured, and every figure with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nybble.evaluation.intervals import Estimate

LABELS = {
    "perplexity": "perplexity",
    "reference_perplexity": "  of the reference",
    "perplexity_ratio": "  ratio",
    "kl_divergence": "KL divergence, nats a token",
    "top1_agreement": "top-1 agreement",
    "lambada_accuracy": "LAMBADA accuracy",
    "reference_lambada_accuracy": "  of the reference",
    "lambada_perplexity": "LAMBADA perplexity of a word",
    "reference_lambada_perplexity": "  of the reference",
}
SHARES = ("top1_agreement", "lambada_accuracy", "reference_lambada_accuracy")


def show(record: Mapping[str, Any], estimates: Mapping[str, Estimate]) -> None:
    """record: what `nybble eval --json` writes."""
    console = Console(highlight=False)
    head = Table.grid(padding=(0, 2))
    head.add_column(no_wrap=True)
    head.add_column(overflow="fold")
    for label, value in _facts(record):
        head.add_row(Text(label, style="dim"), Text(value))
    console.print(head)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    for label, value, between in _figures(estimates):
        table.add_row(Text(label, style="dim"), value, between)
    console.print(table)


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was measured, against what, on what."""
    yield "model", str(record["model"]["path"])
    yield "", _computed(record["model"])
    if record["reference"]:
        yield "reference", f"{record['reference']['path']}, float32"
    text = record["text"]
    taken = f"{text['windows']} of {text['windows_in_text']} windows of {text['length']} tokens"
    yield "text", f"{text['name']}, {taken}"
    if "lambada" in record:
        yield "LAMBADA", f"{record['lambada']['name']}, {record['lambada']['passages']} passages"


def _figures(estimates: Mapping[str, Estimate]) -> Iterator[tuple[str, str, str]]:
    """Every figure with its interval."""
    for name in (each for each in LABELS if each in estimates):
        estimate, form = estimates[name], _form(name)
        between = "" if estimate.ends is None else " to ".join(map(form, estimate.ends))
        yield LABELS[name], form(estimate.value), between


def _form(name: str) -> Callable[[float], str]:
    if name in SHARES:
        return "{:.2%}".format
    if name == "kl_divergence":
        return "{:.5f}".format
    return lambda value: f"{value:.4f}" if value < 1e6 else f"{value:.4g}"


def _computed(model: Mapping[str, Any]) -> str:
    """ "awq int4 g64 asymmetric, engine serve, cpu float32": what was measured, and how."""
    kernels = model.get("kernels") or {}
    how = kernels.get({"serve": "prefill", "decode": "decode"}.get(model["engine"], ""), model["dtype"])
    return f"{model['quantization']}, engine {model['engine']}, {model['device']} {how}"
