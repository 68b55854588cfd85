"""For every test: OpenMP threads sleep instead of spinning, so that a busy machine stalls no test."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before anything imports torch
