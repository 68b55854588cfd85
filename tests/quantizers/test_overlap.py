from __future__ import annotations

import random
from pathlib import Path

import pytest

from nybble_models.errors import ModelError
from nybble_quantizers import overlap
from nybble_quantizers.calibrate import refuse_overlap
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.report import Listener, QuantizeProgress
from nybble_quantizers.scheme import Scheme
from support_checkpoint import write_checkpoint

RNG = random.Random(5)
WORDS = [f"word{number}" for number in range(3000)]
TEXT = " ".join(RNG.choices(WORDS, k=2000))
TWELVE = " ".join(TEXT.split()[700:712])


def test_texts_of_their_own_share_nothing() -> None:
    other = " ".join(RNG.choices(WORDS, k=2000))
    assert overlap.shared(other, overlap.sketch([TEXT])) == []


@pytest.mark.parametrize("quote", [TWELVE, TWELVE.upper().replace(" ", ",\n ")], ids=["as is", "rewritten"])
def test_ten_words_in_a_row_are_found(quote: str) -> None:
    prints = [print for _, print in overlap.runs(TEXT)]
    found = overlap.shared(f"Something else, then {quote} and so on.", prints)
    assert found == [" ".join(TWELVE.split()[:10])]  # three runs in a row are one passage


def test_nine_words_are_no_run() -> None:
    prints = [print for _, print in overlap.runs(TEXT)]
    assert overlap.shared("x " * 20 + " ".join(TEXT.split()[700:709]) + " y" * 20, prints) == []


def test_a_sketch_of_a_long_text_still_finds_a_long_passage() -> None:
    """A tenth of the text in common; a sketch that kept nothing of it has probability 0.9 to the 1024."""
    long = " ".join(random.Random(6).choices(WORDS, k=20000))
    prints = overlap.sketch([long])
    assert len(prints) == overlap.KEPT
    assert overlap.shared("before " + " ".join(long.split()[:2000]), prints)


def test_calibration_on_the_judging_text_is_refused(tmp_path: Path) -> None:
    judge, text = tmp_path / "wiki.test.raw", tmp_path / "calib.txt"
    judge.write_text(f"An article. {TWELVE}. The end.")
    text.write_text(TEXT)
    with pytest.raises(ModelError, match=r"calib\.txt and wiki\.test\.raw share 1 runs of ten words"):
        refuse_overlap(text, judge)
    judge.write_text("Nothing in common.")
    refuse_overlap(text, judge)


def test_a_run_that_goes_on_is_refused_too(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "plain", group_size=None)
    text, judge = tmp_path / "calib.txt", tmp_path / "judge.txt"
    text.write_text(TEXT)
    judge.write_text(TWELVE)

    def stop(event: QuantizeProgress) -> None:
        if event.stage == "quantize":
            raise KeyboardInterrupt

    def run(judge: Path | None, progress: Listener | None = None) -> None:
        scheme = Scheme(group_size=32, samples=2, length=24, grid=2)
        quantize(source, tmp_path / "out", scheme, calibration=str(text), evaluation=judge, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        run(None, stop)
    with pytest.raises(ModelError, match="share 1 runs"):
        run(judge)
    assert list(tmp_path.glob(".out.partial-*/.journal/calibration.safetensors"))  # what is done is not lost
    run(None)
