"""Every way to a model's logits: what is served lies near the reference, and is what the engine reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nybble.config import ServeConfig
from nybble.engine.build import build_engine
from nybble.evaluation import streamed
from nybble.evaluation.model import CHUNK, Model, Tokens
from nybble.evaluation.served import Decoded, Served
from nybble.evaluation.streamed import Streamed
from nybble.evaluation.windows import score
from nybble_kernels.activations import Activations
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.loader import Loader
from nybble_models.weights import Block
from support_checkpoint import write_checkpoint
from support_device import Pretended
from support_runner import Collector, request
from support_tiny import CONFIGS

LENGTH = 45
Make = Callable[[Path], Model]


def quiet(phase: str, fraction: float) -> None:
    pass


def texts(count: int = 3, length: int = LENGTH) -> list[Tokens]:
    generator = torch.Generator().manual_seed(7)
    return [tuple(torch.randint(256, (length,), generator=generator).tolist()) for _ in range(count)]


def config(folder: Path) -> ServeConfig:
    return ServeConfig(model=str(folder), threads=1, head_bits=16, device="cpu")


WAYS: dict[str, tuple[Make, float]] = {  # and the error that its arithmetic may leave, of the logits' spread
    "serve": (lambda folder: Served(config(folder), LENGTH, quiet), 0.1),  # inputs of 8 bits
    "decode": (lambda folder: Decoded(config(folder), LENGTH, quiet), 0.1),
    "reference": (lambda folder: Streamed(folder, quiet, "model"), 1e-5),
}


def exact(folder: Path, tokens: Tokens) -> torch.Tensor:
    loader = Loader(Checkpoint(folder))
    with torch.inference_mode():
        return Decoder(loader.spec, loader.load()).forward(torch.tensor(tokens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_reference_decoder(tmp_path: Path, family: str, way: str) -> None:
    folder = write_checkpoint(tmp_path, family)
    make, slack = WAYS[way]
    asked = texts(2)
    for tokens, rows in zip(asked, make(folder).run(asked), strict=True):
        expected = exact(folder, tokens)
        for first, stop in ((0, LENGTH), (20, 23)):
            found = torch.cat(list(rows(first, stop)))
            missed = (found - expected[first:stop]).square().mean().sqrt()
            assert missed < slack * expected.std()


def test_texts_longer_than_a_chunk_come_in_pieces(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, max_position_embeddings=2 * CHUNK)
    length = CHUNK + 40
    (tokens,) = texts(1, length)
    for model, slack in (
        (Served(config(folder), length, quiet), WAYS["serve"][1]),
        (Streamed(folder, quiet, "model"), WAYS["reference"][1]),
    ):
        (pieces,) = [list(rows(0, length)) for rows in model.run([tokens])]
        assert [len(piece) for piece in pieces] == [CHUNK, 40]
        expected = exact(folder, tokens)
        assert (torch.cat(pieces) - expected).square().mean().sqrt() < slack * expected.std()


def test_what_is_measured_is_what_the_engine_reports(folder: Path) -> None:
    """The loss of a window is the mean of the prompt's own log probabilities."""
    asked = texts()
    scores = list(score(Served(config(folder), LENGTH, quiet), None, asked, quiet))
    engine = build_engine(config(folder), quiet)
    for tokens, each in zip(asked, scores, strict=True):
        sink = Collector()
        engine.submit(request("prompt", tokens, 0, prompt_logprobs=True), sink)
        logprobs = [entry for delta in sink.wait().deltas for entry in delta.prompt_logprobs or ()]
        found = [-entry.logprob for entry in logprobs if entry is not None]
        assert len(found) == LENGTH - 1
        assert each.loss == pytest.approx(sum(found) / len(found), rel=1e-6)
    engine.stop()


def test_states_that_do_not_fit_are_made_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = texts(5)
    whole = [torch.cat(list(rows(0, LENGTH))) for rows in Streamed(folder, quiet, "model").run(asked)]
    monkeypatch.setattr(streamed, "STATES_BYTES", 2 * LENGTH * 4 * 64)
    phases: list[str] = []
    model = Streamed(folder, lambda phase, part: phases.append(phase), "model")
    parts = [torch.cat(list(rows(0, LENGTH))) for rows in model.run(asked)]
    assert list(dict.fromkeys(phases)) == [f"model, part {part} of 3" for part in (1, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_states_are_kept_for_the_next_run_over_the_same_texts(folder: Path) -> None:
    phases: list[str] = []
    model = Streamed(folder, lambda phase, part: phases.append(phase), "model")
    first = [torch.cat(list(rows(3, 9))) for rows in model.run(texts())]
    made = len(phases)
    second = [torch.cat(list(rows(3, 9))) for rows in model.run(texts())]
    assert len(phases) == made
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    list(model.run(texts(2)))
    assert len(phases) > made


def test_inputs_that_a_checkpoint_rounds_are_rounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tokens,) = texts(1)
    plain = exact(folder, tokens)
    read = Loader.block

    def rounding(loader: Loader, layer: int) -> Block:
        block = read(loader, layer)
        for linear in block.linears.values():
            linear.inputs = Activations()
        return block

    monkeypatch.setattr(Loader, "block", rounding)
    expected = exact(folder, tokens)
    (rows,) = Streamed(folder, quiet, "model").run([tokens])
    found = torch.cat(list(rows(0, LENGTH)))
    assert (found - expected).square().mean().sqrt() < 1e-3 * expected.std()
    assert (found - plain).square().mean().sqrt() > 1e-2 * expected.std()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_reference_lies_on_the_device_that_is_named(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path, family)
    with Pretended() as pretended:
        model = Streamed(folder, quiet, "model", torch.device("cuda"))
        found = [torch.cat(list(rows(0, LENGTH))).cpu() for rows in model.run(texts(2))]
    assert "linear" in pretended.there and "linear" not in pretended.here
    for tokens, logits in zip(texts(2), found, strict=True):
        expected = exact(folder, tokens)
        assert (logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_reference_on_a_gpu(folder: Path) -> None:
    model = Streamed(folder, quiet, "model", torch.device("cuda"))
    for tokens, rows in zip(texts(), model.run(texts()), strict=True):
        expected = exact(folder, tokens)
        assert (torch.cat(list(rows(0, LENGTH))).cpu() - expected).abs().max() < 1e-3 * expected.std()
