"""`nybble quantize` as a person uses it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from nybble.cli import main
from nybble.commands.dry_run import table
from nybble.commands.recipe import Recipe, in_bytes
from nybble.errors import UsageError
from nybble_quantizers.pipeline import foresee
from nybble_quantizers.scheme import Scheme, preset
from support_checkpoint import write_checkpoint

SMALL = ["--group-size", "32", "--samples", "4", "--length", "24"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    return write_checkpoint(folder, group_size=None)


def test_every_block_says_how_it_went(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *SMALL]) == 0
    printed = capsys.readouterr()
    blocks = [line for line in printed.err.splitlines() if line.startswith("block ")]
    assert len(blocks) == 3
    number = r"\d+\.\d"
    pattern = rf"block 1/3  q {number}  k {number} .* down {number} dB  {number} s, about \d+ s left"
    assert re.fullmatch(pattern, blocks[0])
    assert "bits per weight" in printed.out


def test_without_text_the_weights_errors_are_shown(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--method", "rtn", *SMALL]) == 0
    assert re.search(r"block 3/3 .* down \d+\.\d %  ", capsys.readouterr().err)


def test_several_patterns_after_one_flag(tmp_path: Path, source: Path) -> None:
    flags = [
        "--override",
        "*.down_proj=8",
        "model.layers.0.*=16",
        "--skip",
        "*.o_proj",
        "*.up_proj",
        "*.gate_proj",
    ]
    rest = ["-o", str(tmp_path / "out"), "--method", "rtn", *SMALL]
    assert main(["quantize", str(source), *flags, *rest]) == 0
    rows = json.loads((tmp_path / "out" / "quant_report.json").read_text())["layers"]
    ends = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "down_proj": 8}
    assert {row["name"]: row["bits"] for row in rows} == {
        f"model.layers.{layer}.{'mlp' if end == 'down_proj' else 'self_attn'}.{end}": bits
        for layer in (1, 2)
        for end, bits in ends.items()
    }


def test_flags_reach_the_file(tmp_path: Path, source: Path) -> None:
    flags = ["--override", "*.down_proj=8", "--format", "gptq_v2", "--symmetric", "--method", "rtn", *SMALL]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *flags]) == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["checkpoint_format"], settings["sym"], settings["bits"]) == ("gptq_v2", True, 4)
    assert len(settings["dynamic"]) == 3


@pytest.mark.parametrize(
    ("flags", "format", "kinds"),
    [
        (["--method", "smoothquant"], "int-quantized", {"int"}),
        (["--method", "smoothquant+gptq", "--alpha", "0.5"], "int-quantized", {"int"}),
        (["--scheme", "W8A8-static"], "int-quantized", {"int"}),
        (["--scheme", "FP8"], "float-quantized", {"float"}),
        (["--scheme", "FP8-static"], "float-quantized", {"float"}),
    ],
    ids=["smoothquant", "with gptq", "static", "fp8", "fp8 static"],
)
def test_eight_bits_by_name(
    tmp_path: Path, source: Path, flags: list[str], format: str, kinds: set[str]
) -> None:
    small = ["--samples", "4", "--length", "24"]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *flags, *small]) == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == format
    group = settings["config_groups"]["group_0"]
    assert {group["weights"]["type"], group["input_activations"]["type"]} == kinds
    static = any("static" in flag for flag in flags)
    assert group["input_activations"]["dynamic"] != static
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_the_report_holds_the_command_and_not_where_the_program_lies(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["quantize", "plain", "-o", "out", "--skip", "*.o_proj", "--method", "rtn", *SMALL]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/on/this/machine/nybble", *arguments])
    assert main(arguments) == 0
    said = json.loads((tmp_path / "out" / "quant_report.json").read_text())["command"]
    assert said.startswith("nybble quantize plain -o out --skip '*.o_proj' --method rtn ")
    assert "somewhere" not in (tmp_path / "out" / "README.md").read_text()


def test_classic_act_order(tmp_path: Path, source: Path) -> None:
    flags = ["--method", "gptq", "--order", "desc_act", "--damp", "0.05", *SMALL]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *flags]) == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["desc_act"] is True
    order = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert order.tolist() != sorted(order.tolist())
    assert {
        row["damp"] for row in json.loads((tmp_path / "out" / "quant_report.json").read_text())["layers"]
    } == {0.05}
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("order", ["columns", "none"])
def test_orders_that_leave_no_trace(tmp_path: Path, source: Path, order: str) -> None:
    """They choose other codes than the default, and no g_idx."""
    written = []
    for name, flags in (("default", []), ("other", ["--order", order])):
        made = ["quantize", str(source), "-o", str(tmp_path / name), "--method", "gptq", *flags, *SMALL]
        assert main(made) == 0
        written.append(load_file(tmp_path / name / "model.safetensors"))
    down = "model.layers.0.mlp.down_proj"
    assert not (written[0][f"{down}.qweight"] == written[1][f"{down}.qweight"]).all()
    assert f"{down}.g_idx" not in written[1]


def test_the_nearest_on_searched_grids(tmp_path: Path, source: Path) -> None:
    """In rows: a group of 32 normal numbers has no outlier that is worth cutting."""
    errors = []
    for name, flags in (("plain", []), ("searched", ["--mse"])):
        made = ["quantize", str(source), "-o", str(tmp_path / f"q-{name}"), "--method", "rtn", *flags]
        assert main([*made, "--bits", "3", "--group-size", "-1"]) == 0
        report = json.loads((tmp_path / f"q-{name}" / "quant_report.json").read_text())
        errors.append(sum(row["weight_error"] for row in report["layers"]))
    assert errors[1] < 0.97 * errors[0]


def test_the_best_quality(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quality", "best", "--steps", "3", "--method", "gptq", *SMALL]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *flags]) == 0
    assert "tuning: 100%" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80MB", 80e6), ("1.2 GiB", int(1.2 * 2**30)), ("5e6", 5e6), ("7kb", 7000), ("12", 12), ("3g", 3e9)],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: float) -> None:
    assert in_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "12XB", "1.2.3GB", "-5MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        in_bytes(text)


@pytest.mark.parametrize(
    ("recipe", "scheme"),
    [
        (Recipe(), Scheme()),
        (Recipe(scheme="auto"), Scheme(target_bits=5.0)),
        (Recipe(scheme="auto", target_bits=4.5), Scheme(target_bits=4.5)),
        (Recipe(scheme="auto", target_size="80MB"), Scheme(target_bytes=80_000_000)),
        (Recipe(method="smoothquant"), preset("W8A8")),
        (Recipe(scheme="W4A16-g128", symmetric=True), Scheme(group_size=128, symmetric=True)),
    ],
    ids=["nothing said", "preset", "its target", "another target", "by method", "one flag"],
)
def test_what_is_not_said_is_the_presets(recipe: Recipe, scheme: Scheme) -> None:
    assert preset(recipe.preset, **recipe.changes()) == scheme


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--override", "*.down_proj"], "is not PATTERN=FORM"),
        (["--override", "*.nothing=8"], "matches no linear"),
        (["--override", "*.q_proj=8"], "run as one"),
        (["--target-bits", "2"], "too few"),
        (["--target-bits", "17"], "is no target"),
        (["--scheme", "W16", "--embeddings"], "rounds nothing"),
        (["--calibration", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--format", "awq", "--bits", "3"], "4-bit"),
        (["--bits", "9"], "bits is 9"),
        (["--scheme", "W1A1"], "'W1A1' is unknown"),
        (["--alpha", "0.5"], "alpha is 0.5"),
        (["--order", "desc_act"], "awq takes the inputs in no order"),
        (["--order", "desc_act", "--method", "gptq", "--format", "awq"], "no act-order"),
        (["--quality", "best", "--method", "rtn"], "does not tune rtn"),
        (["--mse"], "is round-to-nearest's"),
        (["--damp", "-1", "--method", "gptq"], "damp is -1"),
        (["--skip", "*.nothing"], "matches no linear"),
        (["--override", "*=4g48"], "cannot be w4g48"),
        (["--seed", str(2**50)], "seed is 1125899906842624"),
        (["--seed", "-1"], "seed is -1"),
    ],
    ids=[
        "no form",
        "no match",
        "partners",
        "too few bits",
        "too many bits",
        "no method",
        "no text",
        "awq",
        "bits",
        *(
            "scheme",
            "alpha",
            "order",
            "order format",
            "best",
            "mse",
            "damp",
            "skip",
            "override",
            "seed",
            "negative seed",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *SMALL, *flags]) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2 and complaint in lines[0]
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


def test_calibration_text_that_judges_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(f"word{number}" for number in range(600))
    for name in ("calib.txt", "judge.txt"):
        (tmp_path / name).write_text(f"{name} {words}")
    flags = ["--calibration", str(tmp_path / "calib.txt"), "--evaluation", str(tmp_path / "judge.txt")]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *SMALL, *flags]) != 0
    assert "share 1 runs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_command_quantizes_and_measures(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "judge.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    flags = ["--evaluation", str(tmp_path / "judge.txt"), "--method", "rtn", *SMALL]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *flags]) == 0
    assert "perplexity" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "quant_report.json").read_text())["evaluation"]
    assert found["perplexity"] > 1 and found["kl_divergence"] > 0 and 0 < found["top1_agreement"] <= 1
    assert "top-1 agreement" in (tmp_path / "out" / "README.md").read_text()
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_judging_text_that_is_too_short_is_refused_before_anything_is_made(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "judge.txt").write_text("brief")
    flags = ["--evaluation", str(tmp_path / "judge.txt"), "--method", "rtn", *SMALL]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *flags]) == 2
    assert "too short" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_one_line(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(source / "model.safetensors")
    files = {name: f"model-0000{1 + ('layers.2' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, source / file)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for file in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"):
        (source / file).rename(tmp_path / "away")
        assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--method", "rtn", *SMALL]) != 0
        assert capsys.readouterr().err.splitlines() == [
            f"error: {source / file} is missing",
            "hint: download the checkpoint again",
        ]
        (tmp_path / "away").rename(source / file)
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_judging_text_that_is_not_there_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    flags = ["--evaluation", str(tmp_path / "nowhere.raw"), "--method", method]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *SMALL, *flags]) != 0
    assert "nowhere.raw" in capsys.readouterr().err.splitlines()[-2]
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


def test_no_folder_is_made_below_a_file(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file/out", "file/deep/out"):
        assert main(["quantize", str(source), "-o", str(tmp_path / out), "--method", "rtn", *SMALL]) != 0
        assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err.splitlines()[-2]


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    flags = ["--dry-run", "--method", method, *SMALL]
    assert main(["quantize", str(source), "-o", str(tmp_path / "deep" / "out"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[\d,]+ parameters, 21 linears to round, \d+\.\d\d bits per weight, .*", lines[0])
    assert lines[1].startswith("disk: ") and lines[2].startswith("memory: ")
    assert any(re.fullmatch(r"time: about \d+ s", line) for line in lines)
    assert {f.name for f in tmp_path.iterdir()} == {"plain"}


def test_a_gpu_that_is_not_there_is_one_line(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = ["-o", str(tmp_path / "out"), "--device", "cuda"]
    assert main(["quantize", str(source), *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: PyTorch finds no GPU",
        "hint: --device cpu",
    ]
    assert main(["quantize", str(source), *flags[:2], "--device", "auto", "--dry-run", *SMALL]) == 0


def test_times_that_nobody_measured_are_left_out(source: Path) -> None:
    said = foresee(source, Scheme())
    assert "\ntime: about" in table(said, 1 << 30, 1 << 30)
    assert "time" not in table(replace(said, seconds={}), 1 << 30, 1 << 30)


def test_a_dry_run_fails_where_the_run_would(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["quantize", str(source), "-o", str(tmp_path / "out"), "--dry-run", *SMALL]
    assert main([*command, "--memory", "10MiB"]) == 1
    assert "10 MiB may be used" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(command) == 1
    assert "has 1.0 kB free" in capsys.readouterr().err


def test_a_budget_of_memory_is_a_flag(tmp_path: Path, source: Path) -> None:
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--memory", "4GiB", *SMALL]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
