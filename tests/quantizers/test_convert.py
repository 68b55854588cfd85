"""Conversion between formats: every value stays, what cannot stay is refused by name."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, dense
from nybble_models.checkpoint import Checkpoint
from nybble_models.decoder import Decoder
from nybble_models.errors import ModelError
from nybble_models.formats.awq import AwqCodec
from nybble_models.formats.codec import Codec
from nybble_models.formats.compressed_tensors import IntQuantizedCodec, PackQuantizedCodec
from nybble_models.formats.form import CHANNEL, Form
from nybble_models.formats.gptq import GptqCodec
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_quantizers import sums
from nybble_quantizers.convert import Conversion, convert
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.verify import verify
from support_checkpoint import write_checkpoint
from support_gguf import write_gguf
from support_tiny import round_to_nearest, tiny_spec, tiny_weights

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
CODECS: dict[str, Codec] = {
    "awq": AwqCodec(),
    "gptq": GptqCodec(),
    "gptq_v2": GptqCodec(version=2),
    "compressed-tensors": PackQuantizedCodec(),
}
ORDERED: Codec = GptqCodec(version=2, act_order=True)


def levels(weight: Tensor, form: Form, ordered: bool) -> QuantizedTensor:
    """Scales are float16 numbers and zeros at least 1: what every format can hold."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) if ordered else None
    made = round_to_nearest(weight if order is None else weight[:, order], form.group(inputs), form.bits)
    zeros = None if form.symmetric or made.zeros is None else made.zeros.clamp(min=1)
    return QuantizedTensor(made.codes, made.scales, form.bits, form.group(inputs), zeros, permutation=order)


def write(
    folder: Path,
    codec: Codec,
    form: Form,
    ordered: Callable[[str], bool] = lambda name: False,
    family: str = "llama",
    **changes: Any,
) -> Path:
    """A quantized folder; linears whose names `ordered` is true of are in act-order."""
    folder.mkdir(parents=True)
    write_checkpoint(folder, family, group_size=None, **changes)
    stored = load_file(folder / "model.safetensors")
    forms: dict[str, Form | None] = {}
    for full in [n for n in stored if ("_proj." in n or ".fc" in n) and n.endswith("weight")]:
        name = full.removesuffix(".weight")
        parts = codec.encode(levels(stored.pop(full), form, ordered(name)))
        stored |= {f"{name}.{part}": t.contiguous() for part, t in parts.items()}
        forms[name] = form
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = codec.settings(forms)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(path: Path) -> Tensor:
    loader = Loader(open_source(path))
    return Decoder(loader.spec, loader.load()).forward(TOKENS)


def weights(path: Path) -> dict[str, Tensor]:
    loader = Loader(open_source(path))
    return {
        f"{layer}.{p}": dense(linear.weight)
        for layer in range(loader.spec.num_layers)
        for p, linear in loader.block(layer).linears.items()
    }


def assert_same(path: Path, other: Path) -> None:
    mine, theirs = weights(path), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(path), logits(other))


