"""`nybble eval`: table, JSON, and one line for everything that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nybble import cli
from support_checkpoint import write_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog. " * 9
HERE = ("--threads", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized model, its unquantized one, a text and passages."""
    place = tmp_path_factory.mktemp("models")
    write_checkpoint(place / "base", group_size=None)
    write_checkpoint(place / "awq")
    bigger = shutil.copytree(place / "base", place / "bigger") / "config.json"
    bigger.write_text(json.dumps(json.loads(bigger.read_text()) | {"vocab_size": 270}))
    (place / "awq" / "quant_report.json").write_text(json.dumps({"source": "base"}))
    (place / "text.txt").write_text(TEXT)
    (place / "words.jsonl").write_text('{"text": "one two three"}\n')
    return place


def run(models: Path, *arguments: str) -> int:
    return cli.main(["eval", *(a.replace("@", f"{models}/") for a in arguments), *HERE])


def test_table_and_json(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "eval.json"
    asked = ("@awq", "--text", "@text.txt", "--lambada", "@words.jsonl", "--windows", "2", "--length", "96")
    assert run(models, *asked, "--json", str(path)) == 0
    shown = capsys.readouterr()
    for word in (
        "95 % interval",
        "KL divergence",
        "top-1 agreement",
        "LAMBADA accuracy",
        "2 of 4 windows of 96",
    ):
        assert word in shown.out
    assert "windows: 100%" in shown.err
    record = json.loads(path.read_text())
    assert record["model"]["quantization"] == "awq int4 g32 asymmetric"
    assert record["model"]["engine"] == "serve"
    assert record["reference"]["path"] == str(models / "base")
    assert (record["text"]["windows"], record["text"]["length"]) == (2, 96)
    assert record["lambada"]["passages"] == 1
    figures = record["figures"]
    assert figures["kl_interval"][0] <= figures["kl_divergence"] <= figures["kl_interval"][1]
    assert figures["kl_divergence"] > 0 and 0 < figures["top1_agreement"] < 1
    assert len(record["scores"]) == 2
    assert {"processor", "versions", "commit"} <= set(record["machine"])


def test_json_alone_on_standard_output(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("@awq", "--text", "@text.txt", "--reference", "none", "--engine", "reference", "--windows", "1")
    assert run(models, *asked, "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["reference"] is None
    assert list(record["figures"]) == ["perplexity", "perplexity_interval"]
    assert record["figures"]["perplexity_interval"] is None


def test_a_missing_reference_is_said_and_left_out(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, "@base", "--text", "@text.txt", "--windows", "2") == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0].startswith("no reference: none is named; --reference BASE")
    assert "KL divergence" not in shown.out


def test_a_model_is_not_its_own_reference(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder has the name of its source."""
    namesake = models / "apart" / "base"
    namesake.parent.mkdir()
    shutil.copytree(models / "awq", namesake)
    asked = ("--text", "@text.txt", "--windows", "1")
    assert run(models, "@apart/base", *asked) == 0
    assert "no reference: base is not here" in capsys.readouterr().err
    assert run(models, "@apart/base", *asked, "--reference", "@awq") == 0
    assert f"warning: the reference {models / 'awq'} is quantized itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["@nothing", "--text", "@text.txt"], "nothing does not exist"),
        (["@awq", "--text", "@nothing.txt"], "No such file"),
        (["@awq", "--text", "@text.txt", "--length", "500"], "the model reads 2 to 160"),
        (["@awq", "--text", "@words.jsonl"], "14 tokens: too short for one window of 160"),
        (["@awq", "--text", "@text.txt", "--windows", "-1"], "start at 0"),
        (["@awq", "--text", "@text.txt", "--reference", "@nothing"], "nothing does not exist"),
        (["@awq", "--text", "@text.txt", "--reference", "@bigger"], "264 tokens, its reference 270"),
        (["@awq", "--text", "@text.txt", "--kernels", "steam"], "'steam' is not one of"),
        (["@awq", "--text", "@text.txt", "--engine", "steam"], "engine"),
        (["@awq", "--text", "@text.txt", "--json", "@far/off/eval.json"], "far/off does not exist"),
        (["@awq", "--text", "@text.txt", "--json", "@text.txt/eval.json"], "text.txt is a file"),
        (["@awq", "--text", "@text.txt", "--json", "@awq"], "awq is a folder"),
    ],
    ids=[
        "model", "text", "length", "short", "windows", "reference", "vocabulary", "kernels", "engine",
        "json folder", "json below a file", "json is a folder",
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    models: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, *arguments) == 2
    *_, error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert hint.startswith("hint: ")


@pytest.fixture(scope="module")
def calibrated(models: Path) -> Path:
    """A checkpoint with its papers, calibrated on a text of sixty words of its own."""
    words = " ".join(f"word{number}" for number in range(60))
    (models / "calib.txt").write_text(words)
    flags = ["--group-size", "32", "--calibration", str(models / "calib.txt"), "--samples", "2"]
    out = str(models / "made")
    assert cli.main(["quantize", str(models / "base"), "-o", out, *flags, "--length", "200"]) == 0
    return models / "made"


def test_figures_are_put_into_the_papers(models: Path, calibrated: Path) -> None:
    asked = ("@made", "--text", "@text.txt", "--windows", "2", "--length", "96", "--record")
    assert run(models, *asked) == 0
    found = json.loads((calibrated / "quant_report.json").read_text())["evaluation"]
    assert (found["text"], found["windows"], found["length"]) == ("text.txt", 2, 96)
    assert found["perplexity"] > 1 and 0 < found["top1_agreement"] < 1
    assert "top-1 agreement" in (calibrated / "README.md").read_text()
    assert cli.main(["verify", str(calibrated)]) == 0


def test_figures_are_shown_before_they_are_recorded(
    models: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(calibrated, models / "changed")
    (changed / "README.md").write_text("another card")
    asked = ("--reference", "none", "--text", "@text.txt", "--windows", "1", "--record")
    assert run(models, "@changed", *asked) != 0
    shown = capsys.readouterr()
    assert "perplexity" in shown.out and "README.md" in shown.err


def test_nothing_is_measured_that_could_not_be_recorded(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.evaluation.evaluation.evaluate", None)
    assert (
        run(models, "@base", "--reference", "none", "--text", "@text.txt", "--windows", "2", "--record") == 2
    )
    assert "no quant_report.json" in capsys.readouterr().err


def test_a_text_that_it_was_calibrated_on_is_named(
    models: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "judge.txt").write_text("Before. " + (models / "calib.txt").read_text() + " After that. " * 9)
    for text, warned in (("judge.txt", True), ("text.txt", False)):
        assert run(models, "@made", "--reference", "none", "--text", f"@{text}", "--windows", "1") == 0
        shown = capsys.readouterr().err
        assert (f"warning: calib.txt and {text} share " in shown) == warned
