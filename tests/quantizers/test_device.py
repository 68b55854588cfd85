"""What a quantizer makes lies where its inputs lie.

There is no second device here, so the default one is "meta": a tensor that somebody makes without saying
where has no numbers, and whatever meets it fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import Checkpoint
from nybble_models.loader import Loader
from nybble_quantizers.calibrate import Calibration
from nybble_quantizers.scheme import PRESETS, Scheme
from nybble_quantizers.stream import Stream, read_block
from nybble_quantizers.workers import in_turn
from support_checkpoint import write_checkpoint

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
