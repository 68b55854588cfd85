"""What is computed lies on the device that was named, and what is read and written on the CPU.

Where there is no second device, two stand in for it: the default device "meta", on which a tensor that
somebody makes without saying where has no numbers; and a pretended GPU (see `support_device`), on which a
whole quantization fails where a tensor was not moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble_kernels.quantized import QuantizedTensor, dense
from nybble_models.checkpoint import Checkpoint
from nybble_models.errors import ModelError
from nybble_models.loader import Loader
from nybble_models.weights import Block
from nybble_quantizers.calibrate import Calibration
from nybble_quantizers.device import device_named
from nybble_quantizers.estimate import WARM, Estimate
from nybble_quantizers.pipeline import foresee, quantize
from nybble_quantizers.report import Listener, QuantizeProgress
from nybble_quantizers.scheme import PRESETS, Scheme, preset
from nybble_quantizers.stream import Stream, read_block
from nybble_quantizers.verify import verify
from nybble_quantizers.workers import in_turn
from support_checkpoint import write_checkpoint
from support_device import Mixed, Pretended

SCHEMES = {
    "awq": Scheme(group_size=32),
    "gptq": Scheme(method="gptq", group_size=32),
    "act-order": Scheme(method="gptq", group_size=32, order="desc_act"),
    "awq+gptq, symmetric": Scheme(method="awq+gptq", group_size=32, symmetric=True),
    "W8A8": PRESETS["W8A8"],
    "W8A8-static": PRESETS["W8A8-static"],
    "FP8-static": PRESETS["FP8-static"],
}


@pytest.mark.parametrize("name", SCHEMES)
def test_nothing_is_made_on_the_default_device(tmp_path: Path, name: str) -> None:
    scheme = SCHEMES[name]
    loader = Loader(Checkpoint(write_checkpoint(tmp_path, group_size=None)), floats=True)
    tokens = torch.randint(200, (4, 24), generator=torch.Generator().manual_seed(1))
    assert scheme.form is not None
    with torch.inference_mode():
        stream, block = Stream(loader, Calibration(tokens, "test"), scheme, in_turn), read_block(loader, 0)
        with torch.device("meta"):
            _, made, findings = stream.advance(0, block, dict.fromkeys(loader.spec.projections, scheme.form))
    assert set(findings) == set(loader.spec.projections)
    for linear in made.linears.values():
        weight = linear.weight
        assert not isinstance(weight, torch.Tensor)
        values = weight.codes if isinstance(weight, QuantizedTensor) else weight.values
        assert values.device.type == weight.scales.device.type == "cpu"


SMALL: dict[str, Any] = {"samples": 2, "length": 16, "grid": 4}

RUNS = {
    "rtn": preset("W4A16-RTN", mse=True, **SMALL),
    "awq": Scheme(group_size=32, **SMALL),
    "gptq": Scheme(method="gptq", group_size=32, **SMALL),
    "awq+gptq": Scheme(method="awq+gptq", group_size=32, order="desc_act", **SMALL),
    "W8A8": preset("W8A8", **SMALL),
    "W8A8-static": preset("W8A8-static", method="smoothquant+gptq", **SMALL),
    "FP8": preset("FP8-static", method="gptq", **SMALL),
    "a target": Scheme(group_size=32, target_bits=6.0, ends=True, format="compressed-tensors", **SMALL),
    "best": Scheme(group_size=32, best=True, steps=2, **SMALL),
}

PRODUCTS = {"linear", "matmul", "__matmul__", "addmm_", "addmv_", "bmm", "einsum", "cholesky_ex"}


def make(folder: Path, layers: int) -> Path:
    (folder / "plain").mkdir()
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    return write_checkpoint(folder / "plain", group_size=None, num_hidden_layers=layers)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path, layers=1)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    with Pretended() as mode:
        yield mode


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_moves_everything(tmp_path: Path, source: Path, pretended: Pretended, name: str) -> None:
    text = str(tmp_path / "text.txt")
    report = quantize(source, tmp_path / "out", RUNS[name], calibration=text, device="cuda")
    assert report.versions["gpu"] == "pretended"
    assert "linear" in pretended.there
    assert not pretended.here & PRODUCTS  # nothing large is left to the CPU


def test_text_is_written_there_and_states_may_lie_in_files(
    tmp_path: Path, source: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estimate, "check", lambda said, budget: None)
    quantize(source, tmp_path / "out", RUNS["gptq"], memory=1, device="cuda")
    assert "linear" in pretended.there and not pretended.here & PRODUCTS
    assert not verify(tmp_path / "out").problems


def test_a_run_that_was_interrupted_goes_on_there(tmp_path: Path, pretended: Pretended) -> None:
    source = make(tmp_path, layers=2)

    def run(name: str, progress: Listener | None = None) -> None:
        text = str(tmp_path / "text.txt")
        quantize(source, tmp_path / name, RUNS["awq"], calibration=text, device="cuda", progress=progress)

    def stop(event: QuantizeProgress) -> None:
        if event.layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("out", stop)
    run("out")
    run("whole")
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out


def test_a_gpu_that_is_too_small_is_one_line_and_keeps_what_is_done(
    tmp_path: Path, source: Path, pretended: Pretended
) -> None:
    def full(event: QuantizeProgress) -> None:
        if event.stage == "quantize":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    with pytest.raises(ModelError, match="pretended has too little memory"):
        quantize(source, tmp_path / "out", RUNS["rtn"], device="cuda", progress=full)
    assert list(tmp_path.glob(".out.partial-*/.journal/block-00000.safetensors"))


def test_the_pretended_gpu_is_strict(pretended: Pretended) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert (there * 2 + there.sum()).to("cpu").device.type == here.device.type == "cpu"
    assert there[torch.tensor([0, 1])].unbind()[0].device.type == "cuda"
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here[there.long()],
        lambda: there.numpy(),
        lambda: torch.multinomial(there, 1, generator=torch.Generator()),
    ):
        with pytest.raises(Mixed):
            mixed()


def test_its_own_memory_is_foreseen_and_no_time(source: Path, pretended: Pretended) -> None:
    """What Python and its libraries take is the machine's."""
    here, there = (foresee(source, RUNS["awq"], calibration="x", device=name) for name in ("cpu", "cuda"))
    assert there.memory["the program"] == WARM < here.memory["the program"]
    assert here.seconds and not there.seconds


