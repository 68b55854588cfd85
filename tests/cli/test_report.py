"""`nybble report` writes one whole page that loads nothing and in which words of files stay words."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nybble import cli
from nybble_quantizers.quality_report.axis import axis
from nybble_quantizers.quality_report.heat import heat, scale
from nybble_quantizers.quality_report.page import page
from nybble_quantizers.quality_report.record import Record, record
from nybble_quantizers.quality_report.scatter import MARKS, scatter
from nybble_quantizers.quality_report.wording import form, label, size, storage
from support_papers import EVALUATION, with_papers

VOID = {"meta", "br"}
LOADS = {"src", "srcset", "data", "action", "background", "poster", "xlink:href"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
HOSTILE = "<script>alert('x')</script>\"><img src=http://evil/>&\x00\ud800"


class Page(HTMLParser):
    """Checks that every tag is closed where it must be; collects what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [
            held
            for name, held in self.tags
            if name == tag and kind in [*(held.get("class") or "").split(" "), ""]
        ]


def said(layers: int = 2, db: float | None = 20.0, **changes: Any) -> dict[str, Any]:
    """A report of a model of two projections a layer."""
    rows = [
        {
            "name": f"model.layers.{i}.{p}",
            "bits": 4,
            "group_size": 64,
            "bytes": 1000,
            "weight_error": 0.1,
            "output_sqnr_db": None if db is None else db + i,
        }
        for i in range(layers)
        for p in ("self_attn.q_proj", "mlp.down_proj")
    ]
    whole = {"source": "model", "scheme": {"method": "awq"}, "bytes": {"linear": 10**6}, "layers": rows}
    return whole | {"bits_per_weight": 4.5, "seed": 0, "command": "nybble quantize"} | changes


def of(name: str = "a", settings: dict[str, Any] = AWQ, **changes: Any) -> Record:
    return record(name, said(**changes), {"quantization_config": settings})


