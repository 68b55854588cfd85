"""The model card: what was made, how good it is, how to use it, and how it was done. No times, no paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from nybble_models.checkpoint import read_json
from nybble_quantizers.quality_report.page import strip
from nybble_quantizers.quality_report.readers import readers
from nybble_quantizers.quality_report.record import Record, record
from nybble_quantizers.quality_report.wording import (
    UNKNOWN,
    bits_of,
    figure,
    form,
    interval,
    label,
    method,
    share,
    size,
    storage,
)
from nybble_quantizers.report import QuantReport

CARD, PLOT = "README.md", "quant_errors.svg"


def write(folder: Path, report: QuantReport) -> None:
    """Write README.md and its plot. `folder` holds config.json already."""
    found = record("", asdict(report), read_json(folder / "config.json"))
    plot = strip(found)
    if plot is not None:
        (folder / PLOT).write_text(plot, encoding="utf8")
    (folder / CARD).write_text(card(found, report, plotted=plot is not None), encoding="utf8")


def card(found: Record, report: QuantReport, *, plotted: bool) -> str:
    """The Markdown text."""
    title = f"{found.source or 'A language model'}, {label(found)}"
    sections = [
        f"---\n{_front_matter(found, report)}---\n\n# {_plain(title)}\n",
        _what(found, report),
        _figures(found),
        f"![Signal over noise of every linear, by layer]({PLOT})\n" if plotted else "",
        _use(found),
        _making(found, report),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(found: Record, report: QuantReport) -> str:
    """https://huggingface.co/docs/hub/model-cards#model-card-metadata"""
    said = dict(report.origin)
    base = said.pop("base_model", None)
    matter: dict[str, object] = {} if base is None else {"base_model": base}
    if base is not None and found.rows:
        matter["base_model_relation"] = "quantized"
    matter |= said | {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return yaml.safe_dump(matter | {"tags": list(_tags(found))}, sort_keys=False, allow_unicode=True)


def _tags(found: Record) -> Iterator[str]:
    yield "nybble"
    if found.rows:
        yield from dict.fromkeys([*found.method.split("+"), str(found.settings.get("quant_method", ""))])
        yield from (f"{bits}-bit" for bits in bits_of(found))


def _what(found: Record, report: QuantReport) -> str:
    base = report.origin.get("base_model")
    original = f"[{base}](https://huggingface.co/{base})" if base else _code(found.source)
    if not found.rows:
        return f"{original} with all weights at 16 bits, written by nybble.\n"
    left = f" {len(found.skipped)} linears stay at 16 bits." if found.skipped else ""
    return (
        f"{original} with its linears quantized by nybble: {method(found)}, {form(found)}, "
        f"stored as {storage(found)}.{left}\n"
    )


def _figures(found: Record) -> str:
    lines = [f"| {name} | {value} |" for name, value in (*_made(found), *_measured(found)) if value]
    notes = []
    if found.weight_noise is not None:
        notes.append("Noise is the power of the error over that of the signal.")
    if found.output_noise is not None:
        notes.append("Outputs are those on the calibration text.")
    return "\n".join(["| figure | value |", "|---|---|", *lines, "", " ".join(notes), ""]).rstrip() + "\n"


def _made(found: Record) -> Iterator[tuple[str, str]]:
    yield "method", method(found)
    yield "weights of linears", form(found)
    yield "bits a weight, embeddings included", _known(figure(found.bits_per_weight))
    yield "size of the tensors", size(found.nbytes)
    yield "noise of the weights, mean over linears", _known(share(found.weight_noise))
    yield "noise of the linears' outputs, mean", _known(share(found.output_noise))
    heard = [(row.output_db, row.name) for row in found.rows if row.output_db is not None]
    if heard:
        db, name = min(heard)
        yield "the noisiest", f"{_code(name)}, {db:.1f} dB"


def _measured(found: Record) -> Iterator[tuple[str, str]]:
    """What `nybble eval` has found, if it has run."""
    said = found.evaluation
    where = f" on {_code(said.text)}" if said.text else ""
    if said.windows and said.length:
        where += f", {said.windows} windows of {said.length} tokens"
    yield f"perplexity{where}", _known(figure(said.perplexity, "{:.3f}"))
    yield "of the unquantized model", _known(figure(said.reference_perplexity, "{:.3f}"))
    yield "rise", _known(share(said.rise, signed=True))
    divergence = figure(said.kl_divergence, "{:.4f}"), interval(said.kl_interval, "{:.4f}")
    yield "KL divergence from it, nats a token", _known(*divergence)
    agreement = share(said.top1_agreement), interval(said.top1_interval, "{:.2f}", 100)
    yield "top-1 agreement with it", _known(*agreement)


def _known(value: str, ends: str = "") -> str:
    """Empty for what was not measured, so that its row is left out."""
    if value == UNKNOWN:
        return ""
    return f"{value} (95 %: {ends})" if ends else value


def _use(found: Record) -> str:
    lines = [
        "## Use\n\n```sh",
        "nybble verify FOLDER    # sums, tensors, report",
        "nybble serve FOLDER     # an OpenAI-compatible server on port 8000\n```\n",
    ]
    others = list(readers(found))
    if others:
        lines += ["The format is also read by\n", *(f"* {other}" for other in others), ""]
    return "\n".join(lines)


def _making(found: Record, report: QuantReport) -> str:
    lines = ["## How it was made\n"]
    if found.calibration:
        told = dict(found.calibration)
        digest = told.pop("sha256", "")
        origin = told.pop("origin", "")
        rest = ", ".join(f"{key} {value}" for key, value in told.items())
        lines.append(f"* Calibration: {_code(origin)}, {rest}; SHA-256 of its tokens {_code(digest)}")
    else:
        lines.append("* Calibration: none")
    lines.append(f"* Seed: {report.seed}; the same arguments make the same bytes")
    lines.append(f"* Versions: {', '.join(f'{name} {_code(number)}' for name, number in found.versions)}")
    if found.command:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", found.command)), default=0))
        lines.append(f"* Command:\n\n{fence}sh\n{found.command}\n{fence}")
    lines.append("\nEvery linear's figures are in `quant_report.json`, every file's sum in `SHA256SUMS`.\n")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Words of a file as words of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", text)


def _code(text: str) -> str:
    """Words of a file as they are; a bar would end a table's cell."""
    held = text.replace("|", "¦")
    fence = "`" * (1 + max(map(len, re.findall("`+", held)), default=0))
    pad = " " if held.startswith("`") or held.endswith("`") else ""
    return f"{fence}{pad}{held}{pad}{fence}" if held else "an unnamed file"
