"""Stop strings over a stream, against the obvious way of finding them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.text.stops import StopFilter

LETTERS = st.text("ab", max_size=12)


def obvious(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character; the first end wins, of equal ends the longer string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    chunks=st.lists(LETTERS, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
)
def test_result_does_not_depend_on_the_chunks(chunks: list[str], stops: list[str]) -> None:
    text, stop = obvious("".join(chunks), stops)
    found = StopFilter(stops)
    shown = ""
    for chunk in chunks:
        shown += found.push(chunk)
        assert text.startswith(shown), "a part of a stop string was shown"
        if found.stop is not None:
            break
    else:
        shown += found.flush()
    assert (shown, found.stop) == (text, stop)


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        (["one S", "TO", "P two"], ["one ", "", ""]),
        (["one S", "TO", "M two"], ["one ", "", "STOM two"]),
        (["SSTO", "P"], ["S", ""]),
        (["STO", "STOP"], ["", "STO"]),
    ],
    ids=["stopped", "not-stopped", "overlap", "restart"],
)
def test_only_what_may_be_a_start_is_held_back(chunks: list[str], shown: list[str]) -> None:
    found = StopFilter(["STOP"])
    assert [found.push(chunk) for chunk in chunks] == shown


def test_flush_lets_go() -> None:
    found = StopFilter(["STOP"])
    assert found.push("a STO") + found.flush() == "a STO"


def test_long_stop_strings_cost_the_same_per_character() -> None:
    """Sixteen strings of 1024 characters that nearly match 20,000 characters."""
    found = StopFilter(["a" * 1023 + chr(98 + i) for i in range(16)])
    began = time.perf_counter()
    for _ in range(200):
        found.push("a" * 100)
    assert found.stop is None
    assert time.perf_counter() - began < 5
