"""First starts: one quantizes, others wait for it and serve the same folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from nybble import prepare as preparation
from nybble.config import ServeConfig
from nybble.prepare import prepare, scheme_of
from nybble_quantizers import pipeline
from support_checkpoint import write_checkpoint


def config(tmp_path: Path, **changes: Any) -> ServeConfig:
    folder = tmp_path / "plain"
    if not folder.exists():
        folder.mkdir()
        write_checkpoint(folder, group_size=None)
    return ServeConfig(
        model=str(folder), quantization="rtn", group_size=32, cache_dir=str(tmp_path / "cache"), **changes
    )


def test_two_first_starts_quantize_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "PATIENCE", 0.01)
    settings, quantize = config(tmp_path), pipeline.quantize
    waiting, calls, said, found = threading.Event(), [], [], []

    def slow(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        assert waiting.wait(20)
        return quantize(*arguments, **options)

    def progress(phase: str, fraction: float) -> None:
        said.append(phase)
        if phase.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(pipeline, "quantize", slow)
    threads = [threading.Thread(target=lambda: found.append(prepare(settings, progress))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1 and len(found) == 2
    assert found[0] == found[1]
    assert "waiting for another process that quantizes this model" in said
    assert [f.name for f in (tmp_path / "cache" / "models").iterdir()] == [found[0][0].name]


def test_the_folder_is_named_after_what_is_in_it(tmp_path: Path) -> None:
    made, _ = prepare(config(tmp_path, symmetric=True), lambda phase, part: None)
    assert made.name.startswith("plain-rtn-w4g32-sym-")
    again, _ = prepare(config(tmp_path, symmetric=True), lambda phase, part: None)
    assert again == made


def test_another_text_or_tokenizer_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(**changes: Any) -> str:
        return prepare(config(tmp_path, **changes), lambda phase, part: None)[0].name

    names = {made(), *(made(calibration=f"hf:some/data-set/{name}.jsonl") for name in "ab")}
    assert len(names) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("one text", "another, longer"):
        (tmp_path / "calib.txt").write_text(text)
        names.add(made(calibration="~/calib.txt"))
    assert len(names) == 5
    tokenizer = tmp_path / "plain" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert made() not in names


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "awq-5bit-w4g64"),
        ({"bits": 3}, "awq-w3g64"),
        ({"group_size": 128, "symmetric": True}, "awq-w4g128-sym"),
        ({"quantization": "gptq", "target_bits": 4.5}, "gptq-4.5bit-w4g64"),
        ({"quantization": "smoothquant+gptq"}, "smoothquant+gptq-w8a8"),
        ({"quantization": "fp8"}, "rtn-fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_are_a_scheme(settings: dict[str, Any], label: str) -> None:
    assert scheme_of(ServeConfig(**settings)).label == label


def test_a_target_chooses_among_the_widths_that_the_kernels_read() -> None:
    assert scheme_of(ServeConfig(), (4, 8)).widths == (4, 8)
    assert scheme_of(ServeConfig(target_bits=4.5, quantization="gptq"), (4, 8)).widths == (4, 8)
    assert scheme_of(ServeConfig(bits=4), (4, 8)) == scheme_of(ServeConfig(bits=4))
    assert scheme_of(ServeConfig()).widths == (3, 4, 5, 6, 8)
