"""Runs that end too early: what they leave is found, and the bytes are those of a run that did not."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nybble_models.errors import ModelError
from nybble_quantizers import output
from nybble_quantizers.estimate import Estimate
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.report import QuantizeProgress
from nybble_quantizers.scheme import Scheme
from support_checkpoint import write_checkpoint

AWQ = Scheme(group_size=32, samples=4, length=24, grid=8)
RTN, GPTQ = replace(AWQ, method="rtn"), replace(AWQ, method="gptq")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    return write_checkpoint(folder, group_size=None)


def stop_after(blocks: int) -> Callable[[QuantizeProgress], None]:
    def stop(event: QuantizeProgress) -> None:
        if event.stage == "quantize" and event.done == blocks:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "awq+gptq"])
def test_an_interrupted_run_goes_on_and_makes_the_same_bytes(
    tmp_path: Path, source: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheme = replace(AWQ, method=method)
    quantize(source, tmp_path / "whole", scheme, command="")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", scheme, command="", progress=stop_after(2))
    assert not (tmp_path / "out").exists()
    events: list[QuantizeProgress] = []
    with caplog.at_level(logging.WARNING, "nybble.quantize"):
        quantize(source, tmp_path / "out", scheme, command="", progress=events.append)
    assert "after block 1 of 3" in caplog.text or "after block 2 of 3" in caplog.text
    assert "calibrate" not in {event.stage for event in events}
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out
    assert {f.name for f in tmp_path.iterdir()} == {"plain", "whole", "out"}


@pytest.mark.parametrize("budgets", [(1, None), (None, 1)], ids=["from files", "to files"])
def test_states_go_on_wherever_they_were_held(
    tmp_path: Path, source: Path, budgets: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estimate, "check", lambda said, budget: None)
    quantize(source, tmp_path / "whole", GPTQ, command="")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", GPTQ, command="", memory=budgets[0], progress=stop_after(2))
    (folder,) = tmp_path.glob(".out.partial-*/.journal")
    kept = {f.name for f in folder.iterdir()} - {"calibration.safetensors"}
    assert kept == {"block-00000.safetensors", "block-00001.safetensors", "states-00001.safetensors"}
    quantize(source, tmp_path / "out", GPTQ, command="", memory=budgets[1])
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out


@pytest.mark.parametrize("kill_at", ["states-00001", "block-00001", "shard-0", "rename"])
def test_a_killed_run_goes_on_and_makes_the_same_bytes(tmp_path: Path, source: Path, kill_at: str) -> None:
    """SIGKILL in the middle of any write: a process that cannot clean up."""
    quantize(source, tmp_path / "whole", GPTQ, command="")
    script = f"""
import os, signal, sys
from pathlib import Path
import nybble_quantizers.journal as journal, nybble_quantizers.output as output
import nybble_quantizers.windows as windows
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme
real = journal.save_file
def save(tensors, path, metadata=None):
    if {kill_at!r} in str(path):
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, path, metadata=metadata)
journal.save_file = output.save_file = save
replace = os.replace
def appear(unfinished, path):
    if {kill_at!r} in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(unfinished, path)
windows.os.replace = appear
if {kill_at!r} == "rename":
    output._flush = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
quantize(Path(sys.argv[1]), Path(sys.argv[2]), Scheme(**{asdict(GPTQ)!r}), command="")
"""
    arguments = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    killed = subprocess.run(
        arguments, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", GPTQ, command="")
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out
    assert {f.name for f in tmp_path.iterdir()} == {"plain", "whole", "out"}


def test_what_another_command_left_is_swept(tmp_path: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", RTN, progress=stop_after(1))
    assert list(tmp_path.glob(".out.partial-*"))
    with output.appearing(tmp_path / "other", 0, "key"):
        quantize(source, tmp_path / "out", replace(RTN, symmetric=True))
        assert list(tmp_path.glob(".other.partial-*"))  # a live run's is left alone
    assert not list(tmp_path.glob(".out.partial-*"))


def test_two_runs_do_not_write_the_same(tmp_path: Path) -> None:
    with (
        output.appearing(tmp_path / "out", 0, "key"),
        pytest.raises(ModelError, match="another process"),
        output.appearing(tmp_path / "out", 0, "key"),
    ):
        pass
    assert (tmp_path / "out").is_dir()


def test_a_journal_that_is_damaged_counts_as_not_written(tmp_path: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", AWQ, command="", progress=stop_after(2))
    (block,) = tmp_path.glob(".out.partial-*/.journal/block-00001.safetensors")
    block.write_bytes(block.read_bytes()[:-100])
    quantize(source, tmp_path / "out", AWQ, command="")
    quantize(source, tmp_path / "whole", AWQ, command="")
    whole, out = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert whole == out
