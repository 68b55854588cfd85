"""`nybble eval`: a model's perplexity, and its distance from the model it was made from."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured."""

    text: Annotated[
        Path | None, Parameter(help="wiki.test.raw, or a .txt or .jsonl; default: WikiText-2 from the hub")
    ] = None
    windows: Annotated[
        int, Parameter(help="windows to measure, one of every so many; 0: all, as in papers")
    ] = 12
    length: Annotated[int | None, Parameter(help="tokens in a window (default 2048, or all positions)")] = (
        None
    )
    lambada: Annotated[Path | None, Parameter(help=".jsonl of passages whose last word to guess")] = None
    passages: Annotated[int, Parameter(help="passages to measure, one of every so many; 0: all")] = 500


@dataclass(frozen=True, kw_only=True)
class Through:
    """What it is measured through."""

    engine: Annotated[
        Literal["serve", "decode", "reference"],
        Parameter(help="serve: as prompts are read; decode: as answers are made; reference: in float32"),
    ] = "serve"
    kernels: Annotated[str, Parameter(help="as for nybble serve")] = "auto"
    head_bits: Annotated[int, Parameter(help="as for nybble serve")] = 8
    device: Annotated[str, Parameter(help="as for nybble serve")] = "auto"
    threads: Annotated[int, Parameter(help="as for nybble serve")] = 0
    cache_dir: Annotated[str, Parameter(help="where fetched models are kept (default ~/.cache/nybble)")] = ""

    def config(self, model: str) -> ServeConfig:
        return ServeConfig(
            model=model,
            kernels=self.kernels,
            head_bits=self.head_bits,
            device=self.device,
            threads=self.threads,
            cache_dir=self.cache_dir,
        )


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
    asked: Annotated[Asked, Parameter(name="*")] = Asked(),
    through: Annotated[Through, Parameter(name="*")] = Through(),
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
    if min(asked.windows, asked.passages) < 0:
        raise UsageError("eval: numbers of windows and passages start at 0, which is all", hint="see --help")
    if json_ is not None and str(json_) != STANDARD_OUTPUT:
        check_place(json_)
    log.configure("warning")
    from nybble.evaluation import table
    from nybble_models.hub import fetch

    config, started = through.config(model), time.perf_counter()
    with display() as shown:
        local = fetch(model, config.cache_path, lambda phase: shown.update(phase, 0.0))
        if record_:
            check_report(local)
        base = _base(local, reference, config)
        record, estimates = _measured(local, base, asked, through, config, shown.update)
        shown.close()
    record |= {"seconds": round(time.perf_counter() - started, 1), "machine": facts()}
    if json_ is None or str(json_) != STANDARD_OUTPUT:
        table.show(record, estimates)
    if json_ is not None:
        write(json_, record)
    if record_:
        put_down(local, record)


def judge(folder: Path, base: Path, text: Path, cache_dir: str) -> None:
    """Measure what was just made of `base`, show it, and put it down in its papers."""
    from nybble.evaluation import table

    through = Through(cache_dir=cache_dir)
    config = through.config(str(folder))
    with display() as shown:
        record, estimates = _measured(folder, base, Asked(text=text), through, config, shown.update)
        shown.close()
    table.show(record, estimates)
    put_down(folder, record)


def check_text(model: Path, text: Path) -> None:
    """Whether `judge` can use it. Raises `UsageError`."""
    from nybble.evaluation.material import Choice, gather

    gather(model, Choice(text))


def _measured(
    local: Path,
    base: Path | None,
    asked: Asked,
    through: Through,
    config: ServeConfig,
    tell: Callable[[str, float], None],
) -> tuple[dict[str, Any], Mapping[str, Estimate]]:
    """What is to be written, but for the time it took and the machine."""
    from nybble.evaluation.evaluation import check_reference, evaluate, open_model, open_streamed
    from nybble.evaluation.material import Choice, gather
    from nybble.evaluation.wikitext import fetch_wikitext

    file = asked.text or fetch_wikitext(config.cache_path)
    material = gather(local, Choice(file, asked.windows, asked.length, asked.lambada, asked.passages))
    warn_of_overlap(local, file)
    truth = None
    if base is not None:
        truth = open_streamed(base, config, "reference", tell)
        check_reference(local, truth, material)
    measured = open_model(through.engine, config, material, tell)
    result = evaluate(measured, truth, material, tell)
    record = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": measured.describe(),
        "reference": None if truth is None else truth.describe(),
        **material.describe(),
        "figures": result.figures(),
        "scores": [asdict(each) for each in result.scores],
    }
    return record, result.estimates


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
    from nybble_models.checkpoint import REPORT, read_json
    from nybble_models.documents import read_documents
    from nybble_quantizers import overlap

    report = model / REPORT
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
    from nybble_models.checkpoint import REPORT

    if not (folder / REPORT).is_file():
        raise UsageError(f"{folder}: no {REPORT} to record in", hint="`nybble quantize` writes one")


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
