"""`nybble eval`: a model's perplexity, and its distance from the model it was made from."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nybble import log
from nybble.bench.machine import facts
from nybble.commands.place import check_place
from nybble.config import ServeConfig
from nybble.errors import UsageError
from nybble.progress import display

if TYPE_CHECKING:
    from nybble.evaluation.intervals import Estimate

NO_REFERENCE = "none"
STANDARD_OUTPUT = "-"

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


def eval(
    model: Annotated[str, Parameter(help='model folder, .gguf file, hub id, or "default"')],
    /,
    *,
    reference: Annotated[
        str | None,
        Parameter(
            help="the unquantized model, named likewise; default: what quant_report.json names; or none"
        ),
    ] = None,
    text: Annotated[
        Path | None, Parameter(help="wiki.test.raw, or a .txt or .jsonl; default: WikiText-2 from the hub")
    ] = None,
    windows: Annotated[
        int, Parameter(help="windows to measure, one of every so many; 0: all, as in papers")
    ] = 12,
    length: Annotated[
        int | None, Parameter(help="tokens in a window (default 2048, or all positions)")
    ] = None,
    lambada: Annotated[Path | None, Parameter(help=".jsonl of passages whose last word to guess")] = None,
    passages: Annotated[int, Parameter(help="passages to measure, one of every so many; 0: all")] = 500,
    engine: Annotated[
        Literal["serve", "decode", "reference"],
        Parameter(help="serve: as prompts are read; decode: as answers are made; reference: in float32"),
    ] = "serve",
    kernels: Annotated[str, Parameter(help="as for nybble serve")] = "auto",
    head_bits: Annotated[int, Parameter(help="as for nybble serve")] = 8,
    device: Annotated[str, Parameter(help="as for nybble serve")] = "auto",
    threads: Annotated[int, Parameter(help="as for nybble serve")] = 0,
    cache_dir: Annotated[str, Parameter(help="where fetched models are kept (default ~/.cache/nybble)")] = "",
    json_: Annotated[
        Path | None,
        Parameter(name="--json", help="file for the result; - prints it", allow_leading_hyphen=True),
    ] = None,
    record_: Annotated[
        bool,
        Parameter(name="--record", negative=(), help="put the figures into the report and the model card"),
    ] = False,
) -> None:
    """Measure perplexity, and KL divergence and top-1 agreement against the unquantized model."""
    if min(windows, passages) < 0:
        raise UsageError("eval: numbers of windows and passages start at 0, which is all", hint="see --help")
    if json_ is not None and str(json_) != STANDARD_OUTPUT:
        check_place(json_)
    log.configure("warning")
    from nybble.evaluation.evaluation import check_reference, evaluate, open_model, open_streamed
    from nybble.evaluation.material import Choice, gather
    from nybble.evaluation.wikitext import fetch_wikitext
    from nybble_models.hub import fetch

    config = ServeConfig(
        model=model, kernels=kernels, head_bits=head_bits, device=device, threads=threads, cache_dir=cache_dir
    )
    started = time.perf_counter()
    with display() as shown:
        local = fetch(model, config.cache_path, lambda phase: shown.update(phase, 0.0))
        if record_:
            check_report(local)
        base = _base(local, reference, config)
        file = text or fetch_wikitext(config.cache_path)
        material = gather(local, Choice(file, windows, length, lambada, passages))
        warn_of_overlap(local, file)
        truth = None
        if base is not None:
            truth = open_streamed(base, config, "reference", shown.update)
            check_reference(local, truth, material)
        measured = open_model(engine, config, material, shown.update)
        result = evaluate(measured, truth, material, shown.update)
        shown.close()
    record = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": measured.describe(),
        "reference": None if truth is None else truth.describe(),
        **material.describe(),
        "figures": result.figures(),
        "scores": [asdict(each) for each in result.scores],
        "seconds": round(time.perf_counter() - started, 1),
        "machine": facts(),
    }
    if json_ is None or str(json_) != STANDARD_OUTPUT:
        print_table(record, result.estimates)
    if json_ is not None:
        write(json_, record)
    if record_:
        put_down(local, record)


def _base(model: Path, reference: str | None, config: ServeConfig) -> Path | None:
    """The reference's folder or file; `None`, and a line that says so, where there is none."""
    from nybble.evaluation.base import find_base, name_base
    from nybble.prepare import quantized
    from nybble_models.hub import fetch

    if reference == NO_REFERENCE:
        return None
    if reference is not None:
        given = fetch(reference, config.cache_path)
        if given.is_dir() and quantized(given):
            print(f"warning: the reference {reference} is quantized itself", file=sys.stderr)
        return given
    found = find_base(model, config.cache_path)
    if found is None:
        named = f"{name_base(model)} is not here" if name_base(model) else "none is named"
        print(f"no reference: {named}; --reference BASE adds KL divergence and agreement", file=sys.stderr)
    return found


def warn_of_overlap(model: Path, text: Path) -> None:
    """Say so where the model was calibrated on the text that is to judge it."""
    from nybble_models.checkpoint import read_json
    from nybble_quantizers import overlap
    from nybble_quantizers.corpus import read_documents

    report = model / "quant_report.json"
    calibration = (read_json(report) if report.is_file() else {}).get("calibration") or {}
    prints = calibration.get("sketch") or ()
    found = (
        [run for document in read_documents(text) for run in overlap.shared(document, prints)]
        if prints
        else []
    )
    if found:
        origin = calibration.get("origin", "its calibration text")
        print(f"warning: {origin} and {text.name} share {len(found)} runs of ten words", file=sys.stderr)


def check_report(folder: Path) -> None:
    """Whether figures can be put down there. Raises `UsageError`."""
    if not (folder / "quant_report.json").is_file():
        raise UsageError(f"{folder}: no quant_report.json to record in", hint="`nybble quantize` writes one")


def put_down(folder: Path, record: Mapping[str, Any]) -> None:
    """Into `quant_report.json`, the model card and the sums."""
    from nybble_quantizers import papers

    text = record["text"]
    said = {"text": text["name"], "windows": text["windows"], "length": text["length"]}
    papers.add_evaluation(folder, record["figures"] | said | {"engine": record["model"]["engine"]})


def write(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2)
    if str(path) == STANDARD_OUTPUT:
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def facts_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
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


def figures_of(estimates: Mapping[str, Estimate]) -> Iterator[tuple[str, str, str]]:
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


def print_table(record: Mapping[str, Any], estimates: Mapping[str, Estimate]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    head = Table.grid(padding=(0, 2))
    head.add_column(no_wrap=True)
    head.add_column(overflow="fold")
    for label, value in facts_of(record):
        head.add_row(Text(label, style="dim"), Text(value))
    console.print(head)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    for label, value, between in figures_of(estimates):
        table.add_row(Text(label, style="dim"), value, between)
    console.print(table)