@pytest.mark.parametrize(
    ("source", "target"),
    list(itertools.product(CODECS, repeat=2)),
    ids=lambda name: name,
)
@pytest.mark.parametrize(
    "form", [Form(4, 32), Form(4, 32, symmetric=True), Form(4, CHANNEL)], ids=lambda form: form.label
)
def test_every_format_becomes_every_other(tmp_path: Path, source: str, target: Any, form: Form) -> None:
    made = write(tmp_path / "in", CODECS[source], form)
    done = convert(made, tmp_path / "out", target)
    assert (done.packed, done.loose, done.folded) == (21, (), 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == CODECS[target].method
    assert_same(made, tmp_path / "out")
    assert verify(tmp_path / "out").problems == []
    assert {f.name for f in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("target", ["gptq", "gptq_v2", "compressed-tensors"])
def test_other_widths(tmp_path: Path, bits: int, symmetric: bool, target: Any) -> None:
    source = PackQuantizedCodec() if target.startswith("gptq") else GptqCodec(version=2)
    made = write(tmp_path / "in", source, Form(bits, 32, symmetric))
    assert convert(made, tmp_path / "out", target).packed == 21
    assert_same(made, tmp_path / "out")


@pytest.mark.parametrize("target", CODECS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_order_of_down_becomes_rows_of_what_feeds_it(tmp_path: Path, target: Any, family: str) -> None:
    """OPT has one projection before `down`, with a bias that moves along."""
    made = write(tmp_path / "in", ORDERED, Form(4, 32), lambda name: "down" in name or "fc2" in name, family)
    done = convert(made, tmp_path / "out", target)
    assert done.folded == 3
    loader = Loader(Checkpoint(tmp_path / "out"))
    down = loader.block(1).linears["down"].weight
    assert isinstance(down, QuantizedTensor) and down.permutation is None
    assert loader.settings.get("desc_act", False) is False
    assert torch.allclose(logits(made), logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["gptq", "gptq_v2"])
def test_gptq_keeps_the_orders_that_have_nowhere_to_go(tmp_path: Path, target: Any) -> None:
    made = write(tmp_path / "in", ORDERED, Form(4, 32), lambda name: True)
    done = convert(made, tmp_path / "out", target)
    assert (done.folded, done.packed) == (3, 21)
    block = Loader(Checkpoint(tmp_path / "out")).block(0)
    kept = {p for p, x in block.linears.items() if getattr(x.weight, "permutation", None) is not None}
    assert kept == {"q", "k", "v", "o", "gate", "up"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["desc_act"]
    assert torch.allclose(logits(made), logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("target", ["gptq_v2", "compressed-tensors"])
def test_gguf_levels_move_too(tmp_path: Path, kind: Kind, target: Any) -> None:
    """The embedding's levels become numbers, in a type that holds them."""
    spec = tiny_spec("llama", vocab_size=96)
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        spec,
        tiny_weights(spec, group_size=None),
        kind=kind,
        kinds={"token_embd": Kind.Q8_0},
        tokens=96,
    )
    assert convert(path, tmp_path / "out", target).packed == 21
    assert_same(path, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_widths_that_do_not_fit_become_floats_with_their_partners(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """60 outputs of gate and up are no whole words of GPTQ, and neither are 60 inputs of down."""
    made = write(tmp_path / "in", PackQuantizedCodec(), Form(4, CHANNEL), intermediate_size=60)
    with caplog.at_level(logging.WARNING, "nybble.convert"):
        done = convert(made, tmp_path / "out", "gptq_v2")
    assert len(done.loose) == 9
    assert "9 linears are stored as floats: model.layers.0.mlp.gate_proj" in caplog.text
    assert_same(made, tmp_path / "out")
    assert verify(tmp_path / "out").problems == []


def test_w8a8_stays_w8a8(tmp_path: Path) -> None:
    made = write(tmp_path / "in", IntQuantizedCodec(), Form(8, CHANNEL, symmetric=True, inputs="token"))
    convert(made, tmp_path / "out", "compressed-tensors")
    before, after = (
        json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("in", "out")
    )
    assert before["config_groups"] == after["config_groups"]
    assert_same(made, tmp_path / "out")


def test_bfloat16_scales_and_embeddings_stay_exact(tmp_path: Path) -> None:
    made = write(tmp_path / "in", PackQuantizedCodec(), Form(4, 32, symmetric=True))
    stored = load_file(made / "model.safetensors")
    wide = {n: (t.float() * 1e-7).bfloat16() for n, t in stored.items() if "scale" in n or "embed" in n}
    save_file(stored | wide, made / "model.safetensors")
    convert(made, tmp_path / "out", "compressed-tensors")
    assert_same(made, tmp_path / "out")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj: its scales are no float16"):
        convert(made, tmp_path / "gptq", "gptq_v2")


def test_report_and_canary_come_along(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write_checkpoint(tmp_path / "plain", group_size=None)
    quantize(tmp_path / "plain", tmp_path / "in", Scheme(method="rtn", group_size=32), command="")
    (tmp_path / "in" / "canary.json").write_text("{}")
    done = convert(tmp_path / "in", tmp_path / "out", "gptq_v2")
    before, after = (json.loads((tmp_path / n / "quant_report.json").read_text()) for n in ("in", "out"))
    assert after["bytes"] == dict(done.bytes)
    assert after["scheme"]["format"] == "gptq_v2"
    assert [row["weight_error"] for row in after["layers"]] == [
        row["weight_error"] for row in before["layers"]
    ]
    assert (tmp_path / "out" / "canary.json").read_text() == "{}"
    assert sums.check(tmp_path / "out") == []
    assert verify(tmp_path / "out").problems == []


def test_papers_and_licence_come_along(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write_checkpoint(tmp_path / "plain", group_size=None)
    (tmp_path / "plain" / "LICENSE").write_text("as you like")
    quantize(tmp_path / "plain", tmp_path / "in", Scheme(method="rtn", group_size=32), command="nybble x")
    convert(tmp_path / "in", tmp_path / "out", "gptq_v2")
    assert {f.name for f in (tmp_path / "in").iterdir()} == {f.name for f in (tmp_path / "out").iterdir()}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "stored as GPTQ v2" in text
    assert "nybble x  # then nybble convert --format gptq_v2" in text
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "with a head"])
@pytest.mark.parametrize("target", ["compressed-tensors", "gptq_v2"])
def test_rounded_ends_stay_where_they_can(
    tmp_path: Path, target: Any, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plain").mkdir()
    write_checkpoint(tmp_path / "plain", group_size=None, tie_word_embeddings=tied)
    quantize(tmp_path / "plain", tmp_path / "in", Scheme(method="rtn", group_size=32, ends=True))
    with caplog.at_level(logging.WARNING, "nybble.convert"):
        done = convert(tmp_path / "in", tmp_path / "out", target)
    ends = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    kept = isinstance(Loader(Checkpoint(tmp_path / "out")).embed(), QuantizedTensor)
    assert kept == (target == "compressed-tensors")
    assert [name for name in ends if name in done.forms] == (ends if kept else [])
    assert [name for name in ends if f"{name} is stored as floats" in caplog.text] == ([] if kept else ends)
    assert_same(tmp_path / "in", tmp_path / "out")
    assert verify(tmp_path / "out").problems == []


def zeroed(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.qzeros"] *= 0
    save_file(stored, folder / "model.safetensors")


def spoiled(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.scales"][0, 0] = torch.nan
    save_file(stored, folder / "model.safetensors")


def poisoned(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.embed_tokens.weight"][0, 0] = torch.nan
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("form", "ordered", "spoil", "target", "says", "advises"),
    [
        (Form(8, 32), False, None, "awq", r"layers\.0\.self_attn\.q_proj: .*4-bit weights, not 8", "format"),
        (Form(4, 32), True, None, "awq", r"q_proj: it is in act-order", "gptq_v2"),
        (Form(4, 32), True, None, "compressed-tensors", r"q_proj: it is in act-order", "gptq_v2"),
        (Form(4, 32), False, zeroed, "gptq", r"layers\.1\.mlp\.up_proj: it has a zero point 0", "gptq_v2"),
        (Form(4, 32), False, spoiled, "awq", r"layers\.1\.mlp\.up_proj\.scales holds NaN", "again"),
        (Form(4, 32), False, poisoned, "awq", r"embed_tokens\.weight holds NaN", "again"),
    ],
    ids=["bits", "act-order, awq", "act-order, compressed", "zero 0", "NaN scale", "NaN embedding"],
)
def test_what_would_change_is_refused_by_name(
    tmp_path: Path,
    form: Form,
    ordered: bool,
    spoil: Callable[[Path], None] | None,
    target: Any,
    says: str,
    advises: str,
) -> None:
    made = write(tmp_path / "in", ORDERED, form, lambda name: ordered)
    if spoil is not None:
        spoil(made)
    with pytest.raises(ModelError, match=says) as caught:
        convert(made, tmp_path / "out", target)
    assert "\n" not in str(caught.value)
    assert advises in caught.value.hint
    assert {f.name for f in tmp_path.iterdir()} == {"in"}


def test_real_minimums_are_refused(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    path = write_gguf(
        tmp_path / "m.gguf", "llama", spec, tiny_weights(spec, group_size=None), kind=Kind.Q4_1, tokens=97
    )
    with pytest.raises(ModelError, match="real minimums") as caught:
        convert(path, tmp_path / "out", "gptq_v2")
    assert "serve the file" in caught.value.hint


def test_floats_are_not_converted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_checkpoint(tmp_path / "in", group_size=None)
    with pytest.raises(ModelError, match="no linear of it is quantized"):
        convert(tmp_path / "in", tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_a_value_that_changed_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write(tmp_path / "in", AwqCodec(), Form(4, 32))
    encode = PackQuantizedCodec.encode

    def careless(self: PackQuantizedCodec, weight: QuantizedTensor) -> dict[str, Tensor]:
        stored = encode(self, weight)
        return stored | {"weight_packed": stored["weight_packed"] ^ (weight.in_features == 96)}

    monkeypatch.setattr(PackQuantizedCodec, "encode", careless)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj would not hold the same values"):
        convert(made, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_the_same_conversion_makes_the_same_bytes(tmp_path: Path) -> None:
    made = write(tmp_path / "in", AwqCodec(), Form(4, 32))
    done: list[Conversion] = [convert(made, tmp_path / name, "gptq_v2") for name in ("a", "b")]
    assert done[0] == done[1]
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("a", "b"))
    assert first == second
