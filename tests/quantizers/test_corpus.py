"""Where a calibration text lies: in a file here, or in a data set on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble_models.errors import ModelError
from nybble_quantizers import corpus


@pytest.mark.parametrize("name", ["hf:owner", "hf:owner/data", "hf:owner/data/", "hf:"])
def test_a_data_set_is_named_with_a_file(name: str) -> None:
    with pytest.raises(ModelError, match="does not name a file"):
        corpus.locate(name)


def test_a_file_of_a_data_set_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def download(repo: str, file: str, **options: object) -> str:
        asked.append((repo, file, options))
        return str(tmp_path / "found.jsonl")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert corpus.locate("hf:owner/data/en/part-0.jsonl") == tmp_path / "found.jsonl"
    options = {"repo_type": "dataset", "cache_dir": None, "local_files_only": False}
    assert asked == [("owner/data", "en/part-0.jsonl", options)]


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"owner/data-set-of-nobody is not in the cache") as caught:
        corpus.locate("hf:owner/data-set-of-nobody/a.jsonl")
    assert "writes the text itself" in caught.value.hint
