"""Which server a client verb talks to."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from nybble.errors import UsageError

ADDRESS_HELP = "address of the server; default: NYBBLE_HOST and NYBBLE_PORT, else http://127.0.0.1:8000"


def base_url(given: str | None) -> str:
    """The address without a trailing slash or `/v1`."""
    url = given or _local()
    if "://" not in url:
        url = f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{given}: not an address of a server", hint="for example http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _local() -> str:
    host = os.environ.get("NYBBLE_HOST", "127.0.0.1")
    port = os.environ.get("NYBBLE_PORT", "8000")
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{reachable}:{port if port.isdigit() else 8000}"
