from __future__ import annotations

import pytest
import torch

from nybble_models.decoder import Decoder
from nybble_models.families import FAMILIES
from nybble_models.weights import Weights
from nybble_quantizers.folding import channels, fold, foldable, pool, spread
from support_tiny import CONFIGS, tiny_spec, tiny_weights

TOKENS = torch.randint(97, (24,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_changes_no_logit(name: str) -> None:
    spec, family = tiny_spec(name), next(f for f in FAMILIES if f.name == name)
    weights = tiny_weights(spec, group_size=None)
    generator = torch.Generator().manual_seed(5)
    blocks = []
    for block in weights.blocks:
        for producer, consumers in family.folds:
            assert foldable(spec, producer, consumers)
            scale = torch.rand(channels(spec, producer), generator=generator) * 4 + 0.25
            block = fold(block, spec, producer, consumers, scale)
        blocks.append(block)
    folded = Weights(weights.embed, weights.positions, blocks, weights.final_norm, weights.head)
    before, after = Decoder(spec, weights).forward(TOKENS), Decoder(spec, folded).forward(TOKENS)
    assert not torch.equal(before, after)
    assert torch.allclose(before, after, atol=1e-4)


def test_shared_heads_get_one_scale_for_each_v_row() -> None:
    spec = tiny_spec("llama")  # 4 query heads, 2 key/value heads of 16
    scale = torch.arange(32.0)
    columns = spread(spec, "v", scale).view(4, 16)
    assert torch.equal(columns[0], columns[1])
    assert torch.equal(columns[2], scale[16:])
    assert torch.equal(pool(spec, "v", spread(spec, "v", scale)), scale)


def test_gelu_lets_no_scale_pass() -> None:
    assert foldable(tiny_spec("opt"), "up", ("down",))
    assert not foldable(tiny_spec("opt", activation_function="gelu"), "up", ("down",))