def test_a_gpu_that_is_not_there_is_one_line(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto").type == "cpu"
    with pytest.raises(ModelError, match="PyTorch finds no GPU"):
        foresee(source, RUNS["rtn"], device="cuda")


def _dense(folder: Path) -> Block:
    return Loader(Checkpoint(folder), floats=True).block(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", RUNS)
def test_a_gpu_makes_what_the_cpu_makes(tmp_path: Path, source: Path, name: str) -> None:
    """A weight near the middle of two levels may fall either way, and what GPTQ rounds after it follows.

    With noise of 3e-7 on every product, which stood in for a GPU, weights came to differ by up to 6 % of
    their norm, their errors by 1.6 % and their outputs' by 0.16 dB.
    """
    text = str(tmp_path / "text.txt")
    here, there = (
        quantize(source, tmp_path / device, RUNS[name], calibration=text, device=device)
        for device in ("cpu", "cuda")
    )
    assert not verify(tmp_path / "cuda").problems
    for row, other in zip(here.layers, there.layers, strict=True):
        assert (row.name, row.bits) == (other.name, other.bits)
        assert other.weight_error == pytest.approx(row.weight_error, rel=0.05)
        assert other.output_sqnr_db == pytest.approx(row.output_sqnr_db, abs=0.5)
    one, two = _dense(tmp_path / "cpu"), _dense(tmp_path / "cuda")
    for name, linear in one.linears.items():
        weight, other = dense(linear.weight), dense(two.linears[name].weight)
        assert float((weight - other).norm() / weight.norm()) < 0.15, name
