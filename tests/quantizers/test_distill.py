from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_kernels.quantized import QuantizedTensor
from nybble_models.decoder import Decoder
from nybble_models.formats.form import Form
from nybble_models.weights import Block, Weights
from nybble_models.window import Window
from nybble_quantizers import rtn
from nybble_quantizers.distill import distill
from nybble_quantizers.levels import Levels, Pace, TunedBlock
from nybble_quantizers.slope import Slope, batches, spaced
from nybble_quantizers.workers import Map, in_turn, side_by_side
from support_tiny import CONFIGS, tiny_spec, tiny_weights

FORMS = (Form(2, 32), Form(3, 40, symmetric=True), Form(4, -1), Form(4, 24, symmetric=True), Form(8, 64))
COARSE = Form(3, 32)
SHORT = Pace(steps=12, batch=3)
RECKLESS = Pace(steps=3, batch=2, reach=40.0, scales=2.0, vectors=2.0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rounded(block: Block, form: Form, but: tuple[str, ...] = ()) -> Block:
    linears = dict(block.linears)
    for name, linear in block.linears.items():
        if name not in but and isinstance(linear.weight, Tensor):
            group = form.group(linear.weight.shape[1])
            linears[name] = replace(
                linear, weight=rtn.quantize(linear.weight, form.bits, group, form.symmetric)
            )
    return Block(linears, block.norms)


@dataclass(frozen=True)
class Tuned:
    """A tuned block, and its objective over the target's energy before and after."""

    block: Block
    before: float
    after: float


class Case:
    """A tiny random model, its first block rounded, and text before and after the float block."""

    def __init__(self, family: str = "llama", form: Form = COARSE, but: tuple[str, ...] = ()) -> None:
        self.spec = tiny_spec(family)
        self.weights = tiny_weights(self.spec, group_size=None)
        self.decoder = Decoder(self.spec, self.weights)
        self.whole = self.weights.blocks
        self.rounded = [rounded(block, form, but) for block in self.whole]
        tokens = torch.randint(97, (7, 20), generator=torch.Generator().manual_seed(1))
        self.states = [self.decoder.embed(window) for window in tokens]

    def through(self, blocks: list[Block]) -> list[Tensor]:
        """The states after these blocks, which are the first ones."""
        weights = Weights(self.weights.embed, None, blocks, self.weights.final_norm, None)
        decoder, states = Decoder(self.spec, weights), list(self.states)
        for layer in range(len(blocks)):
            states = [decoder.block(layer, x, Window(self.spec)) for x in states]
        return states

    @torch.inference_mode(False)
    @torch.no_grad()
    def tune(self, pace: Pace = SHORT, seed: int = 0, run: Map = in_turn) -> Tuned:
        """The first block alone, down the squared distance from the float block's outputs."""
        targets = self.through(self.whole[:1])
        slope, tuned = Slope(self.decoder, run), TunedBlock(self.whole[0], self.rounded[0])
        for step, chosen in enumerate(batches(len(targets), pace, seed)):
            values = tuned.values()
            windows = [(self.states[i], targets[i].neg().add) for i in chosen]
            _, gradients = slope.backward(0, tuned.block(values), values, windows)
            tuned.move(gradients, pace, step)
        made = tuned.made()
        return Tuned(made, self.error(self.rounded[0]), self.error(made))

    def error(self, block: Block) -> float:
        pairs = list(zip(self.through([block]), self.through(self.whole[:1]), strict=True))
        return float(sum((y - t).square().sum() for y, t in pairs) / sum(t.square().sum() for _, t in pairs))


def same(a: Block, b: Block) -> bool:
    pairs = [(a.linears[p].weight, b.linears[p].weight) for p in a.linears]
    for one, other in pairs:
        if isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor):
            if not (torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)):
                return False
        elif one is not other:
            return False
    norms = [(a.norms[n], b.norms[n]) for n in a.norms]
    biases = [(a.linears[p].bias, b.linears[p].bias) for p in a.linears] + [
        (x.bias, y.bias) for x, y in norms
    ]
    vectors = biases + [(x.weight, y.weight) for x, y in norms]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in vectors)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.label)
