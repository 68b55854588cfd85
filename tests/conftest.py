"""For every test: OpenMP threads sleep instead of spinning, so that a busy machine stalls no test.

Triton kernels run in its interpreter, on the CPU; on a GPU machine, `TRITON_INTERPRET=0` compiles them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before anything imports torch
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton


SLOW = (
    "test_triton_aot",
    "test_gpu",
    "test_formats",
    "test_triton_step",
    "test_sample",
    "test_disk",
    "test_estimate",
    "test_gpu_gate",
    "test_teaching",
    "test_default_model",
)
"""Files that take half a minute or more, the longest first: so no worker is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    """A command that runs inside a test logs to that test's standard error, which is closed afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
    root.setLevel(level)
