from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nybble_models.decoder import Decoder
from nybble_models.families import FAMILIES
from nybble_models.formats.form import CHANNEL, Form
from nybble_models.weights import Block, Weights
from nybble_models.window import Window
from nybble_quantizers import awq, clipping, rounding, rtn
from nybble_quantizers.block import Finding, Scene, fold_block, merged, round_block
from nybble_quantizers.calibrate import Inputs, Observation
from nybble_quantizers.grids import Grid
from nybble_quantizers.scheme import Scheme
from support_tiny import CONFIGS, tiny_spec, tiny_weights


def quantize_block(
    block: Block, scene: Scene, forms: dict[str, Form]
) -> tuple[Block, Block, dict[str, Finding]]:
    """(the folded block in float, the same with linears in their forms, what was chosen for each)."""
    folded, scales = fold_block(block, scene, SCHEME, forms)
    made, rounding = round_block(folded, scene, forms, SCHEME.clip)
    return folded, made, merged(scales, rounding)


SCHEME, FORM = Scheme(group_size=32), Form(4, 32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlying(tokens: int, channels: int) -> torch.Tensor:
    """Inputs in which a few channels are thirty times the rest: what AWQ is for."""
    x = random(tokens, channels, seed=1)
    x[:, ::13] *= 30
    return x


def test_a_scale_protects_the_loud_channels() -> None:
    weight, x = random(48, 64), outlying(256, 64)
    gram = x.T @ x

    def loss(scale: torch.Tensor) -> float:
        return awq.energy(awq.scaled_rounding(weight, scale, FORM) - weight, gram)

    choice = awq.search(loss, x.abs().mean(0), awq.magnitude([weight], 32), 20)
    assert choice.ratio is not None
    assert choice.error < 0.5 * choice.plain_error
    assert choice.scale[::13].min() > choice.scale[1:13].max()


@pytest.mark.parametrize(
    "form", [Form(8, CHANNEL, True, "float"), Form(8, CHANNEL, True)], ids=["floats", "integers"]
)
def test_a_scale_is_judged_by_the_rounding_that_follows(form: Form) -> None:
    weight, scale = random(24, 64), random(64, seed=2).exp()
    expected = rounding.nearest(weight * scale, form).dequantize() / scale
    assert torch.allclose(awq.scaled_rounding(weight, scale, form), expected, rtol=1e-5, atol=1e-6)


def test_no_scale_is_chosen_where_none_helps() -> None:
    choice = awq.search(
        lambda scale: float((scale - 1).abs().sum()), outlying(64, 32).abs().mean(0), torch.ones(32), 20
    )
    assert choice.ratio is None
    assert torch.equal(choice.scale, torch.ones(32))


def test_the_coarse_search_finds_the_best_point_of_the_grid() -> None:
    activation, weight = outlying(64, 32).abs().mean(0), random(32).abs() + 0.1
    wanted = awq.scale_of(activation, weight, 0.35, False)
    choice = awq.search(lambda s: float((s - wanted).square().sum()), activation, weight, 20)
    assert (choice.ratio, choice.duo) == (0.35, False)


def test_dead_channels_keep_a_finite_scale() -> None:
    scale = awq.scale_of(torch.tensor([0.0, 1.0, 100.0]), torch.ones(3), 0.5, False)
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())


def test_energy_is_the_squared_norm_of_the_output() -> None:
    weight, x = random(8, 32), random(100, 32, seed=2)
    assert awq.energy(weight, x.T @ x) == pytest.approx(float(F.linear(x, weight).square().sum()), rel=1e-4)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("columns", [64, 80], ids=["whole groups", "short last group"])
def test_clipping_never_loses_and_pays_with_one_outlier(symmetric: bool, columns: int) -> None:
    weight, x = random(16, columns), outlying(256, columns)
    weight[:, 1] *= 6  # one wide weight in a quiet channel stretches every first group
    gram = x.T @ x
    blocks = [gram[i : i + 32, i : i + 32] for i in range(0, columns, 32)]

    def cost(levels: Grid) -> torch.Tensor:
        missed = (rtn.on_grid(weight, levels, 32, symmetric).dequantize() - weight).split(32, dim=1)
        return torch.stack([((m @ h) * m).sum(1) for m, h in zip(missed, blocks, strict=True)], dim=1)

    plain = clipping.search(weight, gram, 4, 32, symmetric, clip=False)
    found = clipping.search(weight, gram, 4, 32, symmetric, clip=True)
    assert plain.share == 0
    assert bool((cost(found.levels) <= cost(plain.levels) * (1 + 1e-4)).all())
    assert cost(found.levels)[:, 0].sum() < 0.8 * cost(plain.levels)[:, 0].sum()
    assert 0 < found.share <= 1


