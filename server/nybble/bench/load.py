"""Keeps a number of requests in flight until all are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import httpx2

from nybble.bench.client import RequestRefused, Sample, Target, ask
from nybble.bench.words import prompt
from nybble.errors import UsageError

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Round:
    """All requests of one concurrency. `failures` are messages; `wall` is the seconds of all of it."""

    concurrency: int
    samples: tuple[Sample, ...]
    failures: tuple[str, ...]
    wall: float


async def settle(client: httpx2.AsyncClient, target: Target, prompt_tokens: int) -> Target:
    """Warm the server up with one short answer; asks to ignore the end of text where the server allows it."""
    for extras in ({"ignore_eos": True}, {}):
        tried = replace(target, extras=extras)
        try:
            await ask(client, replace(tried, max_tokens=WARM_UP_TOKENS), prompt(prompt_tokens, seed=-1))
            return tried
        except RequestRefused as error:
            refusal = error
            if error.status not in (400, 422):
                break
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise UsageError(f"{target.endpoint}: {reason}", hint="see the server's log") from None
    mendable = refusal.status in (400, 404, 422)
    hint = "try --chat, or a shorter --prompt-tokens" if mendable else "see the server's log"
    raise UsageError(f"{target.endpoint}: HTTP {refusal.status}: {refusal}", hint=hint)


async def run(
    client: httpx2.AsyncClient,
    target: Target,
    *,
    concurrency: int,
    prompts: Iterator[str],
    done: Callable[[], None],
) -> Round:
    """Ask every prompt, `concurrency` at a time. `done` is called after each answer."""
    samples: list[Sample] = []
    failures: list[str] = []

    async def worker() -> None:
        for each in prompts:
            try:
                samples.append(await ask(client, target, each))
            except (RequestRefused, httpx2.TransportError) as error:
                failures.append(str(error) or type(error).__name__)
            done()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return Round(concurrency, tuple(samples), tuple(failures), time.perf_counter() - began)
