"""One server for all tests that need no special engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support_engine import FakeEngine, byte_tokenizer
from support_http import Served, serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with nothing but a tokenizer."""
    return byte_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(folder: Path) -> FakeEngine:
    return FakeEngine(folder)


@pytest.fixture(scope="module")
def shared_engine(folder: Path) -> FakeEngine:
    return FakeEngine(folder)


@pytest.fixture(scope="module")
def served(shared_engine: FakeEngine) -> Iterator[Served]:
    with serving(shared_engine, max_body_bytes=300_000) as server:
        yield server