def test_nothing_changes_before_the_first_step(form: Form) -> None:
    case = Case(form=form)
    assert same(TunedBlock(case.whole[0], case.rounded[0]).made(), case.rounded[0])


def test_a_step_by_hand() -> None:
    """Levels 0 to 3 with zero 1 and scale 0.5: 0.2 lies 0.4 above level 1, and half of that is kept."""
    start = QuantizedTensor(
        torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8),
        torch.tensor([[0.5]]),
        2,
        4,
        torch.tensor([[1]], dtype=torch.uint8),
    )
    levels = Levels(torch.tensor([[0.2, 0.5, 9.0, -0.5]]), start)
    assert levels.places.tolist() == [pytest.approx([1.2, 2.0, 3.2495, 0.0])]
    assert levels.value().tolist() == [[0.0, 0.5, 1.0, -0.5]]
    gradient = torch.tensor([[-3.0, 1.0, -1.0, 0.0]])
    levels.move(gradient, Pace(steps=1, batch=1, reach=0.4, scales=0.25), 1.0)
    assert levels.places.tolist() == [pytest.approx([1.6, 1.6, 3.499, 0.0])]
    # of the scale: -3 · 0 + 1 · 1 - 1 · 2 = -1, so it grows by a quarter
    assert levels.tensor().scales.tolist() == [[0.625]]
    assert levels.tensor().codes.tolist() == [[2, 2, 3, 0]]
    assert levels.value().tolist() == levels.tensor().dequantize().tolist()


def test_the_steps_fall_to_zero_and_add_up_to_the_reach() -> None:
    pace = Pace(steps=50, batch=1, reach=0.7)
    steps = [pace.levels * pace.left(step) for step in range(50)]
    assert sum(steps) == pytest.approx(0.7)
    assert steps == sorted(steps, reverse=True)


