"""Wheels of the peers, for a machine without a network: downloaded here, and `gate.py --site FOLDER` there.

    python benchmarks/gpu/carry.py wheels         the peers
    python benchmarks/gpu/carry.py wheels --http  also what the HTTP part needs beside torch and transformers

bitsandbytes is repacked without the libraries of other CUDA versions: 4 MB instead of 43.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import paths

PEERS = ("humming-kernels==0.1.19", "torchao==0.18.0", "bitsandbytes==0.50.2")
SOURCES = ("gemlite==0.6.0.post2",)  # a source distribution of pure Python: built here
HTTP = (
    "annotated-types",
    "cyclopts",
    "docstring-parser",
    "docutils",
    "fastapi",
    "gguf",
    "orjson",
    "pydantic",
    "pydantic-core",
    "rich-rst",
    "starlette",
    "uvicorn",
)
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
KEPT = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def download(folder: Path, names: list[str], python: str) -> None:
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    for name in names:
        pip("download", "--quiet", "--no-deps", *target, "--dest", str(folder), name)


def pinned(names: tuple[str, ...]) -> list[str]:
    """With the versions of constraints.txt where it has them."""
    lines = (paths.ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    return [f"{name}=={versions[name]}" if name in versions else name for name in names]


def slim(wheel: Path) -> None:
    """Without libraries for other versions of CUDA and for other makers' devices."""
    small = wheel.with_suffix(".small")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.infolist():
            name = Path(each.filename).name
            if not name.startswith("libbitsandbytes") or name in KEPT:
                new.writestr(each, old.read(each))
    small.replace(wheel)


def unpacked(folder: Path, target: Path) -> Path:
    """A folder to import from: the given one, or `target` with the wheels that lie in it."""
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as held:
            held.extractall(target)
    return target if wheels else folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--http", action="store_true", help="also what serving needs")
    parser.add_argument("--python", default="3.12", help="of the machine they are for")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    download(asked.folder, [*PEERS, *(pinned(HTTP) if asked.http else ())], asked.python)
    for name in SOURCES:
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(asked.folder), name)
    for wheel in asked.folder.glob("bitsandbytes-*.whl"):
        slim(wheel)
    for wheel in sorted(asked.folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