def test_rows_in_pieces_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random(16, 64), outlying(128, 64)
    whole = clipping.search(weight, x.T @ x, 4, 32, False, clip=True)
    monkeypatch.setattr(clipping, "CHUNK", 3 * 64)
    pieces = clipping.search(weight, x.T @ x, 4, 32, False, clip=True)
    assert torch.equal(whole.levels.scales, pieces.levels.scales)
    assert whole.share == pytest.approx(pieces.share)


@pytest.mark.parametrize("window", [None, 5], ids=["causal", "sliding"])
def test_attention_over_a_window_is_the_references(window: int | None) -> None:
    from nybble_models.decoder import ReferenceCache

    spec = tiny_spec("mistral")
    shape = (12, spec.num_heads, spec.head_dim)
    q, k, v = random(*shape), *(random(12, spec.num_kv_heads, spec.head_dim, seed=s) for s in (1, 2))
    expected = ReferenceCache(spec).attend(0, q, k, v, window)
    assert torch.allclose(Window(spec).attend(0, q, k, v, window), expected, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_awq_beats_round_to_nearest_where_channels_stand_out(name: str) -> None:
    spec, family = tiny_spec(name), next(f for f in FAMILIES if f.name == name)
    weights = tiny_weights(spec, group_size=None)
    for block in weights.blocks:
        for role in ("attention_norm", "mlp_norm"):
            block.norms[role].weight[::16] *= 12
    decoder = Decoder(spec, weights)
    windows = torch.randint(spec.vocab_size, (6, 40), generator=torch.Generator().manual_seed(1))
    states = [decoder.embed(w) for w in windows]
    inputs = Inputs(kept=4)
    expected = torch.stack([watched(decoder, x, inputs) for x in states])
    scene = Scene(decoder, family, 0, inputs)
    float_block = weights.blocks[0]
    _, found, findings = quantize_block(float_block, scene, dict.fromkeys(spec.projections, FORM))
    nearest = {p: rtn.quantize(_weight(float_block, p), 4, 32) for p in spec.projections}
    plain = Block({p: type(x)(nearest[p], x.bias) for p, x in float_block.linears.items()}, float_block.norms)

    def error(block: Block) -> float:
        weights.blocks[0] = block
        made = torch.stack([decoder.block(0, x, Window(spec)) for x in states])
        return float((made - expected).square().mean())

    assert error(found) < 0.75 * error(plain)
    assert set(findings) == set(spec.projections)
    assert findings["q"].clip_share == 0


def watched(decoder: Decoder, state: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The first block over one window, its inputs added up."""
    seen = Observation()
    after = decoder.block(0, state, Window(decoder.spec), seen.observe)
    inputs.add(seen)
    return after


def _weight(block: Block, projection: str) -> torch.Tensor:
    weight = block.linears[projection].weight
    assert isinstance(weight, torch.Tensor)
    return weight


def test_what_stays_float_is_neither_folded_nor_rounded() -> None:
    spec, family = tiny_spec("llama"), FAMILIES[0]
    weights: Weights = tiny_weights(spec, group_size=None)
    decoder, inputs = Decoder(spec, weights), Inputs(kept=2)
    watched(decoder, decoder.embed(torch.arange(30)), inputs)
    scene = Scene(decoder, family, 0, inputs)
    before = weights.blocks[0]
    _, after, findings = quantize_block(before, scene, {"gate": FORM, "up": FORM})
    assert set(findings) == {"gate", "up"}
    for projection in ("q", "k", "v", "o", "down"):
        assert torch.equal(_weight(after, projection), _weight(before, projection))
    assert torch.equal(after.norms["attention_norm"].weight, before.norms["attention_norm"].weight)
