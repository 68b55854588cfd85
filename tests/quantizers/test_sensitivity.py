from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nybble_kernels.quantized import dense
from nybble_models.decoder import Decoder
from nybble_models.formats.form import CHANNEL, Form
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.weights import Linear
from nybble_quantizers.rounding import fake
from nybble_quantizers.sensitivity import measure
from nybble_quantizers.stream import float_weights
from nybble_quantizers.units import Unit, block_units, end_units
from nybble_quantizers.workers import side_by_side
from support_checkpoint import write_checkpoint
from support_tiny import CONFIGS

FINE, COARSE = Form(8, CHANNEL), Form(4, 32)
TOKENS = torch.randint(250, (6, 48), generator=torch.Generator().manual_seed(3))


def tiny(directory: Path, family: str, **changes: object) -> Loader:
    return Loader(open_source(write_checkpoint(directory, family, group_size=None, **changes)), floats=True)


@torch.inference_mode()
def divergence(loader: Loader, forms: Mapping[Unit, Form | None]) -> float:
    """Nats a token by which the model moves with these units rounded: KL(p ‖ q) itself."""
    weights = float_weights(loader)
    plain = Decoder(loader.spec, weights)
    p = [plain.forward(tokens).log_softmax(-1) for tokens in TOKENS]
    for unit, form in forms.items():
        if form is None:
            continue
        for part in unit.parts:
            if part == "embed":
                weights.embed = fake(dense(weights.embed), form)
            elif part == "head":
                assert weights.head is not None
                weights.head = Linear(fake(dense(weights.head.weight), form))
            else:
                assert unit.layer is not None
                linear = weights.blocks[unit.layer].linears[part]
                rounded = replace(linear, weight=fake(dense(linear.weight), form))
                weights.blocks[unit.layer].linears[part] = rounded
    rounded_model = Decoder(loader.spec, weights)
    q = [rounded_model.forward(tokens).log_softmax(-1) for tokens in TOKENS]
    return sum(float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True)) / TOKENS.numel()


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_the_divergence_of_rounding_one_unit(family: str, tmp_path: Path) -> None:
    loader = tiny(tmp_path / "model", family, tie_word_embeddings=False)
    units = (*block_units(loader.spec), *end_units(loader.spec))
    costs = measure(loader, TOKENS, dict.fromkeys(units, (FINE,)))
    assert list(costs) == list(units)
    errors = [math.log(costs[unit][FINE] / divergence(loader, {unit: FINE})) for unit in units]
    assert abs(sum(errors) / len(errors)) < 0.1
    assert max(map(abs, errors)) < 0.6


def test_a_tied_table_counts_as_embedding_and_as_head(tmp_path: Path) -> None:
    loader = tiny(tmp_path / "model", "llama")
    (table,) = end_units(loader.spec)
    assert table.parts == ("embed",)
    found = measure(loader, TOKENS, {table: (FINE,)})[table][FINE]
    assert found == pytest.approx(divergence(loader, {table: FINE}), rel=0.3)


def test_the_costs_of_units_add_up(tmp_path: Path) -> None:
    loader = tiny(tmp_path / "model", "llama")
    costs = measure(loader, TOKENS, dict.fromkeys(block_units(loader.spec), (FINE,)))
    together = divergence(loader, dict.fromkeys(costs, FINE))
    assert sum(of[FINE] for of in costs.values()) == pytest.approx(together, rel=0.2)


def test_fewer_bits_cost_more_and_sixteen_nothing(tmp_path: Path) -> None:
    loader = tiny(tmp_path / "model", "opt")
    units = (*block_units(loader.spec), *end_units(loader.spec))
    for unit, of in measure(loader, TOKENS, dict.fromkeys(units, (None, FINE, COARSE))).items():
        assert of[None] == 0 < of[FINE] < of[COARSE], unit


def test_workers_in_inference_mode_find_the_same(tmp_path: Path) -> None:
    loader = tiny(tmp_path / "model", "qwen2")
    candidates = dict.fromkeys((*block_units(loader.spec), *end_units(loader.spec)), (COARSE,))
    with torch.inference_mode(), side_by_side() as run:
        found = measure(loader, TOKENS.clone(), candidates, run=run)
    assert found == measure(loader, TOKENS, candidates)
    assert found != measure(loader, TOKENS, candidates, seed=1)  # other labels are drawn
