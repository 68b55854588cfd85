"""Everything that is measured on a GPU, in one command and at most nine minutes. `make gpu` runs it.

    python benchmarks/gpu/gate.py                  all parts; rows to benchmarks/results/gpu.jsonl
    python benchmarks/gpu/gate.py --parts linears  some of them
    python benchmarks/gpu/gate.py --site FOLDER    third-party packages from a folder (see carry.py)
    python benchmarks/gpu/gate.py --dry            tiny sizes on a CPU: proves that every part runs
    python benchmarks/gpu/gate.py --tune           sweep the tiles and write kernels/nybble_kernels/tuned/

It needs Python 3.11 or later, torch and triton, and nothing of ours installed. Each part is a process of
its own with a hard limit. Rows are on disk as soon as they are measured, so what a part did before it ended
stays. Time that a part leaves over goes to those after it. A part says in a line what it lacks, and the gate
goes on.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import paths
from carry import unpacked
from part import NOTE, RESULTS
from rows import new_run

HERE = Path(__file__).parent
MINUTES = 8.75
GRACE = 10.0  # seconds between "begin nothing new" and the end of a process
TRIES = 3  # starts of a part that something ends
COLOURS = {0: "green", 1: "red"}


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float  # of the nine minutes
    resumes: bool = False  # whether another start goes on where the last one ended


STEPS = (
    Step("correctness", 140),
    Step("ceilings", 25),
    Step("linears", 170, resumes=True),
    Step("steps", 140, resumes=True),
    Step("over_http", 45),
)
TUNE = Step("tune", 400)


def budget(step: Step, later: list[Step], left: float) -> float:
    """What a part may take: its own time and whatever the parts before it left over."""
    return max(step.seconds, left - sum(each.seconds + GRACE for each in later) - GRACE)


def run(step: Step, seconds: float, arguments: argparse.Namespace) -> int:
    """The part's exit status; 124 if it had to be ended."""
    without: list[str] = []
    (arguments.out / NOTE).unlink(missing_ok=True)
    started = time.perf_counter()
    for _ in range(TRIES):
        left = seconds - (time.perf_counter() - started)
        code = start(step, left, without, arguments)
        culprit = arguments.out / NOTE
        if code in (0, 3, 124) or not step.resumes or not culprit.exists():
            break
        without.append(culprit.read_text(encoding="utf8"))
        culprit.unlink()
        print(f"  ended with {code} while trying {without[-1]!r}: once more without it", flush=True)
    return code


def start(step: Step, seconds: float, without: list[str], arguments: argparse.Namespace) -> int:
    command = [sys.executable, str(HERE / f"{step.name}.py")]
    command += ["--out", str(arguments.out), "--seconds", f"{seconds:.0f}"]
    command += ["--dry"] if arguments.dry else []
    command += ["--without", *without] if without else []
    with subprocess.Popen(command, cwd=paths.ROOT, start_new_session=True) as process:
        try:
            return process.wait(timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):  # what the part started ends with it
                os.killpg(process.pid, signal.SIGKILL)


def outcome(code: int) -> str:
    known = {0: "done", 1: "FAILED", 3: "something is missing", 4: "cut off", 124: "cut off"}
    return known.get(code, f"ended with {code}")


def environment(arguments: argparse.Namespace) -> None:
    """What the parts inherit: the run's name, third-party packages, and a commit where git is missing."""
    os.environ["GPU_GATE_RUN"] = new_run()
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["TRITON_INTERPRET"] = "1" if arguments.dry else "0"
    if arguments.site:
        folder = tempfile.mkdtemp(prefix="nybble-site-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        site = unpacked(arguments.site.resolve(), Path(folder))
        folders = [str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(each for each in folders if each)


def steps(arguments: argparse.Namespace) -> list[Step]:
    if arguments.tune:
        return [TUNE]
    return [each for each in STEPS if each.name in arguments.parts]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [each.name for each in STEPS]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--out", type=Path, help="folder of the rows (of a dry run: a temporary one)")
    parser.add_argument("--site", type=Path, help="folder of third-party packages, or of their wheels")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, nothing is measured")
    parser.add_argument("--tune", action="store_true", help="sweep tiles instead of measuring")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    asked.out = (asked.out or (Path(tempfile.mkdtemp()) if asked.dry else RESULTS)).resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    environment(asked)
    deadline = time.perf_counter() + 60 * asked.minutes
    chosen, codes = steps(asked), {}
    for index, step in enumerate(chosen):
        left = deadline - time.perf_counter()
        if left < GRACE:
            print(f"{step.name}: no time left", flush=True)
            continue
        seconds = min(left - GRACE, budget(step, chosen[index + 1 :], left))
        print(f"{step.name} (at most {seconds:.0f} s)", flush=True)
        began = time.perf_counter()
        codes[step.name] = run(step, seconds, asked)
        print(f"{step.name}: {outcome(codes[step.name])}, {time.perf_counter() - began:.0f} s", flush=True)
        if step.name == "correctness":
            os.environ["NYBBLE_GPU_GATE"] = COLOURS.get(codes[step.name], "not run")
    report(asked)
    return 1 if any(code not in (0, 3) for code in codes.values()) else 0


def report(asked: argparse.Namespace) -> None:
    """Tables of the rows on the terminal; nothing of it is written to the docs here."""
    command = [sys.executable, str(HERE / "report.py"), "--rows", str(asked.out), "--print"]
    subprocess.run(command + (["--dry"] if asked.dry else []), cwd=paths.ROOT, check=False)


if __name__ == "__main__":
    sys.exit(main())
