"""`nybble bench`: a table for people, JSON for files."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nybble.bench import client as http
from nybble.bench.load import run, settle
from nybble.bench.machine import facts
from nybble.bench.summary import Summary, summarize
from nybble.bench.words import prompt
from nybble.commands.address import ADDRESS_HELP, base_url
from nybble.errors import UsageError
from nybble.progress import Display, display

HEADS = ("streams", "done", "failed", "first", "p99", "next", "p99", "tok/s each", "tok/s all")
CAPTION = "first, next: median ms to the first token and from token to token, each with its 99th percentile"


def bench(
    url: Annotated[str | None, Parameter(help=ADDRESS_HELP)] = None,
    /,
    *,
    model: Annotated[str | None, Parameter(help="model to ask for; default: the first one listed")] = None,
    concurrency: Annotated[tuple[int, ...], Parameter(help="streams at once", negative=())] = (1, 4, 16),
    requests: Annotated[int, Parameter(help="requests a round; 0 takes 4 for each stream")] = 0,
    prompt_tokens: Annotated[int, Parameter(help="length of each prompt, about")] = 128,
    max_tokens: Annotated[int, Parameter(help="length of each answer")] = 128,
    chat: Annotated[bool, Parameter(help="use chat completions instead of completions", negative=())] = False,
    seed: Annotated[int, Parameter(help="seed of the prompts")] = 0,
    api_key: Annotated[str | None, Parameter(help="key to send; default: OPENAI_API_KEY")] = None,
    json_: Annotated[
        Path | None,
        Parameter(name="--json", help="file for the result; - prints it", allow_leading_hyphen=True),
    ] = None,
) -> None:
    """Measure any OpenAI-compatible server: first token, token to token, tokens per second."""
    if min((*concurrency, prompt_tokens, max_tokens)) < 1 or requests < 0:
        raise UsageError("bench: numbers of streams and tokens start at 1", hint="see `nybble bench --help`")
    target = http.Target(base_url(url), model or "", chat, max_tokens)
    key = api_key or os.environ.get("OPENAI_API_KEY")
    plan = {streams: requests or 4 * streams for streams in concurrency}
    with display() as shown:
        target, summaries = asyncio.run(_measure(target, key, plan, prompt_tokens, seed, shown))
        shown.close()
    result = record(target, summaries)
    if json_ is None or str(json_) != "-":
        print_table(target, summaries)
    if json_ is not None:
        write(json_, result)


async def _measure(
    target: http.Target, key: str | None, plan: dict[int, int], prompt_tokens: int, seed: int, shown: Display
) -> tuple[http.Target, list[Summary]]:
    async with http.connect(key, max(plan)) as client:
        cards = await http.models(client, target.url)
        named = http.Target(target.url, target.model or str(cards[0]["id"]), target.chat, target.max_tokens)
        shown.update("warm-up", 0.0)
        target = await settle(client, named, prompt_tokens)
        summaries = []
        for streams, count in plan.items():
            first = seed * 1_000_000 + streams * 10_000
            prompts = (prompt(prompt_tokens, first + number) for number in range(count))
            counter = Counter(shown, f"concurrency {streams}", count)
            done = await run(client, target, concurrency=streams, prompts=prompts, done=counter.tick)
            if not done.samples:
                reason = f"every request failed: {done.failures[0]}"
                raise UsageError(f"{target.endpoint}: {reason}", hint="see the server's log")
            summaries.append(summarize(done))
    return target, summaries


class Counter:
    """Turns answers into a fraction of the round."""

    def __init__(self, shown: Display, phase: str, total: int) -> None:
        self._shown, self._phase, self._total, self._count = shown, phase, total, 0

    def tick(self) -> None:
        self._count += 1
        self._shown.update(self._phase, self._count / self._total)


def record(target: http.Target, summaries: list[Summary]) -> dict[str, Any]:
    """The whole result: what was asked, where, and what came out."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "url": target.url,
        "model": target.model,
        "endpoint": "chat" if target.chat else "completions",
        "max_tokens": target.max_tokens,
        "ignore_eos": "ignore_eos" in target.extras,
        "machine": facts(),
        "rounds": [asdict(summary) for summary in summaries],
    }


def write(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=2)
    if str(path) == "-":
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def print_table(target: http.Target, summaries: list[Summary]) -> None:
    from rich.console import Console
    from rich.table import Table

    lengths = f"{summaries[0].prompt_tokens:.0f} tokens in, {target.max_tokens} out"
    title = f"{target.model} at {target.url}, {lengths}"
    table = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left")
    for head in HEADS:
        table.add_column(head, justify="right")
    for each in summaries:
        first, after = each.first_token_ms, each.inter_token_ms
        times = (f"{value:.1f}" for value in (first["p50"], first["p99"], after["p50"], after["p99"]))
        rates = (f"{each.stream_rate:.1f}", f"{each.total_rate:.1f}")
        table.add_row(str(each.concurrency), str(each.requests), str(each.failed), *times, *rates)
    Console(highlight=False).print(table)
