"""`benchmarks/peers/run.py` as it is started: ours alone on a tiny model; and random weights as GGUF."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from random_gguf import SHAPES, Shape, write

from nybble_kernels.quantized import dense
from nybble_models.decoder import Decoder
from nybble_models.formats.gguf import Gguf
from nybble_models.formats.gguf_tokenizer import write_tokenizer
from nybble_models.loader import Loader
from nybble_models.window import Window
from support_gguf import write_gguf
from support_process import ROOT, environment
from support_tiny import tiny_spec, tiny_weights

SCRIPT = ROOT / "benchmarks" / "peers" / "run.py"


def started(*flags: str) -> subprocess.CompletedProcess[str]:
    """As a user does, whose Python finds a script's own folder."""
    command = [sys.executable, str(SCRIPT), *flags]
    kept = {name: value for name, value in environment().items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--help"], 0, "llama.cpp,openvino,transformers,vllm"),
        (["--peers", "steam"], 2, "no such peer: steam"),
    ],
    ids=["help", "unknown-peer"],
)
def test_arguments(
    flags: list[str],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(SystemExit) as ended:
        run.arguments()
    assert ended.value.code == status
    assert said in "".join(capsys.readouterr())


def test_ours_alone_on_a_tiny_model(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    spec = tiny_spec("llama", vocab_size=80)
    write_gguf(model, "llama", spec, tiny_weights(spec, group_size=None), kind=Kind.Q4_1, tokens=80)
    flags = ["--model", str(model), "--peers", "openvino", "--environments", str(tmp_path / "peers")]
    flags += ["--rounds", "2", "--tokens", "8", "--prompt-tokens", "48", "--out", str(tmp_path / "rows")]
    done = started(*flags, "--cache-dir", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "openvino: left out: not installed" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["subject"], row["way"]) for row in rows] == [
        ("nybble as it is", "library"),
        ("nybble as it is", "server"),
    ]
    wanted = {"benchmark", "when", "model", "tokens", "prompt_tokens", "read_gb_s", "processor", "cores"}
    wanted |= {"versions", "commit", "subject", "way", "peer", "file", "setting", "facts", "isa", "load"}
    for row in rows:
        assert wanted <= set(row)
        assert len(row["read_gb_s"]) == len(row["rounds"]["decode"]) == 2
        assert row["once"]["peak_mib"] > 0
    assert set(rows[0]["figures"]) == {"decode", "prefill", "first_token_ms"}
    assert {"decode", "gap_ms", "gap_p99_ms", "first_token_ms", "streams"} == set(rows[1]["figures"])
    assert rows[0]["of_read_bandwidth"] > 0 and rows[0]["facts"]["kernels"]["decode"]
    assert rows[1]["once"]["start_s"] > 0
    assert "nybble as it is, server: 8 streams to one" in done.stdout


def test_random_weights_are_read_and_stay_finite(tmp_path: Path) -> None:
    tokens = tmp_path / "tokenizer.gguf"
    spec = tiny_spec("llama")
    write_gguf(tokens, "llama", spec, tiny_weights(spec, group_size=None), tokens=80)
    shape = Shape(layers=2, hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocabulary=128)
    write(tmp_path / "random.gguf", shape, tokens)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "random.gguf", tmp_path / "tokenizer")
    loader = Loader(Gguf(tmp_path / "random.gguf"))
    weights = loader.load()
    assert loader.spec.vocab_size == 128 and loader.spec.tied_head
    for block in weights.blocks:
        for linear in block.linears.values():
            linear.weight = dense(linear.weight)
            assert float(linear.weight.std()) * linear.weight.shape[1] ** 0.5 == pytest.approx(1.0, abs=0.05)
    decoder = Decoder(loader.spec, weights)
    x = decoder.embed(torch.arange(5))
    for layer in range(loader.spec.num_layers):
        x = decoder.block(layer, x, Window(loader.spec))
    assert bool(decoder.logits(x).isfinite().all())


def test_the_shapes_are_those_of_their_model() -> None:
    shape = SHAPES["llama-3.2-1b"]
    weights = sum(outputs * inputs for outputs, inputs in shape.linears().values()) * shape.layers
    norms = (2 * shape.layers + 1) * shape.hidden
    assert weights + shape.vocabulary * shape.hidden + norms == 1_235_814_400, "as its model card counts"
