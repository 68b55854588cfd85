"""Disks that are full or cannot be written: real ones, small and in memory, in a namespace of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support_checkpoint import write_checkpoint
from support_process import environment

NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _may_mount(), reason="needs user namespaces (unshare, of util-linux)")

QUANTIZE = """
import os, sys
from pathlib import Path
from nybble_models.errors import ModelError
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme

disk, fill = Path(sys.argv[2]), sys.argv[3] == "fill"

def use_up(event):
    if fill and event.stage == "quantize" and event.done == 1:
        with open(disk / "other", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

scheme = Scheme(method="awq", group_size=32, samples=4, length=24, grid=8)
try:
    quantize(sys.argv[1], disk / "out", scheme, progress=use_up)
except ModelError as error:
    print(error, "|", error.hint)
print(sorted(f.name for f in disk.iterdir()))
"""


def run(tmp_path: Path, options: str, mode: str) -> list[str]:
    """What quantizing onto a tmpfs with these mount options prints."""
    (tmp_path / "plain").mkdir()
    source = write_checkpoint(tmp_path / "plain", group_size=None)
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "quantize.py").write_text(QUANTIZE)
    command = f"mount -t tmpfs -o {options} tmpfs {disk} && exec {sys.executable} {tmp_path}/quantize.py"
    arguments = [*NAMESPACE, "sh", "-c", f"{command} {source} {disk} {mode}"]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path) -> None:
    said, left = run(tmp_path, "size=40m", "fill")
    assert "No space left" in said and "is the disk full" in said
    assert left == "['other']"


def test_a_disk_that_is_too_small_from_the_start(tmp_path: Path) -> None:
    said, left = run(tmp_path, "size=1m", "leave")
    assert "1 MiB free" in said and "MiB are needed" in said
    assert left == "[]"


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    said, left = run(tmp_path, "size=40m,ro", "leave")
    assert "Read-only file system" in said
    assert left == "[]"


def test_a_disk_with_room(tmp_path: Path) -> None:
    """The same script on the same disk, with nobody else on it."""
    assert run(tmp_path, "size=40m", "leave") == ["['out']"]
