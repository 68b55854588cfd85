"""Makes the checkout importable where nothing of ours is installed. Imported first by every script here."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("server", "kernels", "models", "quantizers", "benchmarks", "tests")

sys.path[1:1] = [str(ROOT / folder) for folder in FOLDERS if str(ROOT / folder) not in sys.path]
