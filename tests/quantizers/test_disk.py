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
import sys
from pathlib import Path
from nybble_models.errors import ModelError
from nybble_quantizers.convert import convert
from nybble_quantizers.pipeline import quantize
from nybble_quantizers.scheme import Scheme

source, disk, at, memory = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "little"
room = 200_000 if at == "write 0" else 0  # for the canary, and not for the shard after it
scheme = Scheme(method="awq", group_size=32, samples=4, length=24, grid=8, format="gptq_v2")
if memory:
    from nybble_quantizers.estimate import Estimate
    Estimate.check = lambda said, budget: None

def use_up(stage):
    if stage == at:
        with open(disk / "other", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                file.truncate(file.tell() - room)

def attempt(name, told=lambda event: None):
    try:
        quantize(source, disk / name, scheme, progress=told, command="", memory=int(memory) or None)
    except ModelError as error:
        print(error, "|", error.hint)

attempt("out", lambda event: use_up(f"{event.stage} {event.done}"))
print(sorted(f.name for f in disk.iterdir()))
if (disk / "other").exists():
    kept = [f.name for f in next(disk.glob(".out.*")).rglob("*") if f.is_file()]
    print(sorted(kept))
    (disk / "other").unlink()
    attempt("out")
    attempt("whole")
    folders = [{f.name: f.read_bytes() for f in (disk / n).iterdir()} for n in ("out", "whole")]
    print(folders[0] == folders[1], sorted(f.name for f in disk.iterdir()))
if at == "convert":
    try:
        convert(disk / "out", disk / "other format", "compressed-tensors", lambda phase, part: use_up(phase))
    except ModelError as error:
        print(error, "|", error.hint)
    print(sorted(f.name for f in disk.iterdir()))
"""


def run(tmp_path: Path, options: str, full_at: str = "", memory: str = "enough") -> list[str]:
    """What quantizing onto a tmpfs with these mount options prints. `full_at`: when somebody fills it."""
    (tmp_path / "plain").mkdir()
    source = write_checkpoint(tmp_path / "plain", group_size=None)
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "quantize.py").write_text(QUANTIZE)
    script = f"{sys.executable} {tmp_path}/quantize.py {source} {disk} '{full_at}' {memory}"
    arguments = [*NAMESPACE, "sh", "-c", f"mount -t tmpfs -o {options} tmpfs {disk} && exec {script}"]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


BLOCKS = [f"block-0000{i}.safetensors" for i in range(3)]
TEXT = "calibration.safetensors"


@pytest.mark.parametrize(
    ("full_at", "memory", "kept"),
    [
        ("calibrate 24", "enough", []),
        ("quantize 1", "enough", [*BLOCKS[:1], TEXT, "states-00000.safetensors"]),
        ("quantize 2", "little", [*BLOCKS[:2], TEXT, "states-00001.safetensors"]),
        ("write 0", "enough", [*BLOCKS, TEXT, "states-00002.safetensors"]),
        ("write 1", "enough", [*BLOCKS, TEXT, "states-00002.safetensors"]),
    ],
    ids=["before the first block", "after a block", "states in files", "shards", "papers"],
)
def test_what_is_done_when_a_disk_fills_up_is_not_done_again(
    tmp_path: Path, full_at: str, memory: str, kept: list[str]
) -> None:
    """The same bytes as of a run with room come out once there is some."""
    said, left, found, resumed = run(tmp_path, "size=40m", full_at, memory)
    assert said.startswith(f"the disk of {tmp_path}/disk is full: about ")
    assert f"the same command again: it goes on from what is kept in {tmp_path}/disk/.out.partial-" in said
    assert left.startswith("['.out.partial-") and left.endswith("', 'other']")
    assert found == str(kept)
    assert resumed == "True ['out', 'whole']"


def test_what_starts_anew_anyway_leaves_nothing_on_a_full_disk(tmp_path: Path) -> None:
    made, said, left = run(tmp_path, "size=40m", "convert")
    assert made == "['out']"
    assert "No space left" in said and "is the disk full" in said
    assert left == "['other', 'out']"


def test_a_disk_that_is_too_small_from_the_start(tmp_path: Path) -> None:
    said, left = run(tmp_path, "size=1m")
    assert "1 MiB free" in said and "MiB are needed" in said
    assert left == "[]"


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    said, left = run(tmp_path, "size=40m,ro")
    assert "Read-only file system" in said
    assert left == "[]"


def test_a_disk_with_room(tmp_path: Path) -> None:
    """The same script on the same disk, with nobody else on it."""
    assert run(tmp_path, "size=40m") == ["['out']"]
