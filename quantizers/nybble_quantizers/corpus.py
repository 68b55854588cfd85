"""Where a calibration text lies: in a file here, or in a data set on the hub."""

from __future__ import annotations

from pathlib import Path

from nybble_models.errors import ModelError
from nybble_models.hub import fetch_data

HUB = "hf:"


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
    otherwise = "give a local .txt or .jsonl file, or none: then the model writes the text itself"
    return fetch_data(f"{owner}/{data_set}", file, otherwise)
