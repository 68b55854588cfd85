"""WikiText-2's raw test split from the hub, for those who have no file of it."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

from nybble.errors import UsageError
from nybble_models.hub import fetch_data, hub_answers

NAME = "wiki.test.raw"
REPOSITORY, ARCHIVE = "ggml-org/ci", "wikitext-2-raw-v1.zip"  # the zip its authors published
MEMBER = f"wikitext-2-raw/{NAME}"
SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
HINT = f"give --text FILE: {NAME}, or any UTF-8 .txt or .jsonl"


def fetch_wikitext(cache: Path) -> Path:
    """The file in the cache, fetched once. Raises `UsageError` or `ModelError` in one line."""
    target = cache / "texts" / NAME
    if not target.exists():
        archive = fetch_data(REPOSITORY, ARCHIVE, HINT, cache, local_only=not hub_answers())
        raw = _member(archive)
        if hashlib.sha256(raw).hexdigest() != SHA256:
            raise UsageError(f"{REPOSITORY}/{ARCHIVE} holds another {NAME}", hint=HINT)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(raw)
        partial.replace(target)
    return target


def _member(archive: Path) -> bytes:
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.read(MEMBER)
    except (zipfile.BadZipFile, KeyError):
        raise UsageError(f"no text: {REPOSITORY}/{ARCHIVE} has no {MEMBER}", hint=HINT) from None