def test_a_page_about_two_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = with_papers(tmp_path, "first", scheme={"method": "awq"}, evaluation=EVALUATION)
    second, _ = with_papers(tmp_path, "second", scheme={"method": "rtn"})
    out = tmp_path / "page.html"
    assert cli.main(["report", str(first), str(second), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    found = Page(out.read_text(encoding="utf8"))
    assert len(found.of("rect", "cell")) == 2 * 21
    assert len([held for held in found.of("path", "mark") if "transform" in held]) == 2 * 2  # wide and narrow
    for words in ("0.0123", "0.0119 to 0.0127", "95.10 %", "+7.50 %", "nybble quantize plain -o out", "n/a"):
        assert words in found.words
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "first", "second", "page.html"}


def test_the_page_is_written_here_unless_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = with_papers(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert (tmp_path / "report.html").exists()


def test_every_picture_has_a_title_a_description_and_a_table() -> None:
    found = Page(page([of("a"), of("b", db=None)]))
    ids = {held.get("id") for _, held in found.tags}
    pictures = [held for held in found.of("svg") if held.get("aria-hidden") != "true"]
    assert len(pictures) == 4
    for held in pictures:
        assert held["role"] == "img"
        assert set((held["aria-labelledby"] or "").split()) <= ids
    assert len(found.of("table")) == 3
    assert len(ids - {None}) == sum("id" in held for _, held in found.tags)


def test_nothing_is_loaded_and_nothing_runs() -> None:
    text = page([of("a", evaluation=EVALUATION), of(HOSTILE)])
    found = Page(text)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "embed", "img", "base"}
    for _, held in found.tags:
        assert not LOADS & held.keys()
        assert not [name for name in held if name.startswith("on")]
        assert (held.get("href") or "#").startswith("#")
    policy = next(held["content"] for held in found.of("meta") if "http-equiv" in held)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not re.search(r"url\(|@import|@font-face", text)


def test_hostile_words_stay_words() -> None:
    report = said(
        source=HOSTILE,
        scheme={"method": HOSTILE},
        command=HOSTILE,
        skipped=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        calibration={"origin": HOSTILE},
        evaluation=EVALUATION | {"text": HOSTILE},
    )
    report["layers"][0]["name"] = HOSTILE
    text = page([record(HOSTILE, report, {"quantization_config": {"quant_method": HOSTILE}})])
    text.encode("utf8")
    found = Page(text)
    assert "script" not in {tag for tag, _ in found.tags}
    assert "\x00" not in text
    assert found.words.count("<script>alert('x')</script>\"><img src=http://evil/>&\ufffd\ufffd") >= 8


@pytest.mark.parametrize(
    "report",
    [
        {},
        {
            "layers": [None, 1, {}],
            "bytes": [],
            "scheme": "awq",
            "evaluation": 3,
            "skipped": "x",
            "seed": True,
        },
        {"layers": [{"name": 5, "bits": "4", "weight_error": -1, "output_sqnr_db": float("nan")}]},
        {
            "layers": {},
            "bytes": {"linear": "many"},
            "evaluation": {"kl_interval": [1], "top1_interval": "ab"},
        },
    ],
    ids=["empty", "other types", "no numbers", "other shapes"],
)
@pytest.mark.parametrize(
    "settings", [None, "awq", {"config_groups": 3}, {"config_groups": {"a": 1}}, {"zero_point": []}]
)
def test_reports_of_any_content_make_a_page(report: dict[str, Any], settings: Any) -> None:
    Page(page([record("x", report, {"quantization_config": settings})]))


def test_a_layer_number_of_any_size_is_one_column() -> None:
    report = said(layers=1)
    report["layers"].append(report["layers"][0] | {"name": "model.layers.999999.self_attn.q_proj"})
    report["layers"].append(report["layers"][0] | {"name": f"model.layers.{'9' * 5000}.x"})
    plot = heat(record("x", report, {}))
    assert plot is not None
    assert plot.width < 2000


def test_experts_share_a_square_and_the_noisiest_decides() -> None:
    rows = [
        {"name": f"model.layers.0.mlp.experts.{i}.up_proj", "bits": 4, "output_sqnr_db": db, "bytes": 1}
        for i, db in enumerate((30.0, 12.0, 25.0))
    ]
    plot = heat(record("x", {"layers": [*rows, {"name": "lm_head", "bits": 8, "output_sqnr_db": 40.0}]}, {}))
    assert plot is not None
    assert [cell.tip for cell in plot.cells] == [
        "model.layers.0.mlp.experts.1.up_proj: 12.0 dB, 4-bit, 1 B",
        "lm_head: 40.0 dB, 8-bit, n/a",
    ]
    assert [cell.colour for cell in plot.cells] == [7, 1]


@pytest.mark.parametrize("values", [[20.0], [19.99, 20.0], [3.0, 96.0], [-250.0, 300.0]])
def test_a_scale_holds_every_value(values: list[float]) -> None:
    ruler = scale(values)
    levels = [ruler.level(db) for db in values]
    assert all(0 <= ruler.colour(level) <= 7 for level in levels)
    assert levels == sorted(levels, reverse=True)
    for db, level in zip(values, levels, strict=True):
        low, high = (float(end) for end in ruler.label(level).split(" to "))
        assert low <= db <= high or ruler.count == 8


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.1, 0.9], (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        ([5.0], (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)),
        ([-0.01, 0.04], (-0.01, 0.0, 0.01, 0.02, 0.03, 0.04)),
        ([0.0], (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        ([0.003, 0.4], (0.001, 0.01, 0.1, 1.0)),
        ([-1.0, 40.0], (-10.0, 0.0, 10.0, 20.0, 30.0, 40.0)),
    ],
)
def test_axes_have_round_ticks(values: list[float], ticks: tuple[float, ...]) -> None:
    made = axis(values, zero=True, logarithmic=True)
    assert made.ticks == pytest.approx(ticks)
    assert all(0 <= made.at(value) <= 1 for value in values)


def test_the_frontier_leaves_out_what_is_larger_and_worse() -> None:
    points = {"a": (1, 0.5), "b": (2, 0.1), "worse": (3, 0.2), "c": (4, 0.01), "twin": (2, 0.3)}
    records = [
        of(name, bytes={"linear": mb * 10**6}, evaluation={"kl_divergence": kl})
        for name, (mb, kl) in points.items()
    ]
    plot = scatter(records)
    assert plot is not None
    by_name = dict(zip(points, plot.points, strict=True))
    assert plot.frontier == tuple((by_name[name].x, by_name[name].y) for name in "abc")


@pytest.mark.parametrize(
    ("evaluated", "title", "left_out"),
    [
        ((True,), "KL divergence", ()),
        ((True, False), "mean noise of the linears' outputs", ()),
        ((True, True), "KL divergence", ()),
        ((True, False, True), "KL divergence", ("1",)),
    ],
)
def test_the_axis_shows_the_best_figure_that_can_be_compared(
    evaluated: tuple[bool, ...], title: str, left_out: tuple[str, ...]
) -> None:
    records = [of(str(i), evaluation=EVALUATION if known else None) for i, known in enumerate(evaluated)]
    plot = scatter(records)
    assert plot is not None
    assert plot.measure.title.startswith(title)
    assert plot.left_out == left_out
    if left_out:
        assert "Not shown, for want of that figure: 1." in Page(page(records)).words


def test_without_any_figure_there_is_no_plot() -> None:
    assert scatter([record("x", {}, {})]) is None


def test_labels_do_not_cover_each_other_and_marks_repeat() -> None:
    records = [of(f"checkpoint-{i}", scheme={"method": f"m{i}"}, db=20.0) for i in range(8)]
    plot = scatter(records, 360, 340)
    assert plot is not None
    assert [point.kind for point in plot.points] == [i % len(MARKS) for i in range(8)]
    assert 0 < sum(point.label is not None for point in plot.points) < 8


@pytest.mark.parametrize(
    ("settings", "bits", "words", "where"),
    [
        pytest.param(AWQ, (4,), "4-bit g64", "AWQ (GEMM)", id="awq"),
        pytest.param(
            {"quant_method": "gptq", "sym": True, "group_size": 64, "checkpoint_format": "gptq_v2"},
            (4,),
            "4-bit g64 symmetric",
            "GPTQ v2",
            id="gptq",
        ),
        pytest.param(
            {"quant_method": "gptq", "sym": False, "group_size": -1},
            (3, 8),
            "3 and 8-bit",
            "GPTQ v1",
            id="mixed",
        ),
        pytest.param(
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {
                    "g": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 8, "type": "float", "symmetric": True},
                        "input_activations": {"num_bits": 8},
                    }
                },
            },
            (8,),
            "FP8, 8-bit inputs",
            "compressed-tensors (float-quantized)",
            id="fp8",
        ),
    ],
)
def test_forms_and_formats_have_names(
    settings: dict[str, Any], bits: tuple[int, ...], words: str, where: str
) -> None:
    report = said(layers=len(bits))
    for row in report["layers"]:
        row["bits"] = bits[int(row["name"].split(".")[2])]
    found = record("x", report, {"quantization_config": settings})
    assert form(found) == words
    assert storage(found) == where
    assert label(found) == f"AWQ {words}"


