"""WikiText-2's raw test split from the hub, for those who have no file of it."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

from nybble.errors import UsageError
from nybble_models.hub import hub_answers

NAME = "wiki.test.raw"
REPOSITORY, ARCHIVE = "ggml-org/ci", "wikitext-2-raw-v1.zip"  # the zip its authors published
MEMBER = f"wikitext-2-raw/{NAME}"
SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
HINT = f"--text FILE: {NAME}, or any UTF-8 .txt or .jsonl"


def fetch_wikitext(cache: Path) -> Path:
    """The file in the cache, fetched once. Raises `UsageError` in one line."""
    target = cache / "texts" / NAME
    if not target.exists():
        raw = _member(_archive(cache))
        if hashlib.sha256(raw).hexdigest() != SHA256:
            raise UsageError(f"{REPOSITORY}/{ARCHIVE} holds another {NAME}", hint=HINT)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(raw)
        partial.replace(target)
    return target


def _archive(cache: Path) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    reachable = hub_answers()
    try:
        found = hf_hub_download(
            REPOSITORY,
            ARCHIVE,
            repo_type="dataset",
            cache_dir=cache / "hub",
            local_files_only=not reachable,
        )
    except LocalEntryNotFoundError:
        raise UsageError("no text: the hub, which has WikiText-2, cannot be reached", hint=HINT) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"no text: cannot fetch WikiText-2: {reason}", hint=HINT) from None
    return Path(found)


def _member(archive: Path) -> bytes:
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.read(MEMBER)
    except (zipfile.BadZipFile, KeyError):
        raise UsageError(f"no text: {REPOSITORY}/{ARCHIVE} has no {MEMBER}", hint=HINT) from None
