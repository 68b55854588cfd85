"""The tokenizer of a folder: tokenizer.json, or the same thing made of the older files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from nybble.text.tokenizer import Tokenizer as Served
from nybble_models.errors import ModelError
from nybble_models.tokenizer import load_tokenizer
from nybble_quantizers.tokenizing import carry_over
from support_originals import write_new, write_parts
from support_process import environment

TEXTS = ("apple", " an apple\n\n= Title =", "</s>", "", "Grüße <pad> 👍 <s>")


def ids(tokenizer: Tokenizer) -> list[list[int]]:
    return [
        tokenizer.encode(text, add_special_tokens=special).ids for text in TEXTS for special in (True, False)
    ]


def test_older_files_encode_as_tokenizer_json_does(tmp_path: Path) -> None:
    """OPT's begins every text with </s>."""
    made = load_tokenizer(write_parts(tmp_path))
    assert made.encode("apple").ids[0] == 2 and made.decode(made.encode("apple").ids[1:]) == "apple"
    assert ids(made) == ids(load_tokenizer(write_new(tmp_path / "new")))


def test_the_quantized_folder_encodes_as_its_source(tmp_path: Path) -> None:
    (tmp_path / "quantized").mkdir()
    carry_over(write_parts(tmp_path), tmp_path / "quantized")
    assert not (tmp_path / "tokenizer.json").exists()
    assert ids(Tokenizer.from_file(str(tmp_path / "quantized" / "tokenizer.json"))) == ids(
        load_tokenizer(tmp_path)
    )
    before, after = Served.load(tmp_path), Served.load(tmp_path / "quantized")
    assert [before.encode(text) for text in TEXTS] == [after.encode(text) for text in TEXTS]
    assert before.special == after.special and before.special["bos_token"] == "</s>"


def test_transformers_encodes_both_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "quantized").mkdir()
    carry_over(write_parts(tmp_path), tmp_path / "quantized")
    found = [AutoTokenizer.from_pretrained(each) for each in (tmp_path, tmp_path / "quantized")]
    assert [found[0](text)["input_ids"] for text in TEXTS] == [found[1](text)["input_ids"] for text in TEXTS]


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    write_new(tmp_path)
    (tmp_path / "vocab.json").write_text("not even JSON")
    assert load_tokenizer(tmp_path).encode("apple").ids


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("vocab.json", None, "no tokenizer.json"),
        ("vocab.json", "{", r"no tokenizer\.json, and none can be made of vocab\.json \("),
        ("merges.txt", None, r"none can be made of vocab\.json"),
        ("tokenizer.json", "<html>", "not a tokenizer"),
    ],
    ids=["nothing", "damaged", "a part", "damaged whole"],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    file = write_parts(tmp_path) / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(ModelError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.hint


def test_weights_are_written_without_a_tokenizer_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (write_parts(tmp_path) / "merges.txt").unlink()
    (tmp_path / "quantized").mkdir()
    carry_over(tmp_path, tmp_path / "quantized")
    assert "no tokenizer.json is written" in caplog.text
    assert (tmp_path / "quantized" / "vocab.json").exists()


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    write_parts(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"none can be made of vocab\.json"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_importing_loads_nothing_heavy() -> None:
    program = (
        "import sys, nybble_models.tokenizer, nybble.text.tokenizer\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
