"""The prompts that come with a checkpoint: what the quantizer writes, and what a server makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.api.lifecycle import Loaded, load
from nybble.api.series import CANARY_AGREEMENT, CANARY_DIVERGENCE
from nybble.config import ServeConfig
from nybble.engine.build import build_engine
from nybble.engine.canary import FILE, divergence
from nybble.errors import NybbleError
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.loader import Loader
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.report import QuantizeProgress
from nybble_quantizers.scheme import Scheme
from support_checkpoint import write_checkpoint
from support_http import serving

SCHEMES = {
    "as it was": Scheme(method="none"),
    "8-bit": Scheme(method="rtn", bits=8, group_size=32),
    "3-bit": Scheme(method="rtn", bits=3, group_size=32),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("canary")
    (root / "plain").mkdir()
    source = write_checkpoint(root / "plain", group_size=None)
    for name, scheme in SCHEMES.items():
        quantize(source, root / name, scheme, command="")
    return {name: root / name for name in ("plain", *SCHEMES)}


def config(folder: Path, **changes: Any) -> ServeConfig:
    return ServeConfig(
        model=str(folder), quantization="none", kernels="reference", dtype="float32", head_bits=16, **changes
    )


def loaded(folder: Path, **changes: Any) -> Loaded:
    found = load(config(folder, **changes), build_engine, lambda phase, part: None)
    found.engine.stop()
    return found


def test_it_holds_what_the_unquantized_model_says(folders: dict[str, Path]) -> None:
    written = json.loads((folders["3-bit"] / FILE).read_text())["prompts"]
    loader = Loader(Checkpoint(folders["plain"]))
    decoder = Decoder(loader.spec, loader.load())
    assert len(written) == 8
    for row in written:
        tokens = torch.tensor(row["tokens"])
        assert len(tokens) == 32
        expected = decoder.forward(tokens)[:-1].log_softmax(-1).topk(20)
        assert row["top"] == expected.indices.tolist()
        assert torch.allclose(torch.tensor(row["logprobs"]), expected.values, atol=2e-5)


def test_the_fewer_bits_the_less_it_agrees(folders: dict[str, Path]) -> None:
    found = {name: loaded(folders[name]).canary for name in SCHEMES}
    same, eight, three = (found[name] for name in SCHEMES)
    assert same and eight and three
    assert same.top1_agreement > 0.98 and same.kl_divergence < 1e-3  # the cache is bfloat16
    assert same.positions == 8 * 31
    assert max(same.kl_divergence, eight.kl_divergence) < three.kl_divergence / 10
    assert three.top1_agreement < eight.top1_agreement <= 1


def test_a_run_that_was_interrupted_writes_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    def stop(event: QuantizeProgress) -> None:
        if event.stage == "quantize" and event.done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(folders["plain"], out, SCHEMES["3-bit"], command="", progress=stop)
    quantize(folders["plain"], out, SCHEMES["3-bit"], command="")
    assert (out / FILE).read_bytes() == (folders["3-bit"] / FILE).read_bytes()


def test_readiness_waits_for_enough_agreement(folders: dict[str, Path]) -> None:
    assert loaded(folders["8-bit"], min_top1_agreement=0.9).canary
    with pytest.raises(NybbleError, match=r"agrees .* on \d+\.\d% of its tokens, less than .* 99\.0%"):
        loaded(folders["3-bit"], min_top1_agreement=0.99)
    with pytest.raises(NybbleError, match="has no canary"):
        loaded(folders["plain"], min_top1_agreement=0.5)


def test_it_can_be_left_out(folders: dict[str, Path]) -> None:
    assert loaded(folders["3-bit"], canary=False).canary is None
    assert loaded(folders["plain"]).canary is None


def test_dashboards_see_it(folders: dict[str, Path]) -> None:
    settings = {"model": str(folders["8-bit"]), "quantization": "none", "kernels": "reference"}
    with serving(build_engine, **settings) as served:
        assert 0.8 < served.metric(CANARY_AGREEMENT.name) <= 1
        assert 0 <= served.metric(CANARY_DIVERGENCE.name) < 0.1
    settings["model"] = str(folders["plain"])
    with serving(build_engine, **settings) as served:
        assert f"\n{CANARY_AGREEMENT.name} " not in served.client.get("/metrics").text


@pytest.fixture
def damaged(folders: dict[str, Path]) -> Iterator[Path]:
    path = folders["8-bit"] / FILE
    before = path.read_bytes()
    yield path
    path.write_bytes(before)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"prompts": []}', '{"prompts": [{"tokens": [1, 2, 3], "top": [[1]], "logprobs": [[0]]}]}'],
    ids=["empty", "no object", "no prompts", "rows missing"],
)
def test_one_that_cannot_be_read_is_named(damaged: Path, content: str) -> None:
    damaged.write_text(content)
    with pytest.raises(NybbleError, match=r"canary\.json") as caught:
        loaded(damaged.parent)
    assert "\n" not in caught.value.message


def test_divergence_of_what_is_listed_is_exact_when_nothing_else_is_likely() -> None:
    p, q = {1: math.log(0.7), 2: math.log(0.3)}, {1: math.log(0.5), 2: math.log(0.5)}
    assert divergence(p, q) == pytest.approx(0.7 * math.log(1.4) + 0.3 * math.log(0.6))
    assert divergence(p, p) == 0


def test_what_only_one_side_lists_counts_as_one_outcome() -> None:
    """Joined: {1} against {everything else}, never more than the true divergence."""
    p, q = {1: math.log(0.5), 2: math.log(0.25)}, {1: math.log(0.25), 3: math.log(0.5)}
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
