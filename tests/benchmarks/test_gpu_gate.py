"""The measuring program for GPUs, on a machine without one: every part runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support_process import ROOT

GPU = ROOT / "benchmarks" / "gpu"
PARTS = ("correctness", "ceilings", "linears", "steps", "over_http")


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """As on a machine where nothing of ours is installed: no source folder on the path."""
    dropped = ("NYBBLE_", "PYTHONPATH", "PYTHONSAFEPATH", "TRITON_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    command = [sys.executable, str(GPU / f"{script}.py"), *flags]
    return subprocess.run(
        command, env=kept | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The output and the rows of one dry run of the whole gate."""
    folder = tmp_path_factory.mktemp("gate")
    result = run("gate", "--dry", "--out", str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    yield result.stdout, [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def test_a_dry_run_does_every_part(dry: tuple[str, list[dict[str, Any]]]) -> None:
    output, rows = dry
    for part in PARTS:
        assert f"{part}: done" in output, output
        assert any(row["part"] == part and "lacks" not in row for row in rows), part


def test_every_row_says_where_it_comes_from(dry: tuple[str, list[dict[str, Any]]]) -> None:
    _, rows = dry
    wanted = {
        "benchmark",
        "part",
        "when",
        "device",
        "sms",
        "driver",
        "torch",
        "triton",
        "commit",
        "run",
        "gate",
    }
    for row in rows:
        assert wanted <= row.keys()
        assert row["dry"] and row["device"] == "cpu"
    assert len({row["run"] for row in rows}) == 1


def test_linears_are_checked_before_they_are_timed(dry: tuple[str, list[dict[str, Any]]]) -> None:
    _, rows = dry
    timed = [row for row in rows if row["part"] == "linears" and "us" in row]
    assert {row["kind"] for row in timed if row["ours"]} == {"W4A16", "W8A8", "16-bit"}
    assert {"cuBLAS bfloat16", "torch _int_mm"} <= {row["subject"] for row in timed}
    for row in timed:
        assert row["error"] <= row["tolerance"]
        assert row["us"]["min"] <= row["us"]["median"] <= row["us"]["max"]
        assert row["bytes"] > 0


def test_an_absent_peer_is_named(dry: tuple[str, list[dict[str, Any]]]) -> None:
    _, rows = dry
    reasons = {row["lacks"]: row["reason"] for row in rows if "lacks" in row}
    assert reasons["torch _weight_int4pack_mm"] == "needs a CUDA device"
    assert "not installed" in reasons["gemlite A16W4"] or "CUDA" in reasons["gemlite A16W4"]


def test_parts_refuse_a_machine_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    import torch
    from part import begin

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        begin("ceilings", argparse.Namespace(out=tmp_path, seconds=60, dry=False))


def test_parts_inherit_the_time_that_others_leave() -> None:
    from gate import GRACE, STEPS, budget

    later = list(STEPS[1:])
    whole = sum(step.seconds + GRACE for step in STEPS)
    assert budget(STEPS[0], later, whole) == STEPS[0].seconds
    assert budget(STEPS[0], later, whole + 100) == STEPS[0].seconds + 100
    assert budget(STEPS[-1], [], 300) == 300 - GRACE


def test_the_gate_fits_into_nine_minutes() -> None:
    from gate import GRACE, MINUTES, STEPS

    assert 60 * MINUTES + GRACE < 540
    assert sum(step.seconds for step in STEPS) <= 60 * MINUTES


def test_what_ends_a_part_is_left_out_of_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    import gate

    tries: list[list[str]] = []

    def start(step: gate.Step, seconds: float, without: list[str], arguments: argparse.Namespace) -> int:
        tries.append(list(without))
        if len(tries) == 1:
            (tmp_path / gate.NOTE).write_text("a peer")
            return -11
        return 0

    monkeypatch.setattr(gate, "start", start)
    step = next(each for each in gate.STEPS if each.name == "linears")
    assert gate.run(step, 100, argparse.Namespace(out=tmp_path, dry=False)) == 0
    assert tries == [[], ["a peer"]]


def test_wheels_are_unpacked_to_import_from(tmp_path: Path) -> None:
    import zipfile

    import carry

    with zipfile.ZipFile(tmp_path / "peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "")
    assert (carry.unpacked(tmp_path, tmp_path / "site") / "peer" / "__init__.py").exists()
    assert carry.unpacked(tmp_path / "site", tmp_path / "other") == tmp_path / "site"


@pytest.mark.parametrize("loose", [True, False])
def test_the_commit_is_found_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loose: bool
) -> None:
    import paths
    import rows

    name = "0123456789abcdef0123456789abcdef01234567"
    refs = tmp_path / ".git" / "refs" / "heads"
    refs.mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    if loose:
        (refs / "main").write_text(f"{name}\n")
    else:
        (tmp_path / ".git" / "packed-refs").write_text(f"# pack-refs\n{name} refs/heads/main\n")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "output", lambda *command: None)
    monkeypatch.delenv("GPU_GATE_COMMIT", raising=False)
    assert rows.commit() == name[:12]
