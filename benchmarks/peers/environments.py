"""Each peer in an environment of its own: what to run to make it, and a line about what did not work."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wire import Failed

STAMP = ".installed"


@dataclass(frozen=True)
class Step:
    """One command. Without an optional step the environment is of use, only not whole."""

    command: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Environment:
    """A virtual environment at `home`, and the steps that fill it within `patience` seconds."""

    name: str
    home: Path
    steps: tuple[Step, ...]
    patience: float = 1800.0

    @property
    def plan(self) -> tuple[Step, ...]:
        return (Step((sys.executable, "-m", "venv", str(self.home))), *self.steps)

    @property
    def installed(self) -> bool:
        stamp = self.home / STAMP
        return stamp.exists() and stamp.read_text(encoding="utf8") == self.recipe

    @property
    def recipe(self) -> str:
        """Changes when a step does."""
        return "\n".join(" ".join(step.command).replace(str(self.home), "") for step in self.steps)


def pip(home: Path, *arguments: str) -> Step:
    command = (str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
    return Step((*command, *arguments))


def install(home: Path, *requirements: str) -> Step:
    return pip(home, "install", "--no-compile", *requirements)


def build(environment: Environment, say: Callable[[str], None]) -> None:
    """Make it, unless it is there. Raises `Failed` in one line, and leaves nothing that looks whole."""
    if environment.installed:
        return
    say(f"{environment.name}: installing into {environment.home} (first run only)")
    shutil.rmtree(environment.home, ignore_errors=True)
    environment.home.parent.mkdir(parents=True, exist_ok=True)
    log = environment.home.with_name(f"{environment.home.name}.log")
    until = time.monotonic() + environment.patience
    log.write_bytes(b"")
    for step in environment.plan:
        try:
            run(step.command, log, until)
        except Failed as failure:
            if not step.optional:
                raise
            say(f"{environment.name}: without {step.command[-1]}: {failure}")
    (environment.home / STAMP).write_text(environment.recipe, encoding="utf8")


def run(command: Sequence[str], log: Path, until: float) -> None:
    """Raises `Failed` with the last telling line of what the command said."""
    with log.open("ab") as sink:
        try:
            left = max(until - time.monotonic(), 1)
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, timeout=left, check=False
            )
        except FileNotFoundError:
            raise Failed(f"there is no {command[0]}") from None
        except subprocess.TimeoutExpired:
            raise Failed(f"not done in time; see {log}") from None
    if done.returncode:
        raise Failed(telling(log.read_text(encoding="utf8", errors="replace")) or f"see {log}")


def telling(said: str) -> str:
    """The last line that speaks of an error, or else the last."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:200]
