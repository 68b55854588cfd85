"""Others read what we write, and we read what they write: every format, answers compared.

    python benchmarks/referees/run.py --env-a DIR --env-b DIR [--save]

Environment A holds GPTQModel, transformers and compressed-tensors, B llm-compressor: `make referees` builds
both and runs this. Tiny random models are written by us in every format, by the codecs alone (`ours`) and by
the whole pipeline (`pipelines`), and read by A, compressed-tensors by B too; then one is quantized by A and B
and read by us. The greatest difference between two answers, as a share of their standard deviation, must
stay within the precision of the reader's kernel; the exit status is 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ours
import pipelines
from material import CONFIGS, make_model, make_texts
from safetensors.torch import load_file
from torch import Tensor
from write_nybble import by_scheme

from nybble.bench.machine import facts

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "referees.jsonl"
BY_GPTQMODEL = "gptq-w4g32-sym gptq-w4g32 gptq-w2g32-sym gptq-w3g32-sym gptq-w8g32-sym gptq-w4channel-sym"
BY_GPTQMODEL += " gptq-w4g32-sym-order rtn-w4g32-sym awq-w4g32"
BY_LLMCOMPRESSOR = "rtn-w4g32-sym rtn-w4g32 rtn-w8channel-sym gptq-w4g32-sym gptq-w3g32-sym awq-w4g32"
BY_LLMCOMPRESSOR += " smoothquant-w8a8 rtn-fp8"

EXACT = 1e-4  # the same float32 arithmetic
HALVES = 0.02  # float16 sums, or weights that were unpacked to float16
COARSE = (
    0.1  # sums of bfloat16, or 8-bit inputs: one that is rounded the other way is felt in all that follows
)
COARSE_KERNELS = ("TorchAtenLinear", "TorchAtenAwqLinear", "TorchFusedLinear")

Case = ours.Case | pipelines.Case
CASES: Mapping[str, Case] = {**ours.CASES, **pipelines.CASES}
COMPRESSED = [name for name in CASES if "ct" in name.split("-")]


def call(environment: Path, script: str, *arguments: object) -> None:
    """Run a script of this folder with another environment's Python; what it says goes to standard error."""
    quiet = {
        "PYTHONPATH": str(HERE),
        "TORCHDYNAMO_DISABLE": "1",  # kernels as they are: compiling them takes minutes
        "GPTQMODEL_CPU_WORKERS": "2",  # GPTQModel does not start with fewer
        "HF_HUB_OFFLINE": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(environment / "bin" / "python"), str(HERE / script), *map(str, arguments)]
    result = subprocess.run(command, env=inherited | quiet, stdout=sys.stderr, check=False)
    if result.returncode != 0:
        raise SystemExit(f"error: {script} failed in {environment}; what it said is above")


def compared(theirs: Tensor, mine: Tensor) -> dict[str, float]:
    return {
        "difference": round(float((theirs - mine).abs().max() / mine.std()), 6),
        "top1_agreement": round(float((theirs.argmax(-1) == mine.argmax(-1)).double().mean()), 4),
    }


def we_write(work: Path) -> None:
    """Every case into a folder of its name."""
    for family in CONFIGS:
        make_model(work / family, family)
    calibration = load_file(work / "texts.safetensors")["calibration"]
    for name, case in ours.CASES.items():
        ours.write(work / "llama", work / "ours" / name, case)
    for name, made in pipelines.CASES.items():
        by_scheme(work / made.model, calibration, work / "ours" / name, made.scheme)


def they_read(work: Path, environment: Path, script: str, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    prompts, report = work / "texts.safetensors", work / f"{script}.jsonl"
    call(environment, f"{script}.py", prompts, report, *(work / "ours" / name for name in names))
    for line in report.read_text(encoding="utf8").splitlines():
        row = json.loads(line)
        folder = work / "ours" / row.pop("folder")
        limit = limit_of(CASES[folder.name], row.get("kernel", ""), script)
        found = {} if "error" in row else judged(folder, row["loader"], prompts, limit)
        yield {"direction": "they read", "what": folder.name} | row | found


def limit_of(case: Case, kernel: str, script: str) -> float:
    """How far an answer may be from ours."""
    if kernel in COARSE_KERNELS or case.rounds:
        return COARSE
    halved = script == "read_transformers" and not all(form.symmetric for form in case.forms)
    return EXACT if kernel == "Linear" and not halved else HALVES


def we_read(work: Path, environment: Path, writer: str, words: str) -> Iterator[dict[str, Any]]:
    recipes, prompts, out = words.split(), work / "texts.safetensors", work / writer
    out.mkdir()
    call(environment, f"write_{writer}.py", work / "llama", prompts, out, *recipes)
    for recipe in recipes:
        row = json.loads((out / f"{recipe}.json").read_text(encoding="utf8"))
        limit = HALVES if writer == "gptqmodel" else COARSE if recipe.endswith(("a8", "fp8")) else EXACT
        found = {} if "error" in row else judged(out / recipe, "answers", prompts, limit)
        yield {"direction": "we read", "what": recipe, "loader": writer} | row | found


def judged(folder: Path, answered: str, prompts: Path, limit: float) -> dict[str, Any]:
    if not (folder / f"{answered}.safetensors").exists():
        return {}
    mine = ours.answers(folder, load_file(prompts)["prompts"])
    found = compared(load_file(folder / f"{answered}.safetensors")["logits"], mine)
    return found | {"limit": limit, "agrees": found["difference"] <= limit}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env-a", type=Path, help="with GPTQModel, transformers and compressed-tensors")
    parser.add_argument("--env-b", type=Path, help="with llm-compressor")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    parser.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS.name}")
    return parser.parse_args()


def rows(options: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    make_texts(work / "texts.safetensors")
    we_write(work)
    if options.env_a:
        yield from they_read(work, options.env_a, "read_transformers", CASES)
        yield from we_read(work, options.env_a, "gptqmodel", BY_GPTQMODEL)
    if options.env_b:
        yield from they_read(work, options.env_b, "read_llmcompressor", COMPRESSED)
        yield from we_read(work, options.env_b, "llmcompressor", BY_LLMCOMPRESSOR)


def main() -> None:
    options = parse()
    machine, wrong = facts(), 0
    files = [path for path in (options.out, RESULTS if options.save else None) if path]
    print(f"{'direction':9}  {'checkpoint':23} {'other side':19} {'difference':>10} {'top-1':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(options, Path(folder)):
            wrong += not row.get("agrees", False)
            verdict = "" if row.get("agrees") else f"  {row.get('error', 'DISAGREES')}"
            other = f"{row['loader']} {row.get('version', '')}"
            figures = (
                f"{row.get('difference', float('nan')):10.5f} {row.get('top1_agreement', float('nan')):6.3f}"
            )
            print(f"{row['direction']:9}  {row['what']:23} {other:19} {figures}{verdict}", flush=True)
            stamped = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "benchmark": "referees"}
            for path in files:
                with path.open("a", encoding="utf8") as file:
                    file.write(json.dumps(stamped | row | machine) + "\n")
    if wrong:
        raise SystemExit(f"error: {wrong} answers differ by more than they may, or are missing")


if __name__ == "__main__":
    main()
