"""What is said of a run before it starts, against what the run then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nybble_models.errors import ModelError
from nybble_models.families import FAMILIES
from nybble_quantizers.estimate import Estimate, estimate
from nybble_quantizers.pipeline import foresee, quantize
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.selection import SPARE, select
from support_checkpoint import write_checkpoint
from support_process import environment
from support_tiny import tiny_spec

MADE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}

RUN = """
import json, re, sys, torch
from pathlib import Path
from nybble_quantizers.estimate import resident
from nybble_quantizers.pipeline import foresee, quantize
from nybble_quantizers.scheme import Scheme

torch.set_num_threads(2)
source, out, text, settings, memory = sys.argv[1:]
scheme, budget = Scheme(**json.loads(settings)), int(memory) or None
before = resident()
said = foresee(source, scheme, calibration=text, memory=budget)
quantize(source, Path(out), scheme, calibration=text, memory=budget, command="")
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"before": before, "said": said.needed, "spilled": said.spilled, "peak": peak}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that what a method holds outweighs what Python does."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "text.txt").write_text("".join(chr(97 + i * i * i % 23) for i in range(40000)))
    return write_checkpoint(folder, group_size=None, **MADE)


def run(source: Path, out: Path, memory: int, **settings: Any) -> dict[str, Any]:
    scheme = {"samples": 16, "length": 512, "grid": 4} | settings
    arguments = [str(source), str(out), str(source / "text.txt"), json.dumps(scheme), str(memory)]
    made = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    found: dict[str, Any] = json.loads(made.stdout)
    return found


def as_said(found: dict[str, Any]) -> bool:
    """Too much by at most 60 %, too little by at most 35."""
    said, grown = found["said"] - found["before"], found["peak"] - found["before"]
    return bool(0.65 * grown < said < 1.6 * grown) and not found["spilled"]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn"},
        {"method": "awq"},
        {"method": "rtn", "target_bits": 5.0},
        {"method": "gptq", "best": True, "steps": 1, "samples": 4},
    ],
    ids=["rtn", "awq", "chosen", "best"],
)
def test_memory_is_what_was_said(tmp_path: Path, source: Path, settings: dict[str, Any]) -> None:
    found = run(source, tmp_path / "out", 0, **settings)
    assert as_said(found), found


def test_a_budget_is_kept_to_and_changes_no_byte(tmp_path: Path, source: Path) -> None:
    """The budget is between what is needed with states in files and with states in memory."""
    free = run(source, tmp_path / "free", 0, method="gptq", samples=12)
    assert as_said(free), free
    budget = free["said"] - (32 << 20)
    tight = run(source, tmp_path / "tight", budget, method="gptq", samples=12)
    assert tight["spilled"] and tight["said"] < budget
    assert tight["peak"] < budget, tight
    for file in (tmp_path / "free").iterdir():
        assert file.read_bytes() == (tmp_path / "tight" / file.name).read_bytes(), file.name


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    return write_checkpoint(folder, group_size=None)


SMALL = Scheme(group_size=32, samples=4, length=24, grid=8)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "awq+gptq"])
def test_any_budget_makes_the_same_bytes(
    tmp_path: Path, small: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = replace(SMALL, method=method)
    quantize(small, tmp_path / "whole", scheme, command="")
    monkeypatch.setattr(Estimate, "check", lambda said, budget: None)
    quantize(small, tmp_path / "out", scheme, command="", memory=1)
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out


def test_too_little_memory_is_one_line_before_anything_is_written(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ModelError, match=r"of memory are needed, .* for the program; 1 MiB may be used"):
        quantize(small, tmp_path / "out", SMALL, memory=1 << 20)
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


def test_a_model_too_large_to_write_its_own_text_is_sent_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble_quantizers.estimate.resident", lambda: 300 << 20)  # not of all these tests
    spec, scheme = tiny_spec("llama", **MADE | {"num_hidden_layers": 40}), Scheme(samples=4, length=128)
    family = next(row for row in FAMILIES if row.name == "llama")
    selection = select(spec, family, scheme, scheme.container)
    itself, given = (estimate(spec, scheme, selection, given=g, budget=None) for g in (False, True))
    assert itself.stage == "calibrate" and itself.needed > 4 * spec.parameters > given.needed
    with pytest.raises(ModelError, match="for the whole model, to write the text") as error:
        itself.check(given.needed)
    assert "--calibration FILE" in str(error.value.hint)
    given.check(given.needed)


def test_more_text_takes_more_memory_disk_and_time(small: Path) -> None:
    few, many = (
        foresee(small, replace(SMALL, method="gptq", samples=samples), calibration="x")
        for samples in (8, 8000)
    )
    assert few.needed <= many.needed and few.journal < many.journal
    assert few.seconds["quantize"] < many.seconds["quantize"]
    assert few.written == many.written and few.linears == 3 * 7


def test_targets_and_tuning_count(small: Path) -> None:
    plain = foresee(small, SMALL, calibration="x")
    mixed = foresee(small, replace(SMALL, target_bits=6.0, format="compressed-tensors"), calibration="x")
    best = foresee(small, replace(SMALL, best=True), calibration="x")
    assert set(mixed.seconds) - set(plain.seconds) == {"choose"}
    assert set(best.seconds) - set(plain.seconds) == {"tune"} and best.journal > plain.journal


def test_a_target_is_what_will_be_written(tmp_path: Path, small: Path) -> None:
    scheme = replace(SMALL, method="rtn", format="compressed-tensors")
    said = {bits: foresee(small, replace(scheme, target_bits=bits), calibration="x") for bits in (5.0, 8.0)}
    assert said[5.0].bits < said[8.0].bits and said[5.0].disk < said[8.0].disk
    for bits, found in said.items():
        report = quantize(small, tmp_path / f"{bits}", replace(scheme, target_bits=bits))
        written = sum(report.bytes.values())
        assert 0.9 * written < found.written - SPARE < 1.1 * written
