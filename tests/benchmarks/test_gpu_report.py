"""From rows of a GPU to goals, tables and the plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

H100 = "NVIDIA H100 80GB HBM3"


def test_the_page_is_current() -> None:
    """Regenerate with `python benchmarks/gpu/report.py`."""
    from part import RESULTS
    from report import pages, stale
    from results import load

    assert stale(pages(load(RESULTS))) == []


def linear_row(projection: str, m: int, subject: str, kind: str, us: float, **more: Any) -> dict[str, Any]:
    shape = {"o": [4096, 4096], "gate_up": [22016, 4096]}[projection]
    size = shape[0] * shape[1] * 17 // 32
    return {
        "part": "linears",
        "model": "Llama-2-7B",
        "projection": projection,
        "shape": shape,
        "m": m,
        "subject": subject,
        "kind": kind,
        "ours": subject.startswith("nybble"),
        "us": {"median": us, "min": us, "max": us},
        "bytes": size,
        "gb_per_s": {"median": size / us / 1e3},
        **more,
    }


def write(folder: Path, rows: list[dict[str, Any]], **facts: Any) -> Path:
    origin = {
        "device": H100,
        "run": "1",
        "gate": "green",
        "dry": False,
        "commit": "c",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "driver": "580",
        "when": "2026-01-01T00:00:00",
    }
    text = "".join(json.dumps(row | origin | facts) + "\n" for row in rows)
    with (folder / "gpu.jsonl").open("a", encoding="utf8") as sink:
        sink.write(text)
    return folder


def decode_row(overlap: bool, rate: float) -> dict[str, Any]:
    case = {"part": "steps", "phase": "decode", "model": "Llama-2-7B", "kind": "W4A16"}
    numbers = {"tokens_per_s": {"median": rate}, "gb_per_s": {"median": 3.703 * rate}}
    return case | {"context": 0, "batch": 1, "overlap": overlap} | numbers


def verdicts_of(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    from goals import verdicts
    from results import load

    return {(text, device): (found, met) for text, device, _, found, met in verdicts(load(folder))}


def test_goals_without_rows_are_not_yet_measured(tmp_path: Path) -> None:
    assert set(verdicts_of(tmp_path).values()) == {("not yet measured", "")}


def test_goals_are_judged_by_rows(tmp_path: Path) -> None:
    rows = [
        decode_row(False, 615.0),
        decode_row(True, 699.0),
        linear_row("gate_up", 1, "nybble W4A16 bfloat16", "W4A16", 19.0),
        linear_row("gate_up", 1, "cuBLAS bfloat16", "16-bit", 60.0),
        linear_row("o", 1, "nybble W4A16 bfloat16", "W4A16", 5.0),
        linear_row("o", 1, "humming W4A16", "W4A16", 4.5),
        {"part": "over_http", "of_in_process": {"median": 0.981}},
    ]
    found = verdicts_of(write(tmp_path, rows))
    assert found["Llama-2-7B W4A16, batch 1, context 0", "H100"] == ("615 tokens/s", "yes")
    assert found["the same with overlapping launches", "H100"] == ("699 tokens/s", "no")
    assert found["gate/up kernel, W4A16, M = 1", "H100"] == ("2.52 TB/s", "yes")
    assert found["o kernel, W4A16, M = 1", "H100"] == ("1.78 TB/s", "no")
    worst = "W4A16 over the fastest peer, worst shape, M = 1 to 16"
    assert found[worst, "H100"] == ("0.90 x", "no")
    assert found["rate over HTTP, of the rate in process", "H100"] == ("0.981 x", "yes")
    assert found[worst, "H200"] == ("not yet measured", "")


def test_figures_behind_a_red_gate_are_marked(tmp_path: Path) -> None:
    found = verdicts_of(write(tmp_path, [decode_row(False, 900.0)], gate="red"))
    assert found["Llama-2-7B W4A16, batch 1, context 0", "H100"] == ("900 tokens/s †", "yes")


def test_only_the_last_run_of_a_part_counts(tmp_path: Path) -> None:
    write(tmp_path, [decode_row(False, 900.0)])
    found = verdicts_of(write(tmp_path, [decode_row(False, 300.0)], run="2"))
    assert found["Llama-2-7B W4A16, batch 1, context 0", "H100"] == ("300 tokens/s", "no")


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    with (write(tmp_path, [decode_row(False, 700.0)]) / "gpu.jsonl").open("a") as sink:
        sink.write('{"part": "steps", "tok')
    assert verdicts_of(tmp_path)["Llama-2-7B W4A16, batch 1, context 0", "H100"] == ("700 tokens/s", "yes")


def test_tables_show_what_was_measured(tmp_path: Path) -> None:
    from results import load
    from tables import sections

    rows = [
        {"part": "ceilings", "subject": "read", "gb_per_s": {"median": 3000.0}},
        linear_row("gate_up", 1, "nybble W4A16 bfloat16", "W4A16", 20.0),
        linear_row("gate_up", 1, "humming W4A16", "W4A16", 30.0),
        decode_row(True, 700.0),
    ]
    found = sections(load(write(tmp_path, rows)))
    assert "20.0 (80%) 1.50x" in found["W4A16"]
    assert "| Llama-2-7B | W4A16 | 0 | 3.70 | 700 (86%) | not yet measured |" in found["decode"]
    assert "3000" in found["machine"]


@pytest.mark.parametrize("measured", [False, True])
def test_the_plot_is_sound(tmp_path: Path, measured: bool) -> None:
    from results import load
    from roofline import svg

    if measured:
        write(tmp_path, [linear_row("o", 1, "nybble W4A16 bfloat16", "W4A16", 4.0)])
    text = svg(load(tmp_path))
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert ("bounds only" in text) != measured
    assert ("<title>nybble W4A16 bfloat16, Llama-2-7B o, M = 1: 8.4</title>" in text) == measured
