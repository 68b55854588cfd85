"""SHA256SUMS: what every file of a checkpoint must hash to, as `sha256sum -c SHA256SUMS` reads it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from nybble_models.errors import BrokenCheckpoint

FILE = "SHA256SUMS"

_LINE = re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9a-f]{64}) [ *](?P<name>.+)", re.DOTALL)
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # of names, as coreutils writes them


def write(folder: Path) -> None:
    """Hash every file of the folder; the last thing to be written to it."""
    lines = [_line(_sum(folder / name), name) for name in _names(folder)]
    (folder / FILE).write_bytes(_bytes("".join(lines)))


def check(folder: Path) -> list[str]:
    """What does not hold, one line each: files that are missing, changed or not listed."""
    if not (folder / FILE).is_file():
        return [f"{FILE} is missing"]
    try:
        listed = read(folder)
    except BrokenCheckpoint as error:
        return [str(error)]
    problems = []
    for name, digest in listed.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing; {FILE} lists it")
        elif _sum(folder / name) != digest:
            problems.append(f"{name} is not the file that {FILE} lists: its sum differs")
    problems += [f"{name} is not listed in {FILE}" for name in _names(folder) if name not in listed]
    return problems


def read(folder: Path) -> dict[str, str]:
    """SHA-256 in hexadecimal by path. Raises `BrokenCheckpoint` for what is no list of sums."""
    text = (folder / FILE).read_bytes().decode("utf8", "surrogateescape")
    found: dict[str, str] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise BrokenCheckpoint(f"{FILE}:{number} is not a sum and a name", hint="download the file again")
        name = _unescaped(match["name"]) if match["escaped"] else match["name"]
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BrokenCheckpoint(f"{FILE}:{number} names a file outside the folder: {name!r}")
        found[name] = match["digest"]
    return found


def _names(folder: Path) -> Iterator[str]:
    """Every file but the sums, sorted. Hidden ones are a tool's (.git, .cache), not the model's."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    seen = (path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    return iter(sorted((name for name in seen if name != FILE), key=_bytes))


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(digest: str, name: str) -> str:
    escaped = "".join(_ESCAPES.get(character, character) for character in name)
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def _unescaped(name: str) -> str:
    plain = {written: character for character, written in _ESCAPES.items()}
    return re.sub(r"\\.", lambda match: plain.get(match[0], match[0]), name)


def _bytes(text: str) -> bytes:
    """File names are bytes, whatever they hold."""
    return text.encode("utf8", "surrogateescape")
