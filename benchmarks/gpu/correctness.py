"""Part 1: the tests of the kernels, of a whole decode step and of the quantizers, compiled and on the device.

    python benchmarks/gpu/correctness.py          exit status 1: wrong, 3: something is missing, 4: cut off

The test files are those of `make test`; only TRITON_INTERPRET and so the device differ.
A dry run collects them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import paths
from part import Part, begin, missing, parser

TESTS = ("tests/kernels/triton", "tests/models/test_triton*.py", "tests/engine/test_gpu.py")
QUANTIZERS = "tests/quantizers/test_device.py::test_a_gpu_makes_what_the_cpu_makes"
QUANTIZERS_NEED = ("safetensors", "tokenizers", "yaml")
WORKERS = 12  # compiling is the processor's work
TAIL = 30  # lines of the log that are shown


def command(part: Part) -> list[str]:
    here = paths.ROOT / "benchmarks" / "gpu" / "pytest.ini"
    found = [sys.executable, "-m", "pytest", "-c", str(here), f"--rootdir={paths.ROOT}"]
    found.append(f"--confcutdir={paths.ROOT}")
    if part.dry:
        found.append("--collect-only")
    else:
        if not missing("xdist"):
            found += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
        if not missing("pytest_timeout"):
            found += ["--timeout", "90"]
    found += [str(path) for pattern in TESTS for path in sorted(paths.ROOT.glob(pattern))]
    return found if missing(*QUANTIZERS_NEED) else [*found, str(paths.ROOT / QUANTIZERS)]


def environment(part: Part) -> dict[str, str]:
    folders = [str(paths.ROOT / folder) for folder in paths.FOLDERS]
    found = os.environ.get("PYTHONPATH")
    return os.environ | {
        "TRITON_INTERPRET": "1" if part.dry else "0",
        "PYTHONPATH": os.pathsep.join([*folders, found] if found else folders),
    }


def counts(text: str) -> dict[str, int]:
    """{"passed": 12, "failed": 1} of pytest's last line, whatever it names."""
    return {kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)", text)}


def run(part: Part) -> int:
    """0: every test passed, 1: not, 4: cut off. The whole output lies beside the rows."""
    log = part.arguments.out / "gpu-correctness.log"
    with log.open("w", encoding="utf8") as sink:
        process = subprocess.Popen(
            command(part), cwd=paths.ROOT, env=environment(part), stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(timeout=max(1.0, part.left()))
        except subprocess.TimeoutExpired:
            process.terminate()
            code = 4
    lines = log.read_text(encoding="utf8").splitlines()
    for line in lines[-1:] if code == 0 else lines[-TAIL:]:
        part.say(line)
    part.rows.write(passed=code == 0, cut_off=code == 4, **counts(lines[-1] if lines else ""))
    return code if code in (0, 4) else 1


def main() -> int:
    part = begin("correctness", parser(__doc__).parse_args())
    if absent := missing("pytest", "triton"):
        part.lacks("correctness", f"{', '.join(absent)} not installed")
        return 3
    if not (paths.ROOT / TESTS[0]).is_dir():
        part.lacks("correctness", f"no {TESTS[0]}")
        return 3
    if absent := missing(*QUANTIZERS_NEED):
        part.say(f"the quantizers are left out: {', '.join(absent)} not installed")
    return run(part)


if __name__ == "__main__":
    sys.exit(main())
