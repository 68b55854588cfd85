"""Ours beside llama.cpp and others on one machine: interleaved rounds, medians with ranges, ratios.

    make peers                                        build the peers' environments, then compare
    python benchmarks/peers/run.py --peers llama.cpp  with what is installed already
    python benchmarks/peers/run.py --shapes llama-3.2-1b --ways library

Every subject is a process of its own, stopped while it is not its turn. In a round each is measured once,
alone, right after the memory's read bandwidth: greedy decoding of one sequence in process and over HTTP, the
time to the first token of a long prompt, eight streams together. A peer that cannot be installed or does not
answer is named with its reason, and the others go on. Numbers are compared, never required: exit status 1
means only that ours answered nonsense.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import files
import llama_cpp_peer
import openvino_peer
import ours_side
import transformers_peer
import vllm_peer
from aims import aims
from comparison import Row, row, table
from environments import build
from measuring import Amount
from random_gguf import SHAPES
from rounds import Rounds
from subjects import Files, Subject
from texts import EXPECTED, Texts
from wire import Failed

from nybble.bench.machine import facts
from nybble_kernels.numba.isa import choose
from nybble_models.hub import DEFAULT

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers.jsonl"
PEERS = {peer.NAME: peer for peer in (llama_cpp_peer, openvino_peer, transformers_peer, vllm_peer)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def names(text: str) -> list[str]:
    """A list with commas; "none" is an empty one."""
    return [] if text == "none" else text.split(",")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"of {','.join(PEERS)}, or none")
    parser.add_argument("--ways", type=names, default=["library", "server"], help="of library,server")
    parser.add_argument(
        "--model", type=Path, help="a GGUF file, or a folder for ours alone; else the default"
    )
    parser.add_argument(
        "--default", default=DEFAULT, help="what ours makes its own of; a quantized folder; none"
    )
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="random weights of these shapes, in process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins that would end later")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the long prompts")
    parser.add_argument("--build", action="store_true", help="install the peers that are not installed yet")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-peers", help="where the peers are")
    parser.add_argument("--cache-dir", default="", help="where our models are kept (default ~/.cache/nybble)")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    parser.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS.name}")
    asked = parser.parse_args()
    if unknown := set(asked.peers) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    return asked


def installed(asked: argparse.Namespace) -> dict[str, Path]:
    """The environments of the peers that can be measured, by name; the others are named."""
    found = {}
    for name in asked.peers:
        environment = PEERS[name].environment(asked.environments.resolve() / name)
        try:
            if asked.build:
                build(environment, say)
            if not environment.installed:
                raise Failed("not installed; --build installs it")
        except Failed as failure:
            say(f"{name}: left out: {failure}")
            continue
        found[name] = environment.home
    return found


def chosen(asked: argparse.Namespace, homes: dict[str, Path]) -> tuple[list[Subject], Texts]:
    store = files.Store(asked.environments.resolve() / "files", say)
    source = asked.model or files.default_gguf(asked.cache_dir)
    texts = Texts(files.tokenizer_of(source, store), asked.prompt_tokens)
    made: Files
    if asked.shapes:
        made = files.of_shape(asked.shapes, homes, store, source)
    else:
        default = None if asked.model or asked.default == "none" else asked.default
        made = files.of_model(source, homes, store, default)
    found = list(ours_side.subjects(made, asked.cache_dir))
    for name, home in homes.items():
        found += PEERS[name].subjects(home, made)
    ways = ["library"] if asked.shapes else asked.ways
    return [subject for subject in found if subject.way in ways], texts


def compare(asked: argparse.Namespace) -> list[Row]:
    subjects, texts = chosen(asked, installed(asked))
    rounds = Rounds(Amount(asked.tokens, texts), asked.environments.resolve() / "logs", say)
    until = time.monotonic() + 60 * asked.minutes
    try:
        rounds.begin(subjects)
        rounds.measure(asked.rounds, until)
        found = rounds.finish()
    finally:
        rounds.end()
    common = {
        "benchmark": "peers",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": asked.shapes or (asked.model.name if asked.model else DEFAULT),
        "tokens": asked.tokens,
        "prompt_tokens": asked.prompt_tokens,
        "read_gb_s": [round(each / 1e9, 1) for each in rounds.bandwidth],
        "load": rounds.load,
        "isa": choose().name,
        **facts(),
    }
    return [common | row(subject, each, found, rounds.bandwidth) for subject, each in found.items()]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended from outside"))  # and end the subjects
    asked = arguments()
    rows = compare(asked)
    print("\n".join(table(rows)))
    for aim in aims(rows, random=bool(asked.shapes)):
        print(aim)
    for path in [path for path in (asked.out, RESULTS if asked.save else None) if path]:
        with path.open("a", encoding="utf8") as sink:
            sink.writelines(json.dumps(each) + "\n" for each in rows)
    judge(rows, asked)


def judge(rows: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    """Whoever does not know the capital of France is named; of ours that is an error."""
    if asked.shapes or asked.model:
        return
    odd = [each for each in rows if EXPECTED not in each["text"]]
    for each in odd:
        print(f"{each['subject']}, {each['way']}: its text is not sane: {each['text']!r}")
    if any(each["peer"] == "nybble" for each in odd):
        raise SystemExit("error: ours answers nonsense")


if __name__ == "__main__":
    main()
