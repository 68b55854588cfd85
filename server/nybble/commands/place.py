"""Where a file is to be written: checked before the work that fills it."""

from __future__ import annotations

from pathlib import Path

from nybble.errors import UsageError


def check_place(file: Path) -> None:
    """Whether a file can be put there. Raises `UsageError`."""
    if file.is_dir():
        raise UsageError(f"{file} is a folder", hint="name a file in it")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{above} is a file", hint="name a file in a folder")
    if above != file.absolute().parent:
        raise UsageError(f"{file.parent} does not exist", hint="make that folder, or name another file")
