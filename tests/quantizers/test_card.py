from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gguf
import pytest
import yaml

from nybble_models.errors import BrokenCheckpoint, ModelError
from nybble_quantizers import card, papers, sums
from nybble_quantizers.origin import copy_licence, origin
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.quality_report.page import page
from nybble_quantizers.quality_report.record import read
from nybble_quantizers.scheme import Scheme
from support_checkpoint import write_checkpoint
from support_papers import EVALUATION, with_papers

SVG = "{http://www.w3.org/2000/svg}"


def front_matter(folder: Path) -> dict[str, Any]:
    _, matter, _ = (folder / card.CARD).read_text().split("---\n", 2)
    found = yaml.safe_load(matter)
    assert isinstance(found, dict)
    return found


def test_the_hub_finds_what_it_looks_for(tmp_path: Path) -> None:
    known = {"base_model": "owner/name", "license": "apache-2.0", "language": ["en"]}
    out, _ = with_papers(tmp_path, origin=known)
    assert front_matter(out) == {
        "base_model": "owner/name",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nybble", "rtn", "awq", "4-bit"],
    }


def test_a_source_outside_the_hubs_cache_is_named_by_hand(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    source = write_checkpoint(tmp_path / "plain", group_size=None)
    scheme = Scheme(method="rtn", group_size=32)
    with pytest.raises(ModelError, match="is no id of the hub"):
        quantize(source, tmp_path / "out", scheme, base_model="../plain/x")
    quantize(source, tmp_path / "out", scheme, base_model="owner/name")
    matter = front_matter(tmp_path / "out")
    assert (matter["base_model"], matter["base_model_relation"]) == ("owner/name", "quantized")


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    out, _ = with_papers(tmp_path)
    assert front_matter(out).keys() == {"library_name", "pipeline_tag", "tags"}
    text = (out / card.CARD).read_text()
    assert "perplexity" not in text
    assert "n/a" not in text
    assert "outputs" not in text


def test_figures_of_an_evaluation_are_in_the_table(tmp_path: Path) -> None:
    out, _ = with_papers(tmp_path, evaluation=EVALUATION)
    text = (out / card.CARD).read_text()
    for line in (
        "| method | round-to-nearest |",
        "| weights of linears | 4-bit g32 |",
        "| perplexity on `wiki.test.raw`, 12 windows of 2048 tokens | 21.500 |",
        "| rise | +7.50 % |",
        "| KL divergence from it, nats a token | 0.0123 (95 %: 0.0119 to 0.0127) |",
        "| top-1 agreement with it | 95.10 % (95 %: 94.70 to 95.50) |",
    ):
        assert f"\n{line}\n" in text


def test_a_calibrated_card_says_how_it_was_made(tmp_path: Path) -> None:
    out, report = with_papers(tmp_path, scheme={"method": "awq"})
    text = (out / card.CARD).read_text()
    assert report.calibration is not None
    assert str(report.calibration["sha256"]) in text
    assert "noise of the linears' outputs" in text
    assert "```sh\nnybble quantize plain -o out\n```" in text
    assert "* Seed: 0;" in text
    assert "torch `" in text


def test_the_same_input_makes_the_same_bytes_in_any_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with_papers(tmp_path, name, origin={"license": "mit"})
    for file in (card.CARD, card.PLOT, sums.FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_plot_is_svg_with_a_square_for_every_linear(tmp_path: Path) -> None:
    out, report = with_papers(tmp_path)
    text = (out / card.PLOT).read_text()
    squares = [e for e in ElementTree.fromstring(text).iter(f"{SVG}rect") if "cell" in e.get("class", "")]
    assert [square[0].text.split(":")[0] for square in squares if square[0].text] == [
        row.name for row in report.layers
    ]
    assert f"]({card.PLOT})" in (out / card.CARD).read_text()
    assert text.count("http") == 1  # the namespace


def test_a_model_at_16_bits_is_no_quantized_one(tmp_path: Path) -> None:
    out, _ = with_papers(tmp_path, scheme={"method": "none"}, origin={"base_model": "owner/name"})
    assert "base_model_relation" not in front_matter(out)
    assert not (out / card.PLOT).exists()
    assert "with all weights at 16 bits" in (out / card.CARD).read_text()


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    out, _ = with_papers(
        tmp_path,
        source="<script>alert(1)</script>\n---\n# x",
        command="echo ```\n```\n<b>",
        origin={"license": "[x]: '"},
    )
    text = (out / card.CARD).read_text()
    assert front_matter(out)["license"] == "[x]: '"
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert "\\<script\\>" in title
    assert "\n````sh\n" in text


@pytest.mark.parametrize(
    ("settings", "bits", "vllm", "needs"),
    [
        pytest.param({"quant_method": "awq", "zero_point": True}, 4, True, "`gptqmodel` and", id="awq"),
        pytest.param({"quant_method": "awq", "zero_point": False}, 4, False, "`gptqmodel` and", id="awq-sym"),
        pytest.param({"quant_method": "gptq", "sym": True}, 8, True, "`optimum`", id="gptq-sym"),
        pytest.param({"quant_method": "gptq", "sym": False}, 4, False, "`optimum`", id="gptq-asym"),
        pytest.param({"quant_method": "gptq", "sym": True}, 3, False, "`optimum`", id="gptq-3"),
        pytest.param(
            {"quant_method": "compressed-tensors"}, 4, True, "`compressed-tensors`", id="compressed-tensors"
        ),
        pytest.param(
            {"quant_method": "compressed-tensors"}, 3, False, "`compressed-tensors`", id="compressed-3"
        ),
        pytest.param(
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"targets": ["Linear"], "weights": {"type": "int", "strategy": "tensor"}}
                },
            },
            8,
            False,
            "`compressed-tensors`",
            id="compressed-tensor",
        ),
    ],
)
def test_only_programs_that_read_the_format_are_named(
    tmp_path: Path, settings: dict[str, Any], bits: int, vllm: bool, needs: str
) -> None:
    out, report = with_papers(tmp_path)
    layers = tuple(replace(row, bits=bits) for row in report.layers)
    config = json.loads((out / "config.json").read_text()) | {"quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config))
    card.write(out, replace(report, layers=layers))
    text = (out / card.CARD).read_text()
    assert ("vllm serve" in text) == vllm
    assert needs in text


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_transformers_is_not_named_for_zeros_that_are_packed(tmp_path: Path, symmetric: bool) -> None:
    """It expects them as they are not, and refuses the file."""
    scheme = {"format": "compressed-tensors", "symmetric": symmetric}
    out, _ = with_papers(tmp_path, scheme=scheme)
    text = (out / card.CARD).read_text()
    assert ("[transformers]" in text) == symmetric
    assert "vllm serve" in text


def test_fingerprints_of_the_text_are_not_for_readers(tmp_path: Path) -> None:
    out, report = with_papers(tmp_path, scheme={"method": "awq"})
    assert report.calibration is not None
    told = replace(report, calibration=report.calibration | {"sketch": ["0123456789abcdef"]})
    papers.write(out, told)
    assert "0123456789abcdef" not in (out / card.CARD).read_text() + page([read(out)])
    assert papers.read(out).calibration == told.calibration


def test_a_quantized_head_is_left_to_nybble(tmp_path: Path) -> None:
    out, report = with_papers(tmp_path)
    head = replace(report.layers[0], name="lm_head")
    card.write(out, replace(report, layers=(*report.layers, head)))
    text = (out / card.CARD).read_text()
    assert "also read by" not in text
    assert "nybble serve" in text


def test_an_evaluation_can_be_added_later(tmp_path: Path) -> None:
    out, report = with_papers(tmp_path, scheme={"method": "awq"})
    papers.add_evaluation(out, EVALUATION)
    assert papers.read(out).evaluation == EVALUATION
    assert papers.read(out).layers == report.layers
    assert "KL divergence" in (out / card.CARD).read_text()
    assert sums.check(out) == []


def test_an_evaluation_is_not_added_to_what_has_changed(tmp_path: Path) -> None:
    out, _ = with_papers(tmp_path)
    (out / "tokenizer.json").write_text("{}")
    before = (out / sums.FILE).read_bytes()
    with pytest.raises(BrokenCheckpoint, match=r"tokenizer\.json"):
        papers.add_evaluation(out, EVALUATION)
    assert (out / sums.FILE).read_bytes() == before


def test_a_report_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quant_report.json").write_text('{"layers": [], "skipped": [], "colour": "blue"}')
    with pytest.raises(BrokenCheckpoint, match="another version"):
        papers.read(tmp_path)


def test_the_source_says_its_licence_and_the_cache_its_name(tmp_path: Path) -> None:
    source = tmp_path / "hub" / "models--Some-Owner--some--model.v1" / "snapshots" / "abc"
    source.mkdir(parents=True)
    matter = (
        "license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en, de]\nbase_model: not/this\n"
    )
    (source / "README.md").write_text(f"---\n{matter}tags: [x]\n---\n# Model\n")
    assert origin(source) == {
        "base_model": "Some-Owner/some--model.v1",
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": ["en", "de"],
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\n[1, 2]\n---\n",
        "---\n: {\n---\n",
        "---\nlicense: 5\n---\n",
        "---\nlicense: |\n  a\n  b\n---\n",
        "\udcff",
    ],
    ids=["empty", "none", "list", "not yaml", "number", "lines", "not text"],
)
def test_a_card_that_says_nothing_is_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("utf8", "surrogateescape"))
    assert origin(tmp_path) == {}


def test_a_gguf_head_says_its_licence(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert origin(tmp_path / "m.gguf") == {"license": "mit", "language": ["en"]}


def test_licence_texts_go_with_the_weights(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md"):
        (source / name).write_text(name)
    copy_licence(source, out)
    assert {path.name for path in out.iterdir()} == {"LICENSE", "NOTICE.txt", "USE_POLICY.md"}
