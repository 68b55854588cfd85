"""Perplexity of a model unquantized, rounded to nearest, by AWQ and GPTQ, in the protocol of the papers.

    python benchmarks/quality.py --text wiki.test.raw                 the default model, groups of 64 and 32
    python benchmarks/quality.py --text wiki.test.raw --engine serve  through the serving engine itself
    python benchmarks/quality.py --text wiki.test.raw --save          append to results/quality.jsonl

The text is the raw WikiText-2 test split, tokenized in one call and cut into windows that do not overlap; the
score is exp of the mean over windows of the mean loss of a window's tokens after its first. `--windows 12`
takes twelve windows evenly spaced over the text (0: all).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from nybble.bench.machine import facts
from nybble.config import ServeConfig
from nybble.prepare import prepare
from nybble_kernels.quantized import dense
from nybble_models.decoder import Decoder
from nybble_models.hub import fetch, open_source
from nybble_models.loader import Loader
from nybble_quantizers.block import Window
from nybble_quantizers.tokenizing import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"

Score = Callable[[Tensor], float]
"""The mean loss of a window's tokens after its first, in nats."""


def wikitext(path: Path) -> str:
    """The rows of the raw split as the papers join them: blank lines are empty rows."""
    lines = path.read_text(encoding="utf8").split("\n")[:-1]
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def windows(ids: list[int], length: int, count: int) -> Tensor:
    """int64 [count, length]: windows without overlap, evenly spaced; all of them where count is 0."""
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if not 0 < count < len(whole):
        return whole
    return whole[:: len(whole) // count][:count]


@contextmanager
def reference(config: ServeConfig) -> Iterator[Score]:
    """The plain float32 decoder over the dequantized weights."""
    fetched = config.quantization == "none"
    source = fetch(config.model, config.cache_path) if fetched else prepare(config, lambda phase, part: None)
    loader = Loader(open_source(source))
    weights = loader.load()
    for linear in (linear for block in weights.blocks for linear in block.linears.values()):
        linear.weight = dense(linear.weight)  # once, not in every window
    decoder = Decoder(loader.spec, weights)

    def score(tokens: Tensor) -> float:
        with torch.inference_mode():
            x = decoder.embed(tokens)
            for layer in range(loader.spec.num_layers):
                x = decoder.block(layer, x, Window(loader.spec))
            return float(torch.nn.functional.cross_entropy(decoder.logits(x)[:-1], tokens[1:]))

    yield score


@contextmanager
def serving(config: ServeConfig) -> Iterator[Score]:
    """The engine that serves: the prompt's own log probabilities."""
    from nybble.engine.build import build_engine
    from nybble.engine.request import Delta, Request, SamplingParams, TokenLogprob

    engine = build_engine(config, lambda phase, part: None)

    def score(tokens: Tensor) -> float:
        scored: list[TokenLogprob | None] = []
        failed: list[str] = []
        done = Event()

        def sink(delta: Delta) -> None:
            scored.extend(delta.prompt_logprobs or ())
            if delta.error:
                failed.append(delta.error)
            if delta.finish:
                done.set()

        params = SamplingParams(max_tokens=0, prompt_logprobs=True)
        engine.submit(Request("window", tuple(tokens.tolist()), params), sink)
        done.wait()
        losses = [-entry.logprob for entry in scored if entry is not None]
        if failed or len(losses) != len(tokens) - 1:
            raise SystemExit(f"error: the engine scored {len(losses)} of {len(tokens) - 1} tokens {failed}")
        return math.fsum(losses) / len(losses)

    try:
        yield score
    finally:
        engine.stop()


ENGINES = {"reference": reference, "serve": serving}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One measurement after another, the unquantized model first."""
    text = wikitext(options.text)
    source = fetch(options.model, ServeConfig(cache_dir=options.cache_dir).cache_path)
    ids = load_tokenizer(source).encode(text).ids
    chosen = windows(ids, options.length, options.windows)
    common = {
        "benchmark": "quality",
        "model": options.model,
        "engine": options.engine,
        "windows": len(chosen),
        "length": options.length,
        "tokens": len(ids),
        "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(),
        "calibration": Path(options.calibration).name if options.calibration else "written by the model",
    }
    plans = [("none", 0)] + [(m, g) for g in options.group_size for m in options.method]
    plain: float | None = None
    for method, group in plans:
        started = time.perf_counter()
        with ENGINES[options.engine](_config(options, method, group)) as score:
            prepared = time.perf_counter() - started
            perplexity = math.exp(math.fsum(score(w) for w in chosen) / len(chosen))
        plain = perplexity if plain is None else plain
        yield common | {
            "method": method,
            "group_size": group or None,
            "perplexity": round(perplexity, 4),
            "rise": round(perplexity - plain, 4),
            "prepare_seconds": round(prepared, 1),
        }


def _config(options: argparse.Namespace, method: str, group: int) -> ServeConfig:
    return ServeConfig(
        model=options.model,
        quantization=method,
        group_size=group or 64,
        calibration=options.calibration,
        cache_dir=options.cache_dir,
        kernels=options.kernels,
        max_model_len=options.length,
        head_bits=16 if method == "none" else options.head_bits,
        max_num_seqs=1,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="wiki.test.raw")
    parser.add_argument("--model", default="default", help="as for nybble serve")
    parser.add_argument(
        "--method", nargs="+", choices=("rtn", "awq", "gptq", "awq+gptq"), default=["rtn", "awq"]
    )
    parser.add_argument("--group-size", nargs="+", type=int, default=[64, 32])
    parser.add_argument("--calibration", help=".txt or .jsonl; else text of the model itself")
    parser.add_argument("--windows", type=int, default=12, help="evenly spaced; 0: all")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="reference")
    parser.add_argument("--kernels", default="auto", help="with --engine serve: as for nybble serve")
    parser.add_argument("--head-bits", type=int, default=8, help="with --engine serve: of the quantized rows")
    parser.add_argument("--cache-dir", default="", help="where models are kept")
    parser.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS.name}")
    return parser.parse_args()


def main() -> None:
    options = parse()
    rises: dict[tuple[str, int | None], float] = {}
    print(f"{'method':8} {'group':>5} {'perplexity':>10} {'rise':>8} {'of rtn':>7}")
    for row in rows(options):
        rises[row["method"], row["group_size"]] = row["rise"]
        nearest = rises.get(("rtn", row["group_size"]))
        share = f"{row['rise'] / nearest:7.2f}" if nearest and row["method"] != "rtn" else ""
        group = row["group_size"] or "-"
        print(
            f"{row['method']:8} {group!s:>5} {row['perplexity']:10.3f} {row['rise']:8.3f} {share}", flush=True
        )
        if options.save:
            stamped = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | row | facts()
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf8") as file:
                file.write(json.dumps(stamped) + "\n")


if __name__ == "__main__":
    main()
