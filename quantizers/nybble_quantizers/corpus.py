"""Documents of text: from a file here, or from a data set on the hub."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

from nybble_models.errors import ModelError

HUB = "hf:"
LINES = (".jsonl", ".json")  # an object a line


def locate(name: str) -> Path:
    """A local file, or "hf:owner/data-set/path/in/it.jsonl", which is downloaded. Raises `ModelError`."""
    if not name.startswith(HUB):
        return Path(name).expanduser()
    owner, _, rest = name.removeprefix(HUB).partition("/")
    data_set, _, file = rest.partition("/")
    if not (owner and data_set and file):
        raise ModelError(
            f"{name!r} does not name a file of a data set",
            hint="as hf:allenai/c4/en/c4-validation.00000-of-00008.json.gz",
        )
    return _download(f"{owner}/{data_set}", file)


def _download(data_set: str, file: str) -> Path:
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(data_set, file, repo_type="dataset"))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{data_set} is not in the cache and the hub cannot be reached",
            hint="give a local .txt or .jsonl file, or none: then the model writes the text itself",
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot fetch {file} of {data_set}: {reason}", hint="check the name, the network and HF_TOKEN"
        ) from None


def read_documents(path: Path) -> list[str]:
    """.jsonl (or .json with an object a line): the "text" of every line; anything else is one document.

    Either may be compressed (.gz).
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}", hint="give a UTF-8 .txt or .jsonl file") from None
    if Path(path.name.removesuffix(".gz")).suffix not in LINES:
        return [text]
    rows = enumerate(text.split("\n"), start=1)  # a string may hold other ends of lines, as U+2028
    return [_text_of(line, path, number) for number, line in rows if line.strip()]


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
        text = row["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ModelError(f'{path}:{number} has no "text"', hint='each line is an object: {"text": "..."}')
    return text
