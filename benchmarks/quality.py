"""What quantizing costs a model: perplexity in the protocol of the papers, divergence, agreement, time.

    quality.py --text wiki.test.raw                  the default model, groups of 64 and 32
    quality.py --text wiki.test.raw --engine serve   through the kernels and the cache that serve
    quality.py --folder DIR                          and a folder that another program quantized
    quality.py --table --weights DIR --calibration c4.jsonl
                                                     the tables of OPT and Llama-2, all windows
    quality.py ... --save                            append to results/quality.jsonl

What is measured, and how, is `nybble eval`'s. A calibration text that shares ten words in a row with the text
that judges is refused. `--windows 12` takes twelve of the n windows of the text, every (n // 12)th from the
first on (0: all). Every quantized model is made anew, unless the folder of `--keep` has one of the same
source, scheme and calibration text. A row that cannot be run says why, and the others follow.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from quality_subject import PLAIN, Row, Subject

from nybble.bench.machine import facts
from nybble.errors import NybbleError, UsageError
from nybble_models.errors import ModelError

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
WINDOWS = 12

with Path(__file__).with_name("quality_tables.toml").open("rb") as _file:
    _tables = tomllib.load(_file)
TABLE_METHODS: dict[str, Row] = _tables["methods"]
TABLE_CALIBRATION: Row = _tables["calibration"]
TABLES: dict[str, dict[str, float]] = _tables["perplexity"]

FAILURES = (ModelError, NybbleError, MemoryError, OSError, RuntimeError)  # PyTorch's lack of memory: the last
"""What keeps a row of a table from being run, and not the others."""


def compare(options: argparse.Namespace) -> Iterator[Row]:
    """One model, the unquantized row first, then methods by group size."""
    subject = Subject(options.model, options)
    print(f"{'method':12} {'group':>5} {'perplexity':>10} {'rise':>8} {'of rtn':>7} {'KL':>8} {'top-1':>7}")
    nearest: dict[int, float] = {}
    wanted = [
        {"method": m, "bits": options.bits, "group_size": g}
        for g in options.group_size
        for m in options.method
    ]
    schemes = [subject.scheme(each) for each in wanted]  # a mistake in what is asked for shows first
    makers: list[tuple[str, int, Callable[[], Row]]] = [("none", 0, subject.unquantized)]
    makers += [(s.method, s.group_size, partial(subject.quantized, s)) for s in schemes]
    makers += [(f.name, 0, partial(subject.given, f)) for f in options.folder]
    for method, group, make in makers:
        try:
            row = make()
        except FAILURES as error:
            if subject.plain is None:
                raise
            print(f"{method:12} {group or '-':>5} {not_run(error)}", flush=True)
            continue
        group = row.get("group_size", 0)
        if row["method"] == "rtn":
            nearest[group] = row["rise"]
        of_nearest = row["rise"] / nearest[group] if nearest.get(group) and row["method"] != "rtn" else None
        print(
            f"{row['method']:12} {group or '-':>5} {row['perplexity']:10.3f} {row['rise']:8.3f}"
            f" {figure(of_nearest, '7.2f')} {figure(row.get('kl_divergence'), '8.4f')}"
            f" {figure(row.get('top1_agreement'), '7.2%')}",
            flush=True,
        )
        yield row


def table(options: argparse.Namespace) -> Iterator[Row]:
    """Every row of the papers' models; one that is not run says why. Raises `UsageError`."""
    if options.calibration is None:
        raise UsageError(
            "--table needs --calibration FILE: without one a model is held whole to write a text"
        )
    print(f"{'model':12} {'method':12} {'to beat':>8} {'ours':>8}")
    for model, figures in TABLES.items():
        held = weights_of(model, options.weights)
        subject: Subject | None = None
        for method, settings in TABLE_METHODS.items():
            head = f"{model:12} {method:12} {figures[method]:8.3f}"
            try:
                subject = subject or Subject(str(held or missing(model, options.weights)), options)
                row = (
                    subject.unquantized()
                    if method == "none"
                    else subject.quantized(subject.scheme({"method": method} | TABLE_CALIBRATION | settings))
                )
            except FAILURES as error:
                print(f"{head} {not_run(error)}", flush=True)
                continue
            print(f"{head} {row['perplexity']:8.3f}", flush=True)
            yield row | {"table": model, "to_beat": figures[method]}


def missing(model: str, weights: Path | None) -> NoReturn:
    raise ModelError(f"{weights} has no folder {model}" if weights else "no --weights")


def not_run(error: Exception) -> str:
    """What a row says in the place of figures: a line of the error, or its name where it says nothing."""
    return f"{'not run':>8}: {(str(error) or type(error).__name__).splitlines()[0]}"


def weights_of(model: str, weights: Path | None) -> Path | None:
    """The folder of that name, in any case, with or without the hub's "-hf"."""
    folders = sorted(weights.iterdir()) if weights and weights.is_dir() else []
    return next((each for each in folders if each.name.lower().removesuffix("-hf") == model), None)


def figure(value: float | None, form: str) -> str:
    return f"{value:{form}}" if value is not None else " " * int(form.split(".")[0])


def setting(text: str) -> tuple[str, Any]:
    """ "samples=64", the value in JSON or a plain word."""
    name, _, value = text.partition("=")
    if name not in asdict(PLAIN):
        raise argparse.ArgumentTypeError(f"a scheme has no {name}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="wiki.test.raw; else WikiText-2 from the hub")
    parser.add_argument("--model", default="default", help="as for nybble serve")
    parser.add_argument("--method", nargs="*", default=["rtn", "awq"], help="as for nybble quantize")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", nargs="+", type=int, default=[64, 32])
    parser.add_argument("--folder", nargs="*", type=Path, default=[], help="quantized by whatever program")
    parser.add_argument(
        "--calibration", help=".txt or .jsonl, as --table needs; else text of the model itself"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
        help="of the Scheme, as samples=64",
    )
    parser.add_argument("--windows", type=int, help=f"of the text; 0: all (default {WINDOWS}, of --table 0)")
    parser.add_argument("--length", type=int, help="tokens in a window (default 2048, or all positions)")
    parser.add_argument("--engine", choices=("serve", "decode", "reference"), default="reference")
    parser.add_argument("--kernels", default="auto", help="with --engine serve: as for nybble serve")
    parser.add_argument("--head-bits", type=int, default=8, help="with --engine serve: of the quantized rows")
    parser.add_argument("--threads", type=int, default=0, help="as for nybble serve")
    parser.add_argument("--cache-dir", default="", help="where models are kept")
    parser.add_argument("--keep", type=Path, help="where quantized models are kept, and looked for")
    parser.add_argument("--table", action="store_true", help="the tables of OPT and Llama-2")
    parser.add_argument("--weights", type=Path, help="with --table: folder of model folders, as opt-1.3b")
    parser.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS.name}")
    options = parser.parse_args()
    if options.windows is None:
        options.windows = 0 if options.table else WINDOWS
    return options


def main() -> None:
    options = parse()
    try:
        for row in table(options) if options.table else compare(options):
            if options.save:
                save(row)
    except (ModelError, NybbleError) as error:
        raise SystemExit(f"error: {error}") from None


def save(row: Row) -> None:
    stamped = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | row | facts()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf8") as file:
        file.write(json.dumps(stamped) + "\n")


if __name__ == "__main__":
    main()
