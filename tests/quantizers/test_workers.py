from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nybble_quantizers.workers import in_turn, side_by_side


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_items() -> None:
    with side_by_side() as run:
        assert run(lambda x: x * x, range(50)) == in_turn(lambda x: x * x, range(50))


def test_a_worker_computes_on_one_thread_and_without_gradients() -> None:
    def state(_: int) -> tuple[int, bool]:
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    with side_by_side() as run:
        assert set(run(state, range(8))) == {(1, True)}
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_an_error_comes_through_and_the_threads_come_back() -> None:
    with pytest.raises(ZeroDivisionError), side_by_side() as run:
        run(lambda x: 1 / x, [1, 0])
    assert torch.get_num_threads() == 2
