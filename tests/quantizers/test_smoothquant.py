"""SmoothQuant: the scale, the search, a whole block of every family, and checkpoints that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels.activations import Activations
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.families import FAMILIES
from nybble_models.formats.form import CHANNEL, Form, Inputs, Kind
from nybble_models.loader import Loader
from nybble_models.weights import Block, Weights
from nybble_models.window import Window
from nybble_quantizers import smoothquant
from nybble_quantizers.block import Finding, Scene, round_block
from nybble_quantizers.calibrate import Inputs as Seen
from nybble_quantizers.calibrate import Observation
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.rounding import fake
from nybble_quantizers.scheme import PRESETS, preset
from support_checkpoint import write_checkpoint
from support_tiny import CONFIGS, tiny_spec, tiny_weights

W8A8 = Form(8, CHANNEL, True, inputs="token")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlying(tokens: int, channels: int) -> Tensor:
    """Inputs in which a few channels are a hundred times the rest: what SmoothQuant is for."""
    x = random(tokens, channels, seed=1)
    x[:, ::13] *= 100
    return x


def test_the_scale_is_that_of_the_paper_but_for_its_middle() -> None:
    peak, weight = random(32).abs() + 0.1, random(32, seed=1).abs() + 0.1
    scale = smoothquant.scale_of(peak, weight, 0.75)
    paper = peak**0.75 / weight**0.25
    assert torch.allclose(scale / scale[0], paper / paper[0], rtol=1e-5)
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)


def test_channels_that_are_silent_or_unread_are_left_alone() -> None:
    peak, weight = torch.tensor([0.0, 1.0, 100.0]), torch.tensor([1.0, 0.0, 2.0])
    scale = smoothquant.scale_of(peak, weight, 0.5)
    assert scale[:2].tolist() == [1, 1]
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())


def test_smooth_inputs_round_better() -> None:
    """One linear: the error falls to less than a third, and no candidate of the grid would be better."""
    weight, x = random(48, 64) / 8, outlying(256, 64)
    target = F.linear(x, weight)

    def loss(scale: Tensor) -> float:
        made = F.linear(Activations("int").round(x / scale), fake(weight * scale, W8A8))
        return float((made - target).square().sum())

    choice = smoothquant.search(loss, x.abs().amax(0), weight.abs().amax(0))
    assert choice.error < 0.3 * choice.plain_error
    assert choice.error == min(
        loss(smoothquant.scale_of(x.abs().amax(0), weight.abs().amax(0), step / 20)) for step in range(21)
    )


def test_no_scale_is_chosen_where_none_helps() -> None:
    choice = smoothquant.search(
        lambda scale: float((scale - 1).abs().sum()), outlying(64, 32).abs()[0], random(32).abs()
    )
    assert choice.ratio is None
    assert torch.equal(choice.scale, torch.ones(32))


class Model:
    """One tiny model with loud channels, and what its first block reads."""

    def __init__(self, name: str) -> None:
        self.spec = tiny_spec(name)
        self.weights: Weights = tiny_weights(self.spec, group_size=None)
        for block in self.weights.blocks:
            for role in ("attention_norm", "mlp_norm"):
                block.norms[role].weight[::16] *= 10
        self.decoder = Decoder(self.spec, self.weights)
        windows = torch.randint(self.spec.vocab_size, (4, 40), generator=torch.Generator().manual_seed(1))
        self.states = [self.decoder.embed(window) for window in windows]
        self.block = self.weights.blocks[0]
        self.expected = self.run(self.block)

    def scene(self) -> Scene:
        seen = Seen(kept=4)
        for state in self.states:
            window = Observation()
            self.decoder.block(0, state, Window(self.spec), window.observe)
            seen.add(window)
        return Scene(self.decoder, next(f for f in FAMILIES if f.name == self.spec.family), 0, seen)

    def run(self, block: Block) -> Tensor:
        before, self.weights.blocks[0] = self.weights.blocks[0], block
        made = torch.stack([self.decoder.block(0, x, Window(self.spec)) for x in self.states])
        self.weights.blocks[0] = before
        return made

    def error(self, block: Block) -> float:
        return float((self.run(block) - self.expected).square().mean())

    def made(self, form: Form, alpha: float | None, smooth: bool) -> tuple[Block, dict[str, Finding]]:
        scene, forms = self.scene(), dict.fromkeys(self.spec.projections, form)
        block, findings = self.block, dict[str, Finding]()
        if smooth:
            block, findings = smoothquant.smooth_block(block, scene, forms, alpha)
            assert self.error(block) < 1e-8 * float(self.expected.square().mean()), "the same function"
        return round_block(block, scene, forms, clip=False)[0], findings


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_smooth_block_rounds_better(name: str) -> None:
    model = Model(name)
    plain = model.error(model.made(W8A8, None, smooth=False)[0])
    searched, findings = model.made(W8A8, None, smooth=True)
    assert model.error(searched) < 0.5 * plain
    assert findings.keys() >= {"q", "k", "v", "o", "up", "down"}
    assert all(f.ratio is None or 0 <= f.ratio <= 1 for f in findings.values())
    assert all(linear.inputs == Activations("int") for linear in searched.linears.values())


@torch.inference_mode()
def test_an_alpha_that_is_given_is_taken() -> None:
    model = Model("llama")
    made, findings = model.made(W8A8, 0.5, smooth=True)
    assert {f.ratio for f in findings.values()} == {0.5}
    assert model.error(made) < 0.5 * model.error(model.made(W8A8, None, smooth=False)[0])


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int", "float"])
def test_static_scales_are_those_of_the_smooth_inputs(kind: Kind) -> None:
    """The largest magnitude that calibration showed is the largest code; partners share it."""
    model = Model("llama")
    scene, forms = (
        model.scene(),
        dict.fromkeys(model.spec.projections, Form(8, CHANNEL, True, kind, "tensor")),
    )
    before = {name: peak.max() for name, peak in scene.inputs.peak.items()}
    block, _ = smoothquant.smooth_block(model.block, scene, forms, 0.5)
    made, _ = round_block(block, scene, forms, clip=False)
    found = {name: linear.inputs for name, linear in made.linears.items()}
    top = 127 if kind == "int" else 448
    for name, read in {
        "q": "q",
        "k": "q",
        "v": "q",
        "o": "o",
        "gate": "gate",
        "up": "gate",
        "down": "down",
    }.items():
        largest = float(scene.inputs.peak[read].max())
        assert found[name] == Activations(kind, largest / top)
    assert scene.inputs.peak["q"].max() < before["q"]


@torch.inference_mode()
def test_linears_with_float_inputs_are_left_alone() -> None:
    model = Model("llama")
    scene, forms = model.scene(), dict.fromkeys(model.spec.projections, Form(8, CHANNEL, True))
    block, findings = smoothquant.smooth_block(model.block, scene, forms)
    assert not findings
    assert block is model.block


@pytest.mark.parametrize("method", ["smoothquant", "smoothquant+gptq", "gptq", "rtn"])
@pytest.mark.parametrize("inputs", ["token", "tensor"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_what_is_written_is_read_with_its_inputs(
    tmp_path: Path, method: str, inputs: Inputs, kind: Kind
) -> None:
    """Through the whole pipeline: the loaded model rounds weights and inputs as asked, and is close.

    Static scales saturate: these tokens are not those that the model wrote for its calibration.
    """
    (tmp_path / "float").mkdir()
    source = write_checkpoint(tmp_path / "float", group_size=None, num_hidden_layers=2)
    scheme = preset("W8A8", method=method, inputs=inputs, kind=kind, samples=4, length=32)
    report = quantize(source, tmp_path / "made", scheme)
    assert {layer.bits for layer in report.layers} == {8}
    original, made = (Loader(Checkpoint(folder)) for folder in (source, tmp_path / "made"))
    weights = made.load()
    found = {linear.inputs for block in weights.blocks for linear in block.linears.values()}
    assert {(each.kind, each.scale is None) for each in found if each} == {(kind, inputs == "token")}
    tokens = torch.arange(40, 72)
    expected = Decoder(original.spec, original.load()).forward(tokens)
    missed = Decoder(made.spec, weights).forward(tokens) - expected
    assert float(missed.norm() / expected.norm()) < (0.6 if inputs == "tensor" else 0.25)


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    source = write_checkpoint(tmp_path / "float", group_size=None, num_hidden_layers=1)
    for name in ("a", "b"):
        quantize(source, tmp_path / name, preset("W8A8-static", samples=4, length=32), command="same")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["W8A8", "W8A8-static", "FP8", "FP8-static"])
def test_presets_say_what_they_are(name: str) -> None:
    scheme = PRESETS[name]
    form = scheme.form
    assert form is not None
    assert (form.bits, form.group_size, form.symmetric) == (8, CHANNEL, True)
    assert form.kind == ("float" if name.startswith("FP8") else "int")
    assert form.inputs == ("tensor" if name.endswith("static") else "token")
    assert scheme.container.name == "compressed-tensors"
