"""A whole evaluation of tiny checkpoints, from files to figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble.config import ServeConfig
from nybble.errors import UsageError
from nybble.evaluation.base import find_base, name_base
from nybble.evaluation.evaluation import Engine, evaluate, open_model, open_streamed
from nybble.evaluation.material import Choice, Material, gather
from support_checkpoint import write_checkpoint

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 12


def quiet(phase: str, fraction: float) -> None:
    pass


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("float"), group_size=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("awq"))


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Choice:
    where = tmp_path_factory.mktemp("text")
    (where / "text.txt").write_text(TEXT)
    (where / "words.jsonl").write_text('{"text": "one two"}\n{"text": "three four five"}\n')
    return Choice(where / "text.txt", 3, 64, where / "words.jsonl")


def config(folder: Path) -> ServeConfig:
    return ServeConfig(model=str(folder), threads=1, head_bits=16, device="cpu")


def figures(folder: Path, base: Path | None, engine: Engine, material: Material) -> dict[str, object]:
    truth = None if base is None else open_streamed(base, config(base), "reference", quiet)
    return evaluate(open_model(engine, config(folder), material, quiet), truth, material, quiet).figures()


def test_a_model_in_float32_beside_itself(float_folder: Path, choice: Choice) -> None:
    found = figures(float_folder, float_folder, "reference", gather(float_folder, choice))
    assert (found["kl_divergence"], found["kl_interval"]) == (0, (0, 0))
    assert (found["top1_agreement"], found["perplexity_ratio"]) == (1, 1)
    assert found["perplexity"] == found["reference_perplexity"]
    assert found["lambada_accuracy"] == found["reference_lambada_accuracy"]


def test_serving_adds_less_than_quantizing_does(folder: Path, float_folder: Path, choice: Choice) -> None:
    material = gather(folder, choice)
    cost = {
        engine: {
            name: figures(where, float_folder, engine, material)["kl_divergence"]
            for name, where in (("float", float_folder), ("awq", folder))
        }
        for engine in ("serve", "reference")
    }
    assert cost["reference"]["float"] == 0 < cost["serve"]["float"] < 0.1 * cost["serve"]["awq"]  # type: ignore[operator]
    assert cost["serve"]["awq"] == pytest.approx(cost["reference"]["awq"], rel=0.1)


def test_without_a_reference_there_is_only_perplexity(folder: Path, choice: Choice) -> None:
    material = gather(folder, Choice(choice.text, 2, 64))
    assert list(figures(folder, None, "serve", material)) == ["perplexity", "perplexity_interval"]


def test_the_window_is_as_long_as_the_model_reads(folder: Path, choice: Choice) -> None:
    material = gather(folder, Choice(choice.text))
    assert material.length == 160
    assert len(material.windows) == len(TEXT) // 160
    assert material.describe()["text"] | {} == {  # type: ignore[operator]
        "name": "text.txt",
        "sha256": material.text.sha256,
        "tokens": len(TEXT) + 1,
        "length": 160,
        "windows": 5,
        "windows_in_text": 5,
    }


@pytest.mark.parametrize("length", [1, 161])
def test_a_length_the_model_does_not_read_is_refused(folder: Path, choice: Choice, length: int) -> None:
    with pytest.raises(UsageError, match="the model reads 2 to 160"):
        gather(folder, Choice(choice.text, 0, length))


def test_tokens_the_model_does_not_have_are_refused(tmp_path: Path, choice: Choice) -> None:
    other = write_checkpoint(tmp_path)
    (other / "config.json").write_text(
        json.dumps(json.loads((other / "config.json").read_text()) | {"vocab_size": 200})
    )
    with pytest.raises(UsageError, match="the tokenizer knows token 256, the model 200 tokens"):
        gather(other, Choice(choice.text))


def test_the_base_is_found_by_the_reports_name(folder: Path, float_folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    report = made / "quant_report.json"
    assert find_base(made, tmp_path) is None and name_base(made) == ""
    report.write_text(json.dumps({"source": "base"}))
    assert find_base(made, tmp_path) is None and name_base(made) == "base"
    (tmp_path / "base").mkdir()
    assert find_base(made, tmp_path) is None  # a folder without a model in it
    config = tmp_path / "base" / "config.json"
    config.write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert find_base(made, tmp_path) is None
    config.write_text("{}")
    assert find_base(made, tmp_path) == tmp_path / "base"
    report.write_text(json.dumps({"source": str(float_folder)}))
    assert find_base(made, tmp_path) == float_folder
    report.write_text(json.dumps({"source": "x", "origin": {"base_model": "owner/name"}}))
    assert find_base(made, tmp_path) is None and name_base(made) == "owner/name"


def test_the_base_may_be_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr("nybble.evaluation.base.fetch", lambda model, cache: file)
    made = tmp_path / "made"
    made.mkdir()
    (made / "quant_report.json").write_text(json.dumps({"source": file.name}))
    assert find_base(made, tmp_path) == file
    (made / "quant_report.json").write_text(json.dumps({"source": "SmolLM2-135M-Instruct.Q8_0.gguf"}))
    assert find_base(made, tmp_path) is None
