"""Tiny checkpoints with the papers that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble_quantizers import papers
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.report import QuantReport
from nybble_quantizers.scheme import Scheme
from support_checkpoint import write_checkpoint

SCHEME = Scheme(method="rtn", group_size=32, samples=4, length=24, grid=8)
EVALUATION = {
    "perplexity": 21.5,
    "reference_perplexity": 20.0,
    "kl_divergence": 0.0123,
    "kl_interval": [0.0119, 0.0127],
    "top1_agreement": 0.951,
    "top1_interval": [0.947, 0.955],
    "text": "wiki.test.raw",
    "windows": 12,
    "length": 2048,
}


def plain(folder: Path) -> Path:
    folder.mkdir()
    return write_checkpoint(folder, "llama", group_size=None)


def with_papers(
    folder: Path, name: str = "out", scheme: Mapping[str, Any] | None = None, **changes: Any
) -> tuple[Path, QuantReport]:
    """A checkpoint of a tiny random model and its report, with fields of scheme and report changed."""
    source = folder / "plain"
    if not source.exists():
        plain(source)
    out = folder / name
    made = quantize(source, out, replace(SCHEME, **(scheme or {})), command="nybble quantize plain -o out")
    report = replace(made, **changes)
    papers.write(out, report)
    return out, report
