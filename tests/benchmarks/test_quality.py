"""Rows of `benchmarks/quality.py` on tiny models, and a table that says what was not run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble_models.errors import ModelError
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme
from support_checkpoint import write_checkpoint
from support_originals import write_new, write_original

TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 8
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The script with these arguments; the rows it saves."""
    import quality

    results = tmp_path / "results" / "quality.jsonl"
    monkeypatch.setattr(quality, "RESULTS", results)
    (tmp_path / "text.txt").write_text(TEXT)
    common = ("--cache-dir", str(tmp_path / "cache"), "--threads", "1", "--save")

    def run(*arguments: str, text: str | None = "text.txt") -> list[dict[str, Any]]:
        judge = () if text is None else ("--text", str(tmp_path / text))
        monkeypatch.setattr(sys, "argv", ["quality.py", *judge, *common, *arguments])
        quality.main()
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    return run


def test_rows_of_methods_and_of_a_folder(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_checkpoint(tmp_path / "base", group_size=None)
    other = write_checkpoint(tmp_path / "other")
    asked = ("--windows", "2", "--length", "96", "--method", "rtn", "--group-size", "32", "64")
    asked = (*asked, "--set", "symmetric=true")
    rows = run("--model", str(base), *asked, "--folder", str(other))
    assert [row["method"] for row in rows] == ["none", "rtn", "rtn", "other"]
    assert [row.get("group_size") for row in rows] == [None, 32, 64, None]
    plain, fine, coarse, _ = rows
    assert plain["rise"] == 0 and "kl_divergence" not in plain
    assert 0 < fine["kl_divergence"] < coarse["kl_divergence"]
    assert fine["rise"] == pytest.approx(fine["perplexity"] - plain["perplexity"], rel=1e-3)
    assert fine["scheme"] == {"method": "rtn", "group_size": 32, "symmetric": True}
    assert {"when", "commit", "versions", "text_sha256", "prepare_seconds"} <= set(fine)
    assert not list((tmp_path / "cache").iterdir()), "what was made to be measured is gone"
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_kept_model_is_used_again(run: Run, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", group_size=None)
    asked = ("--windows", "1", "--method", "rtn", "--group-size", "32", "--keep", str(tmp_path / "kept"))
    run("--model", str(base), *asked, "--engine", "serve")
    (made,) = (tmp_path / "kept").iterdir()
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    rows = run("--model", str(base), *asked, "--engine", "serve")
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    assert rows[1]["perplexity"] == rows[3]["perplexity"]


def test_another_scheme_or_text_is_another_kept_model(run: Run, tmp_path: Path) -> None:
    """Also where the label is the same."""
    base = write_checkpoint(tmp_path / "base", group_size=None)
    asked = ("--model", str(base), "--windows", "1", "--method", "awq", "--group-size", "32")
    asked = (*asked, "--keep", str(tmp_path / "kept"), "--set", "samples=1", "length=16")
    (tmp_path / "calib.txt").write_text("Every word of it is its own. " * 40)
    for more in ((), ("grid=2",), ("grid=2", "--calibration", str(tmp_path / "calib.txt"))):
        run(*asked, *more)
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_every_row_of_the_tables_is_a_scheme() -> None:
    import quality

    for method, settings in quality.TABLE_METHODS.items():
        assert Scheme(method=method, **settings).method == method
    assert all(figures.keys() == quality.TABLE_METHODS.keys() for figures in quality.TABLES.values())


def test_a_table_says_what_was_not_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    monkeypatch.setitem(quality.TABLE_METHODS, "awq", {"bits": 1})  # stands for what cannot be made
    monkeypatch.setitem(quality.TABLE_METHODS, "gptq", {"bits": 4, "group_size": 32})
    write_checkpoint(tmp_path / "weights" / "OPT-1.3B", "opt", group_size=None)
    rows = run("--table", "--weights", str(tmp_path / "weights"), *small(tmp_path), "--windows", "1")
    assert [(row["table"], row["method"], row["to_beat"]) for row in rows[:2]] == [
        ("opt-1.3b", "none", 14.63),
        ("opt-1.3b", "gptq", 16.15),
    ]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "method", "to", "beat", "ours"]
    assert len(lines) == len(quality.TABLES) * len(quality.TABLE_METHODS)
    assert lines[2].split()[:5] == ["opt-1.3b", "awq", "14.920", "not", "run:"]
    assert all("has no folder opt-2.7b" in line for line in lines[4:8])


@pytest.mark.parametrize("engine", ["reference", "serve"])
def test_a_table_runs_originals_as_their_copies(
    run: Run, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickled shards and a tokenizer in parts, in every row and by every way to serve."""
    import quality

    for method in ("gptq", "awq"):
        monkeypatch.setitem(quality.TABLE_METHODS, method, {"bits": 4, "group_size": 32})
    new = write_new(tmp_path / "weights" / "opt-1.3b")
    write_original(new, tmp_path / "weights" / "opt-2.7b")
    write_original(new, tmp_path / "weights" / "opt-6.7b", files=2, prefix="model.")
    asked = ("--table", "--weights", str(tmp_path / "weights"), *small(tmp_path), "--windows", "1")
    rows = run(*asked, "--engine", engine)
    measured = [(row["method"], row["perplexity"]) for row in rows]
    assert [method for method, _ in measured] == ["none", "gptq", "awq", "smoothquant"] * 3
    assert measured[:4] == measured[4:8] == measured[8:]


def test_a_table_takes_the_text_and_the_memory_that_are_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much text as the paper's; a row that does not fit is not run."""
    import quality_subject

    asked: list[tuple[Scheme, str, int]] = []

    def record(source: Path, out: Path, scheme: Scheme, *, calibration: str, memory: int) -> None:
        asked.append((scheme, calibration, memory))
        raise ModelError("recorded")

    monkeypatch.setattr(quality_subject, "quantize", record)
    monkeypatch.setattr(quality_subject, "available_memory", lambda: 3 << 30)
    monkeypatch.setattr(quality_subject, "resident", lambda: 1 << 30)
    write_checkpoint(tmp_path / "weights" / "opt-1.3b", "opt", group_size=None)
    calibration = small(tmp_path)[:2]
    run("--table", "--weights", str(tmp_path / "weights"), *calibration, "--windows", "1")
    run("--table", "--weights", str(tmp_path / "weights"), *small(tmp_path), "--windows", "1")
    assert [(scheme.samples, scheme.length) for scheme, _, _ in asked] == [(128, 2048)] * 3 + [(1, 16)] * 3
    assert {(text, memory) for _, text, memory in asked} == {(calibration[1], 4 << 30)}


def test_a_row_that_memory_does_not_hold_is_not_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality_subject

    monkeypatch.setattr(quality_subject, "available_memory", lambda: 0)
    monkeypatch.setattr(quality_subject, "resident", lambda: 1 << 20)
    write_checkpoint(tmp_path / "weights" / "opt-1.3b", "opt", group_size=None)
    rows = run("--table", "--weights", str(tmp_path / "weights"), *small(tmp_path), "--windows", "1")
    assert [row["method"] for row in rows] == ["none"]
    line = capsys.readouterr().out.splitlines()[4]
    assert line.split()[1:5] == ["smoothquant", "14.820", "not", "run:"] and "1 MiB may be used" in line


def small(folder: Path) -> tuple[str, ...]:
    """A calibration text of a few words, and as few of them."""
    (folder / "few.txt").write_text("Some text without any relation to the one that judges. " * 40)
    return "--calibration", str(folder / "few.txt"), "--set", "samples=1", "length=16"


def test_a_table_without_weights_runs_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--table", *small(tmp_path)) == []
    assert all("not run: no --weights" in line for line in capsys.readouterr().out.splitlines()[1:])


def test_a_table_needs_a_calibration_text(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^error: --table needs --calibration FILE: [^\n]*$"):
        run("--table", "--weights", str(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given", [True, False], ids=["--text", "WikiText-2"])
def test_a_calibration_text_that_quotes_the_judge_is_refused(
    run: Run, tmp_path: Path, given: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the model is kept, and was judged by another text before."""
    import quality_subject

    monkeypatch.setattr(quality_subject, "fetch_wikitext", lambda cache: tmp_path / "text.txt")
    base = write_checkpoint(tmp_path / "weights" / "opt-1.3b", "opt", group_size=None)
    (tmp_path / "other.txt").write_text("Some text without any relation to the one of before. " * 40)
    (tmp_path / "calib.txt").write_text("Others say other things. " * 90 + TEXT)
    asked = ("--windows", "1", "--method", "awq", "--group-size", "32", "--keep", str(tmp_path / "kept"))
    asked = (*asked, "--set", "samples=1", "length=16", "--calibration", str(tmp_path / "calib.txt"))
    rows = run("--model", str(base), *asked, text="other.txt")
    assert [row["method"] for row in rows] == ["none", "awq"]
    text = "text.txt" if given else None
    with pytest.raises(SystemExit, match=r"calib\.txt and text\.txt share .* runs of ten words"):
        run("--model", str(base), *asked, text=text)
    capsys.readouterr()
    assert run("--table", "--weights", str(tmp_path / "weights"), *asked, text=text) == rows
    lines = capsys.readouterr().out.splitlines()[1:5]
    assert all("not run: calib.txt and text.txt share" in line for line in lines)


def test_a_folder_that_was_calibrated_on_the_judge_is_warned_of(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_checkpoint(tmp_path / "base", group_size=None)
    scheme = Scheme(group_size=32, samples=1, length=64)
    quantize(base, tmp_path / "quoting", scheme, calibration=str(tmp_path / "text.txt"))
    rows = run("--model", str(base), "--windows", "1", "--method", "--folder", str(tmp_path / "quoting"))
    assert "warning: " in capsys.readouterr().err
    assert [row.get("calibration") for row in rows] == [None, "text.txt, 1 x 64"]


def test_a_row_that_cannot_be_run_says_why_and_the_others_follow(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_checkpoint(tmp_path / "base", group_size=None)
    asked = ("--windows", "1", "--method", "gptq", "rtn", "--group-size", "32")
    (tmp_path / "short.txt").write_text("Too short.")
    rows = run("--model", str(base), *asked, "--calibration", str(tmp_path / "short.txt"))
    assert [row["method"] for row in rows] == ["none", "rtn"]
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:4] == ["gptq", "32", "not", "run:"] and "too short" in first
    assert second.startswith("rtn")


def test_a_scheme_has_no_other_settings(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--set", "colour=red")
    assert "a scheme has no colour" in capsys.readouterr().err


def test_what_is_wrong_is_one_line(run: Run, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", group_size=None)
    with pytest.raises(SystemExit, match="error: method 'steam' is unknown"):
        run("--model", str(base), "--windows", "1", "--method", "steam")
