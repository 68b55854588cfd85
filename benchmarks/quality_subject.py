"""A model whose quantized copies are measured: its windows of text, and a row of figures for each copy."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from originals import as_safetensors

from nybble.commands.eval import warn_of_overlap
from nybble.config import ServeConfig
from nybble.engine.bandwidth import available_memory
from nybble.evaluation.evaluation import Result, evaluate, open_model, open_streamed
from nybble.evaluation.material import Choice, gather
from nybble.evaluation.model import Model
from nybble.evaluation.wikitext import fetch_wikitext
from nybble_models.checkpoint import REPORT
from nybble_models.errors import ModelError
from nybble_models.hub import fetch, name_of
from nybble_quantizers import papers
from nybble_quantizers.calibrate import refuse_overlap
from nybble_quantizers.corpus import locate
from nybble_quantizers.estimate import resident
from nybble_quantizers.journal import fingerprint, key_of
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme

PLAIN = Scheme()

Row = dict[str, Any]


class Subject:
    """One model: its windows, and a row for what is made of it."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.options = options
        cache = self._config("").cache_path
        self.source = as_safetensors(fetch(model, cache), cache)
        self.text = options.text or fetch_wikitext(cache)
        if options.calibration:  # here, as a kept model may have been judged by another text
            refuse_overlap(locate(options.calibration), self.text)
        self.material = gather(self.source, Choice(self.text, options.windows, options.length))
        self.base = open_streamed(self.source, self._config(""), "reference", tell)
        self.common: Row = {
            "benchmark": "quality",
            "model": model if model == "default" else name_of(model),
            "engine": options.engine,
            "windows": len(self.material.windows),
            "length": self.material.length,
            "tokens": self.material.tokens,
            "text_sha256": self.material.text.sha256,
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

    def scheme(self, settings: Row) -> Scheme:
        """With what `--set` says over it. Raises `ModelError`."""
        return Scheme(**settings | dict(self.options.set))

    def quantized(self, scheme: Scheme) -> Row:
        """Quantize, then measure. Raises `ModelError`."""
        started = time.perf_counter()
        with self._made(scheme) as folder:
            prepared = time.perf_counter() - started
            row = self.folder(folder, scheme.method)
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
        row = self._row(method, evaluate(measured, reference, self.material, tell), started)
        return row | {"calibration": calibration_of(folder)}

    def given(self, folder: Path) -> Row:
        """A folder of the user's, which may have been calibrated on whatever text."""
        warn_of_overlap(folder, self.text)
        return self.folder(folder, folder.name)

    @contextmanager
    def _made(self, scheme: Scheme) -> Iterator[Path]:
        """The quantized copy: of `--keep`, or one that is gone afterwards."""
        parent = self.options.keep or self._config("").cache_path
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".quality-", dir=parent) as fleeting:
            target = parent / self._name(scheme) if self.options.keep else Path(fleeting) / "model"
            if not target.exists():
                budget = available_memory() + resident()
                quantize(self.source, target, scheme, calibration=self.options.calibration, memory=budget)
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


def calibration_of(folder: Path) -> str | None:
    """The text by name and size, as the folder's report has it. None: no text, or no report to be read."""
    if not (folder / REPORT).exists():
        return None
    try:
        text = papers.read(folder).calibration
    except ModelError:
        return None
    return text and f"{text['origin']}, {text['samples']} x {text['length']}"


def rounded(value: Any) -> Any:
    """To six digits: what comes after them is noise."""
    if isinstance(value, tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def tell(phase: str, fraction: float) -> None:
    """Rows are printed as they are done; nothing is said in between."""
