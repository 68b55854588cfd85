"""What quantizing costs a model: perplexity in the protocol of the papers, divergence, agreement, time.

    quality.py --text wiki.test.raw                  the default model, groups of 64 and 32
    quality.py --text wiki.test.raw --engine serve   through the kernels and the cache that serve
    quality.py --folder DIR                          and a folder that another program quantized
    quality.py --table --weights DIR                 the tables of OPT and Llama-2, all windows
    quality.py ... --save                            append to results/quality.jsonl

What is measured, and how, is `nybble eval`'s. `--windows 12` takes twelve of the n windows of the text, every
(n // 12)th from the first on (0: all). Every quantized model is made anew, unless the folder of `--keep` has
one of the same source, scheme and calibration text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nybble.bench.machine import facts
from nybble.config import ServeConfig
from nybble.errors import NybbleError
from nybble.evaluation.evaluation import Result, evaluate, open_model, open_streamed
from nybble.evaluation.material import Choice, gather
from nybble.evaluation.model import Model
from nybble.evaluation.wikitext import fetch_wikitext
from nybble_models.errors import ModelError
from nybble_models.hub import fetch, name_of
from nybble_quantizers.journal import fingerprint, key_of
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
WINDOWS = 12
PLAIN = Scheme()

Row = dict[str, Any]

W4 = {"bits": 4, "group_size": 128}
TABLE_METHODS: dict[str, Row] = {
    "none": {},
    "gptq": W4,
    "awq": W4,
    "smoothquant": {"bits": 8, "group_size": -1, "symmetric": True, "inputs": "token"},
}
TABLES = {  # WikiText-2, all windows of 2048: unquantized (GPTQ's and AWQ's papers), and the figures to beat
    "opt-1.3b": (14.63, 16.15, 14.92, 14.82),
    "opt-2.7b": (12.47, 12.84, 12.70, 12.50),
    "opt-6.7b": (10.86, 11.05, 10.92, 10.86),
    "opt-13b": (10.13, 10.21, 10.22, 10.14),
    "llama-2-7b": (5.47, 5.87, 5.60, 5.515),
    "llama-2-13b": (4.88, 4.97, 4.97, 4.929),
    "llama-2-70b": (3.32, 3.52, 3.41, 3.359),
}


FAILURES = (ModelError, NybbleError, MemoryError, OSError, RuntimeError)  # PyTorch's lack of memory: the last
"""What keeps a row of a table from being run, and not the others."""


class Subject:
    """One model: its windows, and a row for what is made of it."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.options = options
        cache = self._config("").cache_path
        self.source = fetch(model, cache)
        text = options.text or fetch_wikitext(cache)
        self.material = gather(self.source, Choice(text, options.windows, options.length))
        self.base = open_streamed(self.source, self._config(""), "reference", tell)
        calibration = Path(options.calibration).name if options.calibration else "written by the model"
        self.common: Row = {
            "benchmark": "quality",
            "model": model if model == "default" else name_of(model),
            "engine": options.engine,
            "windows": len(self.material.windows),
            "length": self.material.length,
            "tokens": self.material.tokens,
            "text_sha256": self.material.text.sha256,
            "calibration": calibration,
        }
        self.plain: float | None = None

    def unquantized(self) -> Row:
        """In float32, or served with the head as stored."""
        started = time.perf_counter()
        measured: Model = self.base
        if self.options.engine != "reference":
            measured = open_model(
                self.options.engine, self._config(str(self.source), 16), self.material, tell
            )
        return self._row("none", evaluate(measured, None, self.material, tell), started)

    def quantized(self, settings: Row) -> Row:
        """Quantize, then measure. Raises `ModelError`."""
        options = self.options
        scheme = Scheme(**settings | dict(options.set))
        started = time.perf_counter()
        with self._made(scheme) as folder:
            prepared = time.perf_counter() - started
            row = self.folder(folder, settings["method"])
        return row | {
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "scheme": {
                name: value for name, value in asdict(scheme).items() if value != getattr(PLAIN, name)
            },
            "prepare_seconds": round(prepared, 1),
        }

    def folder(self, folder: Path, method: str) -> Row:
        """A folder that is quantized already."""
        started = time.perf_counter()
        config = self._config(str(folder), self.options.head_bits)
        measured = open_model(self.options.engine, config, self.material, tell)
        reference = None if self.options.table else self.base
        return self._row(method, evaluate(measured, reference, self.material, tell), started)

    @contextmanager
    def _made(self, scheme: Scheme) -> Iterator[Path]:
        """The quantized copy: of `--keep`, or one that is gone afterwards."""
        parent = self.options.keep or self._config("").cache_path
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".quality-", dir=parent) as fleeting:
            target = parent / self._name(scheme) if self.options.keep else Path(fleeting) / "model"
            if not target.exists():
                quantize(
                    self.source,
                    target,
                    scheme,
                    calibration=self.options.calibration,
                    evaluation=self.options.text,
                )
            yield target

    def _name(self, scheme: Scheme) -> str:
        """Another source, scheme or calibration text is another name."""
        key = key_of(self.source, scheme, fingerprint(self.options.calibration))[:8]
        return f"{name_of(str(self.source))}-{scheme.label}-{key}"

    def _row(self, method: str, result: Result, started: float) -> Row:
        figures = {name: rounded(value) for name, value in result.figures().items()}
        perplexity = result.estimates["perplexity"].value
        self.plain = self.plain or (perplexity if method == "none" else None)
        rise = {} if self.plain is None else {"rise": round(perplexity - self.plain, 4)}
        seconds = round(time.perf_counter() - started, 1)
        return self.common | {"method": method} | figures | rise | {"measure_seconds": seconds}

    def _config(self, model: str, head_bits: int = 16) -> ServeConfig:
        options = self.options
        return ServeConfig(
            model=model or "default",
            kernels=options.kernels,
            head_bits=head_bits,
            threads=options.threads,
            cache_dir=options.cache_dir,
        )


def rounded(value: Any) -> Any:
    """To six digits: what comes after them is noise."""
    if isinstance(value, tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def tell(phase: str, fraction: float) -> None:
    """Rows are printed as they are done; nothing is said in between."""


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
    makers: list[Callable[[], Row]] = [subject.unquantized]
    makers += [lambda settings=each: subject.quantized(settings) for each in wanted]
    makers += [lambda path=each: subject.folder(path, path.name) for each in options.folder]
    for make in makers:
        row = make()
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
    """Every row of the papers' models; one that is not run says why."""
    print(f"{'model':12} {'method':12} {'to beat':>8} {'ours':>8}")
    for model, figures in TABLES.items():
        held = weights_of(model, options.weights)
        subject: Subject | None = None
        for (method, settings), to_beat in zip(TABLE_METHODS.items(), figures, strict=True):
            head = f"{model:12} {method:12} {to_beat:8.3f}"
            if held is None:
                where = f"{options.weights} has no folder {model}" if options.weights else "no --weights"
                print(f"{head} {'not run':>8}: {where}", flush=True)
                continue
            try:
                subject = subject or Subject(str(held), options)
                row = (
                    subject.unquantized()
                    if method == "none"
                    else subject.quantized({"method": method} | settings)
                )
            except FAILURES as error:
                print(f"{head} {'not run':>8}: {str(error).splitlines()[0]}", flush=True)
                continue
            print(f"{head} {row['perplexity']:8.3f}", flush=True)
            yield row | {"table": model, "to_beat": to_beat}


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
    parser.add_argument("--calibration", help=".txt or .jsonl; else text of the model itself")
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
