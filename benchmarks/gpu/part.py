"""What the parts of the gate share: their arguments, their clock, and how they say what is missing."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import paths
from rows import Rows, facts, read

NOTE = "gpu-trying.txt"
RESULTS = paths.ROOT / "benchmarks" / "results"


@dataclass
class Part:
    """One part at work: `device` is "cuda", or "cpu" in a dry run; `left()` seconds remain for measuring."""

    arguments: argparse.Namespace
    device: str
    rows: Rows
    started: float

    @property
    def dry(self) -> bool:
        return bool(self.arguments.dry)

    def left(self) -> float:
        return self.started + float(self.arguments.seconds) - time.perf_counter()

    def lacks(self, what: str, reason: str) -> None:
        """One line for the reader and one row, so that no gap is silent. Compiling helpers say nothing."""
        if getattr(self.arguments, "warm", None):
            return
        print(f"  {what}: {reason}", flush=True)
        self.rows.write(lacks=what, reason=reason)

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def tell(self, text: str) -> None:
        """A figure: a dry run has none."""
        if not self.dry:
            self.say(text)

    @cached_property
    def bandwidth(self) -> float | None:
        """Read bandwidth in GB/s, if this run has measured it."""
        rows = [row for row in read(self.rows.path) if row["run"] == self.rows.facts["run"]]
        return next((row["gb_per_s"]["median"] for row in rows if row.get("subject") == "read"), None)

    def share(self, gb_per_s: float) -> float | None:
        """Of that bandwidth."""
        return round(gb_per_s / self.bandwidth, 4) if self.bandwidth else None

    def alive(self) -> bool:
        """Whether the device still answers: after an illegal access no call of this process will."""
        try:
            if self.device == "cuda":
                import torch

                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def mark(self, name: str | None) -> None:
        """Leaves a note of what is tried just now: if that ends the process, the gate goes on without it."""
        note = self.arguments.out / NOTE
        if name is None:
            note.unlink(missing_ok=True)
        else:
            note.write_text(name, encoding="utf8")


def parser(text: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    found.add_argument("--seconds", type=float, default=600.0, help="begin nothing new after so many")
    found.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU, in the interpreter")
    return found


def begin(name: str, arguments: argparse.Namespace) -> Part:
    """Raises `SystemExit` where there is no GPU and the run is no dry one."""
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    started = time.perf_counter()
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        raise SystemExit(f"error: no CUDA device ({name}); --dry runs without one")
    torch.manual_seed(0)
    if arguments.dry:
        torch.set_num_threads(1)
    device = "cpu" if arguments.dry else "cuda"
    return Part(arguments, device, Rows(arguments.out, name, facts(device)), started)


def missing(*modules: str) -> list[str]:
    """Those that cannot be imported here; looks for them without importing."""
    return [name for name in modules if name not in sys.modules and importlib.util.find_spec(name) is None]