def test_every_window_comes_before_any_comes_again() -> None:
    chosen = list(batches(7, Pace(steps=7, batch=3), 5))
    assert [len(batch) for batch in chosen] == [3] * 7
    order = [i for batch in chosen for i in batch]
    assert [sorted(order[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert chosen != list(batches(7, Pace(steps=7, batch=3), 6))
    assert [len(batch) for batch in batches(2, Pace(steps=2, batch=8), 0)] == [2, 2]


def test_judges_are_evenly_spaced() -> None:
    assert spaced(3, 8) == [0, 1, 2]
    assert spaced(10, 4) == [0, 2, 5, 7]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.label)
def test_a_tuned_block_is_nearer_to_the_float_block(form: Form) -> None:
    case = Case(form=form)
    tuned = case.tune()
    assert tuned.after < 0.9 * tuned.before
    for name, linear in tuned.block.linears.items():
        start = case.rounded[0].linears[name].weight
        assert isinstance(linear.weight, QuantizedTensor)
        assert isinstance(start, QuantizedTensor)
        assert linear.weight.describe() == start.describe()
        assert linear.weight.symmetric == form.symmetric
        assert torch.equal(linear.weight.scales.half().float(), linear.weight.scales)
        assert int(linear.weight.codes.max()) < 2**form.bits


def test_without_reach_the_levels_stay_and_the_scales_still_help() -> None:
    case = Case()
    tuned = case.tune(replace(SHORT, reach=0.0))
    assert tuned.after < tuned.before
    for name, linear in tuned.block.linears.items():
        start = case.rounded[0].linears[name].weight
        assert isinstance(linear.weight, QuantizedTensor)
        assert isinstance(start, QuantizedTensor)
        assert torch.equal(linear.weight.codes, start.codes)
        assert not torch.equal(linear.weight.scales, start.scales)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(family: str) -> None:
    case = Case(family)
    tuned = case.tune()
    assert tuned.after < 0.9 * tuned.before
    for name, norm in tuned.block.norms.items():
        assert not torch.equal(norm.weight, case.whole[0].norms[name].weight)


def test_what_is_not_quantized_stays() -> None:
    case = Case(but=("o", "gate"))
    activations = Activations("int")
    case.rounded[0].linears["down"] = replace(case.rounded[0].linears["down"], inputs=activations)
    tuned = case.tune().block
    assert tuned.linears["o"].weight is case.whole[0].linears["o"].weight
    assert tuned.linears["gate"].weight is case.whole[0].linears["gate"].weight
    assert tuned.linears["down"].inputs is activations


def test_inputs_are_left_alone() -> None:
    case, untouched = Case("opt"), Case("opt")
    case.tune()
    assert same(case.rounded[0], untouched.rounded[0])
    assert all(map(torch.equal, case.states, untouched.states))


@pytest.mark.usefixtures("threads")
def test_seed_and_threads() -> None:
    """The same seed makes the same bits, whatever the number of threads, in inference mode and out of it."""
    torch.set_num_threads(1)
    case, plain = Case("qwen3"), Case("qwen3").tune()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with torch.inference_mode(), side_by_side() as run:
            made = Case("qwen3").tune(run=run)
        assert same(made.block, plain.block)
        assert (made.before, made.after) == (plain.before, plain.after)
    assert not same(case.tune(seed=1).block, plain.block)


@pytest.mark.parametrize("family", ["mistral", "opt"])
def test_gradients_are_those_of_the_whole(family: str) -> None:
    case = Case(family)
    block = TunedBlock(case.whole[0], case.rounded[0])
    slope, weigh = Slope(case.decoder), [torch.full_like(x, 0.1 * i) for i, x in enumerate(case.states)]
    values = block.values()
    windows = [(x, w.expand_as) for x, w in zip(case.states, weigh, strict=True)]
    of_states, of_values = slope.backward(0, block.block(values), values, windows)

    case.decoder.weights.blocks[0] = block.block(values)
    states = [x.clone().requires_grad_() for x in case.states]
    outputs = [case.decoder.block(0, x, Window(case.spec)) for x in states]
    sum((y * w).sum() for y, w in zip(outputs, weigh, strict=True)).backward()
    for x, gradient in zip(states, of_states, strict=True):
        assert x.grad is not None
        assert torch.allclose(x.grad, gradient, rtol=1e-3, atol=1e-5)
    for name, value in values.items():
        assert value.grad is not None
        assert torch.allclose(value.grad, of_values[name], rtol=1e-3, atol=1e-3)


def divergence(case: Case, blocks: list[Block]) -> float:
    """Over the windows, by the decoder itself."""
    total = 0.0
    for made, wanted in zip(case.through(blocks), case.through(case.whole), strict=True):
        p, q = (case.decoder.logits(x).double().log_softmax(-1) for x in (wanted, made))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(case.states)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_distilled_model_predicts_more_like_the_float_model(family: str) -> None:
    case, heard = Case(family, Form(4, 32)), list[tuple[int, float]]()
    tuned = [TunedBlock(w, r) for w, r in zip(case.whole, case.rounded, strict=True)]
    found = distill(
        case.decoder,
        tuned,
        case.states,
        case.through(case.whole),
        SHORT,
        heard=lambda step, loss: heard.append((step, loss)),
    )
    assert found.before == pytest.approx(divergence(case, case.rounded), rel=1e-3)
    assert found.after == pytest.approx(divergence(case, found.blocks), rel=1e-3)
    assert found.after < 0.9 * found.before
    assert [step for step, _ in heard] == list(range(1, SHORT.steps + 1))
    assert all(loss > 0 for _, loss in heard)


def test_distilling_returns_the_start_where_it_does_harm() -> None:
    case = Case()
    tuned = [TunedBlock(w, r) for w, r in zip(case.whole, case.rounded, strict=True)]
    found = distill(case.decoder, tuned, case.states, case.through(case.whole), RECKLESS)
    assert found.before == found.after
    assert all(map(same, found.blocks, case.rounded))


@pytest.mark.usefixtures("threads")
def test_distilling_makes_the_same_bits_on_any_number_of_threads() -> None:
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with torch.inference_mode(), side_by_side() as run:
            case = Case("opt", Form(4, 32))
            tuned = [TunedBlock(w, r) for w, r in zip(case.whole, case.rounded, strict=True)]
            made.append(distill(case.decoder, tuned, case.states, case.through(case.whole), SHORT, run=run))
    one, three = made
    assert all(map(same, one.blocks, three.blocks))
    assert (one.before, one.after) == (three.before, three.after)
    assert one.after < one.before