def test_sizes_are_in_powers_of_ten() -> None:
    assert [size(n) for n in (12, 1500, 2_500_000, 3_000_000_000, None)] == [
        "12 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
        "n/a",
    ]


@pytest.mark.parametrize(
    ("name", "error"),
    [("none", "not a folder"), ("empty", "has no quant_report.json"), ("broken", "is not valid JSON")],
)
def test_what_holds_no_report_is_one_line(
    tmp_path: Path, name: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "quant_report.json").write_text("{")
    assert cli.main(["report", str(tmp_path / name), "-o", str(tmp_path / "r.html")]) == 2
    assert error in capsys.readouterr().err.splitlines()[0]
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("out", "error"),
    [("off/r.html", "off does not exist"), ("text/r.html", "text is a file"), (".", "is a folder")],
    ids=["no folder", "below a file", "a folder"],
)
def test_where_no_page_can_be_written_is_one_line(
    tmp_path: Path, out: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("")
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / out)]) == 2
    said, hint = capsys.readouterr().err.splitlines()
    assert said.endswith(error) and hint.startswith("hint: ")


def test_the_report_of_a_report_is_read_from_disk_as_it_is(tmp_path: Path) -> None:
    folder, report = with_papers(tmp_path, scheme={"method": "awq"})
    held = record("x", json.loads((folder / "quant_report.json").read_text()), {})
    assert [row.output_db for row in held.rows] == [row.output_sqnr_db for row in report.layers]
    assert held.nbytes == sum(report.bytes.values())
