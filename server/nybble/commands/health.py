"""`nybble health`: the check that a container image runs; needs nothing but the standard library."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Annotated

from cyclopts import Parameter

from nybble.commands.address import ADDRESS_HELP, base_url


def health(
    url: Annotated[str | None, Parameter(help=ADDRESS_HELP)] = None,
    /,
    *,
    timeout: Annotated[float, Parameter(help="seconds to wait")] = 5.0,
) -> int:
    """Exit 0 if a server is ready, 1 if not."""
    try:
        with urllib.request.urlopen(f"{base_url(url)}/readyz", timeout=timeout) as response:
            print(response.read().decode(errors="replace").strip())
            return 0
    except urllib.error.HTTPError as error:
        print(error.read().decode(errors="replace").strip() or f"HTTP {error.code}")
    except OSError as error:
        print(f"not reachable: {getattr(error, 'reason', error)}")
    return 1
