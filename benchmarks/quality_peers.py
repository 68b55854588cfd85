"""Our quantizers beside GPTQModel's and llm-compressor's: one model, the same windows, one judge, in one run.

    python benchmarks/quality_peers.py --model DIR --stories exl2_tiny.utf8 --env-a DIR --env-b DIR
    python benchmarks/quality_peers.py --model DIR --text wiki.test.raw --calibration TEXT --env-a ...

Each quantizer runs in a process of its own, one after the other. `seconds` is loading, quantizing and
writing, `process` includes starting Python and its imports, `peak` is the process's largest resident memory.
Every checkpoint is then read by our loader and judged by the reference decoder: exp of the mean loss of a
window's tokens after its first. `--stories` splits a file of tales at "<|endoftext|>": every second of 34 to
193 is judged, the first 58 between them calibrate, each cut to `--length` tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from nybble.bench.machine import facts
from nybble.evaluation.text import read_text, windows
from nybble_kernels.quantized import dense
from nybble_models.decoder import Decoder
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.window import Window
from nybble_quantizers.tokenizing import load_tokenizer

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality_peers.jsonl"
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}

BY_FORM = {
    "w4": {
        "nybble": ("rtn", "gptq", "awq", "awq+gptq", "gptq+best", "awq+gptq+best"),
        "gptqmodel": ("gptq", "awq"),
        "llmcompressor": ("rtn", "gptq", "awq", "awq+gptq"),
    },
    "w3": {
        "nybble": ("rtn", "gptq", "awq+gptq", "awq+gptq+best"),
        "gptqmodel": ("gptq",),
        "llmcompressor": ("rtn", "gptq"),
    },
    "w8a8": {"nybble": ("rtn", "smoothquant"), "llmcompressor": ("rtn", "smoothquant")},
    "fp8": {"nybble": ("rtn", "gptq", "awq+gptq"), "llmcompressor": ("rtn",)},
}
"""Methods by what is stored; 3 and 4 bits are run with and without zero points."""


def plans(forms: list[str], group: int, chosen: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """(tool, recipe), the recipes that compete side by side; of all methods, or of those `chosen`."""
    for form in forms:
        words = [form] if form not in ("w3", "w4") else [f"{form}g{group}", f"{form}g{group}-sym"]
        for word in words:
            for tool, methods in BY_FORM[form].items():
                yield from ((tool, f"{m}-{word}") for m in methods if chosen is None or m in chosen)


def stories(path: Path, tokenizer: Tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """(calibration, evaluation) windows."""
    tales = [tale.strip() for tale in path.read_text(encoding="utf8").split("<|endoftext|>")]

    def cut(chosen: slice) -> Tensor:
        return torch.tensor([tokenizer.encode(tale).ids[:length] for tale in tales[chosen]])

    return cut(slice(35, 151, 2)), cut(slice(34, 194, 2))


def documents(path: Path, tokenizer: Tokenizer, length: int, samples: int) -> Tensor:
    """The first windows of a text that survive being turned into text and back."""
    ids = tokenizer.encode(path.read_text(encoding="utf8")).ids
    found = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    kept = [window for window in found if tokenizer.encode(tokenizer.decode(window)).ids == window]
    if len(kept) < samples:
        raise SystemExit(f"error: {path} has {len(kept)} windows of {length} tokens, {samples} are asked for")
    return torch.tensor(kept[:samples])


@torch.inference_mode()
def perplexity(folder: Path, evaluation: Tensor) -> float:
    loader = Loader(open_source(folder))
    weights = loader.load()
    for linear in (linear for block in weights.blocks for linear in block.linears.values()):
        linear.weight = dense(linear.weight)
    decoder = Decoder(loader.spec, weights)
    losses = []
    for tokens in evaluation:
        x = decoder.embed(tokens)
        for layer in range(loader.spec.num_layers):
            x = decoder.block(layer, x, Window(loader.spec))
        losses.append(float(torch.nn.functional.cross_entropy(decoder.logits(x)[:-1], tokens[1:])))
    return math.exp(math.fsum(losses) / len(losses))


def quantized(options: argparse.Namespace, tool: str, recipe: str, work: Path) -> dict[str, Any]:
    """One quantizer in a process of its own: what it reports, and what the process took."""
    home = {"nybble": None, "gptqmodel": options.env_a, "llmcompressor": options.env_b}[tool]
    python = Path(sys.executable) if home is None else home / "bin" / "python"
    out = work / tool
    out.mkdir(exist_ok=True)
    script = HERE / "referees" / f"write_{tool}.py"
    command = [
        str(python),
        str(script),
        str(options.model),
        str(work / "texts.safetensors"),
        str(out),
        recipe,
    ]
    hidden = ("PYTHONSAFEPATH",) if home is None else ("PYTHONSAFEPATH", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    started = time.perf_counter()
    with (out / f"{recipe}.log").open("w", encoding="utf8") as log:
        process = subprocess.Popen(command, env=kept | ENVIRONMENT, stdout=log, stderr=log)
        process.wait()
    row = {"process_seconds": round(time.perf_counter() - started, 1)}
    report = out / f"{recipe}.json"
    if process.returncode != 0 or not report.exists():
        tail = (out / f"{recipe}.log").read_text(encoding="utf8").strip().splitlines()[-1:]
        return row | {"error": f"exit status {process.returncode}: {' '.join(tail)}"}
    return json.loads(report.read_text(encoding="utf8")) | row


def texts(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    tokenizer = load_tokenizer(options.model)
    if options.stories:
        return stories(options.stories, tokenizer, options.length)
    calibration = documents(options.calibration, tokenizer, options.length, options.samples)
    ids = tokenizer.encode(read_text(options.text).text).ids
    return calibration, torch.tensor(windows(ids, options.eval_length, options.windows))


def rows(options: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    calibration, evaluation = texts(options)
    save_file({"calibration": calibration}, work / "texts.safetensors")
    plain = perplexity(options.model, evaluation)
    common = {
        "benchmark": "quality_peers",
        "model": options.model.name,
        "calibration": f"{len(calibration)} x {calibration.shape[1]}",
        "evaluation": f"{len(evaluation)} x {evaluation.shape[1]}",
        "unquantized": round(plain, 4),
    }
    for tool, recipe in plans(options.forms, options.group, options.methods):
        if {"gptqmodel": options.env_a, "llmcompressor": options.env_b}.get(tool, Path()) is None:
            continue
        row = common | {"tool": tool} | quantized(options, tool, recipe, work)
        if "error" not in row:
            found = perplexity(work / tool / recipe, evaluation)
            row |= {"perplexity": round(found, 4), "rise": round(found - plain, 4)}
        yield row | {"recipe": recipe}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder of float weights")
    parser.add_argument("--stories", type=Path, help='tales with "<|endoftext|>" between them')
    parser.add_argument("--text", type=Path, help="wiki.test.raw, in place of --stories")
    parser.add_argument("--calibration", type=Path, help="with --text: a UTF-8 text")
    parser.add_argument("--samples", type=int, default=16, help="with --text: windows of calibration")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window of calibration")
    parser.add_argument("--windows", type=int, default=12, help="with --text: how many; 0: all")
    parser.add_argument("--eval-length", type=int, default=2048, help="with --text: tokens in such a window")
    parser.add_argument("--forms", nargs="+", choices=tuple(BY_FORM), default=list(BY_FORM))
    parser.add_argument("--methods", nargs="+", help="of each tool's methods these only, as rtn gptq awq")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--env-a", type=Path, help="see referees/README.md")
    parser.add_argument("--env-b", type=Path)
    parser.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS.name}")
    return parser.parse_args()


def main() -> None:
    options = parse()
    machine = facts()
    print(
        f"{'tool':13} {'recipe':20} {'perplexity':>10} {'rise':>8} {'seconds':>8} {'process':>8} {'MiB':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(options, Path(folder)):
            figures = f"{row.get('perplexity', math.nan):10.4f} {row.get('rise', math.nan):8.4f}"
            cost = f"{row.get('seconds', math.nan):8.1f} {row['process_seconds']:8.1f}"
            cost += f" {row.get('peak_bytes', 0) >> 20:6}"
            print(f"{row['tool']:13} {row['recipe']:20} {figures} {cost} {row.get('error', '')}", flush=True)
            if options.save:
                stamped = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | row | machine
                with RESULTS.open("a", encoding="utf8") as file:
                    file.write(json.dumps(stamped) + "\n")


if __name__ == "__main__":
    main()
