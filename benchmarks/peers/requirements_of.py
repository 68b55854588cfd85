"""Writes what an installed package requires into a file for pip, some packages left out.

    python requirements_of.py PACKAGE FILE [LEFT_OUT ...]

Runs in the package's own environment, where nothing else is installed yet.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

package, file, *left_out = sys.argv[1:]
found = importlib.metadata.requires(package) or []
own = [line for line in found if "extra ==" not in line]
kept = [line for line in own if re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] not in left_out]
Path(file).write_text("\n".join(kept) + "\n", encoding="utf8")
