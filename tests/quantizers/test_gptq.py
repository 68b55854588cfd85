from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from nybble.cli import main
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.formats.form import Form
from nybble_models.formats.gptq import GptqCodec
from nybble_models.loader import Loader
from nybble_models.window import Window
from nybble_quantizers import awq, clipping, gptq, rtn
from nybble_quantizers.gptq import DAMP, Order
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.sequential import Passage
from nybble_quantizers.windows import Windows
from support_checkpoint import write_checkpoint
from support_tiny import tiny_spec, tiny_weights

ORDERS: tuple[Order, ...] = get_args(Order)
SIZES = (16, 24, 96, 200)  # short last group of 40, whole groups, one group a row, larger than a block


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(channels: int, tokens: int = 512) -> Tensor:
    """XᵀX of inputs that share a few directions, some much louder than others."""
    x = random(tokens, channels // 4, seed=1) @ random(channels // 4, channels, seed=2)
    x = (x + random(tokens, channels, seed=3)) * (
        0.2 + 2 * torch.rand(channels, generator=torch.manual_seed(4))
    )
    return x.T @ x


def cost(made: QuantizedTensor, weight: Tensor, gram: Tensor) -> float:
    return awq.energy(made.dequantize() - weight, gram)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_is_nearer_than_rounding_to_nearest(
    bits: int, size: int, symmetric: bool, order: Order
) -> None:
    columns = 200 if size == 200 else 96
    weight, gram = random(20, columns), correlated(columns)
    plain = cost(rtn.quantize(weight, bits, size, symmetric), weight, gram)
    for clip, margin in ((False, 0.75), (True, 0.6)):
        found = gptq.gptq(weight, gram, bits, size, symmetric, clip=clip, order=order).weight
        assert cost(found, weight, gram) < margin * plain
        assert (found.symmetric, found.group_size, found.bits) == (symmetric, size, bits)
        assert (found.permutation is not None) == (order == "desc_act")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("size", SIZES)
def test_inputs_that_share_nothing_are_rounded_to_nearest(size: int, symmetric: bool, order: Order) -> None:
    weight = random(8, 200)
    found = gptq.gptq(weight, 3 * torch.eye(200), 4, size, symmetric, clip=False, order=order).weight
    nearest = rtn.quantize(weight, 4, size, symmetric)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scales, nearest.scales)
    assert torch.equal(found.dequantize(), nearest.dequantize())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("clip", [False, True], ids=["full range", "searched range"])
def test_weights_on_the_grid_stay_there(clip: bool, order: Order) -> None:
    levels = torch.arange(16.0).repeat(6, 6)[:, torch.randperm(96, generator=torch.manual_seed(0))]
    weight = rtn.quantize(levels * 0.25 - 1.5, 4, 32).dequantize()
    found = gptq.gptq(weight, correlated(96), 4, 32, clip=clip, order=order)
    assert torch.equal(found.weight.dequantize(), weight)
    assert (found.loss, found.share) == (0, 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_the_errors_it_adds_up_are_the_objective(size: int, order: Order) -> None:
    """Also proves the factor: any other U would spread the errors so that the two sums differ."""
    weight, gram = random(20, 200), correlated(200)
    found = gptq.gptq(weight, gram, 4, size, order=order)
    gram.diagonal().add_(found.damp * gram.diagonal().mean())
    assert found.loss == pytest.approx(cost(found.weight, weight, gram), rel=1e-3)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [2, 4])
def test_no_sweep_raises_the_objective(bits: int, size: int, symmetric: bool) -> None:
    weight, gram = random(20, 200), correlated(200)
    factor = gptq.factorise(gram, size)
    losses = [gptq.round_to(weight, factor, bits, symmetric, True, sweeps=n).loss for n in (0, 1, 2, 8)]
    assert all(later <= earlier * 1.001 for earlier, later in pairwise(losses))
    assert losses[2] < 0.99 * losses[0]


