"""`nybble tune` where there is nothing to tune, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nybble import cli
from nybble_kernels.triton.tiles import Cut, Tuning


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: tune: PyTorch finds no GPU"


def test_table_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Tuning("some gpu", 7, {"w4a16 64x64 decode": Cut(split=2)})
    monkeypatch.setattr("nybble.tuning.tune_model", lambda config, rounds, say, save: save(table))
    path = tmp_path / "made" / "gpu.json"
    assert cli.main(["tune", "some/model", "-o", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert Tuning.from_json(json.loads(path.read_text())) == table
    assert [each.name for each in path.parent.iterdir()] == ["gpu.json"]
