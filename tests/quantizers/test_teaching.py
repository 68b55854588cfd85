"""`Scheme(best=True)`: the finished blocks are tuned together, and what is written is what was tuned."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.errors import ModelError
from nybble_models.loader import Loader
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.report import QuantizeProgress
from nybble_quantizers.scheme import Scheme
from support_checkpoint import write_checkpoint

PLAIN = Scheme(method="gptq", bits=3, group_size=32, samples=4, length=24, format="compressed-tensors")
BEST = replace(PLAIN, best=True, steps=60)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    return write_checkpoint(folder, group_size=None)


def divergence(caplog: pytest.LogCaptureFixture) -> tuple[float, float]:
    """Before and after, as the log says."""
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("tuned:"))
    _, _, before, _, after, *_ = line.split()
    return float(before), float(after)


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_the_model_comes_closer_to_what_it_was(
    tmp_path: Path, source: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nybble.quantize"):
        report = quantize(source, tmp_path / "out", replace(BEST, method=method), command="")
    before, after = divergence(caplog)
    assert after < 0.9 * before
    quantize(source, tmp_path / "fast", replace(PLAIN, method=method), command="")
    made, fast = (
        Loader(Checkpoint(tmp_path / name)).block(1).linears["up"].weight for name in ("out", "fast")
    )
    assert isinstance(made, QuantizedTensor) and isinstance(fast, QuantizedTensor)
    assert (made.bits, made.group_size) == (3, 32)
    assert not torch.equal(made.scales, fast.scales)
    assert report.layers[0].name == "model.layers.0.self_attn.q_proj"
    assert all(0 < row.weight_error < 1 for row in report.layers)
    assert all(row.output_sqnr_db is not None and 5 < row.output_sqnr_db < 60 for row in report.layers)


@pytest.mark.parametrize("stage", ["quantize", "tune"])
def test_a_run_that_was_interrupted_makes_the_same_bytes(tmp_path: Path, source: Path, stage: str) -> None:
    def stop(event: QuantizeProgress) -> None:
        if event.stage == stage and event.done == 2:
            raise KeyboardInterrupt

    quantize(source, tmp_path / "whole", BEST, command="")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", BEST, command="", progress=stop)
    quantize(source, tmp_path / "out", BEST, command="")
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out


def test_a_run_that_ends_after_the_tuning_does_not_tune_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: QuantizeProgress) -> None:
        if event.stage == "write":
            raise KeyboardInterrupt

    quantize(source, tmp_path / "whole", BEST, command="")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", BEST, command="", progress=stop)
    monkeypatch.setattr("nybble_quantizers.teaching.teach", None)
    quantize(source, tmp_path / "out", BEST, command="")
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out


def test_what_is_not_tuned_is_refused() -> None:
    with pytest.raises(ModelError, match="does not tune rtn") as caught:
        replace(BEST, method="rtn")
    assert "awq+gptq" in caught.value.hint