def test_partners_rounded_together_are_what_they_are_alone() -> None:
    gram, weights = correlated(96), [random(rows, 96, seed=rows) for rows in (16, 8, 24)]
    factor = gptq.factorise(gram, 32)
    together = gptq.round_all(weights, factor, 4, False, True)
    for weight, found in zip(weights, together, strict=True):
        alone = gptq.round_to(weight, factor, 4, False, True)
        assert found.weight.shape == weight.shape
        assert found.loss == pytest.approx(alone.loss, rel=0.02)  # sums may differ in the last bit
        assert found.share == pytest.approx(alone.share, abs=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_in_the_order_of_loudness_survive_the_file(bits: int) -> None:
    weight, gram = random(32, 96), correlated(96)
    found = gptq.gptq(weight, gram, bits, 32, True, order="desc_act").weight
    loudest = torch.argsort(gram.diagonal(), descending=True, stable=True)
    assert found.permutation is not None
    assert torch.equal(found.permutation, loudest)
    codec = GptqCodec(act_order=True)
    stored = codec.encode(found)
    assert stored["g_idx"][loudest].tolist() == [i // 32 for i in range(96)]
    again = codec.decode(stored, {"bits": bits, "group_size": 32, "sym": True, "desc_act": True})
    assert torch.equal(again.dequantize(), found.dequantize())


def test_two_inputs_by_hand() -> None:
    """H = [[2, 1], [1, 1]]: an error e in the first weight is made up for by e · H12 / H22 in the second."""
    weight, gram = torch.tensor([[0.4, 1.0, -1.0, 2.0]]), torch.eye(4)
    gram[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    found = gptq.gptq(weight, gram, 2, 4, clip=False, order="none", damp=1e-9).weight
    # levels -1, 0, 1, 2: 0.4 becomes 0, and 1.0 becomes 1.4, which is rounded to 1
    assert found.dequantize().tolist() == [[0, 1, -1, 2]]
    weight[0, 1] = 1.2  # becomes 1.6
    found = gptq.gptq(weight, gram, 2, 4, clip=False, order="none", damp=1e-9).weight
    assert found.dequantize().tolist() == [[0, 2, -1, 2]]


@pytest.mark.parametrize("order", ["groups", "columns"])
def test_rounding_the_dominant_input_first_helps(order: Order) -> None:
    weight, gram = random(32, 128), correlated(128)
    gain = torch.ones(128)
    gain[100] = 40
    gram = gram * gain * gain[:, None]
    made = {
        o: cost(gptq.gptq(weight, gram, 3, 32, order=o, sweeps=0).weight, weight, gram)
        for o in ("none", order)
    }
    assert made[order] < 0.8 * made["none"]


@pytest.mark.parametrize("order", ["groups", "columns"])
def test_the_order_is_by_loudness(order: Order) -> None:
    gram = torch.diag(torch.tensor([1.0, 4.0, 2.0, 9.0, 3.0, 5.0]))
    expected = {"groups": [3, 2, 5, 4, 1, 0], "columns": [3, 5, 1, 4, 2, 0]}
    assert gptq.factorise(gram, 2, order).order.tolist() == expected[order]


def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody() -> None:
    weight, gram = random(12, 64), correlated(64)
    alive = torch.ones(64, dtype=torch.bool)
    alive[5::9] = False
    gram *= alive * alive[:, None]
    found = gptq.gptq(weight, gram, 4, 64, clip=False, order="columns").weight
    nearest = rtn.quantize(weight, 4, 64)
    assert torch.equal(found.codes[:, ~alive], nearest.codes[:, ~alive])
    assert not torch.equal(found.codes[:, alive], nearest.codes[:, alive])
    assert cost(found, weight, gram) < 0.75 * cost(nearest, weight, gram)


def test_no_calibration_signal_at_all_is_rounding_to_nearest() -> None:
    weight = random(4, 32)
    found = gptq.gptq(weight, torch.zeros(32, 32), 4, 16, clip=False)
    assert torch.equal(found.weight.codes, rtn.quantize(weight, 4, 16).codes)


def test_damping_rises_until_the_factor_exists() -> None:
    flat = random(64, 3, seed=1)
    singular = flat @ flat.T
    assert gptq.factorise(singular, 16, damp=0).damp == DAMP
    assert gptq.factorise(singular, 16).damp == DAMP
    indefinite = singular - 0.05 * singular.diagonal().mean() * torch.eye(64)
    raised = gptq.factorise(indefinite, 16)
    assert raised.damp == pytest.approx(10 * DAMP)
    assert bool(raised.upper.isfinite().all())
    assert gptq.gptq(random(4, 64), indefinite, 4, 16).damp == raised.damp


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_hessian_that_is_no_number_is_refused(value: float) -> None:
    gram = correlated(32)
    gram[3, 4] = value
    with pytest.raises(ValueError, match="Hessian"):
        gptq.factorise(gram, 16)


def test_the_searched_range_pays_where_one_weight_stands_out() -> None:
    weight, gram = random(16, 64), correlated(64)
    weight[:, 1] *= 8
    gram[1] /= 100
    gram[:, 1] /= 100
    plain, searched = (gptq.gptq(weight, gram, 3, 64, clip=clip) for clip in (False, True))
    assert cost(searched.weight, weight, gram) < 0.5 * cost(plain.weight, weight, gram)
    assert plain.share == 0 < searched.share <= 1


def test_rows_do_not_depend_on_each_other_and_inputs_are_left_alone() -> None:
    weight, gram = random(24, 96), correlated(96)
    before = weight.clone(), gram.clone()
    whole = gptq.gptq(weight, gram, 4, 32).weight
    part = gptq.gptq(weight[8:16], gram, 4, 32).weight
    assert (
        float((whole.rows(8, 16).codes != part.codes).float().mean()) < 0.02
    )  # sums may differ in the last bit
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_what_no_scale_can_hold_is_refused() -> None:
    weight = random(4, 32)
    weight[0, 0] = 1e9
    with pytest.raises(ValueError, match="too large"):
        gptq.gptq(weight, correlated(32), 4, 16)


def test_it_beats_awqs_rounding_on_the_same_hessian() -> None:
    weight, gram = random(32, 96), correlated(96)
    narrowed = clipping.search(weight, gram, 4, 32, False, clip=True)
    rounded = rtn.on_grid(weight, narrowed.levels, 32, False)
    assert cost(gptq.gptq(weight, gram, 4, 32).weight, weight, gram) < 0.8 * cost(rounded, weight, gram)


SCHEME = Scheme(method="gptq", group_size=32, samples=4, length=24, grid=8)
METHODS = ("gptq", "awq+gptq")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return plain(tmp_path / "plain")


def plain(folder: Path, family: str = "llama") -> Path:
    folder.mkdir()
    return write_checkpoint(folder, family, group_size=None)


def logits(folder: Path) -> Tensor:
    loader = Loader(Checkpoint(folder))
    tokens = torch.randint(200, (30,), generator=torch.Generator().manual_seed(1))
    return Decoder(loader.spec, loader.load()).forward(tokens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_a_model_of_every_family(tmp_path: Path, family: str, method: Literal["gptq", "awq+gptq"]) -> None:
    source = plain(tmp_path / "plain", family)
    report = quantize(source, tmp_path / "out", replace(SCHEME, method=method))
    expected = logits(source)
    assert float((logits(tmp_path / "out") - expected).square().mean() / expected.square().mean()) < 0.4
    assert report.skipped == ()


@pytest.mark.parametrize("method", METHODS)
def test_the_command(tmp_path: Path, source: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--method", method, "--group-size", "32", "--samples", "4", "--length", "24"]
    assert main(["quantize", str(source), "-o", str(out), *options]) == 0
    assert "21 linears" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["desc_act"]) == ("awq", False)
    for linear in Loader(Checkpoint(out)).block(1).linears.values():
        assert isinstance(linear.weight, QuantizedTensor)
        assert linear.weight.permutation is None
    report = json.loads((out / "quant_report.json").read_text())
    assert report["scheme"]["method"] == method
    assert {row["damp"] for row in report["layers"]} == {DAMP}
    assert any(row["ratio"] is not None for row in report["layers"]) == (method == "awq+gptq")
    assert all(row["output_sqnr_db"] > 10 for row in report["layers"])


def test_damping_that_has_to_rise_is_told(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two windows of 24 tokens are too few for 64 inputs."""
    report = quantize(source, tmp_path / "out", replace(SCHEME, samples=2, damp=0.0))
    raised = [row for row in report.layers if row.damp]
    assert raised and {row.damp for row in raised} >= {0.01}
    assert any("layer 0, input of q: damping raised to 0.01" in message for message in caplog.messages)


@pytest.mark.parametrize("method", METHODS)
def test_seed_and_threads(tmp_path: Path, source: Path, method: Literal["gptq", "awq+gptq"]) -> None:
    """The same seed makes the same bytes, whatever the number of threads."""
    before = torch.get_num_threads()
    runs = {"one": (1, 0), "three": (3, 0), "other": (1, 7)}
    try:
        for name, (threads, seed) in runs.items():
            torch.set_num_threads(threads)
            quantize(source, tmp_path / name, replace(SCHEME, method=method), seed=seed, command="")
    finally:
        torch.set_num_threads(before)
    one, three, other = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in runs)
    assert one == three
    assert one["model.safetensors"] != other["model.safetensors"]


def test_what_stays_float_passes_the_text_on(tmp_path: Path, source: Path) -> None:
    scheme = replace(SCHEME, skip=("*.1.self_attn.*", "*.down_proj"))
    report = quantize(source, tmp_path / "out", scheme)
    assert len(report.layers) == 3 * 7 - 4 - 3
    block = Loader(Checkpoint(tmp_path / "out")).block(1)
    assert {p for p, x in block.linears.items() if isinstance(x.weight, QuantizedTensor)} == {"gate", "up"}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_text_goes_on_through_both_blocks(family: str) -> None:
    spec = tiny_spec(family)
    weights = tiny_weights(spec, group_size=None)
    decoder = Decoder(spec, weights)
    block = weights.blocks[0]
    states = [decoder.embed(torch.arange(start, start + 20)) for start in (0, 50)]
    plain = [state + 0.1 * random(*state.shape) for state in states]
    after, told = Windows(torch.stack(states)), Windows(torch.stack(plain))
    passage = Passage(decoder, 0, block, SCHEME, dict.fromkeys(spec.projections, Form(4, 32)))
    passage.through(after, told)
    for made, starts, ends in ((passage.made, states, after), (block, plain, told)):
        weights.blocks[0] = made
        for start, end in zip(starts, ends, strict=True):
            assert torch.allclose(decoder.block(0, start, Window(spec)), end, rtol=1e-4, atol=1e-4)


def test_what_the_stream_lacks_is_made_up_for() -> None:
    """The states after the block are nearer to the float model's than when every linear aims at itself."""
    spec = tiny_spec("llama")
    weights = tiny_weights(spec, group_size=None)
    decoder = Decoder(spec, weights)
    states = [decoder.embed(torch.randint(90, (64,), generator=torch.manual_seed(i))) for i in range(32)]
    shift = 0.3 * random(states[0].shape[1], states[0].shape[1]) / states[0].shape[1] ** 0.5
    plain = [state + state @ shift for state in states]
    missed = []
    for aim in (plain, states):
        passage = Passage(decoder, 0, weights.blocks[0], SCHEME, dict.fromkeys(spec.projections, Form(4, 32)))
        after, told = Windows(torch.stack(states)), Windows(torch.stack(aim))
        passage.through(after, told)
        if aim is plain:
            wanted = told
        missed.append(sum(float((a - b).square().sum()) for a, b in zip(after, wanted, strict=True)))
    assert missed[0] < 0.8 * missed[1]


def test_too_few_tokens_tell_nothing() -> None:
    """Fewer than sixteen for an input: the linears aim at themselves, as if no float state was known."""
    spec = tiny_spec("llama")
    weights = tiny_weights(spec, group_size=None)
    decoder = Decoder(spec, weights)
    states = [decoder.embed(torch.randint(90, (64,), generator=torch.manual_seed(i))) for i in range(8)]
    made = []
    for plain in ([state * 1.5 for state in states], []):
        passage = Passage(decoder, 0, weights.blocks[0], SCHEME, dict.fromkeys(spec.projections, Form(4, 32)))
        told = torch.stack(plain) if plain else torch.empty(0, 64, spec.hidden_size)
        passage.through(Windows(torch.stack(states)), Windows(told))
        made.append(passage.made.linears["down"].weight)
    assert isinstance(made[0], QuantizedTensor) and isinstance(made[1], QuantizedTensor)
    assert torch.equal(made[0].codes, made[1].codes)


def test_solving_undoes_the_damped_hessian() -> None:
    gram, change = correlated(48), random(5, 48)
    for order in ORDERS:
        factor = gptq.factorise(gram, 16, order)
        damped = gram + factor.damp * gram.diagonal().mean() * torch.eye(48)
        assert torch.allclose(factor.solve(change @ damped), change, atol=1e-3)
