from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nybble_quantizers import sums

ODD_NAMES = (
    "model.safetensors",
    "a b",
    "ünï",
    "back\\slash",
    "new\nline",
    "carriage\rreturn",
    "folder/inner",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    for number, name in enumerate(ODD_NAMES):
        (tmp_path / name).write_bytes(bytes([number]) * 5)
    sums.write(tmp_path)
    return tmp_path


def test_sha256sum_reads_what_is_written(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", sums.FILE]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    (folder / "a b").write_text("changed")
    changed = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    assert changed.returncode == 1


def test_what_was_written_holds_and_is_read_back(folder: Path) -> None:
    assert sums.check(folder) == []
    assert set(sums.read(folder)) == set(ODD_NAMES)


def test_lines_are_sorted_and_the_same_each_time(folder: Path) -> None:
    first = (folder / sums.FILE).read_bytes()
    names = [line.split(b"  ")[1] for line in first.splitlines() if not line.startswith(b"\\")]
    assert names == sorted(names)
    sums.write(folder)
    assert (folder / sums.FILE).read_bytes() == first


def test_hidden_files_are_nobodys_business(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    (folder / ".gitattributes").write_text("")
    assert sums.check(folder) == []


@pytest.mark.parametrize("name", ["model.safetensors", "folder/inner", "new\nline"])
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[2] ^= 1
    (folder / name).write_bytes(data)
    assert sums.check(folder) == [f"{name} is not the file that SHA256SUMS lists: its sum differs"]


def test_missing_and_new_files_are_named(folder: Path) -> None:
    (folder / "a b").unlink()
    (folder / "new.json").write_text("{}")
    assert sums.check(folder) == [
        "a b is missing; SHA256SUMS lists it",
        "new.json is not listed in SHA256SUMS",
    ]


def test_without_the_list_nothing_can_be_said(folder: Path) -> None:
    (folder / sums.FILE).unlink()
    assert sums.check(folder) == ["SHA256SUMS is missing"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        pytest.param("", "SHA256SUMS:1 is not a sum and a name", id="empty"),
        pytest.param("abc  model", "SHA256SUMS:1 is not a sum and a name", id="short sum"),
        pytest.param(
            f"{'0' * 64}  ../secret", "SHA256SUMS:1 names a file outside the folder: '../secret'", id="above"
        ),
        pytest.param(
            f"{'0' * 64} */etc/passwd",
            "SHA256SUMS:1 names a file outside the folder: '/etc/passwd'",
            id="absolute",
        ),
    ],
)
def test_a_list_that_is_none_is_a_problem(folder: Path, line: str, problem: str) -> None:
    (folder / sums.FILE).write_text(f"{line}\n")
    assert sums.check(folder) == [problem]
