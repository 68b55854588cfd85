"""Windows of states in memory and in files: the same numbers, and files that vanish with the process."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nybble_quantizers import windows
from nybble_quantizers.hessian import hessian, lack
from nybble_quantizers.windows import Place, Seen, Windows, in_memory, spilled_to
from nybble_quantizers.workers import side_by_side


def made(count: int, rows: int = 5, width: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return in_memory if request.param == "memory" else spilled_to(tmp_path)


def test_what_is_put_is_got(place: Place, tmp_path: Path) -> None:
    expected = made(6)
    held = place(6, (5, 7))
    with side_by_side() as run:
        run(lambda i: held.__setitem__(i, expected[i]), range(6))
    held[-1] = held[-1] + 1
    expected[-1] = expected[-1] + 1
    assert len(held) == 6
    assert all(map(torch.equal, held, expected))
    assert all(map(torch.equal, held[4:1:-1], expected[4:1:-1]))
    with pytest.raises(IndexError):
        held[6]
    assert not list(tmp_path.iterdir())  # a file without a name


def test_views_and_other_types_are_stored_as_numbers(tmp_path: Path) -> None:
    held = spilled_to(tmp_path)(2, (7, 5))
    held[0] = made(1)[0].T
    held[1] = made(1)[0].T.double()
    assert torch.equal(held[0], made(1)[0].T)
    assert torch.equal(held[1], held[0]) and held[1].dtype == torch.float32
    with pytest.raises(ValueError, match=r"window of \[5, 7\]"):
        held[0] = made(1)[0]


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    held = spilled_to(tmp_path)(2, (5, 7))
    with pytest.raises(OSError, match="too early"):
        held[1]


def test_descriptors_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    held = [spilled_to(tmp_path)(2, (5, 7)) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    held.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_saved_is_a_safetensors_file(place: Place, tmp_path: Path) -> None:
    held = {"states": place(4, (5, 7)), "other": Windows(torch.stack(made(1, 3, 2)))}
    for index, window in enumerate(made(4)):
        held["states"][index] = window
    windows.save(tmp_path / "kept.safetensors", held)
    assert [f.name for f in tmp_path.iterdir()] == ["kept.safetensors"]
    read = load_file(tmp_path / "kept.safetensors")
    assert torch.equal(read["states"], torch.stack(made(4)))
    assert torch.equal(read["other"], torch.stack(made(1, 3, 2)))
    again = windows.load(tmp_path / "kept.safetensors")
    assert {name: len(each) for name, each in again.items()} == {"states": 4, "other": 1}
    assert all(map(torch.equal, again["states"], made(4)))
    assert torch.equal(again["other"][0], made(1, 3, 2)[0])


def test_seen_through_a_function_nothing_is_held() -> None:
    looked: list[int] = []

    def double(x: int) -> int:
        looked.append(x)
        return 2 * x

    seen = Seen(range(5), double)
    assert not looked
    assert (seen[1], seen[2:4], list(seen)) == (2, [4, 6], [0, 2, 4, 6, 8])
    assert looked == [1, 2, 3, 0, 1, 2, 3, 4]


def test_sums_do_not_depend_on_where_windows_are(place: Place) -> None:
    held = place(20, (5, 7))
    for index, window in enumerate(made(20)):
        held[index] = window
    aims, found = made(20, 5, 3), made(21, 5, 3)
    assert torch.equal(hessian(held), hessian(made(20)))
    assert torch.equal(lack(aims, found, held), lack(aims, found, made(20)))
